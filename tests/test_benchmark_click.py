"""The benchmark of clicks: its arithmetic, its phantom, and one short session against the real servers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from monailabel_dfqsam.benchmark.click import ClickError, measure_clicks, summary
from monailabel_dfqsam.benchmark.phantom import organ, organ_centre, write_phantom
from monailabel_dfqsam.segmentation.volume import load_volume

CASES = [
    "first on the volume", "first on a slice", "cached", "next slice, prepared", "next slice, not prepared",
    "cached, OHIF", "MONAI Label",
]  # fmt: skip
STAGES = {"load", "embed", "decode", "post", "write", "http"}


def test_a_summary_is_of_the_times_in_any_order() -> None:
    found = summary([0.4, 0.1, *[0.2] * 17, 9.0, 0.3])
    assert found == {"n": 21, "median_s": 0.2, "p95_s": pytest.approx(0.4), "min_s": 0.1}


def test_the_phantom_is_a_body_with_an_organ_on_a_tilted_grid(tmp_path: Path) -> None:
    shape = (48, 40, 6)
    write_phantom(tmp_path / "a.nrrd", shape)
    volume = load_volume(tmp_path / "a.nrrd")
    assert volume.shape == shape
    assert volume.array.dtype == np.int16
    assert volume.modality == "CT"
    assert len(set(volume.spacing)) > 1
    assert not np.allclose(volume.direction, np.eye(3).ravel())
    for k in range(shape[2]):
        i, j = organ_centre(shape, k)
        assert volume.array[i - 1 : i + 2, j - 1 : j + 2, k].mean() == pytest.approx(140, abs=20)
        assert np.array_equal(volume.array[:, :, k] > 85, organ(shape, k))
        assert volume.array[0, 0, k] < -900


@pytest.mark.parametrize(("clicks", "shape"), [(0, (64, 64, 90)), (5, (64, 64, 20)), (5, (8, 64, 90))])
def test_a_session_that_cannot_be_played_is_refused_before_it_begins(
    clicks: int, shape: tuple[int, int, int]
) -> None:
    with pytest.raises(ClickError, match="a session needs"):
        measure_clicks(clicks=clicks, shape=shape)


@pytest.mark.slow
def test_a_session_gives_every_row(tmp_path: Path) -> None:
    stages: list[str] = []
    result = measure_clicks(
        clicks=6,
        shape=(64, 48, 60),
        checkpoint=Path("tiny"),
        progress=lambda stage, done, total: stages.append(stage),
    )
    assert result["model"].endswith(("(native)", "(onednn)", "(openvino)"))  # each layer in the form it needs
    assert 0 < result["first_answer_s"] < 60
    assert 100e6 < result["memory_bytes"] < 4e9
    rows = {row["case"]: row for row in result["rows"]}
    assert list(rows) == CASES
    assert rows["cached"]["n"] == rows["MONAI Label"]["n"] == 6
    for name, row in rows.items():
        assert 0 < row["min_s"] <= row["median_s"] <= row["p95_s"]
        if name not in ("cached, OHIF", "MONAI Label"):
            assert set(row["split"]) == STAGES
            # No part of a click is longer than the click, so its median is not longer than the clicks'.
            assert 0 < max(row["split"].values()) <= row["median_s"]
            assert min(row["split"].values()) >= 0
    voxels = 64 * 48 * 60
    assert rows["cached, OHIF"]["reply_bytes"] > voxels
    assert rows["MONAI Label"]["reply_bytes"] > voxels
    assert rows["cached"]["reply_bytes"] < voxels / 10
    assert rows["cached"]["split"]["embed"] < rows["first on a slice"]["split"]["embed"]
    assert {"volume", "quantizing", "cached clicks", "next slices", "MONAI Label's own"} <= set(stages)
