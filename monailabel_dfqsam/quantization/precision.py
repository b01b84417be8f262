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
    steps: list[Step] = []
    for layer, costs in cost.items():
        forms = sorted(costs, key=lambda form: (-costs[form], harm[layer][form]))
        now = min(forms, key=lambda form: (harm[layer][form], costs[form]))
        while cheaper := [form for form in forms if costs[form] < costs[now]]:
            # The lower convex hull: of all that is cheaper, what costs least harm for its saving.
            def price(form: Form, now: Form = now) -> float:
                return (harm[layer][form] - harm[layer][now]) / (costs[now] - costs[form])

            now_next = min(cheaper, key=lambda form: (price(form), costs[form]))
            steps.append(Step(layer, now_next, price(now_next)))
            now = now_next
    return sorted(steps, key=lambda step: (step.price, step.layer))


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
