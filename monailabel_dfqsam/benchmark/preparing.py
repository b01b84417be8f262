"""Before the engines: a process that writes the files they read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from monailabel_dfqsam.benchmark.child import Child, ChildError
from monailabel_dfqsam.benchmark.plan import ENGINES, OPENVINO_INT8, Family, Place
from monailabel_dfqsam.config import Progress

_Step = tuple[str, tuple[object, ...], tuple[str, ...]]
"""A method of `Preparation`, its arguments, and the engines that need it."""


def prepare(
    engines: Sequence[str],
    place: Place,
    folder: Path,
    weights: tuple[str, Path | None, int, int],
    progress: Progress,
) -> tuple[dict[str, str], dict[str, int] | None]:
    """Writes what the engines read.

    Args:
        engines: names of `ENGINES`.
        weights: what `Preparation` takes beside the folder: variant, checkpoint, images, threads.

    Returns:
        Why an engine cannot be measured, by its name, for those known already; and the encoder's bytes in
        float32 and as an artifact, of the fewest bits that are asked for.

    Raises:
        ValueError: when the checkpoint cannot be used.
    """
    from monailabel_dfqsam.benchmark.weights import Preparation

    reasons = {
        name: f"runs on {' and '.join(each.value for each in ENGINES[name].places)} only"
        for name in engines
        if place not in ENGINES[name].places
    }
    steps = _steps(engines, place)
    progress("preparing", 0, len(steps) + 1)
    sizes = None
    try:
        child = Child(Preparation, folder, *weights, log=folder / "preparation.log")
    except ChildError as error:
        raise ValueError(str(error)) from None
    with child:
        if not child.call("has_cuda"):
            needing = engines if place is Place.CUDA else tuple(reasons)
            reasons.update({name: "no GPU here" for name in needing if Place.CUDA in ENGINES[name].places})
        for done, (method, arguments, needing) in enumerate(steps, start=1):
            progress("preparing", done, len(steps) + 1)
            try:
                found = child.call(method, *arguments)
                sizes = sizes or found
            except ChildError as error:
                reasons.update({name: str(error) for name in needing if name not in reasons})
    progress("preparing", len(steps) + 1, len(steps) + 1)
    return reasons, sizes


def _steps(engines: Sequence[str], place: Place) -> list[_Step]:
    steps: list[_Step] = []
    for bits in sorted({ENGINES[name].bits for name in engines} - {0}):
        own = tuple(name for name in engines if ENGINES[name].bits == bits)
        steps.append(("write_artifact", (bits,), own))
    if place is Place.CPU and any(ENGINES[name].family is Family.OPENVINO for name in engines):
        steps.append(("write_openvino", (False,), ("openvino-fp32", OPENVINO_INT8)))
        if OPENVINO_INT8 in engines:
            steps.append(("write_openvino", (True,), (OPENVINO_INT8,)))
    return steps
