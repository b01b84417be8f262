"""What can be measured, and what one run measures."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.machine import usable_cores

VARIANTS = (
    "tiny", "sam_b_256", "sam_med2d_b", "sam_b_1024", "lite_medsam", "mobile_sam", "efficient_sam_ti",
)  # fmt: skip
FLOOR = "gemm-floor"
TORCH_EAGER = "torch-eager"
OPENVINO_INT8 = "openvino-int8"


class Place(str, Enum):
    """Where a run's engines compute."""

    CPU = "cpu"
    CUDA = "cuda"


class Family(str, Enum):
    """How an engine is loaded."""

    TORCH = "torch"
    OPENVINO = "openvino"
    OURS = "ours"
    FLOOR = "floor"


@dataclass(frozen=True)
class Engine:
    """One row's engine.

    Attributes:
        dtype: what it computes in, where it does not tell itself.
        usual: the encoder is measured on it when no engines are named.
        kind: for engines of ours: what runs the artifact.
        bits: for engines of ours: the artifact's, of Linears.
    """

    name: str
    family: Family
    dtype: str
    places: tuple[Place, ...]
    usual: bool = True
    kind: EngineKind | None = None
    bits: int = 0


_CPU, _CUDA = (Place.CPU,), (Place.CUDA,)


def _ours(
    name: str, kind: EngineKind, bits: int, dtype: str, places: tuple[Place, ...] = _CPU, usual: bool = True
) -> Engine:
    return Engine(name, Family.OURS, dtype, places, usual, kind, bits)


ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(TORCH_EAGER, Family.TORCH, "float32", _CPU + _CUDA),
        Engine("torch-compile", Family.TORCH, "float32", _CPU + _CUDA),
        Engine("openvino-fp32", Family.OPENVINO, "float32", _CPU),
        Engine(OPENVINO_INT8, Family.OPENVINO, "int8", _CPU),
        _ours("native", EngineKind.NATIVE, 4, "w4a4"),
        _ours("native-w8a8", EngineKind.NATIVE, 8, "w8a8", usual=False),
        _ours("onednn", EngineKind.ONEDNN, 4, "w4a4 in int8"),
        _ours("onednn-w8a8", EngineKind.ONEDNN, 8, "w8a8 in int8", usual=False),
        _ours("openvino-w4a4", EngineKind.OPENVINO, 4, "w4a4 in int8"),
        _ours("openvino-w8a8", EngineKind.OPENVINO, 8, "w8a8 in int8", usual=False),
        _ours("reference", EngineKind.REFERENCE, 4, "w4a4 in float", usual=False),
        Engine("torch-bf16", Family.TORCH, "bfloat16", _CUDA),
        Engine("torch-compile-bf16", Family.TORCH, "bfloat16", _CUDA),
        _ours("cutlass", EngineKind.CUTLASS, 4, "w4a4", _CUDA),
        Engine(FLOOR, Family.FLOOR, "int8 and float32", _CPU),
    )
}


@dataclass(frozen=True)
class EncoderPlan:
    """One run of `dfqsam benchmark encoder`.

    Attributes:
        variant: a name of `VARIANTS`.
        batches: images a call; each batch size is a measurement of its own.
        engines: names of `ENGINES`; the order is that of the rows.
        checkpoint: weights, as `find_checkpoint` takes them; None makes them by seed.
        threads: for every engine.
        repeats: timed calls of every engine.
        profile: also profile `native`.

    Raises:
        ValueError: for values outside these.
    """

    variant: str
    batches: tuple[int, ...] = (1,)
    engines: tuple[str, ...] = tuple(name for name, engine in ENGINES.items() if engine.usual)
    place: Place = Place.CPU
    checkpoint: Path | None = None
    threads: int = usable_cores()
    repeats: int = 20
    profile: bool = False

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"--variant must be one of {', '.join(VARIANTS)}, not '{self.variant}'")
        unknown = [name for name in self.engines if name not in ENGINES]
        if unknown or not self.engines:
            raise ValueError(
                f"--engines takes names of {', '.join(ENGINES)}, not '{', '.join(unknown) or 'nothing'}'"
            )
        if not self.batches or min(self.batches) < 1:
            raise ValueError("--batch must be at least 1")
        if self.threads < 1 or self.repeats < 1:
            raise ValueError("--threads and --repeats must be at least 1")
