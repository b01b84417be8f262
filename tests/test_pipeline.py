"""From checkpoint to artifact on the embedded model, with real synthesis kept short."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from monailabel_dfqsam.agreement import Agreement, Fidelity, shortfall
from monailabel_dfqsam.artifact import read_artifact, write_artifact
from monailabel_dfqsam.config import (
    Calibration,
    Policy,
    Preset,
    QuantizationConfig,
    Recipe,
    SynthesisConfig,
    silent,
)
from monailabel_dfqsam.faithful import quantize_faithfully
from monailabel_dfqsam.identity import artifact_key
from monailabel_dfqsam.pipeline import QuantizationResult, quantize
from monailabel_dfqsam.sam import VARIANTS, read_checkpoint
from monailabel_dfqsam.segmentation.segmenter import Prompts, load_segmenter
from tests.models import seeded_checkpoint, seeded_sam

SHORT = QuantizationConfig(synthesis=SynthesisConfig(iterations=4))


@pytest.fixture(scope="module")
def result() -> QuantizationResult:
    return quantize(read_checkpoint("tiny"), SHORT)


def test_header_says_what_was_done(result: QuantizationResult) -> None:
    header = result.artifact.header
    checkpoint = read_checkpoint("tiny")
    assert header["source_sha256"] == checkpoint.sha256
    assert header["key"] == artifact_key(SHORT, checkpoint.sha256, "tiny")
    assert header["variant"] == "tiny"
    assert 0 < header["fidelity"]["mean_iou"] <= 1
    assert header["fidelity"]["n"] > 0
    assert header["fidelity"]["mean_iou"] < header["fidelity"]["grey_level"]["mean_iou"] < 1
    assert header["sizes"]["encoder_artifact_bytes"] < header["sizes"]["encoder_checkpoint_bytes"] / 5
    assert len(header["images_sha256"]) == 1
    assert set(result.layer_errors) == set(header["layers"])
    assert all(0 < error < 1 for error in result.layer_errors.values())


def test_same_seed_gives_the_same_bytes_but_for_the_time(result: QuantizationResult, tmp_path: Path) -> None:
    again = quantize(read_checkpoint("tiny"), SHORT)
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path, artifact in zip(paths, (result.artifact, again.artifact), strict=True):
        write_artifact(replace(artifact, header={**artifact.header, "created": "", "seconds": 0}), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_another_seed_gives_another_artifact(result: QuantizationResult) -> None:
    other = quantize(read_checkpoint("tiny"), replace(SHORT, seed=1)).artifact
    assert other.header["key"] != result.artifact.header["key"]
    assert other.header["images_sha256"] != result.artifact.header["images_sha256"]


def test_artifact_alone_segments(result: QuantizationResult, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_artifact(result.artifact, path)
    segmenter = load_segmenter(read_artifact(path))
    rgb = np.zeros((120, 160, 3), dtype=np.uint8)
    rgb[40:80, 50:110] = 200
    box = np.array([50.0, 40.0, 110.0, 80.0])
    mask = segmenter.predict(segmenter.embed(rgb), Prompts(box=box)).mask
    truth = rgb[..., 0] > 0
    assert (mask & truth).sum() / (mask | truth).sum() > 0.7


def test_folder_calibration_reads_pictures_and_counts_them(tmp_path: Path) -> None:
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    config = replace(SHORT, calibration=Calibration.FOLDER, folder=str(tmp_path), images=2)
    assert quantize(read_checkpoint("tiny"), config).calibration_images.shape == (2, 3, 256, 256)
    with pytest.raises(ValueError, match=r"holds 2 pictures .* but 3 are asked for"):
        quantize(read_checkpoint("tiny"), replace(config, images=3))


def test_paper_policy_quantizes_attention() -> None:
    config = replace(SHORT, calibration=Calibration.GAUSSIAN, policy=Policy.PAPER)
    header = quantize(read_checkpoint("tiny"), config).artifact.header
    assert header["attention_bits"] == 4
    assert header["fidelity"]["engine"] == "reference"
    assert header["bops"] == header["macs"] * 16


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("unshare") or os.geteuid() != 0, reason="cutting the network off needs root and unshare"
)
def test_quantizes_with_the_network_cut(tmp_path: Path) -> None:
    command = ["unshare", "-n", sys.executable, "-m", "monailabel_dfqsam", "quantize", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--preset", "static", "--iterations", "2", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits must be 4, 6 or 8"),
        ({"activation_bits": 8}, "activation_bits must be 4 or 8"),
        ({"fidelity": "auto"}, "bits are not chosen where a fidelity is"),
        ({"fidelity": "auto", "bits": None}, "preset 'fast' or 'best'"),
        (
            {
                "fidelity": "auto",
                "bits": None,
                "recipe": Recipe(run_time=True),
                "calibration": Calibration.NONE,
            },
            "needs images to calibrate on",
        ),
        ({"images": 0}, "images must be 1 to 256"),
        ({"seed": -1}, "seed must not be negative"),
        ({"folder": "x"}, "goes with a folder"),
    ],
)
def test_configuration_is_checked_once(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SHORT, **change)  # type: ignore[arg-type]


def test_a_configuration_knows_its_preset() -> None:
    for preset in Preset:
        assert preset.config.preset is preset
        assert preset.config.changed(seed=5, bits=8).preset is preset
        assert replace(preset.config, images=9).preset is None
    assert QuantizationConfig().preset is Preset.PAPER


def test_views_are_counted() -> None:
    with pytest.raises(ValueError, match="views must be 0 to 256"):
        Recipe(views=-1)


def test_the_cheapest_forms_that_keep_a_fidelity_are_found(tmp_path: Path) -> None:
    fast = Preset.FAST.config
    config = fast.changed(calibration=Calibration.NONE, recipe=replace(fast.recipe, drawn=2))
    stages: list[tuple[str, int, int]] = []
    result = quantize(read_checkpoint("tiny"), config, progress=lambda *step: stages.append(step))
    header = result.artifact.header
    fidelity, itself = header["fidelity"], header["fidelity"]["grey_level"]
    assert fidelity["mean_iou"] >= itself["mean_iou"] - 0.001
    assert fidelity["as_near"] >= 0.5
    assert header["four_bit"] > 0.25
    assert len(result.calibration_images) == len(header["images_sha256"]) == 2
    assert {stage for stage, _, _ in stages} == {"fidelity", "precision", "search"}
    path = tmp_path / "a.safetensors"
    write_artifact(result.artifact, path)
    assert read_artifact(path).label == result.artifact.label
    # A stricter fidelity takes more bits.
    strict = quantize(read_checkpoint("tiny"), config.changed(fidelity=0.9999)).artifact.header
    assert strict["sizes"]["artifact_bytes"] > header["sizes"]["artifact_bytes"]
    assert strict["four_bit"] < header["four_bit"]


def test_a_model_that_finds_nothing_is_never_taken_for_faithful() -> None:
    nothing: Agreement = {"mean_iou": 0.0, "median_iou": 0.0}
    unknown: Fidelity = {**nothing, "n": 0, "engine": "", "grey_level": nothing, "as_near": 0.0}
    encoder = seeded_sam("tiny").image_encoder
    images = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    made, _ = quantize_faithfully(
        encoder, VARIANTS["tiny"], images, "auto", lambda quantized: (quantized, unknown), silent
    )
    assert made.layers == {}
    config = Preset.FAST.config.changed(calibration=Calibration.NONE)
    result = quantize(seeded_checkpoint("tiny"), replace(config, recipe=replace(config.recipe, drawn=1)))
    assert result.artifact.label == "W8A8"
    assert "unknown" in shortfall(result.artifact.header["fidelity"], 0.9)


def test_without_images_everything_is_rounded_to_the_nearest() -> None:
    fast = Preset.FAST.config
    recipe = replace(fast.recipe, drawn=0, compensate=False)
    config = replace(
        fast, bits=4, activation_bits=8, fidelity=None, calibration=Calibration.NONE, recipe=recipe
    )
    result = quantize(read_checkpoint("tiny"), config)
    assert result.artifact.label == "W4A8"
    assert result.artifact.header["images_sha256"] == []
    assert result.artifact.header["fidelity"]["mean_iou"] > 0.9
