"""Handlers outside the event loop, and how long and how many of them wait."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi.testclient import TestClient
from filelock import FileLock

from monailabel_dfqsam.server.gate.guard import Refusal
from monailabel_dfqsam.server.upstream.threads import WAITING, finished, holding, leave_loop, off_loop, slow


async def _who(name: str = "anyone") -> str:
    return f"{name} in {threading.current_thread().name}"


async def _answer(n: int, who: str = Depends(_who)) -> dict[str, Any]:
    return {"n": n, "who": who, "here": threading.current_thread().name}


async def _waiting() -> str:
    await asyncio.sleep(0)
    return "done"


for function in (_who, _answer):
    function.__module__ = "monailabel.endpoints.made_up"


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_routes_of_monai_label_leave_the_loop_with_their_dependencies(prefix: str) -> None:
    router = APIRouter(prefix="/things", tags=["Things"])
    router.add_api_route("/{n}", _answer, methods=["POST"], summary="Of a thing")
    app = FastAPI()
    app.include_router(router, prefix=prefix)
    leave_loop(app.router)
    with TestClient(app) as client:
        answer = client.post(f"{prefix}/things/3?name=somebody").json()
        described = client.get("/openapi.json").json()["paths"][f"{prefix}/things/{{n}}"]["post"]
        assert client.post(f"{prefix}/things/x").status_code == 422
    assert answer["n"] == 3
    assert answer["who"].startswith("somebody in AnyIO worker thread")
    assert answer["here"].startswith("AnyIO worker thread")
    assert (described["summary"], described["tags"]) == ("Of a thing", ["Things"])
    assert {parameter["name"] for parameter in described["parameters"]} == {"n", "name"}


def test_other_routes_stay_where_they_are() -> None:
    app = FastAPI()
    app.add_api_route("/", _waiting)
    leave_loop(app.router)
    with TestClient(app) as client:
        assert client.get("/").json() == "done"


def test_a_handler_that_waits_for_the_loop_is_refused() -> None:
    with pytest.raises(RuntimeError, match="event loop"):
        finished(_waiting())


def test_the_parameters_are_kept() -> None:
    kept = inspect.signature(off_loop(_answer)).parameters
    assert list(kept) == ["n", "who"]
    assert kept["n"].annotation == inspect.signature(_answer).parameters["n"].annotation


def in_request(work: Callable[[], Any]) -> Any:
    """What `work` answers in a handler."""

    async def handler() -> Any:
        return work()

    return off_loop(handler)()


def test_only_so_many_requests_wait_for_something_slow() -> None:
    release, inside = threading.Event(), threading.Barrier(WAITING + 1)

    def wait() -> None:
        with slow("the archive"), slow("the archive"):  # the second is the same place
            inside.wait()
            release.wait()

    threads = [threading.Thread(target=in_request, args=(wait,)) for _ in range(WAITING)]
    for thread in threads:
        thread.start()
    inside.wait()

    def one_more() -> str:
        with slow("the archive"):
            return "waited"

    with pytest.raises(Refusal, match=f"{WAITING} requests wait for the archive") as refused:
        in_request(one_more)
    assert refused.value.status == 503
    assert one_more() == "waited"  # no request: it holds no thread of theirs
    release.set()
    for thread in threads:
        thread.join()
    assert in_request(one_more) == "waited"


def test_a_request_does_not_wait_for_ever_for_a_lock(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(tmp_path / "lock"):
            held.set()
            release.wait()

    def change() -> str:
        with holding(lock, "the record", seconds=0.1):
            return "changed"

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with pytest.raises(Refusal, match="others have kept the record busy") as refused:
        in_request(change)
    assert refused.value.status == 503
    release.set()
    holder.join()
    assert in_request(change) == "changed"
    assert not lock.is_locked
