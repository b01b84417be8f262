"""The choice of forms against every choice there is, and the search against counting."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monailabel_dfqsam.ops import Form
from monailabel_dfqsam.quantization.precision import chosen, farthest, ladder

A, B, C = Form(16, 16), Form(8, 8), Form(4, 8, True)
NUMBERS = st.floats(0.01, 10, allow_nan=False)
LAYERS = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=4)


@given(LAYERS)
def test_no_choice_has_less_harm_at_no_more_cost(layers: list[tuple[float, float, float, float]]) -> None:
    """At each corner of the convex hull, which are what the ladder goes through."""
    cost = {str(i): {A: 4.0, B: 4 - b * 0.1, C: 3 - c * 0.1} for i, (b, c, _, _) in enumerate(layers)}
    harm = {str(i): {A: 0.0, B: b, C: b + c} for i, (_, _, b, c) in enumerate(layers)}
    steps = ladder(harm, cost)
    start = dict.fromkeys(cost, A)
    every = [dict(zip(cost, forms, strict=True)) for forms in itertools.product((A, B, C), repeat=len(cost))]

    def total(of: dict[str, dict[Form, float]], forms: dict[str, Form]) -> float:
        return sum(of[name][form] for name, form in forms.items())

    for count in range(len(steps) + 1):
        forms = chosen(start, steps[:count])
        best = min(total(harm, other) for other in every if total(cost, other) <= total(cost, forms) + 1e-9)
        assert total(harm, forms) <= best + 1e-9
    prices = [step.price for step in steps]
    assert prices == sorted(prices)
    assert total(cost, chosen(start, steps)) == pytest.approx(min(total(cost, other) for other in every))


def test_a_form_that_saves_nothing_is_not_taken() -> None:
    steps = ladder({"x": {A: 0.0, B: 1.0, C: 2.0}}, {"x": {A: 2.0, B: 1.0, C: 1.0}})
    assert [(step.layer, step.form) for step in steps] == [("x", B)]


@given(count=st.integers(0, 60), last=st.integers(0, 70))
def test_the_last_that_passes_is_found(count: int, last: int) -> None:
    tried: list[int] = []

    def reach(steps: int) -> int | None:
        tried.append(steps)
        assert 1 <= steps <= count
        return steps if steps <= last else None

    assert farthest(count, reach, 10) == (min(count, last) or None)
    assert len(tried) == len(set(tried)) <= 6


def test_where_tries_run_out_the_farthest_that_passed_is_taken() -> None:
    assert farthest(100, lambda steps: steps if steps <= 70 else None, 2) == 50
