"""How long a click takes: a session as 3D Slicer plays it, against the real server, timed at the client.

The server runs in a process of its own, as `dfqsam serve` starts it, on one computed volume; it quantizes
quickly first, since neither the encoder's weights nor its synthesis change how long an answer takes. A row
is one kind of click; its `split` comes from the server's own clock, and `http` is the rest of what the client
waited: request, reply, and parsing.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests
import SimpleITK as sitk

from monailabel_dfqsam.benchmark import stock_app
from monailabel_dfqsam.benchmark.phantom import organ_centre, write_phantom
from monailabel_dfqsam.config import Progress, silent
from monailabel_dfqsam.demo.server import DemoServer
from monailabel_dfqsam.sam.checkpoint import DEFAULT, find_checkpoint
from monailabel_dfqsam.slicer_session import InferReply, SlicerSession

IMAGE = "volume"
_ITERATIONS = 10
_NEIGHBOURHOOD = 3  # slices from one uncached click to the next, so that none is another's neighbour
_REPEATS = 10  # of the kinds of click that need a slice each
_WAIT_SECONDS = 120.0
_POLL_SECONDS = 0.1
_STAGES = ("load", "embed", "decode", "post", "write")


class ClickError(ValueError):
    """A measurement that did not come about; the message says why."""


def measure_clicks(
    *,
    clicks: int = 200,
    shape: tuple[int, int, int] = (512, 512, 100),
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Plays the session and times it.

    Args:
        clicks: how many cached clicks.
        shape: (I, J, K) of the volume, int16.
        checkpoint: weights to quantize and serve, as `find_checkpoint` takes them; None takes the default.
        progress: called with (stage, done, total).

    Returns:
        `model`, `engine`, `checkpoint`, `shape`, `clicks`; `first_answer_s`, from the server's start to the
        answer to a click in full precision; `memory_bytes`, what the server's processes hold in the end; and
        `rows`: each {case, n, median_s, p95_s, min_s,
        split, reply_bytes}, seconds at the client, `split` the medians of load, embed, decode, post, write
        and http, where the server tells them. Cases: 'first on the volume', 'first on a slice', 'cached',
        'next slice, prepared', 'next slice, not prepared', 'cached, OHIF' (uncompressed, no multipart), and
        'MONAI Label': the mask of the cached clicks answered by `stock_app`.

    Raises:
        ClickError: when the volume is too small for the session, or the quantized model is not served.
        ServerFailed: when a server does not start, or ends.
    """
    if clicks < 1 or min(shape[:2]) < 32 or shape[2] < _slices_needed():
        raise ClickError(
            f"a session needs clicks, slices of 32×32 at least, and {_slices_needed()} of them, "
            f"not {clicks} clicks on {'×'.join(map(str, shape))}"
        )
    weights = find_checkpoint(checkpoint or DEFAULT)
    with tempfile.TemporaryDirectory(prefix="dfqsam-click-") as name:
        folder = Path(name)
        studies = folder / "studies"
        studies.mkdir()
        progress("volume", 0, 1)
        write_phantom(studies / f"{IMAGE}.nrrd", shape)
        progress("volume", 1, 1)
        with DemoServer(studies, folder / "app", folder / "server.log", weights) as server:
            session = SlicerSession(server.url)
            k = shape[2] // 2
            session.infer(IMAGE, [[*organ_centre(shape, k), k]], slice_index=k)
            first_answer = time.monotonic() - server.started
            quantize_quickly(session, server.check, progress)
            play = _Play(session, shape, progress)
            rows = play.rows(clicks)
            memory = _held(server.pid)
        rows.append(_stock_row(folder, studies, play.last, clicks, progress))
        return {
            "model": play.last.params["model"],
            "engine": play.last.params["engine"],
            "checkpoint": weights.name,
            "shape": list(shape),
            "clicks": clicks,
            "first_answer_s": first_answer,
            "memory_bytes": memory,
            "rows": rows,
        }


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """{n, median_s, p95_s, min_s} of some times."""
    times = np.asarray(seconds)
    return {
        "n": len(times),
        "median_s": float(np.median(times)),
        "p95_s": float(np.percentile(times, 95)),
        "min_s": float(times.min()),
    }


def _held(pid: int) -> int:
    """Bytes of memory of a process and all that it started."""
    process = psutil.Process(pid)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


def _slices_needed() -> int:
    """First clicks and walks along slices, each on slices of its own."""
    return _NEIGHBOURHOOD * (_REPEATS + 1) + 2 * (_REPEATS + _NEIGHBOURHOOD) + 1


class _Play:
    """One annotator at one server.

    Attributes:
        last: the last cached reply.
    """

    last: InferReply

    def __init__(self, session: SlicerSession, shape: tuple[int, int, int], progress: Progress) -> None:
        self._session = session
        self._shape = shape
        self._progress = progress
        self._embedded: dict[int, int] = {}  # slice -> number of the click that came last, 0 for neighbours
        self._clicks = 0
        self._unit = 0

    def rows(self, clicks: int) -> list[dict[str, Any]]:
        """All kinds of click in turn, on slices apart from one another."""
        before = self._cached_bytes()
        first = [self._click(0)]
        self._unit = self._cached_bytes() - before
        step = range(_NEIGHBOURHOOD, _NEIGHBOURHOOD * (_REPEATS + 1), _NEIGHBOURHOOD)
        fresh = [self._click(k, cached=False) for k in step]
        k = step[-1]
        self._settle()
        cached = []
        for n in range(clicks):
            cached.append(self._click(k, n, cached=True))
            self._progress("cached clicks", n + 1, clicks)
        self.last = cached[-1][1]
        ohif = [self._ohif_click(k, n) for n in range(max(_REPEATS, clicks // 10))]
        prepared, k = self._walk(k + _NEIGHBOURHOOD, prepared=True)
        unprepared, _ = self._walk(k + _NEIGHBOURHOOD, prepared=False)
        return [
            _row("first on the volume", first),
            _row("first on a slice", fresh),
            _row("cached", cached),
            _row("next slice, prepared", prepared),
            _row("next slice, not prepared", unprepared),
            {
                "case": "cached, OHIF",
                **summary([seconds for seconds, _ in ohif]),
                "reply_bytes": int(np.median([size for _, size in ohif])),
            },
        ]

    def _walk(self, k: int, *, prepared: bool) -> tuple[list[tuple[float, InferReply]], int]:
        """Clicks on slice after slice, waiting between them for the neighbours or not; and the last slice."""
        self._click(k)
        found = []
        for _ in range(_REPEATS):
            k += 1
            if prepared:
                self._settle()
            found.append(self._click(k))
            self._progress("next slices", len(found), _REPEATS)
        # A machine that is busy with others may let the server get there first, or be pushed out.
        meant = [click for click in found if click[1].params["cached"] is prepared]
        if len(meant) < _REPEATS / 2:
            raise ClickError(f"of {_REPEATS} neighbours {len(meant)} were {'' if prepared else 'un'}prepared")
        return meant, k

    def _click(self, k: int, n: int = 0, cached: bool | None = None) -> tuple[float, InferReply]:
        """Seconds and the answer to a point near the organ's middle on slice k, another one for each n."""
        i, j = organ_centre(self._shape, k)
        point = [i + n % 7 - 3, j + n // 7 % 7 - 3, k]
        begin = time.perf_counter()
        reply = self._session.infer(IMAGE, [point], slice_index=k)
        seconds = time.perf_counter() - begin
        if cached is not None and reply.params["cached"] is not cached:
            raise ClickError(f"slice {k} was to be {'in' if cached else 'out of'} the cache and was not")
        self._clicks += 1
        self._embedded[k] = self._clicks
        return seconds, reply

    def _ohif_click(self, k: int, n: int) -> tuple[float, int]:
        """Seconds and the reply's bytes of a click as OHIF sends it: the voxels as they are, no multipart."""
        i, j = organ_centre(self._shape, k)
        params = {
            "foreground": [[i + n % 7 - 3, j, k]], "background": [], "label": "organ",
            "result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False,
            "restore_label_idx": False,
        }  # fmt: skip
        with requests.Session() as http:
            http.trust_env = False
            begin = time.perf_counter()
            answer = http.post(
                f"{self._session.url}/infer/dfqsam",
                params={"image": IMAGE, "output": "image"},
                files={"params": (None, json.dumps(params))},
                timeout=_WAIT_SECONDS,
            )
            seconds = time.perf_counter() - begin
        if answer.status_code != 200:
            raise ClickError(f"a click as OHIF sends it was answered by {answer.status_code}")
        return seconds, len(answer.content)

    def _settle(self) -> None:
        """Until the server has prepared the last click's neighbours."""
        last = max(self._embedded, key=self._embedded.__getitem__)
        for k in (last - 1, last + 1):
            self._embedded.setdefault(k, 0)
        deadline = time.monotonic() + _WAIT_SECONDS
        while self._cached_bytes() < self._unit * len(self._embedded):
            if time.monotonic() > deadline:
                raise ClickError(f"the neighbouring slices were not ready within {_WAIT_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)

    def _cached_bytes(self) -> int:
        return int(self._session.info()["models"]["dfqsam"]["embedding_cache"]["bytes"])


def quantize_quickly(session: SlicerSession, check: Callable[[], None], progress: Progress) -> None:
    """Has the server quantize in few iterations, instead of as it began to, and serve the result.

    Args:
        check: raises when the server has ended.

    Raises:
        ClickError: when that fails.
    """
    progress("quantizing", 0, 1)
    session.settled(check)  # the start has asked for its own run by then
    session.stop_training()
    run = session.ended_run(session.train(iterations=_ITERATIONS), lambda run: check())
    if run["state"] != "published":
        raise ClickError(f"the server does not serve its quantized model: {run['error']}")
    if session.settled(check)["model"]["key"] != run["key"]:
        raise ClickError("the server could not load its quantized model: its log says why")
    progress("quantizing", 1, 1)


def _stock_row(
    folder: Path, studies: Path, reply: InferReply, clicks: int, progress: Progress
) -> dict[str, Any]:
    """The last cached click's mask, answered by MONAI Label's own app, endpoint and writer."""
    app = folder / "stock"
    app.mkdir()
    (app / "main.py").write_text(stock_app.MAIN_PY)
    (app / stock_app.MASK_NAME).write_bytes(reply.image)
    found = []
    with DemoServer(studies, app, folder / "stock.log") as server:
        session = SlicerSession(server.url)
        for n in range(clicks + 1):
            begin = time.perf_counter()
            answer = session.infer(IMAGE, [[1, 1, 0]], model=stock_app.MODEL)
            found.append((time.perf_counter() - begin, answer))
            progress("MONAI Label's own", n, clicks)
    own, theirs = (_read(file, folder) for file in (reply, found[-1][1]))
    same = np.array_equal(sitk.GetArrayViewFromImage(own), sitk.GetArrayViewFromImage(theirs))
    if not same or not np.allclose(own.GetDirection(), theirs.GetDirection()):
        raise ClickError("MONAI Label's own answer is another mask than the one compared with")
    return _row("MONAI Label", found[1:])  # the first one loads the mask


def _read(reply: InferReply, folder: Path) -> sitk.Image:
    path = folder / "read.nrrd"
    path.write_bytes(reply.image)
    return sitk.ReadImage(str(path))


def _row(case: str, clicks: Sequence[tuple[float, InferReply]]) -> dict[str, Any]:
    laps = [reply.params["latencies"] for _, reply in clicks]
    split = {name: float(np.median([lap[name] for lap in laps])) for name in _STAGES if name in laps[0]}
    rest = [seconds - lap["total"] for (seconds, _), lap in zip(clicks, laps, strict=True)]
    return {
        "case": case,
        **summary([seconds for seconds, _ in clicks]),
        "split": {**split, "http": float(np.median(rest))},
        "reply_bytes": int(np.median([len(reply.image) for _, reply in clicks])),
    }
