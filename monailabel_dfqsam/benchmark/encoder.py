"""Times the image encoder on several engines, interleaved: every round calls each engine once.

The parent computes nothing. Preparation runs in one child process, then each engine lives in its own, and
`Session` asks them in turn. What an engine's rows say is known after every round, so that an interrupted run
keeps what it has.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monailabel_dfqsam.benchmark.child import Child, ChildError
from monailabel_dfqsam.benchmark.machine import describe_run
from monailabel_dfqsam.benchmark.plan import (
    ENGINES,
    FLOOR,
    OPENVINO_INT8,
    TORCH_EAGER,
    EncoderPlan,
    Family,
    Place,
)
from monailabel_dfqsam.benchmark.runner import EngineRunner, Request, make_floor
from monailabel_dfqsam.config import Progress, silent

PROFILED = "onednn"
PEERS = (TORCH_EAGER, OPENVINO_INT8)
_MEASURES = ("median_s", "min_s", "p95_s", "spread", "peak_bytes")


def measure_encoder(
    plan: EncoderPlan, save: Callable[[dict[str, Any]], None] = lambda _: None, progress: Progress = silent
) -> dict[str, Any]:
    """Runs a plan.

    Args:
        save: called with the whole result so far whenever a batch size is done, and on the way out.
        progress: called with (stage, done, total).

    Returns:
        JSON values: the fields of `describe_run`; `variant`, `weights`; `rows`, one per batch size and
        engine (see `Session.rows`); `floors`, what the rows named 'gemm-floor' are made of; `profiles`;
        `artifact`, the encoder's bytes; `complete`, False when the run was interrupted.

    Raises:
        ValueError: when the checkpoint cannot be used.
        KeyboardInterrupt: after `save`.
    """
    result: dict[str, Any] = {
        **describe_run(),
        "variant": plan.variant,
        "weights": "by seed" if plan.checkpoint is None else plan.checkpoint.name,
        "complete": False,
        "rows": [],
        "floors": [],
        "profiles": [],
    }
    with tempfile.TemporaryDirectory(prefix="dfqsam-benchmark-") as name:
        folder = Path(name)
        reasons, result["artifact"] = prepare(plan, folder, progress)
        try:
            for batch in plan.batches:
                _measure_batch(plan, batch, folder, reasons, result, progress)
                save(result)
            result["complete"] = True
        finally:
            save(result)
    return result


def prepare(
    plan: EncoderPlan, folder: Path, progress: Progress
) -> tuple[dict[str, str], dict[str, int] | None]:
    """Writes what the engines read.

    Returns:
        Why an engine cannot be measured, by its name, for those known already; and the encoder's bytes in
        float32 and as an artifact.

    Raises:
        ValueError: when the checkpoint cannot be used.
    """
    from monailabel_dfqsam.benchmark.weights import Preparation

    families = {ENGINES[name].family for name in plan.engines}
    reasons = {
        name: f"runs on {' and '.join(place.value for place in ENGINES[name].places)} only"
        for name in plan.engines
        if plan.place not in ENGINES[name].places
    }
    steps: list[tuple[str, tuple[object, ...], tuple[str, ...]]] = []
    if Family.OURS in families:
        own = tuple(name for name in plan.engines if ENGINES[name].family is Family.OURS)
        steps.append(("write_artifact", (), own))
    if Family.OPENVINO in families and plan.place is Place.CPU:
        steps.append(("write_openvino", (False,), ("openvino-fp32", OPENVINO_INT8)))
        if OPENVINO_INT8 in plan.engines:
            steps.append(("write_openvino", (True,), (OPENVINO_INT8,)))
    progress("preparing", 0, len(steps) + 1)
    sizes = None
    try:
        child = Child(
            Preparation, folder, plan.variant, plan.checkpoint, max(plan.batches), plan.threads,
            log=folder / "preparation.log",
        )  # fmt: skip
    except ChildError as error:
        raise ValueError(str(error)) from None
    with child:
        if not child.call("has_cuda"):
            needing = plan.engines if plan.place is Place.CUDA else tuple(reasons)
            reasons.update({name: "no GPU here" for name in needing if Place.CUDA in ENGINES[name].places})
        for done, (method, arguments, engines) in enumerate(steps, start=1):
            progress("preparing", done, len(steps) + 1)
            try:
                sizes = child.call(method, *arguments) or sizes
            except ChildError as error:
                reasons.update({name: str(error) for name in engines if name not in reasons})
    progress("preparing", len(steps) + 1, len(steps) + 1)
    return reasons, sizes


def _measure_batch(
    plan: EncoderPlan,
    batch: int,
    folder: Path,
    reasons: dict[str, str],
    result: dict[str, Any],
    progress: Progress,
) -> None:
    session = Session(plan, batch, folder, reasons)
    try:
        session.load(progress)
        session.measure(progress)
        if plan.profile:
            result["profiles"] += session.profiles()
    finally:
        session.close()
        result["rows"] += session.rows()
        result["floors"] += session.floors()


class Session:
    """One batch size: the engines' processes, and what they have told so far."""

    def __init__(self, plan: EncoderPlan, batch: int, folder: Path, reasons: dict[str, str]) -> None:
        self._plan, self._batch, self._folder = plan, batch, folder
        self._reasons = dict(reasons)
        self._children: dict[str, Child] = {}
        self._seconds: dict[str, list[float]] = {}
        self._shapes: list[dict[Any, float]] = []
        self._facts: dict[str, dict[str, Any]] = {}

    def load(self, progress: Progress) -> None:
        """Starts and warms up every engine that can be measured, one after the other."""
        names = [name for name in self._plan.engines if name not in self._reasons]
        for done, name in enumerate(names):
            progress(f"loading, batch {self._batch}", done, len(names))
            try:
                self._children[name] = self._start(name)
                self._tell(name)
            except ChildError as error:
                self._drop(name, str(error))
        progress(f"loading, batch {self._batch}", len(names), len(names))

    def measure(self, progress: Progress) -> None:
        """The rounds; each begins with another engine, so that none always follows the same one."""
        for index in range(self._plan.repeats):
            progress(f"rounds, batch {self._batch}", index, self._plan.repeats)
            names = list(self._children)
            start = index % max(1, len(names))
            for name in names[start:] + names[:start]:
                self._turn(name)
        progress(f"rounds, batch {self._batch}", self._plan.repeats, self._plan.repeats)

    def profiles(self) -> list[dict[str, Any]]:
        """The profile of `PROFILED`, with engine and batch; none where it was not measured."""
        if PROFILED not in self._children:
            return []
        try:
            found = self._children[PROFILED].call("profile")
        except ChildError as error:
            found = {"reason": str(error)}
        return [{"engine": PROFILED, "batch": self._batch, **found}]

    def close(self) -> None:
        """Ends all processes."""
        for child in self._children.values():
            child.close()
        self._children.clear()

    def rows(self) -> list[dict[str, Any]]:
        """One row an engine, in the plan's order.

        Each {engine, variant, batch, device, threads, dtype, median_s, min_s, p95_s, spread, repeats,
        peak_bytes}, seconds a call of `batch` images, `spread` = (p95 − min) / median; then, where known,
        `imported_bytes`, `load_s`, `times_torch_eager` and `times_openvino_int8` (how many times as fast as
        that), `floor_share` for engines of ours (the floor at its best rate over the median), and
        OpenVINO's `integer_share` and `operations`. Without a measurement the figures are None and `reason`
        says why.
        """
        own = [self._row(name) for name in self._plan.engines]
        medians = {row["engine"]: row["median_s"] for row in own}
        terms = self._floor_terms()
        floor = terms[0] + terms[1] if terms else None
        for row in own:
            median = row["median_s"]
            for peer in PEERS:
                known = median is not None and medians.get(peer) is not None
                row[f"times_{peer.replace('-', '_')}"] = medians[peer] / median if known else None
            ours = ENGINES[row["engine"]].family is Family.OURS
            row["floor_share"] = floor / median if ours and floor and median else None
        return own

    def floors(self) -> list[dict[str, Any]]:
        """What the floor is made of, one entry or none.

        {batch, integer_s, attention_s, attention_macs, float_gmacs_per_s, shapes}; `shapes` has one
        {m, k, n, count, seconds, gmacs_per_s} for each product, with the seconds of its fastest call.
        """
        terms = self._floor_terms()
        if not terms:
            return []
        from monailabel_dfqsam.benchmark import floor
        from monailabel_dfqsam.sam.variants import VARIANTS

        variant = VARIANTS[self._plan.variant]
        best = {shape: min(turn[shape] for turn in self._shapes) for shape in self._shapes[0]}
        shapes = [
            {**shape._asdict(), "count": count, "seconds": best[shape],
             "gmacs_per_s": shape.macs / best[shape] / 1e9}
            for shape, count in floor.layer_shapes(variant, self._batch).items()
        ]  # fmt: skip
        return [
            {
                "batch": self._batch,
                "integer_s": terms[0],
                "attention_s": terms[1],
                "attention_macs": floor.attention_macs(variant, self._batch),
                "float_gmacs_per_s": floor.FLOAT_SHAPE.macs / best[floor.FLOAT_SHAPE] / 1e9,
                "shapes": shapes,
            }
        ]

    def _start(self, name: str) -> Child:
        log = self._folder / f"{name}.log"
        plan = self._plan
        if ENGINES[name].family is Family.FLOOR:
            return Child(make_floor, plan.variant, self._batch, plan.threads, log=log)
        request = Request(name, plan.variant, self._batch, plan.threads, plan.place, self._folder)
        return Child(EngineRunner, request, log=log)

    def _turn(self, name: str) -> None:
        try:
            answer = self._children[name].call("turn")
            self._tell(name)
        except ChildError as error:
            self._drop(name, str(error))
            return
        if name == FLOOR:
            self._shapes.append(answer)
        else:
            self._seconds.setdefault(name, []).append(answer)

    def _tell(self, name: str) -> None:
        if name != FLOOR:
            self._facts[name] = self._children[name].call("facts")

    def _drop(self, name: str, reason: str) -> None:
        self._reasons[name] = reason
        if name in self._children:
            self._children.pop(name).close()

    def _floor_terms(self) -> tuple[float, float, list[float]] | None:
        if not self._shapes:
            return None
        from monailabel_dfqsam.benchmark.floor import floor_terms

        seconds = {shape: [turn[shape] for turn in self._shapes] for shape in self._shapes[0]}
        return floor_terms(self._plan.variant, self._batch, seconds)

    def _row(self, name: str) -> dict[str, Any]:
        terms = self._floor_terms() if name == FLOOR else None
        seconds = terms[2] if terms else self._seconds.get(name, [])
        row = {
            "engine": name,
            "variant": self._plan.variant,
            "batch": self._batch,
            "device": self._plan.place.value,
            "threads": self._plan.threads,
            "dtype": ENGINES[name].dtype,
            "repeats": len(seconds),
            **dict.fromkeys(_MEASURES),
            **self._facts.get(name, {}),
            **statistics_of(seconds),
        }
        if not seconds:
            row["reason"] = self._reasons.get(name, "interrupted")
        elif name in self._reasons:
            row["reason"] = f"after {len(seconds)} rounds: {self._reasons[name]}"
        return row


def statistics_of(seconds: Sequence[float]) -> dict[str, float]:
    """{median_s, min_s, p95_s, spread} of durations; nothing of none."""
    if not seconds:
        return {}
    median = statistics.median(seconds)
    p95 = float(np.percentile(seconds, 95))
    return {
        "median_s": median,
        "min_s": min(seconds),
        "p95_s": p95,
        "spread": (p95 - min(seconds)) / median,
    }
