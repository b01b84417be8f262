"""`libdfqsam_cuda.so`, the compiled GPU kernels: whether they can run here, and how they are called.

The library has a plain C interface (`kernels/cuda/api.cu`), so that one build serves every version of torch.
An absent library is no error, a broken one is.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("libdfqsam_cuda.so")

_int, _int64, _float, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
SIGNATURES: dict[str, list[Any]] = {
    "dfqsam_linear": [_pointer] * 6 + [_int] * 4,
    "dfqsam_linear_gelu_quantize": [_pointer] * 4 + [_float, _int, _int, _pointer] + [_int] * 4,
    "dfqsam_quantize_rows": [_pointer, _int, _int64, _int, _int64, _float] + [_int] * 4 + [_pointer],
    "dfqsam_layer_norm_quantize": [_pointer, _int, _pointer, _pointer, _float, _int64, _int, _float]
    + [_int] * 4
    + [_pointer],
    "dfqsam_unpack_signed": [_pointer, _pointer, _int64],
    "dfqsam_attention_inputs": [_pointer] * 10 + [_int] * 8 + [_float],
    "dfqsam_attention_output": [_pointer] * 5 + [_int] * 4 + [_float] + [_int] * 4 + [_pointer],
}


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        RuntimeError: when the library is not there, or is there and cannot be loaded.
    """
    if not LIBRARY.is_file():
        raise RuntimeError(f"{LIBRARY.name} is not built: `make kernels` does that")
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        for name, arguments in SIGNATURES.items():
            getattr(loaded, name).argtypes = [*arguments, _pointer]  # the stream
        loaded.dfqsam_message.argtypes, loaded.dfqsam_message.restype = [_int], ctypes.c_char_p
        loaded.dfqsam_native_4bit.argtypes = loaded.dfqsam_set_device.argtypes = [_int]
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"{LIBRARY.name} is there, but broken ({error}): build it again") from None
    return loaded


def why_unavailable() -> str | None:
    """Why the CUDA ops cannot run here, or None when they can.

    Raises:
        RuntimeError: when the library is there and cannot be loaded.
    """
    if not LIBRARY.is_file():
        return f"{LIBRARY.name} is not built"
    loaded = library()
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if loaded.dfqsam_native_4bit(torch.cuda.current_device()) < 0:
        return f"{LIBRARY.name} holds no kernels for the GPU '{torch.cuda.get_device_name()}'"
    return None


def native_4bit(device: torch.device) -> bool:
    """Whether a GPU multiplies 4-bit values itself; otherwise they go through int8 tensor cores."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return bool(library().dfqsam_native_4bit(index) == 1)


def run(function: str, *arguments: Tensor | int | float | None) -> None:
    """Enqueues a kernel on the current stream of its tensors' device.

    Args:
        arguments: as the C function takes them, without the stream; tensors go as addresses, None as null.

    Raises:
        ValueError: when the tensors do not lie on one CUDA device.
        RuntimeError: when the library refuses or CUDA fails; the message says why.
    """
    devices = {argument.device for argument in arguments if isinstance(argument, Tensor)}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise ValueError(
            f"{function} needs its tensors on one CUDA device, not on {sorted(map(str, devices))}"
        )
    device = devices.pop()
    plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    loaded = library()
    with torch.cuda.device(device):
        status = loaded.dfqsam_set_device(device.index)
        if not status:
            status = getattr(loaded, function)(*plain, torch.cuda.current_stream(device).cuda_stream)
    if status:
        raise RuntimeError(f"{function}: {loaded.dfqsam_message(status).decode()} ({status})")
