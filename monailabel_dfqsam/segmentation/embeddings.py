"""A cache bounded in bytes, for image embeddings and for loaded volumes.

Any thread may call it at any time. One lock guards the table and is never held while a value is computed:
a thread that asks for a key which another one is computing waits for that one instead of computing it too.
Entries live until newer ones push them out, least recently used first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What can be cached: it knows the memory it holds."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""


V = TypeVar("V", bound=Sized)


@dataclass(frozen=True)
class CacheStats:
    """hits: requests answered without computing, waiting included; misses: the others; bytes: held now."""

    hits: int
    misses: int
    bytes: int


class BoundedCache(Generic[V]):
    """Least-recently-used values of at most `max_bytes` together.

    A value larger than that on its own is handed out and not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"a cache's size must not be negative, not {max_bytes}")
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._computing: dict[Hashable, threading.Event] = {}
        self._bytes = self._hits = self._misses = 0

    def get_or_compute(self, key: Hashable, compute: Callable[[], V]) -> tuple[V, bool]:
        """The value of `key`, and whether it was here when asked for; `compute()` makes it when it is not.

        `compute` runs once for all threads that ask meanwhile. What it raises goes to its own caller and is
        not kept: each of the others, in turn, computes anew. It must not ask for the same key itself.
        """
        waited: threading.Event | None = None
        while True:
            with self._lock:
                if key in self._values:
                    self._values.move_to_end(key)
                    self._hits += 1
                    return self._values[key], waited is None
                waited = self._computing.get(key)
                if waited is None:
                    self._computing[key] = threading.Event()
                    self._misses += 1
                    break
            waited.wait()
        try:
            value = compute()
            self._store(key, value)
            return value, False
        finally:
            with self._lock:
                self._computing.pop(key).set()

    def __contains__(self, key: Hashable) -> bool:
        """Whether a value is here now."""
        with self._lock:
            return key in self._values

    @property
    def stats(self) -> CacheStats:
        """Counts since it was made, and the bytes held now."""
        with self._lock:
            return CacheStats(self._hits, self._misses, self._bytes)

    def _store(self, key: Hashable, value: V) -> None:
        if value.nbytes > self._max_bytes:
            return
        with self._lock:
            self._values[key] = value
            self._bytes += value.nbytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._values.popitem(last=False)[1].nbytes
