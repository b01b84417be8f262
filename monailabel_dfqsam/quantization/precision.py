"""Which layer multiplies in how many bits: the cheapest choice that is as near to full precision as asked.

Of each layer and form, what it alone costs and what harm it alone does to the embedding are measured. Steps
from form to form, each layer's in the order of its own, are sorted by harm for each saving; every beginning
of that row is the best choice there is for some price of harm, as far as harms add up. How far the row may be
gone is found by measuring quantized models, for which see `pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from monailabel_dfqsam.ops import Form

Result = TypeVar("Result")


class Step(NamedTuple):
    """One layer's change from its form to a cheaper one.

    Attributes:
        price: harm for each saving.
    """

    layer: str
    form: Form
    price: float


def ladder(harm: Mapping[str, Mapping[Form, float]], cost: Mapping[str, Mapping[Form, float]]) -> list[Step]:
    """All steps worth taking, the least harm for each saving first.

    Args:
        harm: of each layer's forms, what the dearest does too; of any unit in which harms add up.
        cost: of the same, > 0.
    """
    steps = [step for layer in cost for step in _hull(layer, harm[layer], cost[layer])]
    return sorted(steps, key=lambda step: (step.price, step.layer))


def _hull(layer: str, harm: Mapping[Form, float], cost: Mapping[Form, float]) -> list[Step]:
    """A layer's way down the lower convex hull of harm over cost, each step to the least harm a saving."""
    steps: list[Step] = []
    now = min(cost, key=lambda form: (harm[form], cost[form]))
    while cheaper := [form for form in cost if cost[form] < cost[now]]:
        prices = {form: (harm[form] - harm[now]) / (cost[now] - cost[form]) for form in cheaper}
        now = min(cheaper, key=lambda form: (prices[form], cost[form]))
        steps.append(Step(layer, now, prices[now]))
    return steps


def chosen(start: Mapping[str, Form], steps: list[Step]) -> dict[str, Form]:
    """Each layer's form after some steps."""
    return {**start, **{step.layer: step.form for step in steps}}


def farthest(count: int, reach: Callable[[int], Result | None], tries: int) -> Result | None:
    """What the most steps that pass give, by halving; passing is taken to end somewhere and not to come back.

    Args:
        count: of all steps.
        reach: from a number of steps, at least 1, to what they give, or None where that does not pass.
        tries: measurements at most.

    Returns:
        None when nothing that was tried passed.
    """
    best, low, high = None, 0, count
    for _ in range(tries):
        if low >= high:
            break
        middle = (low + high + 1) // 2
        found = reach(middle)
        if found is None:
            high = middle - 1
        else:
            best, low = found, middle
    return best
