"""The oracle: exact integer products in plain torch, and policy `paper`'s quantized attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from monailabel_dfqsam.artifact import Artifact
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines.encoder import assemble
from monailabel_dfqsam.engines.kernels import Kernel, Kernels, attend_quantize
from monailabel_dfqsam.ops import QuantizedLayer, Rows, multiplied, plain
from monailabel_dfqsam.quantization.quantizer import Affine, fake_log_sqrt2
from monailabel_dfqsam.sam.encoder import ImageEncoder


class QuantizedAttentionCore(nn.Module):
    """Attention with q, k, v and probabilities quantized, simulated in float (policy `paper`)."""

    def __init__(self, ranges: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        pairs = ranges[:6].view(3, 2)
        self.q, self.k, self.v = (Affine(pair[:1], pair[1:], bits) for pair in pairs)
        self.delta = float(ranges[6])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """As `AttentionCore`; `bias` comes from the unquantized q."""
        logits = self.q.fake(q) @ self.k.fake(k).transpose(-1, -2) * q.shape[-1] ** -0.5
        probabilities = (logits if bias is None else logits + bias).softmax(-1)
        return fake_log_sqrt2(probabilities, self.delta, self.bits) @ self.v.fake(v)


class ReferenceEncoder:
    """Runs every artifact; slow, exact, and what the other engines are held to."""

    kind = EngineKind.REFERENCE

    def __init__(self, artifact: Artifact) -> None:
        self.encoder = assemble(artifact, _KERNELS)

    def embed(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            embedding: Tensor = self.encoder(images)
        return embedding


def reference_kernel(layer: QuantizedLayer) -> Kernel:
    """`ops.integer.multiplied` for one layer."""

    def kernel(rows: Rows, residual: Tensor | None = None) -> Tensor:
        result = multiplied(rows, layer)
        return result if residual is None else residual.add_(result)

    return kernel


_KERNELS = Kernels(
    reference_kernel,
    plain.quantize_input,
    plain.layer_norm_quantize,
    plain.gelu,
    plain.gelu_quantize,
    attend_quantize,
    QuantizedAttentionCore,
)


def layer_by_layer(artifact: Artifact) -> ImageEncoder:
    """The encoder with each quantized layer a module from floats to floats, to look at their outputs."""
    return assemble(artifact, _KERNELS, fused=False)
