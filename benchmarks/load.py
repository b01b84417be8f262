"""Many annotators at once: do all of them get the right answer, how long do they wait, does memory grow.

Each client clicks on a volume of its own, one click after the other without a pause, while the server also
quantizes anew and swaps the model. Every mask is compared with that of the same click alone on the same
model, before or after.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests

from monailabel_dfqsam.benchmark.click import quantize_quickly, summary
from monailabel_dfqsam.benchmark.phantom import organ_centre, write_phantom
from monailabel_dfqsam.config import Progress, silent
from monailabel_dfqsam.demo.server import DemoServer
from monailabel_dfqsam.slicer_session import InferReply, ServerAnswer, SlicerSession

_DEPTH = 20  # slices of a volume
_SIDE = 192  # voxels along i of the smallest volume, so that each one's masks have a shape of their own
_ITERATIONS = 100  # of the quantization under load
_SAMPLE_SECONDS = 1.0
_MIB = 1 << 20

Place = tuple[int, int, int]


@dataclass(frozen=True)
class _Click:
    """One answered click: seconds since the load began, seconds it took, and what came."""

    at: float
    seconds: float
    volume: int
    point: Place
    artifact: str
    digest: str


def measure_load(*, clients: int = 8, seconds: float = 180.0, progress: Progress = silent) -> dict[str, Any]:
    """Lets annotators click, and checks every answer.

    Args:
        clients: how many at once.
        seconds: for how long.
        progress: called with (stage, done, total).

    Returns:
        `clients`, `seconds`, `clicks`, `errors` (sentences, each once), `wrong` (masks other than the same
        click's alone), `artifacts` (models that answered), `requantized` (how that ended), the keys of
        `summary` in seconds at the client, and `memory_mib` of the server's own process: `start`, `third`
        (after the first third), `end`; `cache`, how much of the growth between the last two is embeddings,
        whose cache is bounded; and `growth`, the slope of what is not cached over the last two thirds, times
        their length.

    Raises:
        ValueError: for no clients, or a load too short to say anything.
        ServerFailed: when the server does not start, or ends.
    """
    if clients < 1 or seconds < 3 * _SAMPLE_SECONDS:
        raise ValueError(f"a load needs clients and {3 * _SAMPLE_SECONDS:.0f} seconds at least")
    with tempfile.TemporaryDirectory(prefix="dfqsam-load-") as name:
        folder = Path(name)
        studies = folder / "studies"
        studies.mkdir()
        for n in range(clients):
            write_phantom(studies / f"{_name(n)}.nrrd", _shape(n))
            progress("volumes", n + 1, clients)
        with DemoServer(studies, folder / "app", folder / "server.log", Path("tiny")) as server:
            session = SlicerSession(server.url)
            quantize_quickly(session, server.check, progress)
            alone = _alone(session, clients, progress)
            load = _Load(server, clients, seconds)
            load.run(progress)
            alone |= _alone(session, clients, progress)
    clicks = load.clicks
    wrong = sum(alone.get((c.artifact, c.volume, c.point)) != c.digest for c in clicks)
    return {
        "clients": clients,
        "seconds": seconds,
        "clicks": len(clicks),
        "errors": sorted(set(load.errors)),
        "wrong": wrong,
        "artifacts": len({c.artifact for c in clicks}),
        "requantized": load.requantized,
        **summary([c.seconds for c in clicks]),
        "memory_mib": _memory(load.memory, seconds),
    }


class _Load:
    """The clients, the quantization beside them, and a look at the server's memory every second.

    Attributes:
        clicks, errors: of all clients, appended to by their threads.
        requantized: the state in which the quantization ended.
        memory: (seconds since the beginning, bytes resident, bytes of them cached embeddings).
    """

    def __init__(self, server: DemoServer, clients: int, seconds: float) -> None:
        self.clicks: list[_Click] = []
        self.errors: list[str] = []
        self.memory: list[tuple[float, int, int]] = []
        self._server = server
        self._clients = clients
        self._seconds = seconds
        self._begin = 0.0

    def run(self, progress: Progress) -> None:
        """Until the time is over and the quantization has ended."""
        process = psutil.Process(self._server.pid)
        session = SlicerSession(self._server.url)
        self._begin = time.monotonic()
        with ThreadPoolExecutor(self._clients) as pool:
            done = [pool.submit(self._annotate, n) for n in range(self._clients)]
            run = session.train(seed=1, iterations=_ITERATIONS)
            while (now := time.monotonic() - self._begin) < self._seconds:
                self._server.check()
                cached = session.info()["models"]["dfqsam"]["embedding_cache"]["bytes"]
                self.memory.append((now, process.memory_info().rss, cached))
                progress("clicking", int(now), int(self._seconds))
                time.sleep(_SAMPLE_SECONDS)
            for future in done:
                future.result()
        self.requantized = str(session.ended_run(run, lambda run: self._server.check())["state"])
        session.settled(self._server.check)

    def _annotate(self, volume: int) -> None:
        session = SlicerSession(self._server.url, client_id=f"annotator-{volume}")
        random = np.random.default_rng(volume)
        places = _places(volume)
        while (at := time.monotonic() - self._begin) < self._seconds:
            point = places[random.integers(len(places))]
            begin = time.perf_counter()
            try:
                reply = session.infer(_name(volume), [point])
            except (ServerAnswer, requests.RequestException) as error:
                self.errors.append(str(error))
                continue
            elapsed = time.perf_counter() - begin
            self.clicks.append(
                _Click(at, elapsed, volume, point, str(reply.params["artifact"]), _digest(reply))
            )


def _alone(session: SlicerSession, clients: int, progress: Progress) -> dict[tuple[str, int, Place], str]:
    """(artifact, volume, point) -> the digest of the mask, with nobody else at the server."""
    found = {}
    for n in range(clients):
        for point in _places(n):
            reply = session.infer(_name(n), [point])
            found[str(reply.params["artifact"]), n, point] = _digest(reply)
        progress("clicks alone", n + 1, clients)
    return found


def _name(volume: int) -> str:
    return f"volume{volume:03d}"


def _shape(volume: int) -> Place:
    return _SIDE + volume, _SIDE - 32, _DEPTH


def _places(volume: int) -> list[Place]:
    """Where a volume is clicked: two voxels a slice."""
    shape = _shape(volume)
    middles = [(*organ_centre(shape, k), k) for k in range(_DEPTH)]
    return list(itertools.chain.from_iterable(((i, j, k), (i + 9, j - 7, k)) for i, j, k in middles))


def _digest(reply: InferReply) -> str:
    """Of the whole file: header, and voxels compressed in one way only."""
    return hashlib.sha256(reply.image).hexdigest()


def _memory(samples: list[tuple[float, int, int]], seconds: float) -> dict[str, float]:
    """MiB, see `measure_load`."""
    late = np.array([sample for sample in samples if sample[0] >= seconds / 3])
    times, resident, cached = late.T
    slope = np.polyfit(times, resident - cached, 1)[0] if len(late) > 1 else 0.0
    found = {
        "start": samples[0][1],
        "third": resident[0],
        "end": resident[-1],
        "cache": cached[-1] - cached[0],
        "growth": slope * (times[-1] - times[0]),
    }
    return {key: round(float(value) / _MIB, 1) for key, value in found.items()}
