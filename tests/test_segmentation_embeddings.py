"""The cache: bounded in bytes, least recently used out first, one computation a key."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monailabel_dfqsam.segmentation.embeddings import BoundedCache, CacheStats


@dataclass(frozen=True)
class Value:
    name: str
    nbytes: int


def test_a_value_is_computed_once_and_counted() -> None:
    cache: BoundedCache[Value] = BoundedCache(100)
    found = [cache.get_or_compute("a", lambda: Value("a", 40)) for _ in range(3)]
    made = [value for value, _ in found]
    assert [there for _, there in found] == [False, True, True]
    assert made[0] is made[1] is made[2]
    assert cache.stats == CacheStats(hits=2, misses=1, bytes=40)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 40)), max_size=60))
def test_it_holds_what_a_slow_list_would_hold(requests: list[tuple[int, int]]) -> None:
    limit = 64
    cache: BoundedCache[Value] = BoundedCache(limit)
    model: list[Value] = []  # oldest first
    for key, size in requests:
        computed: list[int] = []

        def compute(key: int = key, size: int = size, computed: list[int] = computed) -> Value:
            computed.append(key)
            return Value(str(key), size)

        value, there = cache.get_or_compute(key, compute)
        known = [v for v in model if v.name == str(key)]
        assert bool(computed) == (not known) == (not there)
        model = [v for v in model if v.name != str(key)] + [value]
        while sum(v.nbytes for v in model) > limit:
            model.pop(0)
        assert cache.stats.bytes == sum(v.nbytes for v in model) <= limit


def test_a_value_too_large_is_handed_out_and_pushes_nothing_out() -> None:
    cache: BoundedCache[Value] = BoundedCache(10)
    cache.get_or_compute("small", lambda: Value("small", 8))
    assert cache.get_or_compute("large", lambda: Value("large", 11))[0].nbytes == 11
    cache.get_or_compute("small", lambda: pytest.fail("was pushed out"))
    assert cache.stats.bytes == 8


def test_threads_that_ask_together_wait_for_one_computation() -> None:
    cache: BoundedCache[Value] = BoundedCache(100)
    calls: list[int] = []
    together = threading.Barrier(8)

    def slow() -> Value:
        calls.append(1)
        time.sleep(0.05)
        return Value("a", 1)

    def ask(_: int) -> Value:
        together.wait()
        value, there = cache.get_or_compute("a", slow)
        assert not there  # all of them asked before it was
        return value

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(ask, range(8)))
    assert len(calls) == 1
    assert all(result is results[0] for result in results)
    assert cache.stats == CacheStats(hits=7, misses=1, bytes=1)


def test_another_key_is_not_held_up() -> None:
    cache: BoundedCache[Value] = BoundedCache(100)
    started, release = threading.Event(), threading.Event()

    def blocked() -> Value:
        started.set()
        assert release.wait(10)
        return Value("a", 1)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.get_or_compute, "a", blocked)
        assert started.wait(10)
        assert cache.get_or_compute("b", lambda: Value("b", 1))[0].name == "b"
        release.set()
        assert waiting.result(10)[0].name == "a"


def test_a_failure_is_not_kept_and_those_who_waited_compute_anew() -> None:
    cache: BoundedCache[Value] = BoundedCache(100)
    started, release = threading.Event(), threading.Event()

    def fails() -> Value:
        started.set()
        assert release.wait(10)
        raise RuntimeError("no memory")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get_or_compute, "a", fails)
        assert started.wait(10)
        second = pool.submit(cache.get_or_compute, "a", lambda: Value("a", 1))
        release.set()
        with pytest.raises(RuntimeError, match="no memory"):
            first.result(10)
        assert second.result(10)[0].name == "a"
    assert cache.get_or_compute("a", lambda: pytest.fail("computed again"))[0].name == "a"
