"""The peer OpenVINO: the same encoder as its files, in float32 and quantized by NNCF, and how it runs.

Nothing here imports torch, whose memory would count as OpenVINO's.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Both libraries report their use to their maker when this can be imported; of a module that is None it fails.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

import openvino as ov  # noqa: E402

FLOAT_MODEL = "openvino-fp32.xml"
INT8_MODEL = "openvino-int8.xml"

_PRODUCTS = ("FullyConnected", "MatMul", "Convolution", "Deconvolution")
_PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
_INTEGERS = ("u8", "i8")


class Execution(NamedTuple):
    """How a compiled model runs.

    Attributes:
        infer: as `caller` gives it; the input is [B, 3, S, S].
        precision: of what is not quantized, 'float32' or 'bfloat16'.
        integer_share: part of the matrix products' and convolutions' multiplications in 8 bit; products of
            a fused attention cannot be seen and are left out.
        operations: how many operations of each kind and precision, 'FullyConnected u8' for instance.
    """

    infer: Any
    precision: str
    integer_share: float
    operations: dict[str, int]


def write_float(folder: Path, encoder: Any, example: Any) -> None:
    """Traces the torch encoder with an example [1, 3, S, S] and writes it for any number of images."""
    model = ov.convert_model(encoder, example_input=example, input=[(-1, *example.shape[1:])])
    ov.save_model(model, folder / FLOAT_MODEL, compress_to_fp16=False)


def write_int8(folder: Path, images: NDArray[np.float32]) -> None:
    """Quantizes what `write_float` wrote: NNCF's post-training quantization for transformers, its defaults.

    Args:
        images: [N, 3, S, S], to calibrate on.
    """
    import nncf

    nncf.set_log_level(logging.ERROR)
    model = ov.Core().read_model(folder / FLOAT_MODEL)
    model.reshape([1, *images.shape[1:]])
    quantized = nncf.quantize(
        model,
        nncf.Dataset([image[None] for image in images]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
    )
    quantized.reshape([-1, *images.shape[1:]])
    ov.save_model(quantized, folder / INT8_MODEL, compress_to_fp16=False)


def load(path: Path, shape: tuple[int, ...], threads: int, precision: str | None) -> Execution:
    """A file's model, compiled as `compiled` does.

    Args:
        shape: [B, 3, S, S].
    """
    model = ov.Core().read_model(path)
    model.reshape(list(shape))
    runs = compiled(model, threads, precision)
    precision_name = runs.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    share, operations = _executed(runs.get_runtime_model())
    return Execution(
        infer=caller(runs),
        precision=_PRECISIONS.get(precision_name, precision_name),
        integer_share=share,
        operations=operations,
    )


def compiled(model: Any, threads: int, precision: str | None) -> Any:
    """An `openvino.Model` compiled for the CPU, for the least time a call.

    Args:
        precision: of what is not quantized; None leaves the choice to OpenVINO, which takes bfloat16 on CPUs
            that have instructions for it.
    """
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    if precision is not None:
        options["INFERENCE_PRECISION_HINT"] = precision
    return ov.Core().compile_model(model, "CPU", options)


def caller(runs: Any) -> Callable[[list[Any]], Any]:
    """From a compiled model's inputs, float32, to its outputs by index, which the next call overwrites."""
    request = runs.create_infer_request()
    return lambda inputs: request.infer(inputs, share_inputs=True, share_outputs=True)


def _executed(graph: Any) -> tuple[float, dict[str, int]]:
    operations: Counter[str] = Counter()
    macs: Counter[bool] = Counter()
    for operation in graph.get_ordered_ops():
        info = operation.get_rt_info()
        kind, precision = str(info["layerType"].astype(str)), str(info["runtimePrecision"].astype(str))
        if kind in ("Const", "Input", "Output"):
            continue
        operations[f"{kind} {precision}"] += 1
        if kind in _PRODUCTS:
            macs[precision in _INTEGERS] += _macs(operation, kind)
    return macs[True] / max(1, sum(macs.values())), dict(sorted(operations.items()))


def _macs(operation: Any, kind: str) -> int:
    output = int(np.prod(operation.output(0).get_shape()))
    if kind in ("FullyConnected", "MatMul"):
        return output * int(operation.input(0).get_shape()[-1])
    weights = list(operation.input(1).get_shape())  # [out, in, k, k], transposed [in, out, k, k]
    if kind == "Convolution":
        return output * int(np.prod(weights[1:]))
    return int(np.prod(operation.input(0).get_shape())) * int(np.prod(weights[1:]))
