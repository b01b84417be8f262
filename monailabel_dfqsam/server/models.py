"""Which model answers: full precision until an artifact is published, then the artifact, swapped atomically.

The folder, shared by the server and the quantization process:

    {key}.safetensors   an artifact, whole or absent (written in `building/`, then renamed)
    report.html         the report of the artifact published last
    current.json        names the artifact to serve; replaced in one step, this is what publishes
    progress.json       how far the quantization is; replaced in one step
    building/           where the quantization process writes; what it left there is removed at the next start

`Models` belongs to the server. One lock guards which model is served; a request takes the model once and
finishes on it, whatever is published meanwhile.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from monailabel_dfqsam.artifact import ArtifactError, read_artifact, read_header
from monailabel_dfqsam.sam import build, read_checkpoint
from monailabel_dfqsam.sam.checkpoint import file_sha256
from monailabel_dfqsam.segmentation.segmenter import Segmenter, full_precision_segmenter, load_segmenter
from monailabel_dfqsam.server.settings import Settings

logger = logging.getLogger(__name__)

FULL_PRECISION = "full precision"


class ModelFolder:
    """The files above; safe between processes, since every file appears in one step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def building(self) -> Path:
        """Where an artifact is made before it is moved into place."""
        return self.path / "building"

    @property
    def report(self) -> Path:
        """The report of the artifact published last."""
        return self.path / "report.html"

    def artifact(self, key: str) -> Path:
        """The artifact of a key, whether or not it exists."""
        return self.path / f"{key}.safetensors"

    def prepare(self) -> None:
        """Makes the folder and removes what an interrupted quantization left."""
        self.path.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.building, ignore_errors=True)
        for partial in self.path.glob(".*.partial"):
            partial.unlink(missing_ok=True)

    def publish(self, key: str, default_key: str) -> None:
        """Names the artifact to serve.

        Args:
            key: of an artifact that is in place.
            default_key: of the server's own configuration; a later start with another one follows that.
        """
        self._replace(self.path / "current.json", {"key": key, "default_key": default_key})

    def published(self) -> dict[str, str] | None:
        """What `publish` was last given, or None; a damaged file counts as none."""
        found = self._read(self.path / "current.json")
        return found if isinstance(found.get("key"), str) else None

    def stamp(self) -> tuple[int, int] | None:
        """Changes whenever something is published: (mtime in ns, bytes) of current.json."""
        try:
            status = (self.path / "current.json").stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_size

    def write_progress(self, values: Mapping[str, Any]) -> None:
        """Keeps progress for `read_progress` in any process."""
        self._replace(self.path / "progress.json", values)

    def read_progress(self) -> dict[str, Any]:
        """The progress last written, or an empty dict."""
        return self._read(self.path / "progress.json")

    def _replace(self, path: Path, values: Mapping[str, Any]) -> None:
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(values))
        os.replace(partial, path)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Served:
    """A model that answers.

    Attributes:
        segmenter: the model.
        identity: tells its embeddings from another's: the artifact's key, or `FULL_PRECISION`.
        engine: what runs its image encoder.
        fidelity: mean mask IoU with full precision, None for full precision itself.
    """

    segmenter: Segmenter
    identity: str
    engine: str
    fidelity: float | None = None


class Models:
    """The server's models; cheap to make, loads on `start` or at the first request."""

    def __init__(self, settings: Settings) -> None:
        self.folder = ModelFolder(settings.model_dir)
        self._settings = settings
        self._lock = threading.RLock()
        self._served: Served | None = None
        self._stamp: tuple[int, int] | None = None
        self._loading = False

    def start(self, quantize: Callable[[], None]) -> None:
        """Loads in the background, so that the server answers at once.

        Args:
            quantize: called when no artifact for this checkpoint and configuration is there and usable.
        """

        def work() -> None:
            try:
                self.current()
                if self._settings.quantize and not self._ready():
                    quantize()
            except Exception as error:
                logger.error("No model can be served: %s", error)

        threading.Thread(target=work, name="dfqsam-models", daemon=True).start()

    def current(self) -> Served:
        """The model to answer with; the first call loads it, later ones notice what was published.

        Raises:
            ValueError: when neither an artifact nor the checkpoint can be read.
        """
        with self._lock:
            stamp = self.folder.stamp()
            if self._served is None:
                self._stamp = stamp
                self._served = self._load_first()
            elif stamp != self._stamp and not self._loading:
                self._stamp, self._loading = stamp, True
                threading.Thread(target=self._swap, name="dfqsam-swap", daemon=True).start()
            return self._served

    def describe(self) -> dict[str, Any]:
        """What `/info/` says about the model served; it does not wait for the first one to load."""
        if self._served is None:
            return {"model": "loading", "engine": "", "fidelity": None}
        served = self.current()
        return {"model": served.segmenter.name, "engine": served.engine, "fidelity": served.fidelity}

    def default_key(self) -> str:
        """The key of the artifact that this server's own configuration makes."""
        return self._settings.quantization.key(file_sha256(self._settings.checkpoint))

    def _load_first(self) -> Served:
        default_key = self.default_key()
        published = self.folder.published() or {}
        # A choice made under another configuration, checkpoint included, does not outlive it.
        chosen = published.get("key") if published.get("default_key") == default_key else None
        for key in dict.fromkeys((chosen, default_key)):
            if key is not None and self.folder.artifact(key).is_file():
                served = self._try_artifact(key)
                if served is not None:
                    return served
        checkpoint = read_checkpoint(self._settings.checkpoint, self._settings.variant)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        logger.info("Serving %s in full precision", checkpoint.variant.name)
        return Served(full_precision_segmenter(build(checkpoint).to(device)), FULL_PRECISION, "torch")

    def _ready(self) -> bool:
        """Whether quantizing again would make nothing new."""
        path = self.folder.artifact(self.default_key())
        if self._served is not None and self._served.identity == path.stem:
            return True
        try:
            read_artifact(path)  # of too low a fidelity perhaps, but it would come out the same
        except ArtifactError:
            return False
        return True

    def _try_artifact(self, key: str) -> Served | None:
        """The artifact's model; None, with one line in the log, when it cannot or must not be served."""
        path = self.folder.artifact(key)
        try:
            fidelity = float(read_header(path)["fidelity"]["mean_iou"])
            if not fidelity >= self._settings.min_fidelity:
                logger.warning(
                    "Not serving %s: its fidelity %.3f is below %.3f",
                    path.name,
                    fidelity,
                    self._settings.min_fidelity,
                )
                return None
            segmenter = load_segmenter(read_artifact(path))
        except (ValueError, KeyError, TypeError) as error:  # ArtifactError is a ValueError
            logger.error("Refused the quantized model: %s", error)
            return None
        engine = segmenter.name.partition("(")[2].rstrip(")")
        logger.info("Serving %s, fidelity %.3f", segmenter.name, fidelity)
        return Served(segmenter, key, engine, fidelity)

    def _swap(self) -> None:
        try:
            published = self.folder.published()
            served = self._try_artifact(published["key"]) if published else None
            if served is not None:
                self._served = served
        finally:
            with self._lock:
                self._loading = False
