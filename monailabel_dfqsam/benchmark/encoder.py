"""Times the image encoder on several engines, interleaved: every round calls each engine once.

The parent computes nothing. Preparation runs in one child process, then each engine lives in its own, and a
`Session` asks them in turn, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monailabel_dfqsam.benchmark.child import Child, ChildError
from monailabel_dfqsam.benchmark.machine import describe_run
from monailabel_dfqsam.benchmark.plan import ENGINES, FLOOR, OPENVINO_INT8, TORCH_EAGER, EncoderPlan, Family
from monailabel_dfqsam.benchmark.preparing import prepare
from monailabel_dfqsam.benchmark.runner import EngineRunner, Request, make_floor
from monailabel_dfqsam.benchmark.session import Session, statistics_of
from monailabel_dfqsam.config import Progress, silent

PROFILED = "native"
PEERS = (TORCH_EAGER, OPENVINO_INT8)


def measure_encoder(
    plan: EncoderPlan, save: Callable[[dict[str, Any]], None] = lambda _: None, progress: Progress = silent
) -> dict[str, Any]:
    """Runs a plan.

    Args:
        save: called with the whole result so far whenever a batch size is done, and on the way out.
        progress: called with (stage, done, total).

    Returns:
        JSON values: the fields of `describe_run`; `variant`, `weights`; `rows`, one per batch size and
        engine (see `EncoderRows.rows`); `floors`, what the rows named 'gemm-floor' are made of; `profiles`;
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
        weights = (plan.variant, plan.checkpoint, max(plan.batches), plan.threads)
        reasons, result["artifact"] = prepare(plan.engines, plan.place, folder, weights, progress)
        try:
            for batch in plan.batches:
                _measure_batch(plan, batch, folder, reasons, result, progress)
                save(result)
            result["complete"] = True
        finally:
            save(result)
    return result


def _measure_batch(
    plan: EncoderPlan,
    batch: int,
    folder: Path,
    reasons: dict[str, str],
    result: dict[str, Any],
    progress: Progress,
) -> None:
    def start(name: str) -> Child:
        log = folder / f"{name}.log"
        if ENGINES[name].family is Family.FLOOR:
            return Child(make_floor, plan.variant, batch, plan.threads, log=log)
        request = Request(name, plan.variant, plan.threads, folder, batch, plan.place)
        return Child(EngineRunner, request, log=log)

    session = Session(plan.engines, start, reasons, progress, f", batch {batch}")
    found = EncoderRows(plan, batch, session)
    try:
        session.load()
        session.measure(plan.repeats)
        if plan.profile:
            result["profiles"] += found.profiles()
    finally:
        session.close()
        result["rows"] += found.rows()
        result["floors"] += found.floors()


class EncoderRows:
    """What a session with the engines says of one batch size."""

    def __init__(self, plan: EncoderPlan, batch: int, session: Session) -> None:
        self._plan, self._batch, self._session = plan, batch, session

    def profiles(self) -> list[dict[str, Any]]:
        """The profile of `PROFILED`, with engine and batch; none where it was not measured."""
        try:
            found = self._session.ask(PROFILED, "profile")
        except ChildError as error:
            found = {"reason": str(error)}
        return [] if found is None else [{"engine": PROFILED, "batch": self._batch, **found}]

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
        turns = self._session.answers[FLOOR]
        best = {shape: min(turn[shape] for turn in turns) for shape in turns[0]}
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

    def _floor_terms(self) -> tuple[float, float, list[float]] | None:
        shapes = self._session.answers.get(FLOOR, [])
        if not shapes:
            return None
        from monailabel_dfqsam.benchmark.floor import floor_terms

        seconds = {shape: [turn[shape] for turn in shapes] for shape in shapes[0]}
        return floor_terms(self._plan.variant, self._batch, seconds)

    def _row(self, name: str) -> dict[str, Any]:
        terms = self._floor_terms() if name == FLOOR else None
        seconds = terms[2] if terms else self._session.answers.get(name, [])
        row = {
            "engine": name,
            "variant": self._plan.variant,
            "batch": self._batch,
            "device": self._plan.place.value,
            "threads": self._plan.threads,
            "dtype": ENGINES[name].dtype,
            "repeats": len(seconds),
            **statistics_of(seconds),
            "peak_bytes": None,
            **self._session.facts.get(name, {}),
        }
        reason = self._session.reason(name)
        return row if reason is None else {**row, "reason": reason}
