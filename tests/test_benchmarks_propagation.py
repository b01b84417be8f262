"""What is reported of propagation, on a phantom volume and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from benchmarks.propagation import PLACES, evaluate_volumes, extruded, prompted_slices
from monailabel_dfqsam.evaluation import EvaluationError, box_baseline, dice
from monailabel_dfqsam.phantom_study import find_pairs, write_phantom_study
from monailabel_dfqsam.sam import build, read_checkpoint
from monailabel_dfqsam.segmentation.segmenter import full_precision_segmenter
from monailabel_dfqsam.segmentation.volume import load_volume


def steps() -> np.ndarray:
    """[I, J, K] a rectangle that is wider on the two last of its slices 2 … 6."""
    truth = np.zeros((20, 16, 9), dtype=bool)
    truth[5:9, 4:10, 2:7] = True
    truth[9:12, 4:10, 5:7] = True
    return truth


def test_an_ideal_person_prompts_the_slices_of_the_object() -> None:
    assert prompted_slices(steps(), (0.5,)) == [4]
    assert prompted_slices(steps(), (0.25, 0.5, 0.75)) == [3, 4, 5]
    assert prompted_slices(steps()[:, :, 2:3], (0.25, 0.5, 0.75)) == [0]


def test_a_baseline_is_the_nearest_prompted_box() -> None:
    truth = steps()
    assert (extruded(truth, "boxes", range(2, 7), box_baseline) == truth).all()
    found = extruded(truth, "box", [4, 5], box_baseline)
    assert dice(found, truth) == pytest.approx(2 * 48 / (48 + 156))


def test_a_row_for_each_prompt(tmp_path: Path) -> None:
    write_phantom_study(tmp_path)
    pairs = [pair for pair in find_pairs(tmp_path) if "us" in pair[0].name]
    reference = full_precision_segmenter(build(read_checkpoint("tiny")))
    rows = evaluate_volumes(pairs, reference, [(reference, {"model": "tiny", "engine": "torch"})])
    assert [row["prompts"] for row in rows] == list(PLACES)
    truth = load_volume(pairs[0][1]).array != 0
    spans = np.flatnonzero(truth.any(axis=(0, 1)))
    for row in rows:
        assert (row["image"], row["object"]) == ("phantom_us.nii.gz", "cyst")
        assert row["slices_true"] == [spans[0], spans[-1]]
        assert row["agreement"] == 1
        assert row["seconds"] > 0
        assert len(row["stops"]) == 2 * len(PLACES[row["prompts"]][1])
    by_prompt = {row["prompts"]: row for row in rows}
    assert by_prompt["boxes"]["dice"] > by_prompt["boxes"]["box"]
    assert by_prompt["box"]["ellipse"] == by_prompt["point"]["ellipse"]


def test_a_mask_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    for name, array in (("a", np.ones((3, 4, 5))), ("a_x", np.ones((3, 4, 4)))):
        sitk.WriteImage(sitk.GetImageFromArray(array.astype(np.uint8)), str(tmp_path / f"{name}.nii.gz"))
    reference = full_precision_segmenter(build(read_checkpoint("tiny")))
    with pytest.raises(EvaluationError, match="a_x"):
        evaluate_volumes(find_pairs(tmp_path), reference, [])
