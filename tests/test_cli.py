"""The command line: what it promises, what it writes, and how it refuses."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from typer.main import get_command
from typer.testing import CliRunner

from monailabel_dfqsam.artifact import read_artifact
from monailabel_dfqsam.cli import app
from monailabel_dfqsam.phantom_study import write_phantom_study
from monailabel_dfqsam.sam import VARIANTS, Sam
from monailabel_dfqsam.sam import checkpoint as checkpoints

SHORT = ("--preset", "static", "--iterations", 3)  # seconds, where a fidelity to keep takes a minute
HELP_SECONDS = 3.0  # a blink, on a busy machine

PROMISED = {
    "serve": {"studies", "host", "port", "checkpoint"},
    "demo": {"studies", "checkpoint", "out"},
    "doctor": {"studies", "checkpoint", "json"},
    "quantize": {
        "checkpoint", "out", "fidelity", "bits", "policy", "calibration", "images", "iterations", "seed",
        "preset", "json",
    },
    "evaluate": {"data", "model", "engine", "prompts", "json", "html"},
    "export": {"artifact", "out", "format"},
    "inspect": {"file", "json"},
    "pretrain": {"out", "steps", "device", "what", "start", "seed"},
    "benchmark": set(),
}  # fmt: skip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_refused(result: Result, *words: str) -> None:
    """Exit code 1 and one sentence on stderr, nothing on stdout."""
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, in a file."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("checkpoint") / "random.safetensors"
    save_file({key: value.contiguous() for key, value in Sam(VARIANTS["tiny"]).state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def quantized(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the printed summary of a short quantization."""
    out = tmp_path_factory.mktemp("quantized") / "new" / "folder"
    result = run("quantize", checkpoint, "--out", out, *SHORT, "--json")
    assert result.exit_code == 0, result.output
    assert "synthesis: 3 of 3, 100 %, " in result.stderr  # a line a stage, where no terminal is
    return out, json.loads(result.stdout)


def test_the_promised_commands_and_options_are_there() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == set(PROMISED)
    for name, options in PROMISED.items():
        found = {
            option.lstrip("-")
            for parameter in commands[name].params
            for option in (parameter.opts if parameter.param_type_name == "option" else [parameter.name])
        }
        assert options <= found


def test_help_is_quick_and_the_module_runs() -> None:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "monailabel_dfqsam", "--help"], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - begin < HELP_SECONDS
    for name in PROMISED:
        assert name in done.stdout


def test_quantize_writes_an_artifact_and_a_report(quantized: tuple[Path, dict[str, Any]]) -> None:
    out, summary = quantized
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [f"{summary['key']}.safetensors", f"{summary['key']}.html"]
    )
    header = read_artifact(Path(summary["artifact"])).header
    assert summary["made"] is True
    assert summary["fidelity"] == header["fidelity"]
    assert summary["sizes"] == header["sizes"]
    assert header["config"]["bits"] == 4
    assert header["config"]["synthesis"]["iterations"] == 3


def test_quantizing_again_does_nothing(checkpoint: Path, quantized: tuple[Path, dict[str, Any]]) -> None:
    out, _ = quantized
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    result = run("quantize", checkpoint, "--out", out, *SHORT)
    assert result.exit_code == 0
    assert "nothing was to do" in result.stdout
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_every_artifact_has_its_own_report(checkpoint: Path, quantized: tuple[Path, dict[str, Any]]) -> None:
    """Also in one folder, where the second would once have replaced the first one's."""
    out, first = quantized
    result = run("quantize", checkpoint, "--out", out, *SHORT, "--seed", 1, "--json")
    second = json.loads(result.stdout)
    assert second["key"] != first["key"]
    for summary in (first, second):
        assert summary["key"] in Path(summary["report"]).read_text(encoding="utf-8")
    Path(second["report"]).unlink()
    again = run("quantize", checkpoint, "--out", out, *SHORT, "--seed", 1, "--json")
    assert json.loads(again.stdout)["report"] is None
    Path(second["artifact"]).unlink()


def test_a_damaged_artifact_is_made_again(
    checkpoint: Path, quantized: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, summary = quantized
    path = tmp_path / Path(summary["artifact"]).name
    content = bytearray(Path(summary["artifact"]).read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    result = run("quantize", checkpoint, "--out", tmp_path, *SHORT, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["made"] is True
    assert "checksum" in result.stderr
    assert read_artifact(path).header["key"] == summary["key"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--bits", 5), "bits must be 4 or 8"),
        (("--fidelity", "high"), "auto or a number above 0"),
        (("--fidelity", 2), "auto' or a number above 0"),
        (("--images", 0), "images must be 1 to 256"),
        (("--iterations", 0), "iterations must be at least 1"),
        (("--seed", -1), "seed must not be negative"),
        (("--calibration", "real"), "synthetic, gaussian, none or a folder"),
    ],
)
def test_wrong_options_are_refused_with_a_sentence(
    checkpoint: Path, tmp_path: Path, options: tuple[object, ...], word: str
) -> None:
    assert_refused(run("quantize", checkpoint, "--out", tmp_path / "out", *options), word)
    assert not (tmp_path / "out").exists()


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_checkpoints_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_refused(run("quantize", tmp_path / "none.pth", "--out", out), "there is no checkpoint file")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no tensors at all")
    assert_refused(run("quantize", damaged, "--out", out), "not a readable safetensors file")
    bomb = tmp_path / "bomb.pth"
    bomb.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert_refused(run("inspect", bomb), "bomb.pth")
    assert not (tmp_path / "exploded").exists()


def test_inspect_shows_a_checkpoint(checkpoint: Path) -> None:
    found = json.loads(run("inspect", checkpoint, "--json").stdout)
    model = Sam(VARIANTS["tiny"])
    assert found["kind"] == "checkpoint"
    assert found["variant"] == "tiny"
    assert found["parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())
    assert "tiny" in run("inspect", checkpoint).stdout


def test_inspect_shows_the_published_lite_medsam_by_its_name(lite_medsam: Path) -> None:
    found = json.loads(run("inspect", "lite-medsam", "--json").stdout)
    assert (found["variant"], found["bytes"]) == ("lite_medsam", lite_medsam.stat().st_size)


@pytest.mark.parametrize(
    "command",
    [
        "quantize lite-medsam --out {folder}", "inspect lite-medsam",
        "pretrain --out {folder} --steps 1 --start lite-medsam --what lite",
        "benchmark click --checkpoint lite-medsam",
        "serve --studies {folder} --checkpoint lite-medsam", "evaluate --data {folder} --model lite-medsam",
    ],
)  # fmt: skip
def test_commands_that_take_a_checkpoint_know_its_name(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_LITE_MEDSAM_PACKAGE", "no_such_medsam")
    words = command.format(folder=tmp_path).split()
    result = run(*words)
    assert result.exit_code == 1
    assert "install monailabel-dfqsam[litemedsam]" in result.stderr.replace("\n", " ")


def test_inspect_shows_an_artifact_and_sees_damage(
    quantized: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path = Path(quantized[1]["artifact"])
    found = json.loads(run("inspect", path, "--json").stdout)
    assert found["kind"] == "artifact"
    assert found["key"] == quantized[1]["key"]
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-10])
    assert_refused(run("inspect", cut), "damaged or cut short")
    assert_refused(run("inspect", tmp_path / "none"), "there is no file")


def test_evaluate_scores_a_checkpoint_and_its_artifact(
    checkpoint: Path, quantized: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    study, rows_file, page = tmp_path / "study", tmp_path / "rows.json", tmp_path / "page.html"
    write_phantom_study(study)
    artifact = quantized[1]["artifact"]
    result = run(
        "evaluate", "--data", study, "--model", artifact, "--model", checkpoint, "--prompts", "box",
        "--engine", "reference", "--json", rows_file, "--html", page,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = [row for row in json.loads(rows_file.read_text()) if row["modality"] == "all"]
    names = [("tiny", "torch"), ("tiny ±1 grey level", "torch"), ("tiny W4A4", "reference")]
    assert [(row["model"], row["engine"]) for row in rows] == names
    assert rows[0]["agreement"] == 1.0
    assert rows[0]["drop"] == 0.0
    assert 0 <= rows[2]["agreement"] <= 1
    assert "of memory" in result.stdout
    assert "tiny W4A4, reference, deploy, box prompts" in page.read_text()
    nowhere = run("evaluate", "--data", study, "--json", tmp_path / "absent" / "rows.json")
    assert_refused(nowhere, "absent", "rows.json")
    alone = run("evaluate", "--data", study, "--model", artifact, "--prompts", "box")
    assert_refused(alone, "random.safetensors")


def test_pretrain_makes_weights_that_can_be_read(tmp_path: Path) -> None:
    result = run("pretrain", "--out", tmp_path / "weights", "--steps", 1, "--what", "auxiliary")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "weights" / "dfqsam-tiny-auxiliary.safetensors").is_file()
    if not torch.cuda.is_available():
        assert_refused(run("pretrain", "--out", tmp_path, "--steps", 1, "--device", "cuda"), "no CUDA device")
    begun = (
        "pretrain",
        "--out",
        tmp_path,
        "--steps",
        1,
        "--what",
        "auxiliary",
        "--start",
        tmp_path / "some.pth",
    )
    assert_refused(run(*begun), "--what sam and --what lite alone")
    lite = "pretrain", "--out", tmp_path, "--steps", 1, "--what", "lite"
    assert_refused(run(*lite), "needs --start")
    assert_refused(run(*lite, "--start", "tiny"), "'tiny' cannot start 'lite'")


def test_serve_refuses_what_it_cannot_serve(tmp_path: Path) -> None:
    arguments = (
        "serve",
        "--studies",
        tmp_path,
        "--app",
        tmp_path / "app",
        "--checkpoint",
        tmp_path / "no.pth",
    )
    assert_refused(run(*arguments), "there is no checkpoint file")
    assert not (tmp_path / "app").exists()


def test_a_demo_leaves_a_strangers_folder_alone(tmp_path: Path) -> None:
    precious = tmp_path / "session" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    assert_refused(run("demo", "--out", tmp_path), "was not made by an earlier demo")
    assert precious.read_text() == "mine"


def test_a_demo_needs_masks(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert_refused(run("demo", "--out", tmp_path, "--studies", tmp_path / "images"), "no volume with a mask")
