"""MONAI Label's routes in worker threads, and what such a thread may wait for.

Upstream's handlers are coroutines that await nothing: one that fetches a series from an archive holds up
every other request. `leave_loop` makes plain functions of them, which FastAPI runs in its threads. Threads
are few, so a request waits for a lock only so long, and only a few requests wait at once for what is slow:
the next one is refused, and threads are left for clicks. Other threads and processes wait for as long as
it takes.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, cast

from fastapi import APIRouter, params
from fastapi.routing import APIRoute
from filelock import BaseFileLock, Timeout

from monailabel_dfqsam.server.gate.guard import Refusal

WAITING = 16
"""Requests that wait at once for something slow, of the 40 that have a thread."""

LOCK_SECONDS = 20.0
"""How long a request waits for a lock that is held for milliseconds."""
_SOON_SECONDS = 0.5  # a change of the record takes milliseconds, and needs no place among the few
# They read the body of their request on the loop, and take a thread themselves.
_ON_THE_LOOP = frozenset({"monailabel.endpoints.proxy"})

_places = threading.BoundedSemaphore(WAITING)
_here = threading.local()


def leave_loop(router: APIRouter) -> None:
    """Replaces the routes of MONAI Label in a router, and in those that it includes."""
    for place, route in enumerate(router.routes):
        included = getattr(route, "original_router", None)  # FastAPI keeps included routers whole, or did not
        if included is not None:
            leave_loop(included)
        elif isinstance(route, APIRoute) and _is_theirs(route.endpoint):
            given = inspect.signature(APIRoute.__init__).parameters
            same = {name: getattr(route, name) for name in given if hasattr(route, name)}
            move = _stay if route.endpoint.__module__ in _ON_THE_LOOP else off_loop
            router.routes[place] = APIRoute(**{**same, "endpoint": move(route.endpoint)})


def off_loop(handler: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    """A plain function with the parameters of a coroutine function that awaits nothing.

    Its dependencies that are such functions become plain ones, too.
    """

    def in_thread(*arguments: Any, **options: Any) -> Any:
        with _in_request():
            return finished(handler(*arguments, **options))

    return _in_place_of(handler, in_thread)


def finished(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that awaits nothing; raises RuntimeError for one that does."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError("a handler outside the event loop waits for it")


@contextmanager
def slow(what: str) -> Iterator[None]:
    """One of the few places to wait for `what`, in a request; raises Refusal 503 when all are taken."""
    if not _is_request() or _here.waits:
        yield
        return
    if not _places.acquire(blocking=False):
        raise Refusal(503, f"{WAITING} requests wait for {what} already: try again in a moment")
    _here.waits = True
    try:
        yield
    finally:
        _here.waits = False
        _places.release()


@contextmanager
def holding(
    lock: BaseFileLock, what: str, seconds: float = LOCK_SECONDS, poll_seconds: float = 0.05
) -> Iterator[None]:
    """Holds a lock; in a request, raises Refusal 503 when others do not let go of it within `seconds`."""
    try:
        if not _is_request():
            lock.acquire(poll_interval=poll_seconds)
        else:
            _acquire_soon(lock, what, seconds, poll_seconds)
    except Timeout:
        raise Refusal(
            503,
            f"others have kept {what} busy for {seconds:.0f} s: nothing was done, try again in a moment",
        ) from None
    try:
        yield
    finally:
        lock.release()


def _acquire_soon(lock: BaseFileLock, what: str, seconds: float, poll_seconds: float) -> None:
    try:
        lock.acquire(timeout=_SOON_SECONDS, poll_interval=poll_seconds)
    except Timeout:
        with slow(what):
            lock.acquire(timeout=seconds, poll_interval=poll_seconds)


@contextmanager
def _in_request() -> Iterator[None]:
    _here.request, _here.waits = True, False
    try:
        yield
    finally:
        _here.request = False


def _is_request() -> bool:
    return getattr(_here, "request", False)


def _stay(handler: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    """A handler as it is, but for its dependencies."""

    async def on_loop(*arguments: Any, **options: Any) -> Any:
        return await handler(*arguments, **options)

    return _in_place_of(handler, on_loop)


def _in_place_of(handler: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """`other` with the name and parameters of a handler; dependencies leave the loop."""
    # Not by `functools.wraps`, after which FastAPI looks at the handler within.
    signature = inspect.signature(handler)
    parameters = [
        parameter.replace(default=_plain(parameter.default)) for parameter in signature.parameters.values()
    ]
    other.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    other.__name__ = getattr(handler, "__name__", type(handler).__name__)
    other.__module__, other.__doc__ = handler.__module__, handler.__doc__
    return other


def _is_theirs(handler: Any) -> bool:
    """Whether a route or dependency is a coroutine function of MONAI Label."""
    if not getattr(handler, "__module__", "").startswith("monailabel."):
        return False
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__)


def _plain(default: Any) -> Any:
    if not isinstance(default, params.Depends) or not _is_theirs(default.dependency):
        return default
    changed = copy.copy(default)
    # A frozen dataclass in newer versions of FastAPI.
    object.__setattr__(changed, "dependency", off_loop(cast(Any, default.dependency)))
    return changed
