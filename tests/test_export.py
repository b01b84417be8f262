"""`dfqsam export`: what it writes, what a client without torch makes of it, and what it says of bad input."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from monailabel_dfqsam.artifact import Artifact, read_artifact, write_artifact
from monailabel_dfqsam.cli import app
from monailabel_dfqsam.config import EngineKind, Policy, QuantizationConfig, Recipe, silent
from monailabel_dfqsam.export.folder import FILES, description, write_openvino
from monailabel_dfqsam.ops import openvino_library
from monailabel_dfqsam.ops.openvino_library import openvino, why_unavailable
from monailabel_dfqsam.pipeline import pack, phantom_images
from monailabel_dfqsam.pretraining.targets import make_example
from monailabel_dfqsam.quantization.calibrate import calibrate
from monailabel_dfqsam.sam import VARIANTS, build, read_checkpoint
from monailabel_dfqsam.sam.preprocess import to_input
from monailabel_dfqsam.segmentation.segmenter import Prompts, load_segmenter
from tests.models import header
from tests.test_engines import make_artifact

needs_openvino = pytest.mark.skipif(why_unavailable() is not None, reason=f"{why_unavailable()}")

CLIENT = Path(__file__).parents[1] / "docs" / "examples" / "openvino_client.py"
SAME_MASK = 0.98  # of one mask; roundings that fall the other way move its edge
SAME_PIXELS = 1e-3
# A client of which nothing may import these.
ISOLATED = """
import runpy, sys
class Blocked:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("torch", "monailabel", "monailabel_dfqsam", "monai"):
            raise ImportError(f"{name} is not on this device")
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def artifact_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in 4 bit, calibrated on a phantom."""
    checkpoint = read_checkpoint("tiny")
    sam = build(checkpoint)
    images = phantom_images(sam.variant, [0])
    quantized = calibrate(sam.image_encoder, images, 4, Policy.DEPLOY, Recipe(), silent)
    path = tmp_path_factory.mktemp("artifact") / "a.safetensors"
    write_artifact(pack(checkpoint, QuantizationConfig(), sam, quantized, images), path)
    return path


@pytest.fixture(scope="module")
def exported(artifact_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "deep" / "model"
    done = run_export(artifact_file, folder)
    assert done.exit_code == 0, done.output
    return folder


def run_export(artifact: Path, folder: Path) -> Any:
    return CliRunner().invoke(app, ["export", str(artifact), "--format", "openvino", "--out", str(folder)])


def phantom(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A picture [200, 256, 3] uint8 and the mask of its largest object, [200, 256] bool."""
    example = make_example(torch.Generator().manual_seed(seed), 256)
    masks = example.masks[:, :200].numpy() > 0
    image = (example.image.permute(1, 2, 0).numpy() * 255).round().clip(0, 255).astype(np.uint8)[:200]
    return np.ascontiguousarray(image), masks[masks.sum((1, 2)).argmax()]


def client(folder: Path, image: NDArray[Any], prompt: list[str], work: Path) -> NDArray[np.bool_]:
    """The mask that the example client writes, where it can import neither torch nor this package."""
    np.save(work / "image.npy", image)
    paths = [str(folder), str(work / "image.npy"), str(work / "mask.npy")]
    done = subprocess.run(
        [sys.executable, "-c", ISOLATED, str(CLIENT), *paths, *prompt],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    mask: NDArray[np.bool_] = np.load(work / "mask.npy")
    assert f"{mask.sum()} pixels" in done.stdout
    return mask


@needs_openvino
def test_it_writes_both_models_and_what_a_client_needs(exported: Path, artifact_file: Path) -> None:
    assert {path.name for path in exported.iterdir()} == set(FILES)
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]
    told, variant = json.loads((exported / "model.json").read_text()), VARIANTS["tiny"]
    assert told == description(read_artifact(artifact_file))
    assert (told["variant"], told["input_size"], told["mask_side"]) == ("tiny", 256, variant.mask_side)
    assert told["artifact"] == read_artifact(artifact_file).header["key"]
    assert told["versions"]["openvino"] == openvino().__version__
    encoder = openvino().Core().read_model(exported / "encoder.xml")
    assert str(encoder.input("images").get_partial_shape()) == "[?,3,256,256]"
    constants = [op for op in encoder.get_ops() if op.get_type_name() == "Constant"]
    weights = [op for op in constants if op.get_element_type() == openvino().Type.i8]
    assert len(weights) == len(read_artifact(artifact_file).header["layers"])
    decoder = openvino().Core().read_model(exported / "decoder.xml")
    assert [port.get_any_name() for port in decoder.outputs] == ["masks", "iou", "best"]


@needs_openvino
@pytest.mark.parametrize("kind", ["point", "box"])
def test_a_client_without_torch_draws_our_masks(
    kind: str, exported: Path, artifact_file: Path, tmp_path: Path
) -> None:
    image, truth = phantom(3)  # one click tells its object: roundings move little
    rows, columns = (axis.nonzero()[0] for axis in (truth.any(1), truth.any(0)))
    if kind == "point":
        inside = np.argwhere(truth)[truth.sum() // 2]
        numbers = [inside[1] + 0.5, inside[0] + 0.5]
        prompts = Prompts(points=np.array([numbers]), labels=np.ones(1, dtype=np.int64))
    else:
        numbers = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        prompts = Prompts(box=np.array(numbers, dtype=np.float64))
    # A picture in grey may have two axes.
    given, image = (image, image) if kind == "box" else (image[:, :, 0], image[:, :, :1].repeat(3, 2))
    segmenter = load_segmenter(read_artifact(artifact_file), EngineKind.REFERENCE)
    expected = segmenter.predict(segmenter.embed(image), prompts).mask
    actual = client(exported, given, [f"--{kind}", *map(str, numbers)], tmp_path)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert expected.sum() > 200
    assert (actual & expected).sum() / (actual | expected).sum() >= SAME_MASK


@pytest.mark.parametrize("shape", [(90, 131), (512, 400)])
@pytest.mark.parametrize(
    "name", ["tiny", "sam_b_256", "sam_b_1024", "medsam", "lite_medsam", "efficient_sam_ti"]
)
def test_the_clients_pixels_are_ours(name: str, shape: tuple[int, int]) -> None:
    pytest.importorskip("openvino", reason="the client imports openvino")
    source = CLIENT.read_text().removesuffix("\nmain()\n")
    names: dict[str, Any] = {}
    exec(compile(source, CLIENT.name, "exec"), names)
    variant = VARIANTS[name]
    artifact = Artifact(header(variant=name), {})
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    expected, frame = to_input(variant, image)
    actual, inner = names["prepare"](image, variant.input_size, description(artifact)["pixels"])
    assert inner == [frame.resized_height, frame.resized_width]
    assert float(np.abs(actual - expected.numpy()).max()) <= SAME_PIXELS


@needs_openvino
def test_the_decoder_chooses_as_the_segmenter_does(exported: Path, artifact_file: Path) -> None:
    segmenter = load_segmenter(read_artifact(artifact_file), EngineKind.REFERENCE)
    decoder = (
        openvino().Core().compile_model(exported / "decoder.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    )
    image, _ = phantom(7)
    embedding = segmenter.embed(np.pad(image, ((0, 56), (0, 0), (0, 0))))
    chosen = set()
    for x, y in np.mgrid[30:230:50, 30:230:50].reshape(2, -1).T:
        box = np.array([x - 20.0, y - 25.0, x + 22.0, y + 24.0])
        for clicks, with_box in ((1, False), (2, False), (0, True), (2, True)):
            points, labels = np.array([[x, y], [x + 60.0, y + 9.0]])[:clicks], np.array([1, 0])[:clicks]
            prompts = Prompts(points=points, labels=labels, box=box if with_box else None)
            expected = segmenter.predict(embedding, prompts)
            places = np.concatenate([points, box.reshape(2, 2)[: 2 * with_box]])
            kinds = [[*labels, *(2, 3)[: 2 * with_box]]]
            answer = decoder(
                [embedding.tensor.numpy(), (places[None] - 0.5).astype(np.float32), np.float32(kinds)]
            )
            best = int(answer["best"][0])
            chosen.add((with_box, best))
            assert best == 0 or with_box
            assert answer["iou"][0, best] == pytest.approx(expected.score, abs=1e-4)
            assert np.allclose(answer["masks"][0, best], expected.low_res_logits[0, 0].numpy(), atol=1e-3)
    assert len(chosen) > 2


@needs_openvino
def test_an_earlier_export_is_replaced_and_nothing_else(
    exported: Path, artifact_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    done = run_export(artifact_file, folder)
    assert (done.exit_code, list(folder.iterdir())) == (1, [folder / "notes.txt"])
    assert "holds something else than an earlier export" in done.output
    (folder / "notes.txt").unlink()
    (folder / "model.json").write_text("{}")
    assert run_export(artifact_file, folder).exit_code == 0
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert (folder / "model.json").read_text() == (exported / "model.json").read_text()
    assert list(tmp_path.iterdir()) == [folder]


@needs_openvino
def test_policy_paper_and_damaged_artifacts_are_refused(artifact_file: Path, tmp_path: Path) -> None:
    paper = tmp_path / "paper.safetensors"
    write_artifact(make_artifact("tiny", policy=Policy.PAPER), paper)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(artifact_file.read_bytes()[:-100])
    for path, sentence in (
        (paper, "policy 'paper' quantizes attention, which only the reference engine runs"),
        (cut, "'cut.safetensors' is damaged or cut short"),
        (tmp_path / "none.safetensors", "there is no artifact 'none.safetensors'"),
    ):
        done = run_export(path, tmp_path / "deep" / "out")
        assert done.exit_code == 1
        assert sentence in done.output
    assert {path.name for path in tmp_path.iterdir()} == {paper.name, cut.name}


def test_without_openvino_it_says_what_to_install(
    artifact_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_library.importlib.util, "find_spec", lambda name: None)
    done = run_export(artifact_file, tmp_path / "out")
    assert done.exit_code == 1
    assert "pip install 'monailabel-dfqsam[openvino]'" in done.output
    assert list(tmp_path.iterdir()) == []


@needs_openvino
def test_a_full_disk_leaves_nothing_behind(artifact_file: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        with pytest.raises(OSError, match=r"'encoder\.xml' could not be written: is the disk full\?"):
            write_openvino(read_artifact(artifact_file), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(OSError, match="file"):
        write_openvino(read_artifact(artifact_file), blocked / "out")
