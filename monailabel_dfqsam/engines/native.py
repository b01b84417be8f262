"""The CPU engine of our own products, which multiply 4-bit values as what they are."""

from __future__ import annotations

import functools
from functools import partial

import torch
from torch import Tensor

from monailabel_dfqsam.artifact import Artifact
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines.encoder import assemble
from monailabel_dfqsam.engines.kernels import Kernels
from monailabel_dfqsam.engines.onednn import attend_quantize_compiled
from monailabel_dfqsam.ops import Rows, compiled, saturation
from monailabel_dfqsam.ops.product import Product, has_dot, instruction_set, library


def why_unavailable() -> str | None:
    """Why the engine cannot run here, or None when it can."""
    if library() is None or compiled.library() is None:
        return "its library was not built: there was no C++ compiler when this package was installed"
    if instruction_set() is None:
        return "it knows no instructions of this processor"
    return None if _is_exact() else saturation.WRONG


@functools.cache
def _is_exact() -> bool:
    instructions = instruction_set()
    assert instructions is not None
    return saturation.is_exact(lambda layer, x: Product(layer, instructions)(Rows(x)))


class NativeEncoder:
    """Runs artifacts of policy `deploy` on the CPU."""

    kind = EngineKind.NATIVE

    def __init__(self, artifact: Artifact) -> None:
        self.encoder = assemble(artifact, native_kernels())

    def embed(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            embedding: Tensor = self.encoder(images)
        return embedding


def native_kernels() -> Kernels:
    """The engine's parts, for the instructions at hand."""
    instructions = instruction_set()
    assert instructions is not None
    levels = not has_dot(instructions)
    return Kernels(
        partial(Product, instructions=instructions),
        partial(compiled.quantize_input, levels=levels),
        partial(compiled.layer_norm_quantize, levels=levels),
        compiled.gelu,
        partial(compiled.gelu_quantize, levels=levels),
        partial(attend_quantize_compiled, levels=levels),
    )
