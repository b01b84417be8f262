"""Which model answers: full precision until an artifact is published, then the artifact, swapped atomically.

`Models` belongs to the server. One lock guards which model is served, another lets one change of it happen
at a time; a request takes the model once and finishes on it, whatever is published or chosen meanwhile.
"""

from __future__ import annotations

import logging
import statistics
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from monailabel_dfqsam.artifact import ArtifactError, read_artifact, read_header
from monailabel_dfqsam.sam import build, read_checkpoint
from monailabel_dfqsam.sam.checkpoint import file_sha256
from monailabel_dfqsam.segmentation.engine_race import load_fastest
from monailabel_dfqsam.segmentation.segmenter import Segmenter, full_precision_segmenter
from monailabel_dfqsam.server.runs.folder import ModelFolder, is_key
from monailabel_dfqsam.server.settings import Settings

logger = logging.getLogger(__name__)

FULL_PRECISION = "full precision"

_ANSWERS = 200  # of which speed is the median: as many as one works through, so that old load is forgotten


class ChoiceError(ValueError):
    """An artifact that cannot be served; the message says why."""


class Speed:
    """How long one model took for its last answers; safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = {kind: deque[float](maxlen=_ANSWERS) for kind in ("embed", "click")}

    def count(self, latencies: Mapping[str, float], cached: bool) -> None:
        """Counts one answer.

        Args:
            latencies: seconds by stage, 'embed' and 'total' among them.
            cached: whether the embedding was there already: then it was nothing but a click.
        """
        with self._lock:
            if cached:
                self._seconds["click"].append(latencies["total"])
            else:
                self._seconds["embed"].append(latencies["embed"])

    def summary(self) -> dict[str, dict[str, float] | None]:
        """Of 'embed', a slice, and 'click', on an embedded one: median `seconds` of `count`, or None."""
        with self._lock:
            kinds = {kind: list(seconds) for kind, seconds in self._seconds.items()}
        return {
            kind: {"seconds": statistics.median(seconds), "count": len(seconds)} if seconds else None
            for kind, seconds in kinds.items()
        }


@dataclass(frozen=True)
class Served:
    """A model that answers.

    Attributes:
        segmenter: the model.
        identity: tells its embeddings from another's: the artifact's key, or `FULL_PRECISION`.
        engine: what runs its image encoder.
        fidelity: mean mask IoU with full precision, None for full precision itself.
        preset: by which it was quantized, None for any other way.
        speed: of its answers since the server began.
    """

    segmenter: Segmenter
    identity: str
    engine: str
    fidelity: float | None = None
    preset: str | None = None
    speed: Speed = field(default_factory=Speed)


class Models:
    """The server's models; cheap to make, loads on `start` or at the first request."""

    def __init__(self, settings: Settings) -> None:
        self.folder = ModelFolder(settings.model_dir)
        self._settings = settings
        self._lock = threading.RLock()
        self._changing = threading.Lock()  # taken before `_lock`
        self._served: Served | None = None
        self._own_key: str | None = None
        self._speeds: dict[str, Speed] = {}  # by key, so that a model chosen back goes on with its own
        self._stamp: tuple[int, int] | None = None
        self._loading = False
        self._is_started = False

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
            self._is_started = True

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

    def choose(self, key: str) -> Served:
        """Serves an artifact of the folder from now on; later starts with the same configuration do so too.

        Args:
            key: of an artifact, as the folder's `keys_kept` says.

        Returns:
            The model, checked and loaded, which answers from now on.

        Raises:
            ChoiceError: when it is not there, damaged, or of too low a fidelity; then nothing changes.
        """
        if not is_key(key):
            raise ChoiceError("a model is named by its key, 16 hexadecimal digits")
        with self._changing:
            try:
                served = self._load(key)
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise ChoiceError(f"the model cannot be served: {error}") from None
            stamp = self.folder.publish(key, self.default_key())
            with self._lock:
                self._served, self._stamp = served, stamp
        logger.info("Serving %s by choice", served.segmenter.name)
        return served

    def served(self) -> Served | None:
        """The model that answers; None while the first one loads, for which this does not wait."""
        return None if self._served is None else self.current()

    def is_changing(self) -> bool:
        """Whether another model may answer soon without anybody asking for more: the first one loads, or a
        published one; a start that quantizes has asked for it when this becomes false.
        """
        self.served()  # notices what was published
        return self._loading or not self._is_started

    def describe(self) -> dict[str, Any]:
        """What `/info/` says about the model served; it does not wait for the first one to load."""
        served = self.served()
        if served is None:
            return {"model": "loading", "engine": "", "fidelity": None, "preset": None, "key": None}
        return {
            "model": served.segmenter.name,
            "engine": served.engine,
            "fidelity": served.fidelity,
            "preset": served.preset,
            "key": None if served.identity == FULL_PRECISION else served.identity,
        }

    @property
    def own_key(self) -> str | None:
        """`default_key` as it was when the first model was loaded; None until then."""
        return self._own_key

    def default_key(self) -> str:
        """The key of the artifact that this server's own configuration makes."""
        return self._settings.quantization.key(file_sha256(self._settings.checkpoint))

    def _load_first(self) -> Served:
        default_key = self._own_key = self.default_key()
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
        """Whether there is nothing to quantize at the start."""
        if self._served is not None and self._served.identity != FULL_PRECISION:
            return True  # the own configuration's, or one chosen instead of it
        try:
            # Of too low a fidelity perhaps, but it would come out the same.
            read_artifact(self.folder.artifact(self.default_key()))
        except ArtifactError:
            return False
        return True

    def _load(self, key: str) -> Served:
        """The artifact's model.

        Raises:
            _FidelityError: when its fidelity is below the server's threshold.
            ValueError, KeyError, TypeError: when it cannot be read or run.
        """
        path = self.folder.artifact(key)
        header = read_header(path)
        fidelity = float(header["fidelity"]["mean_iou"])
        least = self._settings.min_fidelity
        if not fidelity >= least:
            raise _FidelityError(f"the fidelity of {path.name}, {fidelity:.3f}, is below {least:.3f}")
        segmenter, race = load_fastest(read_artifact(path), path.with_suffix(".engines.json"))
        speed = self._speeds.setdefault(key, Speed())
        return Served(segmenter, key, race.winner.value, fidelity, header.get("preset"), speed)

    def _try_artifact(self, key: str) -> Served | None:
        """The artifact's model; None, with one line in the log, when it cannot or must not be served."""
        try:
            served = self._load(key)
        except _FidelityError as error:
            logger.warning("Not served: %s", error)
            return None
        except (ValueError, KeyError, TypeError) as error:  # ArtifactError is a ValueError
            logger.error("Refused the quantized model: %s", error)
            return None
        logger.info("Serving %s, fidelity %.3f", served.segmenter.name, served.fidelity)
        return served

    def _swap(self) -> None:
        try:
            with self._changing:
                published = self.folder.published()
                if published is None or (self._served and self._served.identity == published["key"]):
                    return
                served = self._try_artifact(published["key"])
                if served is not None:
                    self._served = served
        finally:
            with self._lock:
                self._loading = False


class _FidelityError(ValueError):
    """An artifact that agrees too little with full precision."""
