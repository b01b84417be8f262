"""Quantization as MONAI Label's training process runs it, and what it leaves in the model folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from monailabel_dfqsam.artifact import FORMAT_VERSION, read_header
from monailabel_dfqsam.config import Calibration, QuantizationConfig, SynthesisConfig
from monailabel_dfqsam.server.gate.options import OptionError
from monailabel_dfqsam.server.runs import quantizing
from monailabel_dfqsam.server.runs.folder import HISTORY, ModelFolder, default_key
from monailabel_dfqsam.server.runs.models import FULL_PRECISION, ChoiceError, Models
from monailabel_dfqsam.server.runs.options import read_options
from monailabel_dfqsam.server.runs.record import Run, RunState, run_from_json
from monailabel_dfqsam.server.runs.trainers import FinetuneTask, QuantizeTask
from monailabel_dfqsam.server.settings import Settings
from tests.server_fixtures import checkpoint, wait

SWAP_SECONDS = 30.0
# The shortest quantization there is: noise to calibrate on, two steps of synthesis to measure fidelity.
QUICK = QuantizationConfig(calibration=Calibration.GAUSSIAN, synthesis=SynthesisConfig(iterations=2))

can_unshare = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-rn", "true"], check=False).returncode != 0,
    reason="network namespaces are not permitted here",
)


class Untouchable:
    """A datastore of which nothing may be asked."""

    def __getattribute__(self, name: str) -> object:
        raise AssertionError(f"the datastore was asked for {name}")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("weights")
    return Settings(folder / "model", checkpoint=checkpoint(folder), quantization=QUICK, min_fidelity=0.0)


@pytest.fixture(scope="module")
def quantized(settings: Settings) -> Settings:
    """A model folder with one published artifact, made while nothing may be read."""
    stats = QuantizeTask(settings)({"model": "dfqsam", "gpus": "all"}, Untouchable())
    assert stats["state"] == "published"
    return settings


@pytest.fixture
def folder(quantized: Settings, tmp_path: Path) -> Settings:
    """A copy that a test may damage."""
    shutil.copytree(quantized.model_dir, tmp_path / "model")
    return replace(quantized, model_dir=tmp_path / "model")


def key_of(settings: Settings) -> str:
    return default_key(settings)


def test_quantization_needs_no_data(quantized: Settings) -> None:
    model = ModelFolder(quantized.model_dir)
    key = key_of(quantized)
    assert model.published() == {"key": key, "default_key": key}
    assert read_header(model.artifact(key))["config"]["bits"] == 4
    assert "<html" in model.report(key).read_text()[:200].lower()
    assert not model.building.exists()
    assert not [path for path in quantized.model_dir.iterdir() if path.name.startswith(".")]


def test_statistics_are_in_slicers_words(quantized: Settings) -> None:
    stats = QuantizeTask(quantized).stats()
    model = ModelFolder(quantized.model_dir)
    fidelity = read_header(model.artifact(key_of(quantized)))["fidelity"]["mean_iou"]
    assert stats["best_metric"] == pytest.approx(fidelity, abs=1e-4)  # rounded for people
    assert stats["total_time"] > 0
    assert 0 <= stats["epoch"] <= stats["total_epochs"]
    json.dumps(stats)


@can_unshare
def test_quantization_needs_no_network(quantized: Settings, tmp_path: Path) -> None:
    code = f"""
        from pathlib import Path
        from monailabel_dfqsam.config import *
        from monailabel_dfqsam.server.settings import Settings
        from monailabel_dfqsam.server.runs.trainers import QuantizeTask
        config = QuantizationConfig(calibration=Calibration.GAUSSIAN, synthesis=SynthesisConfig(iterations=2))
        settings = Settings(
            Path({str(tmp_path)!r}), checkpoint=Path({str(quantized.checkpoint)!r}), quantization=config,
            min_fidelity=0.0,
        )
        print(QuantizeTask(settings)({{}}, None)["state"])
    """
    line = ["unshare", "-rn", sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "published"


def test_the_same_request_quantizes_nothing_twice(folder: Settings) -> None:
    path = ModelFolder(folder.model_dir).artifact(key_of(folder))
    before = path.stat().st_mtime_ns
    assert QuantizeTask(folder)({}, Untouchable())["state"] == "published"
    assert path.stat().st_mtime_ns == before


def test_a_checkpoint_replaced_while_it_is_quantized_does_not_fail_the_run(
    folder: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was made is of the old one, and does not serve a start with the new one."""
    settings = replace(folder, checkpoint=Path(shutil.copy(folder.checkpoint, tmp_path)))
    original, own = quantizing.ready, key_of(settings)

    def replaced(*given: object) -> object:
        settings.checkpoint.write_bytes(b"no weights")
        return original(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(quantizing, "ready", replaced)
    assert QuantizeTask(settings)({}, Untouchable())["state"] == "published"
    assert ModelFolder(settings.model_dir).published() == {"key": own, "default_key": own}


def test_low_fidelity_is_not_published(folder: Settings) -> None:
    strict = replace(folder, min_fidelity=1.0)
    before = ModelFolder(folder.model_dir).stamp()
    stats = QuantizeTask(strict)({"seed": 1}, Untouchable())
    assert stats["state"] == "rejected"
    assert "fidelity" in stats["error"]
    assert ModelFolder(folder.model_dir).stamp() == before


def test_a_failure_is_told_and_leaves_nothing(folder: Settings, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    task = QuantizeTask(replace(folder, checkpoint=broken))
    before = sorted(folder.model_dir.glob("*.safetensors"))
    with pytest.raises(ValueError, match="broken"):
        task({}, Untouchable())
    assert task.stats()["state"] == "failed"
    assert sorted(folder.model_dir.glob("*.safetensors")) == before


def test_a_wrong_option_fails_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="bits"):
        QuantizeTask(Settings(tmp_path / "model"))({"bits": 5}, Untouchable())
    assert not (tmp_path / "model").exists()


def test_the_published_artifact_is_served(folder: Settings) -> None:
    served = Models(folder).current()
    assert served.segmenter.name.startswith("W4A4")
    assert served.identity == key_of(folder)


def test_a_model_published_later_is_taken_over(folder: Settings) -> None:
    (folder.model_dir / "current.json").unlink()
    artifact = ModelFolder(folder.model_dir).artifact(key_of(folder))
    artifact.rename(folder.model_dir / "aside")
    models = Models(folder)
    first = models.current()
    assert first.segmenter.name == FULL_PRECISION
    (folder.model_dir / "aside").rename(artifact)
    ModelFolder(folder.model_dir).publish(key_of(folder), key_of(folder))
    wait(lambda: models.current().identity == key_of(folder), SWAP_SECONDS)
    assert first.segmenter.name == FULL_PRECISION  # whoever holds the old one may finish with it


@pytest.mark.parametrize("damage", ["cut", "flipped", "newer", "empty"])
def test_a_damaged_artifact_is_refused_in_one_line_and_made_again(
    folder: Settings, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = ModelFolder(folder.model_dir).artifact(key_of(folder))
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[-100] ^= 1
    elif damage == "newer":
        ours, newer = (b'\\"format_version\\": %d' % number for number in (FORMAT_VERSION, 9))
        content = bytearray(bytes(content).replace(ours, newer))
    else:
        content = bytearray()
    path.write_bytes(content)
    asked: list[str] = []
    models = Models(folder)
    models.start(quantize=lambda: asked.append("quantize"))
    wait(lambda: bool(asked), SWAP_SECONDS)
    assert models.current().segmenter.name == FULL_PRECISION
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert "quantize again" in errors[0]


def test_another_configuration_does_not_serve_the_old_choice(folder: Settings) -> None:
    other = replace(folder, quantization=replace(QUICK, seed=5))
    assert Models(other).current().segmenter.name == FULL_PRECISION


def test_an_artifact_below_the_threshold_is_neither_served_nor_made_again(folder: Settings) -> None:
    strict = replace(folder, min_fidelity=1.0)
    asked: list[str] = []
    models = Models(strict)
    models.start(quantize=lambda: asked.append("quantize"))
    wait(lambda: models.describe()["model"] == FULL_PRECISION, SWAP_SECONDS)
    wait(lambda: not any(t.name == "dfqsam-models" for t in threading.enumerate()), SWAP_SECONDS)
    assert asked == []


def test_sweeping_clears_what_was_interrupted_and_nothing_else(tmp_path: Path) -> None:
    model, gone = ModelFolder(tmp_path), subprocess.Popen(["true"])
    gone.wait()
    model.building.mkdir()
    (model.building / "artifact").touch()
    for writer in (gone.pid, os.getpid()):
        (tmp_path / f".current.json.{writer}-7.partial").touch()
    (tmp_path / "keep.safetensors").touch()
    model.sweep()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"keep.safetensors", f".current.json.{os.getpid()}-7.partial"}


def test_the_history_says_what_was_asked_for_and_how_it_ended(folder: Settings, tmp_path: Path) -> None:
    model = ModelFolder(folder.model_dir)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    QuantizeTask(replace(folder, min_fidelity=1.0))({}, Untouchable())
    with pytest.raises(ValueError, match="broken"):
        QuantizeTask(replace(folder, checkpoint=broken))({"seed": 3, "bits": 8}, Untouchable())
    failed, rejected, published = model.runs()
    assert (published.state, published.key) == (RunState.PUBLISHED, key_of(folder))
    header = read_header(model.artifact(key_of(folder)))
    assert published.fidelity == rejected.fidelity == header["fidelity"]
    assert failed.fidelity is None
    assert published.options == {
        "bits": 4, "fidelity": "auto", "policy": "deploy", "calibration": "gaussian", "iterations": 2,
        "images": 1, "seed": 0, "checkpoint": folder.checkpoint.name,
    }  # fmt: skip
    assert (rejected.state, rejected.key) == (RunState.REJECTED, key_of(folder))
    assert "fidelity" in rejected.error
    assert (failed.state, failed.key, failed.options["seed"]) == (RunState.FAILED, "", 3)
    assert failed.options["bits"] == 8
    assert "broken" in failed.error
    assert failed.created >= rejected.created > published.created


@pytest.mark.parametrize(
    "request_", [{}, {"bits": 8, "seed": 4}, {"preset": "best"}, {"preset": ["best"], "iterations": "7"}]
)
def test_a_runs_options_choose_what_its_request_chose(folder: Settings, request_: dict[str, object]) -> None:
    run = QuantizeTask(folder).accepted({**request_, "client_id": "somebody", "gpus": "0"})
    assert read_options(run.options, folder, "dfqsam") == read_options(request_, folder, "dfqsam")


def test_statistics_are_the_trainers_own(folder: Settings) -> None:
    """What the other one did last is not told as one's own."""
    task, other = QuantizeTask(folder), FinetuneTask(folder)
    assert other.stats() == {"epoch": 0, "total_epochs": 1}
    before = task.stats()
    ModelFolder(folder.model_dir).write_run(Run(other.name, {}, state=RunState.RUNNING, step=3, steps=9))
    assert task.stats() == before
    assert (other.stats()["epoch"], other.stats()["total_epochs"]) == (3, 9)
    assert "total_time" not in other.stats()


def test_the_history_is_bounded_and_survives_damage(tmp_path: Path) -> None:
    model = ModelFolder(tmp_path)
    runs = [Run("dfqsam", {}, created=f"{n:03}", state=RunState.PUBLISHED) for n in range(HISTORY + 5)]
    for run in runs:
        model.write_run(run)
    assert model.runs() == runs[: -HISTORY - 1 : -1]
    damaged = tmp_path / "runs" / f"{runs[-1].id}.json"
    damaged.write_text(damaged.read_text()[:40])
    assert model.run(runs[-1].id) is None
    assert len(model.runs()) == HISTORY - 1


def test_a_record_of_an_earlier_version_has_a_fidelity_without_its_yardstick() -> None:
    earlier = {**Run("dfqsam", {}).as_json(), "fidelity": 0.9}
    assert run_from_json(earlier).fidelity is None


@pytest.mark.parametrize("wrong", [None, [], {}, {"id": "x"}, {"state": "unknown"}, {"more": 1}])
def test_what_is_no_record_is_refused(wrong: object) -> None:
    whole = Run("dfqsam", {}).as_json()
    assert run_from_json(whole).as_json() == whole
    with pytest.raises(ValueError, match=r"record|RunState"):
        run_from_json({**whole, **wrong} if isinstance(wrong, dict) and wrong else wrong)


@pytest.fixture(scope="module")
def two(quantized: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, str]:
    """A folder in which the default was made first and another one after it, and the other's key."""
    model_dir = tmp_path_factory.mktemp("two") / "model"
    shutil.copytree(quantized.model_dir, model_dir)
    settings = replace(quantized, model_dir=model_dir)
    assert QuantizeTask(settings)({"seed": 1}, Untouchable())["state"] == "published"
    return settings, ModelFolder(model_dir).published()["key"]  # type: ignore[index]


def test_an_earlier_artifact_chosen_back_serves_at_once_and_after_a_restart(
    two: tuple[Settings, str],
) -> None:
    settings, other = two
    models = Models(settings)
    assert models.current().identity == other
    assert sorted(models.folder.keys_kept()) == sorted([other, key_of(settings)])
    chosen = models.choose(key_of(settings))
    assert models.current() is chosen
    assert models.describe()["key"] == key_of(settings)
    assert Models(settings).current().identity == key_of(settings)
    models.choose(other)
    assert Models(settings).current().identity == other
    elsewhere = replace(settings, quantization=replace(QUICK, seed=5))
    assert Models(elsewhere).current().segmenter.name == FULL_PRECISION


def test_a_chosen_artifact_is_not_replaced_by_the_default_at_the_next_start(
    two: tuple[Settings, str], tmp_path: Path
) -> None:
    shutil.copytree(two[0].model_dir, tmp_path / "model")
    settings, other = replace(two[0], model_dir=tmp_path / "model"), two[1]
    Models(settings).choose(other)
    ModelFolder(settings.model_dir).artifact(key_of(settings)).unlink()
    asked: list[str] = []
    models = Models(settings)
    models.start(quantize=lambda: asked.append("quantize"))
    wait(lambda: models.describe()["key"] == other, SWAP_SECONDS)
    wait(lambda: not any(t.name == "dfqsam-models" for t in threading.enumerate()), SWAP_SECONDS)
    assert asked == []


@pytest.mark.parametrize("wrong", ["unknown", "path", "damaged", "fidelity"])
def test_what_cannot_be_served_is_not_chosen(two: tuple[Settings, str], tmp_path: Path, wrong: str) -> None:
    shutil.copytree(two[0].model_dir, tmp_path / "model")
    settings, key = replace(two[0], model_dir=tmp_path / "model"), two[1]
    models = Models(settings)
    models.choose(key_of(settings))
    before = models.folder.stamp()
    if wrong == "unknown":
        key = "0" * 16
    elif wrong == "path":
        key = f"../{key}"
    elif wrong == "damaged":
        with models.folder.artifact(key).open("r+b") as file:
            file.truncate(file.seek(0, os.SEEK_END) // 2)
    else:
        models._settings = replace(settings, min_fidelity=1.0)
    with pytest.raises(ChoiceError, match="16 hex" if wrong == "path" else "cannot be served"):
        models.choose(key)
    assert models.folder.stamp() == before
    assert models.current().identity == key_of(settings)


def test_speed_is_counted_by_model(two: tuple[Settings, str]) -> None:
    models = Models(two[0])
    served = models.choose(key_of(two[0]))
    assert served.speed.summary() == {"embed": None, "click": None}
    served.speed.count({"embed": 0.5, "total": 0.6}, cached=False)
    for seconds in (0.01, 0.03, 0.02):
        served.speed.count({"embed": 0.0, "total": seconds}, cached=True)
    assert served.speed.summary() == {
        "embed": {"seconds": 0.5, "count": 1},
        "click": {"seconds": 0.02, "count": 3},
    }
    assert models.choose(two[1]).speed.summary() == {"embed": None, "click": None}
    assert models.choose(key_of(two[0])).speed.summary() == served.speed.summary()
