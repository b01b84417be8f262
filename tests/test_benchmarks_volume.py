"""The benchmark of a whole volume: it segments as the product does, and says how alike the masks are."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from benchmarks import volume
from benchmarks.__main__ import app
from benchmarks.volume import VOLUME_ENGINES, VolumePlan
from benchmarks.volume_runner import STAGES, VolumeRunner
from monailabel_dfqsam.artifact import read_artifact
from monailabel_dfqsam.benchmark.layout import BOXES, artifact_path
from monailabel_dfqsam.benchmark.phantom import organ, write_phantom
from monailabel_dfqsam.benchmark.runner import Request
from monailabel_dfqsam.benchmark.weights import Preparation
from monailabel_dfqsam.engines import onednn
from monailabel_dfqsam.masks import tight_box
from monailabel_dfqsam.sam import build, read_checkpoint
from monailabel_dfqsam.sam.checkpoint import NAMED
from monailabel_dfqsam.segmentation.segmenter import Prompts, full_precision_segmenter, load_segmenter
from monailabel_dfqsam.segmentation.volume import load_volume

SHAPE = (96, 80, 3)

needs_onednn = pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN quantized linear")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the embedded model and a phantom of 3 slices, the middle one left out."""
    folder = tmp_path_factory.mktemp("volume")
    Preparation(folder, "tiny", NAMED["tiny"], 1, 1).write_artifact(4)
    write_phantom(folder / "phantom.nrrd", SHAPE)
    np.save(folder / BOXES, np.array([(k, *tight_box(organ(SHAPE, k))) for k in (0, 2)]))
    return folder


@pytest.mark.parametrize(
    "engine",
    [
        "torch-eager",
        pytest.param("onednn", marks=needs_onednn),
        pytest.param("openvino-fp32", marks=pytest.mark.slow),
    ],
)
def test_masks_are_those_that_the_product_gives_for_the_same_boxes(prepared: Path, engine: str) -> None:
    if engine == "openvino-fp32":
        pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install '.[benchmark]'")
        Preparation(prepared, "tiny", NAMED["tiny"], 1, 1).write_openvino(False)
    runner = VolumeRunner(Request(engine, "tiny", 1, prepared), prepared / "phantom.nrrd")
    seconds = runner.turn()
    bits = np.unpackbits(np.frombuffer(runner.masks(), np.uint8))
    found = bits[: 2 * SHAPE[0] * SHAPE[1]].reshape(2, *SHAPE[:2]).astype(bool)
    if engine == "onednn":
        product = load_segmenter(read_artifact(artifact_path(prepared, 4)))
    else:
        product = full_precision_segmenter(build(read_checkpoint("tiny")))
    image = load_volume(prepared / "phantom.nrrd")
    for mask, k in zip(found, (0, 2), strict=True):
        prompts = Prompts(box=tight_box(organ(SHAPE, k)))
        expected = product.predict(product.embed_slices(image, [k], None)[0], prompts).mask
        assert expected.sum() > 100
        assert (mask != expected).sum() <= (3 if engine == "openvino-fp32" else 0)
    assert set(seconds) == {"volume", *STAGES}
    assert all(seconds[stage] > 0 for stage in STAGES)
    assert 0.5 * seconds["volume"] < sum(seconds[stage] for stage in STAGES) <= seconds["volume"]


def _nifti(path: Path, array: NDArray[np.generic]) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    return path


def test_boxes_come_from_the_mask_on_the_slices_that_have_one(tmp_path: Path) -> None:
    image = _nifti(tmp_path / "image.nii.gz", np.zeros((8, 9, 5), dtype=np.int16))
    array = np.zeros((8, 9, 5), dtype=np.uint8)
    array[2:5, 3:7, 1] = array[6, 8, 3] = array[0, 0, 4] = 1
    mask = _nifti(tmp_path / "mask.nii.gz", array)
    path, shape, boxes = volume._volume(VolumePlan("tiny", volume=image, mask=mask, slices=2), tmp_path)
    assert (path, shape) == (image, (8, 9, 5))
    assert boxes.tolist() == [[1, 3, 2, 7, 5], [3, 8, 6, 9, 7]]
    other = _nifti(tmp_path / "other.nii.gz", array[:, :, :4])
    with pytest.raises(ValueError, match=r"must have the shape \[8, 9, 5\]"):
        volume._volume(VolumePlan("tiny", volume=image, mask=other), tmp_path)


def test_masks_are_compared_together() -> None:
    a, b = np.zeros((2, 3, 5), dtype=bool), np.zeros((2, 3, 5), dtype=bool)
    a[0, :2], b[0, 1:] = True, True
    b[1, 0] = True
    first, second = (np.packbits(x).tobytes() for x in (a, b))
    assert volume._iou(first, second) == pytest.approx(5 / 20)
    assert volume._iou(first, None) is None
    empty = np.packbits(np.zeros_like(a)).tobytes()
    assert volume._iou(empty, empty) is None


@pytest.mark.slow
@needs_onednn
def test_rows_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume, "PHANTOM_SLICE", SHAPE[:2])
    saved = []
    plan = VolumePlan("tiny", engines=("torch-eager", "onednn"), slices=2, threads=1, repeats=2)
    result = volume.measure_volume(plan, saved.append)
    assert saved == [result]
    assert result["complete"] is True
    assert result["weights"] == NAMED["tiny"].name
    assert result["volume"] == {"name": "phantom", "shape": [*SHAPE[:2], 2], "slices": 2}
    eager, own = result["rows"]
    assert [row["repeats"] for row in (eager, own)] == [2, 2]
    assert eager["times_torch_eager"] == eager["mask_iou"] == 1
    assert own["times_torch_eager"] == pytest.approx(eager["median_s"] / own["median_s"])
    assert 0.8 < own["mask_iou"] < 1
    assert all(0 < own["stages"][stage] < own["median_s"] for stage in STAGES)
    assert 0 < own["imported_bytes"] < own["peak_bytes"]
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--variant", "huge"), "--variant must be one of tiny"),
        (("--engines", "reference"), f"--engines takes names of {', '.join(VOLUME_ENGINES)}"),
        (("--slices", "0"), "--slices, --threads and --repeats"),
        (("--volume", "a.nii.gz"), "--volume goes with --mask"),
    ],
)
def test_wrong_options_are_refused_with_a_sentence(arguments: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(app, ["volume", *arguments])
    assert result.exit_code == 1
    assert words in result.stderr
