"""Times a whole volume, slice by slice with a box each, on several engines that take turns."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.volume_runner import STAGES, VolumeRunner
from monailabel_dfqsam.benchmark.child import Child, ChildError
from monailabel_dfqsam.benchmark.layout import BOXES
from monailabel_dfqsam.benchmark.machine import describe_run
from monailabel_dfqsam.benchmark.phantom import organ, write_phantom
from monailabel_dfqsam.benchmark.plan import ENGINES, OPENVINO_INT8, TORCH_EAGER, VARIANTS, Place
from monailabel_dfqsam.benchmark.preparing import prepare
from monailabel_dfqsam.benchmark.runner import Request
from monailabel_dfqsam.benchmark.session import Session, statistics_of
from monailabel_dfqsam.config import Progress, silent
from monailabel_dfqsam.machine import usable_cores
from monailabel_dfqsam.masks import tight_box
from monailabel_dfqsam.sam.checkpoint import NAMED
from monailabel_dfqsam.segmentation.volume import load_volume

VOLUME_ENGINES = (
    TORCH_EAGER, "openvino-fp32", OPENVINO_INT8, "native", "native-w8a8", "onednn", "onednn-w8a8",
    "openvino-w4a4", "openvino-w8a8",
)  # fmt: skip
"""Those that a whole volume can be measured on."""

PHANTOM_SLICE = (512, 512)
"""Pixels of the phantom's slices, as a CT's."""


@dataclass(frozen=True)
class VolumePlan:
    """One run of `python -m benchmarks volume`, on the CPU.

    Attributes:
        variant: a name of `VARIANTS`.
        engines: names of `VOLUME_ENGINES`; the order is that of the rows.
        checkpoint: weights; None takes the embedded ones for `tiny`, and makes others by seed.
        slices: as many at most are segmented; the phantom has this many.
        volume: an image file; None takes a phantom of `PHANTOM_SLICE` pixels a slice.
        mask: a file on the same grid, not 0 in the object, whose boxes are the prompts.
        threads: for every engine.
        repeats: of the whole volume on every engine.

    Raises:
        ValueError: for values outside these, and for a volume without a mask or the reverse.
    """

    variant: str = "lite_medsam"
    engines: tuple[str, ...] = VOLUME_ENGINES
    checkpoint: Path | None = None
    slices: int = 80
    volume: Path | None = None
    mask: Path | None = None
    threads: int = usable_cores()
    repeats: int = 3

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"--variant must be one of {', '.join(VARIANTS)}, not '{self.variant}'")
        unknown = [name for name in self.engines if name not in VOLUME_ENGINES]
        if unknown or not self.engines:
            raise ValueError(
                f"--engines takes names of {', '.join(VOLUME_ENGINES)}, "
                f"not '{', '.join(unknown) or 'nothing'}'"
            )
        if min(self.slices, self.threads, self.repeats) < 1:
            raise ValueError("--slices, --threads and --repeats must be at least 1")
        if (self.volume is None) != (self.mask is None):
            raise ValueError("--volume goes with --mask, whose boxes are the prompts")


def measure_volume(
    plan: VolumePlan, save: Callable[[dict[str, Any]], None] = lambda _: None, progress: Progress = silent
) -> dict[str, Any]:
    """Runs a plan; every round segments the volume once on each engine.

    Args:
        save: called with the whole result on the way out.
        progress: called with (stage, done, total).

    Returns:
        JSON values: the fields of `describe_run`; `variant`, `weights`; `volume`, {name, shape, slices}, how
        many of its slices are segmented; `artifact`, the encoder's bytes; `complete`, False when the run was
        interrupted; and `rows`, one an engine, in the plan's order: {engine, variant, slices, device,
        threads, dtype, repeats, median_s, min_s, p95_s, spread}, seconds of the whole volume; `stages`, the
        medians of what each of `STAGES` took of it; `times_torch_eager`, how many times as fast as that;
        `mask_iou`, intersection over union of all masks together with those of torch-eager; and what the
        engine tells. Without a measurement the figures are None and `reason` says why.

    Raises:
        ValueError: when the checkpoint or the volume cannot be used.
        KeyboardInterrupt: after `save`.
    """
    checkpoint = NAMED["tiny"] if plan.checkpoint is None and plan.variant == "tiny" else plan.checkpoint
    result: dict[str, Any] = {
        **describe_run(),
        "variant": plan.variant,
        "weights": "by seed" if checkpoint is None else checkpoint.name,
        "complete": False,
    }
    with tempfile.TemporaryDirectory(prefix="dfqsam-benchmark-") as name:
        folder = Path(name)
        progress("volume", 0, 1)
        volume, shape, boxes = _volume(plan, folder)
        np.save(folder / BOXES, boxes)
        progress("volume", 1, 1)
        weights = (plan.variant, checkpoint, 1, plan.threads)
        reasons, result["artifact"] = prepare(plan.engines, Place.CPU, folder, weights, progress)
        result["volume"] = {
            "name": "phantom" if plan.volume is None else volume.name,
            "shape": list(shape),
            "slices": len(boxes),
        }

        def start(engine: str) -> Child:
            request = Request(engine, plan.variant, plan.threads, folder)
            return Child(VolumeRunner, request, volume, log=folder / f"{engine}.log")

        session = Session(plan.engines, start, reasons, progress)
        masks: dict[str, bytes | None] = {}
        try:
            session.load()
            session.measure(plan.repeats)
            for engine in session.answers:
                with suppress(ChildError):  # one that is gone since has its times all the same
                    masks[engine] = session.ask(engine, "masks")
            result["complete"] = True
        finally:
            session.close()
            result["rows"] = _rows(plan, len(boxes), session, masks)
            save(result)
    return result


def _volume(plan: VolumePlan, folder: Path) -> tuple[Path, tuple[int, int, int], np.ndarray[Any, Any]]:
    """The file, its shape, and [N, 5] slices with their boxes."""
    if plan.volume is None or plan.mask is None:
        path, shape = folder / "phantom.nrrd", (*PHANTOM_SLICE, plan.slices)
        write_phantom(path, shape)
        return path, shape, np.array([(k, *tight_box(organ(shape, k))) for k in range(plan.slices)])
    mask = load_volume(plan.mask).array != 0
    shape = load_volume(plan.volume).shape
    if mask.shape != shape or not mask.any():
        raise ValueError(
            f"'{plan.mask.name}' must have the shape {list(shape)} of '{plan.volume.name}' and not be empty"
        )
    ks = np.flatnonzero(mask.any(axis=(0, 1)))[: plan.slices]
    return plan.volume, shape, np.array([(k, *tight_box(mask[:, :, k])) for k in ks])


def _rows(
    plan: VolumePlan, slices: int, session: Session, masks: dict[str, bytes | None]
) -> list[dict[str, Any]]:
    turns = {name: session.answers.get(name, []) for name in plan.engines}
    eager = statistics_of([turn["volume"] for turn in turns.get(TORCH_EAGER, [])])["median_s"]
    rows = []
    for name in plan.engines:
        found = statistics_of([turn["volume"] for turn in turns[name]])
        median = found["median_s"]
        row = {
            "engine": name,
            "variant": plan.variant,
            "slices": slices,
            "device": Place.CPU.value,
            "threads": plan.threads,
            "dtype": ENGINES[name].dtype,
            "repeats": len(turns[name]),
            **found,
            "stages": {
                stage: statistics.median(turn[stage] for turn in turns[name]) if turns[name] else None
                for stage in STAGES
            },
            "times_torch_eager": eager / median if eager and median else None,
            "mask_iou": _iou(masks.get(name), masks.get(TORCH_EAGER)),
            "peak_bytes": None,
            **session.facts.get(name, {}),
        }
        reason = session.reason(name)
        rows.append(row if reason is None else {**row, "reason": reason})
    return rows


def _iou(a: bytes | None, b: bytes | None) -> float | None:
    """Of masks, a bit a pixel; None without both, or where both are empty."""
    if a is None or b is None:
        return None
    first, second = (np.unpackbits(np.frombuffer(bits, dtype=np.uint8)).astype(bool) for bits in (a, b))
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else None
