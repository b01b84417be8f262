"""A model that cannot be loaded: what answers meanwhile, what is told, and when it is tried again."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import HTTPException

from monailabel_dfqsam.artifact import (
    Artifact,
    ArtifactError,
    Header,
    read_artifact,
    write_artifact,
)
from monailabel_dfqsam.config import QuantizationConfig, silent
from monailabel_dfqsam.pipeline import gaussian_images, pack
from monailabel_dfqsam.quantization.calibrate import calibrate
from monailabel_dfqsam.sam import build, read_checkpoint
from monailabel_dfqsam.segmentation.engine_race import load_fastest
from monailabel_dfqsam.server.answers.workbench import Workbench
from monailabel_dfqsam.server.page.overview import Overview
from monailabel_dfqsam.server.runs import models as models_module
from monailabel_dfqsam.server.runs.folder import ModelFolder, default_key
from monailabel_dfqsam.server.runs.models import FULL_PRECISION, ChoiceError, Models
from monailabel_dfqsam.server.runs.queue import RunQueue
from monailabel_dfqsam.server.settings import Settings
from tests.models import FIDELITY
from tests.server_fixtures import checkpoint, wait

SECONDS = 60.0
FOLDER = "/srv/hospital/secret"

FAILURES: dict[str, Callable[[], Exception]] = {
    "ImportError": lambda: ImportError(f"{FOLDER}/libkernels.so: cannot open shared object file"),
    "OSError": lambda: OSError(5, "Input/output error", FOLDER),
    "RuntimeError": lambda: RuntimeError(f"kernel image at {FOLDER} is invalid"),
    "out of memory": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "no more threads": lambda: RuntimeError("can't start new thread"),
    "MemoryError": lambda: MemoryError(),
    "ValueError": lambda: ValueError("a layer does not fit"),
    "KeyError": lambda: KeyError("layers"),
    "AttributeError": lambda: AttributeError("'NoneType' object has no attribute 'shape'"),
    "ArtifactError": lambda: ArtifactError("'x' is damaged: quantize again"),
    "AssertionError": lambda: AssertionError(),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, str]:
    """A folder with two artifacts, the second published, and the second's key."""
    folder = tmp_path_factory.mktemp("made")
    settings = Settings(folder / "model", checkpoint=checkpoint(folder))
    source, config = read_checkpoint(settings.checkpoint), QuantizationConfig()
    images, sam = gaussian_images(source.variant, 1, 0), build(source)
    quantized = calibrate(sam.image_encoder, images, 4, config.policy, config.recipe, silent)
    artifact = pack(source, config, sam, quantized, images)
    own = default_key(settings)
    other = f"{int(own, 16) ^ 1:016x}"
    models = ModelFolder(settings.model_dir)
    models.path.mkdir()
    for key in (own, other):
        header: Header = {**artifact.header, "key": key, "fidelity": FIDELITY}
        write_artifact(Artifact(header, artifact.tensors), models.artifact(key))
        load_fastest(read_artifact(models.artifact(key)), models.artifact(key).with_suffix(".engines.json"))
    models.publish(other, own)
    return settings, other


@pytest.fixture
def two(made: tuple[Settings, str], tmp_path: Path) -> tuple[Settings, str]:
    """A copy that a test may damage."""
    shutil.copytree(made[0].model_dir, tmp_path / "model")
    return replace(made[0], model_dir=tmp_path / "model"), made[1]


class Failing:
    """`load_fastest`, which fails for as long as `error` says how; counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: Callable[[], Exception] | None = None
        self.calls = 0
        self._original = models_module.load_fastest
        monkeypatch.setattr(models_module, "load_fastest", self)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.error is not None:
            raise self.error()
        return self._original(*arguments)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    return Failing(monkeypatch)


def settled(models: Models) -> str:
    """The identity of what answers once no swap is under way."""
    models.current()
    wait(lambda: not any(t.name == "dfqsam-swap" for t in threading.enumerate()), SECONDS, every=0.01)
    return models.current().identity


def later(models: Models) -> None:
    """As if the pause were over."""
    models._retry_at = 0.0


@pytest.mark.parametrize("failure", FAILURES)
def test_a_published_model_that_cannot_be_loaded_is_taken_over_later(
    two: tuple[Settings, str], failing: Failing, failure: str
) -> None:
    settings, other = two
    models, folder = Models(settings), ModelFolder(settings.model_dir)
    own = default_key(settings)
    models.choose(own)
    failing.error, failing.calls = FAILURES[failure], 0
    folder.publish(other, own)
    assert settled(models) == own
    assert failing.calls == 1
    assert all(models.current().identity == own for _ in range(20))  # requests meanwhile try nothing
    assert failing.calls == 1
    told = models.describe()
    assert (told["key"], told["problem"]) == (own, models.problem)
    assert told["problem"].strip()
    assert FOLDER not in told["problem"]
    later(models)
    assert settled(models) == own
    assert failing.calls == 2
    failing.error = None
    later(models)
    assert settled(models) == other
    assert models.describe()["problem"] == ""


@pytest.mark.parametrize("failure", FAILURES)
def test_at_the_start_it_is_full_precision_until_the_model_can_be_loaded(
    two: tuple[Settings, str], failing: Failing, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings, other = two
    failing.error = FAILURES[failure]
    models = Models(settings)
    asked: list[str] = []
    models.start(quantize=lambda: asked.append("quantize"))
    wait(lambda: not models.is_changing(), SECONDS)
    assert models.current().identity == FULL_PRECISION
    assert asked == []  # it was quantized, and may be loaded later
    assert FOLDER not in models.problem
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    failing.error = None
    later(models)
    assert settled(models) == other
    assert models.problem == ""


@pytest.mark.parametrize("failure", FAILURES)
def test_a_model_chosen_that_cannot_be_loaded_is_refused_in_a_sentence(
    two: tuple[Settings, str], failing: Failing, failure: str
) -> None:
    settings, other = two
    models = Models(settings)
    models.choose(default_key(settings))
    failing.error, before = FAILURES[failure], models.folder.stamp()
    with pytest.raises(ChoiceError, match=r"the model cannot be served: .") as refused:
        models.choose(other)
    assert FOLDER not in str(refused.value)
    assert models.current().identity == default_key(settings)
    assert models.folder.stamp() == before


@pytest.mark.parametrize(
    ("failure", "word"),
    [(MemoryError(), "memory ran out"), (RuntimeError("CUDA error: no device"), "RuntimeError"),
     (OSError(5, "Input/output error"), "Input/output error")],
)  # fmt: skip
def test_where_nothing_can_be_loaded_a_click_is_answered_by_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, word: str
) -> None:
    """And the checkpoint is not read again at every click."""
    calls: list[int] = []

    def fails(*_: object) -> object:
        calls.append(1)
        raise failure

    original = models_module.read_checkpoint
    monkeypatch.setattr(models_module, "read_checkpoint", fails)
    models = Models(Settings(tmp_path / "model", checkpoint=checkpoint(tmp_path)))
    bench = Workbench(models, 16)
    for _ in range(5):
        with pytest.raises(HTTPException, match=word) as refused:
            bench.served()
        assert refused.value.status_code == 503
    assert len(calls) == 1
    assert word in models.describe()["problem"]
    monkeypatch.setattr(models_module, "read_checkpoint", original)
    later(models)
    assert bench.served().identity == FULL_PRECISION


def test_an_artifact_under_anothers_name_is_not_served(two: tuple[Settings, str]) -> None:
    settings, other = two
    folder, own = ModelFolder(settings.model_dir), default_key(settings)
    shutil.copy(folder.artifact(other), folder.artifact(own))
    folder.publish(own, own)
    models = Models(settings)
    assert models.current().identity == FULL_PRECISION
    assert "holds another model than its name says" in models.problem
    assert not models._ready()


@pytest.mark.parametrize("lost", ["fidelity", "config", "variant", "layers", "sizes"])
def test_an_artifact_of_an_earlier_version_is_refused_in_a_sentence(
    two: tuple[Settings, str], lost: str
) -> None:
    settings, other = two
    path = ModelFolder(settings.model_dir).artifact(other)
    artifact = read_artifact(path)
    header = {name: value for name, value in artifact.header.items() if name != lost}
    write_artifact(Artifact(header, artifact.tensors), path)  # type: ignore[arg-type]
    models = Models(settings)
    models.start(quantize=lambda: None)
    wait(lambda: not models.is_changing(), SECONDS)
    assert models.current().identity == default_key(settings)
    assert "quantize again" in models.problem
    status = Overview(models, settings, RunQueue(models.folder, {})).status()
    (one,) = [one for one in status["artifacts"] if one["key"] == other]
    assert "quantize again" in one["refusal"]
    assert status["model"]["problem"] == models.problem


def test_a_choice_is_of_the_checkpoint_that_the_server_began_with(
    two: tuple[Settings, str], tmp_path: Path
) -> None:
    settings = replace(two[0], checkpoint=Path(shutil.copy(two[0].checkpoint, tmp_path)))
    models, own = Models(settings), default_key(settings)
    models.current()
    settings.checkpoint.write_bytes(b"no weights")
    assert models.choose(own).identity == own
    assert models.folder.published() == {"key": own, "default_key": own}


def test_a_choice_that_cannot_be_written_changes_nothing(
    two: tuple[Settings, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, _ = two
    models = Models(settings)
    before = models.current().identity

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", FOLDER)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ChoiceError, match=r"the choice cannot be kept: .*No space left") as refused:
        models.choose(default_key(settings))
    assert FOLDER not in str(refused.value)
    assert models.current().identity == before


def test_a_folder_taken_away_leaves_the_model_that_answers(two: tuple[Settings, str]) -> None:
    settings, other = two
    models = Models(settings)
    assert models.current().identity == other
    aside = settings.model_dir.rename(settings.model_dir.with_name("aside"))
    assert settled(models) == other
    settings.model_dir.write_text("a file in the folder's place")
    assert settled(models) == other
    settings.model_dir.unlink()
    aside.rename(settings.model_dir)
    assert settled(models) == other
    assert models.problem == ""
