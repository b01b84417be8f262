"""The benchmark's parts: what it counts, what it writes, and how it says what was not measured."""

from __future__ import annotations

import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from typer.testing import CliRunner

from benchmarks.volume import VOLUME_ENGINES
from monailabel_dfqsam.artifact import read_artifact
from monailabel_dfqsam.benchmark.floor import (
    FLOAT_SHAPE,
    GemmFloor,
    Shape,
    attention_macs,
    floor_terms,
    layer_shapes,
)
from monailabel_dfqsam.benchmark.layout import DECODER_WEIGHTS, FLOAT_WEIGHTS, IMAGES, artifact_path
from monailabel_dfqsam.benchmark.machine import commit, describe_run
from monailabel_dfqsam.benchmark.plan import ENGINES, EncoderPlan, Family, Place
from monailabel_dfqsam.benchmark.runner import kind_of
from monailabel_dfqsam.benchmark.session import statistics_of
from monailabel_dfqsam.benchmark.table import print_encoder
from monailabel_dfqsam.benchmark.weights import Preparation
from monailabel_dfqsam.cli import app
from monailabel_dfqsam.engines import load_encoder, onednn
from monailabel_dfqsam.quantization.cost import encoder_cost
from monailabel_dfqsam.sam import VARIANTS, build
from monailabel_dfqsam.sam.vit import ImageEncoderViT
from monailabel_dfqsam.segmentation.segmenter import load_decoder
from tests.models import relative_error

W4A4_ERROR = 0.5  # of the whole embedding, random weights
OPENVINO_ERROR = 1e-4

needs_onednn = pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN quantized linear")


def test_products_of_the_tiny_model_are_those_of_its_layers() -> None:
    assert layer_shapes(VARIANTS["tiny"], 2) == {
        Shape(512, 768, 144): 1,
        Shape(512, 144, 432): 6,
        Shape(512, 144, 144): 6,
        Shape(512, 144, 576): 6,
        Shape(512, 576, 144): 6,
        Shape(512, 144, 128): 1,
        Shape(512, 1152, 128): 1,
    }


@pytest.mark.parametrize("name", ["sam_b_256", "sam_med2d_b"])
def test_products_have_the_multiplications_of_the_cost_table(name: str) -> None:
    variant = replace(VARIANTS[name], window_size=0)
    whole = encoder_cost(variant, {}, 0).macs
    without_position = replace(variant, relative_position=False)
    products = sum(count * shape.macs for shape, count in layer_shapes(variant, 1).items())
    assert products + attention_macs(without_position, 1) == whole


def test_attention_counts_pairs_of_real_tokens_in_one_window() -> None:
    variant = replace(VARIANTS["sam_b_256"], depth=2, global_blocks=(1,))
    grid, window = variant.grid, variant.window_size
    expected = 0
    for side in (window, grid):
        tokens = [(y // side, x // side) for y in range(grid) for x in range(grid)]
        sizes = Counter(tokens)
        pairs = sum(sizes[token] for token in tokens)
        rows = sum(len({y for y in range(grid) if y // side == wy}) for wy, _ in tokens)
        columns = sum(len({x for x in range(grid) if x // side == wx}) for _, wx in tokens)
        expected += variant.embed_dim * (2 * pairs + rows + columns)
    assert attention_macs(variant, 3) == 3 * expected


def test_the_floor_takes_each_shapes_best_round() -> None:
    shapes = [*layer_shapes(VARIANTS["tiny"], 1), FLOAT_SHAPE]
    seconds = {shape: [2.0, 1.0] if shape.k == 144 else [1.0, 2.0] for shape in shapes}
    integer, attention, rounds = floor_terms("tiny", 1, seconds)
    share = attention_macs(VARIANTS["tiny"], 1) / FLOAT_SHAPE.macs
    assert integer == 27
    assert attention == pytest.approx(share)
    assert rounds == pytest.approx([2 * 19 + 8 + share, 19 + 2 * 8 + 2 * share])


@needs_onednn
def test_the_floor_times_every_product() -> None:
    turn = GemmFloor("tiny", 1, 1).turn()
    assert set(turn) == {*layer_shapes(VARIANTS["tiny"], 1), FLOAT_SHAPE}
    assert min(turn.values()) > 0


def test_statistics() -> None:
    assert statistics_of([]) == {"median_s": None, "min_s": None, "p95_s": None, "spread": None}
    found = statistics_of([3.0, 1.0, 2.0])
    assert found == pytest.approx({"median_s": 2.0, "min_s": 1.0, "p95_s": 2.9, "spread": 0.95})


def test_ops_are_sorted_by_kind() -> None:
    kinds = {
        "onednn::qlinear_pointwise": "integer products",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "aten::native_layer_norm": "norms and quantize",
        "dfqsam::quantize": "norms and quantize",
        "aten::gelu": "activations",
        "aten::add_": "adds and scales",
        "aten::copy_": "copies",
        "aten::view": "other",
    }
    assert {op: kind_of(op) for op in kinds} == kinds


def test_a_run_describes_itself() -> None:
    run = describe_run()
    assert run["machine"]["cpu"]
    assert run["machine"]["memory_bytes"] > 1e8
    assert 1 <= run["machine"]["cores_usable"] <= run["machine"]["cores_physical"]
    assert run["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert len(run["load_average_before"]) == 3


def test_the_commit_is_that_of_the_folder(tmp_path: Path) -> None:
    assert commit(tmp_path) == {"commit": None, "dirty": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    found = commit(tmp_path)
    assert len(found["commit"]) == 40
    assert found["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path)["dirty"] is True


def test_prepared_files_are_one_model(tmp_path: Path) -> None:
    preparation = Preparation(tmp_path, "tiny", None, 2, 1)
    sizes, sizes_8 = preparation.write_artifact(4), preparation.write_artifact(8)
    encoder = ImageEncoderViT(VARIANTS["tiny"])
    encoder.load_state_dict(load_file(tmp_path / FLOAT_WEIGHTS))
    images = torch.from_numpy(np.load(tmp_path / IMAGES)[:2])
    assert images.std() > 0.1
    with torch.inference_mode():
        expected = encoder(images)
    artifacts = {bits: read_artifact(artifact_path(tmp_path, bits)) for bits in (4, 8)}
    errors = {bits: relative_error(load_encoder(a).embed(images), expected) for bits, a in artifacts.items()}
    assert errors[8] < errors[4] / 2 < W4A4_ERROR / 2
    floats = load_file(tmp_path / DECODER_WEIGHTS)
    prompt_encoder, mask_decoder = load_decoder(artifacts[4])
    for prefix, module in (("prompt_encoder.", prompt_encoder), ("mask_decoder.", mask_decoder)):
        for name, value in module.state_dict().items():
            assert torch.allclose(floats.pop(prefix + name), value, atol=2e-3)
    assert not floats
    assert sizes["encoder_float_bytes"] == sum(4 * value.numel() for value in encoder.state_dict().values())
    assert sizes["encoder_artifact_bytes"] < sizes_8["encoder_artifact_bytes"]
    assert sizes_8["encoder_artifact_bytes"] < sizes["encoder_float_bytes"] / 3
    assert preparation.has_cuda() == torch.cuda.is_available()


@pytest.mark.slow
def test_openvino_runs_the_same_model_and_most_of_it_in_8_bit(tmp_path: Path) -> None:
    pytest.importorskip("nncf", reason="OpenVINO and NNCF are not installed: pip install '.[benchmark]'")
    from monailabel_dfqsam.benchmark import openvino_peer as peer
    from monailabel_dfqsam.benchmark.weights import phantoms, seeded_checkpoint

    windowed = replace(VARIANTS["tiny"], relative_position=True, window_size=14, depth=2, global_blocks=(1,))
    encoder = build(seeded_checkpoint(windowed)).image_encoder
    images = phantoms(windowed, 3)
    with torch.inference_mode():
        expected = encoder(images)
    peer.write_float(tmp_path, encoder, images[:1])
    peer.write_int8(tmp_path, images.numpy())
    floating = peer.load(tmp_path / peer.FLOAT_MODEL, images.shape, 1, "f32")
    integer = peer.load(tmp_path / peer.INT8_MODEL, images.shape, 1, None)
    assert floating.precision == "float32"
    assert floating.integer_share == 0
    assert relative_error(torch.from_numpy(floating.infer([images.numpy()])[0]), expected) < OPENVINO_ERROR
    assert integer.integer_share > 0.8
    assert any(name.startswith("FullyConnected") and name.endswith("8") for name in integer.operations)
    assert 0 < relative_error(torch.from_numpy(integer.infer([images.numpy()])[0]), expected) < W4A4_ERROR


def _row(engine: str, **figures: Any) -> dict[str, Any]:
    none = dict.fromkeys(
        ("median_s", "min_s", "p95_s", "spread", "peak_bytes", "times_torch_eager", "times_openvino_int8",
         "floor_share")
    )  # fmt: skip
    return {"engine": engine, "batch": 2, **none, **figures}


def test_the_table_has_ratios_first_and_says_what_was_not_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = {"median_s": 0.25, "min_s": 0.2, "p95_s": 0.3, "spread": 0.4, "peak_bytes": 5e8}
    rows = [
        _row("onednn", **measured, times_torch_eager=5.5, times_openvino_int8=2.25, floor_share=0.625),
        _row("cutlass", reason="no GPU here"),
    ]
    profile = {"engine": "onednn", "batch": 2, "call_s": 0.2, "seconds": {"copies": 0.05}, "ops": []}
    whole = {"variant": "tiny", "weights": "by seed", "rows": rows, "profiles": [profile], "artifact": None}
    print_encoder({**whole, "load_average_before": [0.1, 0.5, 2.0]})
    lines = capsys.readouterr().out.splitlines()
    own = next(line for line in lines if line.startswith("onednn"))
    assert own.split() == "onednn 5.50 2.25 62 % 250.0 200.0 300.0 40 % 125.0 500 MB".split()  # noqa: SIM905
    assert any("cutlass: not measured (no GPU here)" in line for line in lines)
    assert next(line for line in lines if line.startswith("copies")).split() == ["copies", "50.0", "25", "%"]
    assert not any("Other work" in line for line in lines)
    print_encoder({**whole, "load_average_before": [1.26, 0.5, 2.0]})
    assert "load average 1.3" in capsys.readouterr().out


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["benchmark", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("encoder", "--variant", "huge"), "--variant must be one of tiny"),
        (("encoder", "--variant", "tiny", "--engines", "tensorrt"), "not 'tensorrt'"),
        (("encoder", "--variant", "tiny", "--batch", 0), "--batch must be at least 1"),
        (("encoder", "--variant", "tiny", "--repeats", 0), "--threads and --repeats"),
        (("click", "--shape", "512,512"), "--shape takes three sizes"),
    ],
)
def test_wrong_options_are_refused_with_a_sentence(arguments: tuple[object, ...], words: str) -> None:
    result = _run(*arguments)
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stdout == ""


def test_every_engine_has_a_place_and_the_slow_oracle_is_left_out() -> None:
    assert all(engine.places for engine in ENGINES.values())
    assert "reference" not in EncoderPlan("tiny").engines
    for engine in ENGINES.values():
        assert (engine.family is Family.OURS) == (engine.kind is not None) == (engine.bits > 0)
    assert set(VOLUME_ENGINES) <= set(ENGINES)
    assert all(Place.CPU in ENGINES[name].places for name in VOLUME_ENGINES)
