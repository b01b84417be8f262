"""One engine in its own process: loads it, calls it, times it. No framework is imported before `__init__`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from monailabel_dfqsam.benchmark.layout import FLOAT_WEIGHTS, IMAGES, artifact_path
from monailabel_dfqsam.benchmark.plan import ENGINES, Family, Place
from monailabel_dfqsam.machine import own_memory

WARM_UPS = 2
_PROFILED_CALLS = 5
_LISTED_OPS = 30


@dataclass(frozen=True)
class Request:
    """What a process measures.

    Attributes:
        folder: with the files of `Preparation`.
        batch: images a call.
    """

    engine: str
    variant: str
    threads: int
    folder: Path
    batch: int = 1
    place: Place = Place.CPU


@dataclass
class Loaded:
    """An encoder on an engine.

    Attributes:
        encode: images [B, 3, S, S] to the embedding [B, C, grid, grid]: arrays of numpy for OpenVINO, which
            may overwrite the last one, else tensors on the engine's device, of its dtype.
        dtype: what it computes in, where it tells.
        facts: what else it tells.
    """

    encode: Callable[[Any], Any]
    dtype: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class EngineRunner:
    """An engine, loaded and warm.

    Raises:
        ValueError: when it cannot run here.
        ImportError: when its library is not installed.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        family = ENGINES[request.engine].family
        if family is not Family.OURS:
            without_our_settings()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(request.folder / "inductor")
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        images = np.load(request.folder / IMAGES)[: request.batch]
        _import_libraries(family)
        self._imported_bytes = own_memory("VmRSS")
        begin = time.perf_counter()
        self._loaded = load_engine(request)
        self._run = _on(request, self._loaded.encode, images)
        for _ in range(WARM_UPS):
            self._run()
        self._load_seconds = time.perf_counter() - begin

    def turn(self) -> float:
        """Seconds of one call, after one that is not timed and brings caches and threads back."""
        self._run()
        begin = time.perf_counter()
        self._run()
        return time.perf_counter() - begin

    def facts(self) -> dict[str, Any]:
        """`peak_bytes` of memory since the process began, of it `imported_bytes` before the engine was loaded
        (on a GPU, the peak is torch's of the GPU), `load_s` with warm-up, and what else the engine tells."""
        peak = own_memory("VmHWM")
        if self._request.place is Place.CUDA:
            import torch

            peak = torch.cuda.max_memory_allocated()
        dtype = self._loaded.dtype or ENGINES[self._request.engine].dtype
        return {
            "dtype": dtype,
            "peak_bytes": peak,
            "imported_bytes": self._imported_bytes,
            "load_s": self._load_seconds,
            **self._loaded.facts,
        }

    def profile(self) -> dict[str, Any]:
        """Where the time of one call goes, by torch's profiler.

        {call_s, seconds, ops}: `seconds` by kind of op, 'outside ops' for what no op accounts for; `ops` the
        costliest by name, each {name, kind, seconds, calls}.
        """
        import torch

        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profiler:
            begin = time.perf_counter()
            for _ in range(_PROFILED_CALLS):
                self._run()
            whole = (time.perf_counter() - begin) / _PROFILED_CALLS
        ops = [
            {
                "name": event.key,
                "kind": kind_of(event.key),
                "seconds": event.self_cpu_time_total * 1e-6 / _PROFILED_CALLS,
                "calls": event.count / _PROFILED_CALLS,
            }
            for event in profiler.key_averages()
        ]
        seconds: dict[str, float] = {}
        for op in ops:
            seconds[op["kind"]] = seconds.get(op["kind"], 0.0) + op["seconds"]
        seconds["outside ops"] = max(0.0, whole - sum(seconds.values()))
        order = sorted(seconds, key=lambda kind: -seconds[kind])
        ops.sort(key=lambda op: -op["seconds"])
        return {
            "call_s": whole,
            "seconds": {kind: seconds[kind] for kind in order},
            "ops": ops[:_LISTED_OPS],
        }


def make_floor(variant: str, batch: int, threads: int) -> object:
    """A `GemmFloor`; its module is imported here since it imports torch."""
    without_our_settings()
    from monailabel_dfqsam.benchmark.floor import GemmFloor

    return GemmFloor(variant, batch, threads)


def without_our_settings() -> None:
    """Takes back what this package chooses for servers before torch reads it; others run as they come."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        os.environ.pop(name, None)


_KINDS: tuple[tuple[str, str], ...] = (
    ("integer products", r"dfqsam_product|qlinear|int_linear|linear_|_linear|qgemm|int8|gemm"),
    ("attention", r"attention|softmax|bmm|baddbmm|einsum"),
    ("norms and quantize", r"norm|quantize|round|clamp"),
    ("activations", r"gelu|relu|sigmoid"),
    ("adds and scales", r"::add|::sub|::mul|::div"),
    ("copies", r"copy|clone|contiguous|::cat|::fill|::pad|index|reshape|gather|empty|resize|im2col|col2im"),
)


def kind_of(op: str) -> str:
    """The kind of an op by its name; 'other' where no pattern fits."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, op)), "other")


def _import_libraries(family: Family) -> None:
    if family is Family.OPENVINO:
        import monailabel_dfqsam.benchmark.openvino_peer
    elif family is Family.OURS:
        import monailabel_dfqsam.engines
    else:
        import monailabel_dfqsam.sam.model  # noqa: F401


def load_engine(request: Request) -> Loaded:
    """The encoder on the engine that is asked for.

    Raises:
        ValueError: when it cannot run here.
        ImportError: when its library is not installed.
    """
    loader = {Family.TORCH: _torch, Family.OPENVINO: _openvino, Family.OURS: _ours}
    return loader[ENGINES[request.engine].family](request)


def _on(request: Request, encode: Callable[[Any], Any], images: Any) -> Callable[[], object]:
    """A call of the encoder on images [B, 3, S, S] of numpy that comes back when it is done."""
    family = ENGINES[request.engine].family
    if family is Family.OPENVINO:
        return lambda: encode(images)
    import torch

    x = torch.from_numpy(images).to(request.place.value)
    if family is Family.TORCH:
        x = x.to(getattr(torch, ENGINES[request.engine].dtype))

    def run() -> object:
        with torch.inference_mode():
            result = encode(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        return result

    return run


def _torch(request: Request) -> Loaded:
    import torch
    from safetensors.torch import load_file

    from monailabel_dfqsam.sam.model import build_encoder
    from monailabel_dfqsam.sam.variants import VARIANTS

    torch.set_num_threads(request.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    with torch.device("meta"):
        encoder: Any = build_encoder(VARIANTS[request.variant])
        encoder.fold()
    encoder.load_state_dict(load_file(request.folder / FLOAT_WEIGHTS), assign=True)
    encoder = encoder.eval().requires_grad_(False)
    encoder = encoder.to(torch.device(request.place.value), getattr(torch, ENGINES[request.engine].dtype))
    return Loaded(torch.compile(encoder) if "compile" in request.engine else encoder)


def _openvino(request: Request) -> Loaded:
    from monailabel_dfqsam.benchmark import openvino_peer as peer

    integer = request.engine == "openvino-int8"
    path = request.folder / (peer.INT8_MODEL if integer else peer.FLOAT_MODEL)
    shape = (request.batch, *np.load(request.folder / IMAGES, mmap_mode="r").shape[1:])
    # In full precision it is asked for that; quantized it chooses itself, as it does for its users.
    execution = peer.load(path, shape, request.threads, None if integer else "f32")
    if integer and execution.integer_share == 0:
        raise ValueError("OpenVINO runs nothing of the quantized model in 8 bit here")
    return Loaded(
        lambda images: execution.infer([images])[0],
        f"int8 and {execution.precision}" if integer else execution.precision,
        {"integer_share": execution.integer_share, "operations": execution.operations},
    )


def _ours(request: Request) -> Loaded:
    import torch

    from monailabel_dfqsam.artifact import read_artifact
    from monailabel_dfqsam.engines import load_encoder

    torch.set_num_threads(request.threads)
    engine = ENGINES[request.engine]
    encoder = load_encoder(read_artifact(artifact_path(request.folder, engine.bits)), engine.kind)
    return Loaded(encoder.embed, getattr(encoder, "arithmetic", None))
