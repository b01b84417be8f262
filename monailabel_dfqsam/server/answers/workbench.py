"""What all models of the server share: the weights served, loaded volumes, embeddings, idle-time work.

Volumes and embeddings are kept in two caches, each bounded in bytes; one lock lets one embedding be computed
at a time, since a device is no faster with two. Prompting needs no lock. A request takes the model once, as
`Served`, and finishes on it.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from fastapi import HTTPException
from numpy.typing import NDArray

from monailabel_dfqsam.segmentation.embeddings import BoundedCache, CacheStats
from monailabel_dfqsam.segmentation.loading import VolumeLoader
from monailabel_dfqsam.segmentation.segmenter import Embedding
from monailabel_dfqsam.segmentation.slice_mask import write_slice_mask
from monailabel_dfqsam.segmentation.volume import Volume, Window, write_mask
from monailabel_dfqsam.server.answers.neighbours import Neighbours
from monailabel_dfqsam.server.answers.request import View
from monailabel_dfqsam.server.runs.models import Models, NoModelError, Served


@dataclass(frozen=True, eq=False)
class Shown:
    """One image as a viewer shows it, with the model that answers about it."""

    served: Served
    volume: Volume
    window: Window | None


class Workbench:
    """One a server; any thread may use it."""

    def __init__(self, models: Models, cache_mb: int) -> None:
        self.models = models
        self._volumes = VolumeLoader(cache_mb << 20)
        self._embeddings: BoundedCache[Embedding] = BoundedCache(cache_mb << 20)
        self._one_embedding = threading.Lock()
        self._neighbours = Neighbours()

    @property
    def cache_stats(self) -> CacheStats:
        """Of the embeddings."""
        return self._embeddings.stats

    def busy(self) -> AbstractContextManager[None]:
        """Within, no idle-time work begins."""
        return self._neighbours.busy()

    def served(self) -> Served:
        """The model that answers now; raises HTTPException 503 when there is none."""
        try:
            return self.models.current()
        except NoModelError as error:
            raise HTTPException(503, f"no model can be loaded: {error}") from None

    def volume(self, path: Path, name: str | None = None) -> Volume:
        """An image, read once as long as it stays in the cache; raises ImageError, which calls it `name`."""
        return self._volumes.load(path, name)

    def embed(self, shown: Shown, k: int) -> tuple[Embedding, bool]:
        """The embedding of slice k, and whether it was there when asked for."""
        return self._embeddings.get_or_compute(_key(shown, k), lambda: self._compute(shown, [k])[0])

    def embed_slices(self, shown: Shown, slices: Sequence[int]) -> list[Embedding]:
        """The embeddings of slices; those that are not cached are computed together."""
        missing = [k for k in slices if _key(shown, k) not in self._embeddings]
        made = dict(zip(missing, self._compute(shown, missing), strict=True)) if missing else {}

        def one(k: int) -> Embedding:
            # What was cached a moment ago may have been pushed out since.
            return made[k] if k in made else self._compute(shown, [k])[0]

        return [self._embeddings.get_or_compute(_key(shown, k), partial(one, k))[0] for k in slices]

    def prepare(self, shown: Shown, slices: Sequence[int]) -> None:
        """Embeds slices when nothing else is to be done, first things first; numbers outside are left out."""
        near = [k for k in slices if 0 <= k < shown.volume.shape[2]]
        self._neighbours.next([partial(self.embed, shown, k) for k in near])

    def _compute(self, shown: Shown, slices: Sequence[int]) -> list[Embedding]:
        with self._one_embedding:
            return shown.served.segmenter.embed_slices(shown.volume, slices, shown.window)


def _key(shown: Shown, k: int) -> Hashable:
    """Of the pixels that are shown, whatever has become of their file since."""
    return shown.volume.key, k, shown.window, shown.served.identity


class Clock:
    """Seconds between laps, by name, and in total."""

    def __init__(self) -> None:
        self._begin = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Ends the part called `name`; parts of one name add up."""
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def laps(self) -> dict[str, float]:
        """Seconds a part, and 'total'."""
        return {k: round(v, 6) for k, v in {**self._laps, "total": self._last - self._begin}.items()}


def write_answer(mask: NDArray[np.uint8], k: int | None, volume: Volume, view: View) -> str:
    """A mask as a temporary file, the caller's to remove.

    Args:
        mask: [I, J] uint8 of slice k, or with k None [I, J, K].
        k: 0 … K − 1, or None.
    """
    handle, file = tempfile.mkstemp(prefix="dfqsam-", suffix=view.result_extension)
    os.close(handle)
    try:
        if k is None:
            write_mask(mask, volume, file, view.result_compress, view.dtype)
        else:
            write_slice_mask(mask, k, volume, file, view.result_compress, view.dtype)
    except BaseException:
        os.unlink(file)
        raise
    return file
