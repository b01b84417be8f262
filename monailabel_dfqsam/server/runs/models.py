"""Which model answers: full precision until an artifact is published, then the artifact, swapped atomically.

`Models` belongs to the server. One lock guards which model answers, another lets one change of it happen at a
time. A request takes the model once and finishes on it.

The model that is wanted may fail to load, for want of memory say. Then the model that answered goes on, or
full precision at the start, and the next request after `RETRY_SECONDS` tries again.
"""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from monailabel_dfqsam.agreement import Fidelity, in_words, shortfall
from monailabel_dfqsam.artifact import ArtifactError, read_artifact
from monailabel_dfqsam.memory import MemoryShortage, shortage_told
from monailabel_dfqsam.sam import build, read_checkpoint
from monailabel_dfqsam.segmentation.engine_race import load_fastest
from monailabel_dfqsam.segmentation.segmenter import Segmenter, full_precision_segmenter
from monailabel_dfqsam.server.runs.folder import ModelFolder, default_key, is_key
from monailabel_dfqsam.server.settings import Settings

logger = logging.getLogger(__name__)

FULL_PRECISION = "full precision"

RETRY_SECONDS = 30.0

# Speed is the median of so many answers, so that it forgets what else the machine did earlier.
_ANSWERS = 200


class ChoiceError(ValueError):
    """An artifact that cannot be served; the message says why."""


class NoModelError(Exception):
    """No model can answer now; the message says why."""


class Speed:
    """Seconds that one model's last answers took; any thread may call it."""

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
        identity: the artifact's key, or `FULL_PRECISION`; embeddings are kept by it.
        engine: what runs its image encoder.
        fidelity: agreement with full precision, None for full precision itself.
        preset: the preset by which it was quantized; None where it was no preset's.
        speed: of its answers since the server began.
    """

    segmenter: Segmenter
    identity: str
    engine: str
    fidelity: Fidelity | None = None
    preset: str | None = None
    speed: Speed = field(default_factory=Speed)

    @property
    def key(self) -> str | None:
        """The artifact's, None for full precision."""
        return None if self.identity == FULL_PRECISION else self.identity


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
        self._stamp: tuple[int, ...] | None = None
        self._wanted: str | None = None  # the artifact that should answer; None while there is none
        self._retry_at = -math.inf  # on the monotonic clock; no load is tried before
        self._problem = ""
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
            except NoModelError:
                pass  # said already
            except Exception:
                logger.exception("No model is made at the start")
            self._is_started = True

        threading.Thread(target=work, name="dfqsam-models", daemon=True).start()

    def current(self) -> Served:
        """The model to answer with; the first call loads it, later ones notice what was published.

        Raises:
            NoModelError: when neither an artifact nor the checkpoint can be loaded.
        """
        with self._lock:
            if self._served is None:
                self._served = self._first()
            elif not self._loading and self._is_due(self._served):
                self._loading = True
                try:
                    threading.Thread(target=self._swap, name="dfqsam-swap", daemon=True).start()
                except RuntimeError as error:  # the system has no thread left
                    self._loading = False
                    self._failed(error)
            return self._served

    def choose(self, key: str) -> Served:
        """Serves an artifact of the folder from now on; later starts with the same configuration do so too.

        Args:
            key: of an artifact, as the folder's `keys_kept` says.

        Returns:
            The model, checked and loaded, which answers from now on.

        Raises:
            ChoiceError: when it is not there, damaged, of too low a fidelity or cannot be loaded, or when the
                choice cannot be written down; then nothing changes.
        """
        if not is_key(key):
            raise ChoiceError("a model is named by its key, 16 hexadecimal digits")
        with self._changing:
            try:
                served = self._load(key)
            except Exception as error:  # engines are libraries: any of them may raise anything
                logger.info("The model chosen was not loaded", exc_info=True)
                raise ChoiceError(f"the model cannot be served: {_sentence(error)}") from None
            try:
                stamp = self.folder.publish(key, self._own_key or default_key(self._settings))
            except (ValueError, OSError) as error:
                raise ChoiceError(f"the choice cannot be kept: {_sentence(error)}") from None
            with self._lock:
                self._served, self._stamp, self._wanted, self._problem = served, stamp, key, ""
        logger.info("Serving %s by choice", served.segmenter.name)
        return served

    def served(self) -> Served | None:
        """The model that answers; None while the first one loads, for which this does not wait."""
        return None if self._served is None else self.current()

    def is_changing(self) -> bool:
        """Whether another model may answer soon: one is being loaded, or the start is not over.

        A start that quantizes has begun the run before this becomes false.
        """
        self.served()  # notices what was published
        return self._loading or not self._is_started

    @property
    def problem(self) -> str:
        """Why the model that is wanted does not answer, a sentence; "" where it does."""
        return self._problem

    def describe(self) -> dict[str, Any]:
        """What `/info/` says about the model served; it does not wait for the first one to load."""
        served = self.served()
        told: dict[str, Any] = {"problem": self.problem}
        if served is None:
            return {**told, "model": "loading", "engine": "", "fidelity": None, "preset": None, "key": None}
        return {
            **told,
            "model": served.segmenter.name,
            "engine": served.engine,
            "fidelity": served.fidelity,
            "preset": served.preset,
            "key": served.key,
        }

    @property
    def own_key(self) -> str | None:
        """The `default_key` when the first model was loaded; None until then."""
        return self._own_key

    def _first(self) -> Served:
        """The first model: an artifact, or else full precision; raises NoModelError."""
        if time.monotonic() < self._retry_at:
            raise NoModelError(self._problem)
        try:
            self._stamp = self.folder.stamp()
            own = self._own_key = default_key(self._settings)
            keys = dict.fromkeys((self.folder.chosen(own), own))
            present = [key for key in keys if self.folder.artifact(key).is_file()]
            self._wanted = next(iter(present), None)
            published = self.folder.published()
            if published is not None and published.get("default_key") != own:
                logger.info("The model served earlier was chosen under other settings, or by another version")
            found = (self._load_or_say(key) for key in present)
            return next((served for served in found if served), None) or self._full_precision()
        except Exception as error:  # of a checkpoint, of torch, of a GPU's driver
            self._failed(error)
            raise NoModelError(self._problem) from None

    def _full_precision(self) -> Served:
        with shortage_told("the model in full precision"):
            checkpoint = read_checkpoint(self._settings.checkpoint, self._settings.variant)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            segmenter = full_precision_segmenter(build(checkpoint).to(device))
        logger.info("Serving %s in full precision", checkpoint.variant.name)
        return Served(segmenter, FULL_PRECISION, "torch")

    def _ready(self) -> bool:
        """Whether there is nothing to quantize at the start."""
        if self._served is not None and self._served.key:
            return True  # the own configuration's, or one chosen instead of it
        try:
            # Of too low a fidelity perhaps, but it would come out the same; or it is loaded later.
            own = default_key(self._settings)
            read_artifact(self.folder.artifact(own), own)
        except ArtifactError:
            return False
        return True

    def _load(self, key: str) -> Served:
        """The artifact's model.

        Raises:
            _FidelityError: when its fidelity is below the server's threshold.
            ArtifactError: when it is damaged, or another one under this name.
            Exception: whatever an engine raises that cannot be loaded.
        """
        path = self.folder.artifact(key)
        with shortage_told("the quantized model"):
            artifact = read_artifact(path, key)
            fidelity = artifact.header["fidelity"]
            if low := shortfall(fidelity, self._settings.min_fidelity):
                raise _FidelityError(f"{path.name}: {low}")
            segmenter, race = load_fastest(artifact, path.with_suffix(".engines.json"))
        speed = self._speeds.setdefault(key, Speed())
        return Served(segmenter, key, race.winner.value, fidelity, artifact.header.get("preset"), speed)

    def _load_or_say(self, key: str) -> Served | None:
        """The artifact's model; None, with a line in the log, when it cannot or must not be served."""
        try:
            served = self._load(key)
        except Exception as error:  # engines are libraries: any of them may raise anything
            self._failed(error)
            return None
        if key == self._wanted:
            self._problem = ""
        assert served.fidelity is not None  # an artifact's
        logger.info("Serving %s, fidelity %s", served.segmenter.name, in_words(served.fidelity))
        return served

    def _failed(self, error: Exception) -> None:
        """Keeps why a model was not loaded, and when to try again; the log says it once."""
        sentence, known = _sentence(error), self._problem
        is_final = isinstance(error, _FidelityError)
        self._problem, self._retry_at = sentence, math.inf if is_final else time.monotonic() + RETRY_SECONDS
        if sentence == known:
            return
        if is_final:
            logger.warning("Not served: %s", sentence)
        elif isinstance(error, ArtifactError):
            logger.error("Refused the quantized model: %s", sentence)
        else:
            logger.error("A model cannot be loaded: %s", sentence, exc_info=not isinstance(error, ValueError))

    def _is_due(self, served: Served) -> bool:
        """Whether the artifact wanted is to be loaded now: published since, or some time after it failed."""
        stamp = self.folder.stamp()
        if stamp != self._stamp:
            published = self.folder.published()
            self._stamp = stamp
            if published is not None:
                self._wanted, self._retry_at = published["key"], -math.inf
        wanted = self._wanted is not None and self._wanted != served.identity
        return wanted and time.monotonic() >= self._retry_at

    def _swap(self) -> None:
        try:
            with self._changing:
                key = self._wanted
                if key is None or (self._served and self._served.identity == key):
                    return
                served = self._load_or_say(key)
                if served is not None:
                    self._served = served
        finally:
            with self._lock:
                self._loading = False


class _FidelityError(ValueError):
    """An artifact that agrees too little with full precision."""


def _sentence(error: Exception) -> str:
    """An error for a person; a library's own words, which may name folders, go to the log alone."""
    if isinstance(error, ValueError | MemoryShortage):
        return str(error)
    if isinstance(error, MemoryError):
        return "memory ran out"
    if isinstance(error, OSError) and error.strerror:
        return f"a file cannot be read or written: {error.strerror}"
    return f"its engine does not start ({type(error).__name__}); the server's log says why"
