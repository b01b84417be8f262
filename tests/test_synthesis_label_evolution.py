from __future__ import annotations

import math

import pytest
import torch

from monailabel_dfqsam.config import SynthesisConfig
from monailabel_dfqsam.synthesis.label_evolution import (
    Candidates,
    EvolutionRules,
    class_candidates,
    drop_unsure,
    evolve,
    label_confidence,
    own_candidates,
    random_ellipse,
    regions,
    superimpose,
    tidy,
)

GRID = 32
RULES = EvolutionRules(min_score=0.5, min_area=5, max_area=92)


def block(top: int, left: int, height: int, width: int) -> torch.Tensor:
    mask = torch.zeros(GRID, GRID, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def candidates(*masks: torch.Tensor, scores: list[float], peaks: list[float], kinds: list[int]) -> Candidates:
    return Candidates(torch.stack(masks), torch.tensor(scores), torch.tensor(peaks), torch.tensor(kinds))


def flood(labels: list[list[int]]) -> list[tuple[int, set[tuple[int, int]]]]:
    """Regions by flood fill: (value, cells)."""
    seen: set[tuple[int, int]] = set()
    found = []
    for y, row in enumerate(labels):
        for x, value in enumerate(row):
            if value == 0 or (y, x) in seen:
                continue
            cells, todo = set(), [(y, x)]
            while todo:
                at = todo.pop()
                if at in cells or not (0 <= at[0] < len(labels) and 0 <= at[1] < len(row)):
                    continue
                if labels[at[0]][at[1]] != value:
                    continue
                cells.add(at)
                todo += [(at[0] + dy, at[1] + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
            seen |= cells
            found.append((value, cells))
    return found


def test_rules_of_the_default_configuration_are_80_pixels_and_9_percent() -> None:
    rules = EvolutionRules.of(SynthesisConfig(), 64)
    assert rules == EvolutionRules(0.5, 5, 368)


@pytest.mark.parametrize("seed", range(20))
def test_start_is_one_region_within_the_rules(seed: int) -> None:
    rules = EvolutionRules.of(SynthesisConfig(), 64)
    labels = random_ellipse(torch.Generator().manual_seed(seed), 64, [1, 2, 5], rules)
    (region,) = regions(labels)
    assert region.kind in (1, 2, 5)
    assert rules.min_area < int(region.mask.sum()) <= rules.max_area * 1.05


def test_starts_differ_by_generator_and_take_every_class() -> None:
    starts = [random_ellipse(torch.Generator().manual_seed(s), 64, [1, 2, 5], RULES) for s in range(30)]
    assert {int(s.max()) - 1 for s in starts} == {1, 2, 5}
    assert len({s.numpy().tobytes() for s in starts}) == 30


def test_regions_are_those_of_a_flood_fill() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (12, 12), generator=g)
    ours = [(r.kind + 1, set(map(tuple, r.mask.nonzero().tolist()))) for r in regions(labels)]
    slow = flood(labels.tolist())
    assert sorted(ours, key=str) == sorted(slow, key=str)


def test_box_of_a_region_is_exclusive_at_the_far_side() -> None:
    (region,) = regions(block(2, 3, 4, 6).long())
    assert region.box == (3, 2, 9, 6)


def test_class_candidates_take_the_class_of_the_best_mean() -> None:
    scores = torch.zeros(3, GRID, GRID)
    scores[0] = 0.9  # background, not allowed
    left, right = block(0, 0, 8, 8), block(0, 16, 8, 8)
    scores[1][left] = 0.6
    scores[2][right] = 0.3
    scores[2, 0, 16] = 0.8
    found = class_candidates(torch.stack([left, right, torch.zeros_like(left)]), scores, [1, 2])
    assert found.kinds.tolist()[:2] == [1, 2]
    assert found.scores.tolist() == pytest.approx([0.6, (63 * 0.3 + 0.8) / 64, 0])
    assert found.peaks.tolist() == pytest.approx([0.6, 0.8, 0])


def test_own_candidates_score_iou_times_mean_foreground_probability() -> None:
    probability = torch.full((2, GRID, GRID), 0.1)
    probability[0, :2, :2] = torch.tensor([[0.9, 0.7], [0.9, 0.7]])
    found = own_candidates(probability, torch.tensor([0.5, 1.2]), 0)
    assert int(found.masks[0].sum()) == 4
    assert found.scores.tolist() == pytest.approx([0.4, 0])
    assert found.peaks.tolist() == pytest.approx([0.45, 0])


def test_best_candidate_is_superimposed() -> None:
    labels = block(0, 0, 6, 6).long()
    near, far = block(4, 4, 6, 6), block(20, 20, 6, 6)
    result = superimpose(
        labels, candidates(near, far, scores=[0.8, 0.6], peaks=[0.9, 0.9], kinds=[3, 3]), RULES
    )
    assert bool((result[near] == 4).all())
    assert bool((result[far] == 0).all())
    assert int((result == 1).sum()) == 36 - 4


@pytest.mark.parametrize(("peak", "cells", "taken"), [(0.51, 6, True), (0.5, 6, False), (0.9, 5, False)])
def test_candidates_need_a_peak_and_an_area(peak: float, cells: int, taken: bool) -> None:
    mask = block(20, 20, 1, cells)
    result = superimpose(
        block(0, 0, 6, 6).long(), candidates(mask, scores=[0.4], peaks=[peak], kinds=[1]), RULES
    )
    assert bool((result[mask] == 2).all()) is taken


def test_an_inadmissible_candidate_does_not_keep_out_the_next_best() -> None:
    speck, good = block(0, 10, 1, 2), block(20, 20, 6, 6)
    result = superimpose(
        torch.zeros(GRID, GRID, dtype=torch.int64),
        candidates(speck, good, scores=[0.9, 0.6], peaks=[1.0, 0.7], kinds=[0, 0]),
        RULES,
    )
    assert bool((result > 0).equal(good))


def test_tidy_keeps_two_largest_regions_of_each_class() -> None:
    sizes = [(0, 0, 3, 3), (0, 10, 4, 4), (0, 20, 5, 5)]
    first = sum(block(*size).long() for size in sizes)
    second = sum(2 * block(top + 12, left, h, w).long() for top, left, h, w in sizes)
    result = tidy(first + second, RULES)
    kept = [(r.kind, int(r.mask.sum())) for r in regions(result)]
    assert kept == [(0, 25), (0, 16), (1, 25), (1, 16)]


def test_tidy_removes_small_regions() -> None:
    labels = block(0, 0, 1, 5).long() + block(10, 10, 1, 6).long()
    assert bool((tidy(labels, RULES) > 0).equal(block(10, 10, 1, 6)))


def test_tidy_caps_a_region_to_connected_inner_cells() -> None:
    dumbbell = block(2, 2, 12, 12) | block(7, 14, 1, 6) | block(4, 20, 7, 7)
    assert int(dumbbell.sum()) > RULES.max_area
    (region,) = regions(tidy(dumbbell.long(), RULES))
    assert RULES.min_area < int(region.mask.sum()) <= RULES.max_area
    assert bool(region.mask[8, 8])
    assert not bool(region.mask[2, 2])
    assert not bool((region.mask & ~dumbbell).any())


def test_a_region_below_the_threshold_is_dropped_and_others_stay() -> None:
    sure, unsure, unknown = block(0, 0, 4, 4), block(10, 0, 4, 4), block(20, 0, 4, 4)
    labels = (sure | unsure | unknown).long()
    confidence = torch.full((GRID, GRID), math.nan)
    confidence[sure], confidence[unsure] = 0.6, 0.4
    assert bool((drop_unsure(labels, confidence, 0.5) > 0).equal(sure | unknown))
    assert bool((drop_unsure(labels, confidence, 0.4 - 1e-6) > 0).equal(sure | unsure | unknown))


def test_the_surest_region_stays_however_unsure() -> None:
    first, second = block(0, 0, 4, 4), block(10, 0, 4, 4)
    confidence = torch.zeros(GRID, GRID)
    confidence[second] = 0.1
    assert bool((drop_unsure((first | second).long(), confidence, 0.5) > 0).equal(second))


def test_confidence_is_the_score_of_the_labels_class() -> None:
    scores = torch.rand(3, GRID, GRID, generator=torch.Generator().manual_seed(0))
    labels = 3 * block(0, 0, 2, 2).long()
    confidence = label_confidence(labels, scores)
    torch.testing.assert_close(confidence[:2, :2], scores[2, :2, :2])
    assert int(confidence.isnan().sum()) == GRID * GRID - 4


def test_evolution_drops_later_what_it_tolerates_at_first() -> None:
    sure, unsure = block(0, 0, 4, 4), block(10, 0, 4, 4)
    labels = (sure | unsure).long()
    confidence = torch.where(unsure, 0.3, 0.9)
    none = candidates(sure, scores=[0.0], peaks=[0.0], kinds=[0])
    early, late = (evolve(labels, none, confidence, RULES, progress) for progress in (0.1, 1.0))
    assert bool((early > 0).equal(sure | unsure))
    assert bool((late > 0).equal(sure))


def test_evolution_never_ends_empty() -> None:
    speck = block(0, 0, 1, 3).long()
    none = candidates(speck > 0, scores=[0.0], peaks=[0.0], kinds=[0])
    assert bool(evolve(speck, none, torch.zeros(GRID, GRID), RULES, 1.0).equal(speck))
