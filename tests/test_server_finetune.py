"""The trainer `dfqsam_qat`: it learns from finished labels when it is asked to, and only then."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import requests
import SimpleITK as sitk
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag
from PIL import Image

from monailabel_dfqsam.artifact import Artifact, read_artifact, read_header, write_artifact
from monailabel_dfqsam.config import Calibration, QuantizationConfig, SynthesisConfig
from monailabel_dfqsam.segmentation.segmenter import load_segmenter
from monailabel_dfqsam.server.gate.options import OptionError
from monailabel_dfqsam.server.page.overview import Overview
from monailabel_dfqsam.server.runs.finetuning import NAME, labelled_images
from monailabel_dfqsam.server.runs.folder import ModelFolder, default_key
from monailabel_dfqsam.server.runs.models import Models
from monailabel_dfqsam.server.runs.queue import RunQueue
from monailabel_dfqsam.server.runs.trainers import FinetuneTask
from monailabel_dfqsam.server.settings import Settings
from monailabel_dfqsam.slicer_session import ServerAnswer
from tests.server_fixtures import SAMPLE_APP, WORK_SECONDS, Server, checkpoint, first_run, wait

pytest.importorskip("brevitas", reason="brevitas is not installed: pip install 'monailabel-dfqsam[qat]'")

QUICK = QuantizationConfig(calibration=Calibration.GAUSSIAN, synthesis=SynthesisConfig(iterations=2))


def draw(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture of a disc, and its heart alone, which nobody but its label could know to be meant."""
    generator = np.random.default_rng(number)
    row, column = generator.integers(70, 130, 2)
    radius = np.hypot(*(np.indices((192, 208)) - np.array([row, column])[:, None, None]))
    values = np.where(radius < 45, 180, 60) + generator.normal(0, 6, radius.shape)
    return values.clip(0, 255).astype(np.uint8), (radius < 20).astype(np.uint8)


def fill(folder: Path, count: int) -> dict[str, Path]:
    """Pictures in a folder, and beside it their labels by the picture's name."""
    labels = folder.with_name("labels")
    for path in (folder, labels):
        path.mkdir()
    found = {}
    for number in range(count):
        values, heart = draw(number)
        Image.fromarray(values).save(folder / f"picture{number}.png")
        found[f"picture{number}"] = labels / f"picture{number}.nrrd"
        sitk.WriteImage(sitk.GetImageFromArray(heart), str(found[f"picture{number}"]))
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LocalDatastore:
    """Eight pictures, six of them with a finished label."""
    folder = tmp_path_factory.mktemp("store") / "studies"
    labels = fill(folder, 8)
    store = LocalDatastore(str(folder), extensions=["*.png", "*.nrrd"])
    for number, (image, label) in enumerate(labels.items()):
        tag = DefaultLabelTag.FINAL if number < 6 else DefaultLabelTag.ORIGINAL
        store.save_label(image, str(label), tag, {})
        store.update_image_info(image, {"modality": "US" if number % 2 else "MR"})
    return store


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("weights")
    return Settings(folder / "model", checkpoint=checkpoint(folder), quantization=QUICK, min_fidelity=0.0)


@pytest.fixture(scope="module")
def finetuned(settings: Settings, store: LocalDatastore) -> dict[str, object]:
    """The statistics of a fine-tuning that began with nothing in the model folder."""
    return FinetuneTask(settings)({"model": NAME, "max_epochs": 3}, store)


def test_only_finished_labels_count(store: LocalDatastore) -> None:
    found = labelled_images(store)
    assert [one.image.stem for one in found] == [f"picture{n}" for n in range(6)]
    assert [one.modality for one in found] == ["MR", "US"] * 3
    assert all(one.label.is_file() for one in found)


@pytest.mark.slow
def test_what_it_makes_is_better_and_served(settings: Settings, finetuned: dict[str, object]) -> None:
    assert finetuned["state"] == "published", finetuned
    folder = ModelFolder(settings.model_dir)
    key = str(finetuned["key"])
    start = default_key(settings)
    assert folder.published() == {"key": key, "default_key": start}
    header = read_header(folder.artifact(key))
    facts = header["finetuning"]
    assert facts["labels"] == 6
    assert facts["learned"] == {"MR": 2, "US": 2}
    assert facts["judged"] == {"MR": 1, "US": 1}
    assert facts["after"]["mean"] > facts["before"]["mean"]
    assert header["key"] == key
    assert 0 < header["fidelity"]["mean_iou"] < 1
    # After a restart too, although the server's own settings make another one.
    assert Models(settings).current().identity == key
    text = json.dumps(header)
    assert "picture" not in text
    assert str(settings.model_dir) not in text


@pytest.mark.slow
def test_what_it_makes_is_what_the_label_shows(settings: Settings, finetuned: dict[str, object]) -> None:
    """The gain in the header, once more, by other pictures."""
    from monailabel_dfqsam.segmentation.segmenter import Prompts

    folder = ModelFolder(settings.model_dir)
    start = default_key(settings)

    def overlap(key: str) -> float:
        segmenter = load_segmenter(read_artifact(folder.artifact(key)))
        found = []
        for number in (101, 102, 103):
            values, heart = draw(number)
            rows, columns = np.nonzero(heart)
            click = np.array([[columns.mean() + 0.5, rows.mean() + 0.5]])
            embedding = segmenter.embed(np.repeat(values[:, :, None], 3, 2))
            mask = segmenter.predict(embedding, Prompts(click, np.ones(1, dtype=np.int64))).mask
            found.append((mask & (heart > 0)).sum() / (mask | (heart > 0)).sum())
        return float(np.mean(found))

    assert overlap(str(finetuned["key"])) > overlap(start)


@pytest.mark.slow
def test_the_page_tells_it_from_quantization(settings: Settings, finetuned: dict[str, object]) -> None:
    models = Models(settings)
    status = Overview(models, settings, RunQueue(models.folder, {})).status()
    (one,) = [one for one in status["artifacts"] if one["key"] == finetuned["key"]]
    assert one["learned"]["labels"] == 6
    assert one["learned"]["after"] > one["learned"]["before"]
    assert [other["learned"] for other in status["artifacts"] if other is not one] == [None]
    options = one["options"]
    assert (options["sampling"], options["labels"]) == ("balanced", 6)
    assert status["runs"][0]["trainer"] == NAME


@pytest.mark.slow
def test_the_same_labels_are_learned_from_once(
    settings: Settings, store: LocalDatastore, finetuned: dict[str, object]
) -> None:
    path = ModelFolder(settings.model_dir).artifact(str(finetuned["key"]))
    before = path.stat().st_mtime_ns
    again = FinetuneTask(settings)({"max_epochs": 3}, store)
    assert (again["state"], again["key"]) == ("published", finetuned["key"])
    assert path.stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_same_labels_again_are_compared_with_what_serves_now(
    settings: Settings, store: LocalDatastore, finetuned: dict[str, object]
) -> None:
    """Another model that is as good has been chosen meanwhile: it stays."""
    folder, key = ModelFolder(settings.model_dir), str(finetuned["key"])
    artifact, other = read_artifact(folder.artifact(key)), f"{int(key, 16) ^ 1:016x}"
    write_artifact(Artifact({**artifact.header, "key": other}, artifact.tensors), folder.artifact(other))
    try:
        folder.publish(other, default_key(settings))
        again = FinetuneTask(settings)({"max_epochs": 3}, store)
        assert (again["state"], again["key"]) == ("rejected", key)
        assert "served" in again["error"]
        assert folder.published() == {"key": other, "default_key": default_key(settings)}
    finally:
        folder.artifact(other).unlink()
        folder.publish(key, default_key(settings))


@pytest.mark.slow
def test_what_is_not_better_is_not_served(
    settings: Settings, store: LocalDatastore, finetuned: dict[str, object], tmp_path: Path
) -> None:
    """One epoch from the same start is behind the three that are served."""
    before = ModelFolder(settings.model_dir).stamp()
    stats = FinetuneTask(settings)({"max_epochs": 1}, store)
    assert stats["state"] == "rejected"
    assert "better on images it did not learn from" in stats["error"]
    assert ModelFolder(settings.model_dir).stamp() == before
    assert not ModelFolder(settings.model_dir).artifact(str(stats["key"])).exists()


def test_without_labels_it_says_what_is_needed(settings: Settings, tmp_path: Path) -> None:
    fill(tmp_path / "studies", 2)
    store = LocalDatastore(str(tmp_path / "studies"), extensions=["*.png"])
    task = FinetuneTask(replace(settings, model_dir=tmp_path / "model"))
    with pytest.raises(ValueError, match="at least 2"):
        task({}, store)
    stats = task.stats()
    assert stats["state"] == "failed"
    assert "0 of the images" in stats["error"]
    assert not list((tmp_path / "model").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "word"),
    [({"bits": 6}, "bits"), ({"sampling": "all"}, "sampling"), ({"max_epochs": 0}, "max_epochs"),
     ({"epochs": 5}, "epochs"), ({"seed": -1}, "seed")],
)  # fmt: skip
def test_options_are_checked_first(settings: Settings, options: dict[str, object], word: str) -> None:
    with pytest.raises(OptionError, match=word):
        FinetuneTask(settings).accepted(options)


def test_a_server_of_6_bits_fine_tunes_8(settings: Settings) -> None:
    six = replace(settings, quantization=replace(QUICK, bits=6))
    FinetuneTask(six).accepted({})
    assert FinetuneTask(six).config()["bits"] == ["8", "auto", "4"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    fill(folder / "studies", 6)
    app = folder / "app"
    app.mkdir()
    (app / "main.py").write_text((SAMPLE_APP / "main.py").read_text())
    server = Server(app, str(folder / "studies"), folder / "server.log")
    server.start({"preset": "static", "iterations": 2, "min_fidelity": 0, "checkpoint": checkpoint(folder)})
    yield server
    server.stop()


@pytest.mark.slow
def test_from_labels_to_the_model_served_over_http(server: Server) -> None:
    """As an annotator saves them and an administrator asks; stopped once, and asked again."""
    session = server.session
    first_run(server)
    start = session.info()["models"]["dfqsam"]["serving"]["key"]
    assert "READS THE IMAGES AND LABELS" in session.info()["trainers"][NAME]["description"]
    # Nothing learns because something was saved, or because everything is trained.
    for image, label in sorted((p.stem, p) for p in Path(server.studies).with_name("labels").iterdir()):
        session.save_label(image, label, [{"name": "organ", "idx": 1}])
    answer = requests.post(f"{server.url}/train/", json={"seed": 0}, timeout=60)
    assert set(answer.json()) == {"dfqsam"}
    session.ended_run(answer.json()["dfqsam"]["result"]["id"])
    with pytest.raises(ServerAnswer, match="bits"):
        session.train(NAME, bits=5)

    stopped = session.train(NAME, max_epochs=2)

    def said() -> list[str]:
        return session.train_status().get("details", [])  # type: ignore[no-any-return]

    wait(lambda: any("reads 6 labelled images" in line for line in said()), WORK_SECONDS)
    folder = server.app / "model" / "finetuning"
    wait(lambda: any(folder.glob("*/after*.pt")), WORK_SECONDS)
    stats = session.info()["train_stats"][NAME]
    assert stats["stage"] == "learning"
    assert 0 < stats["epoch"] < stats["total_epochs"]
    session.stop_training()
    assert session.run(stopped)["state"] == "stopped"
    assert session.info()["models"]["dfqsam"]["serving"]["key"] == start

    run = session.ended_run(session.train(NAME, max_epochs=2))
    assert run["state"] == "published", run
    assert not any("picture" in line for line in said())
    assert session.settled()["model"]["key"] == run["key"]
    assert not any(folder.glob("*"))
    assert "picture" not in server.text()
