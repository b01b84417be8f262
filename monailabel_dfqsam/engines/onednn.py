"""The CPU engine: oneDNN's 8-bit matrix product on 4-bit values in 8-bit containers.

No CPU multiplies 4-bit integers natively; the artifact stays packed on disk, and each layer is unpacked and
prepacked once when it is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monailabel_dfqsam.artifact import Artifact, ArtifactError
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines.encoder import Kernel, assemble
from monailabel_dfqsam.ops import QuantizedLayer


def available() -> bool:
    """Whether this torch has oneDNN's quantized linear for the CPU."""
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.onednn, "qlinear_pointwise")


class OnednnEncoder:
    """Runs artifacts of policy `deploy` on the CPU."""

    kind = EngineKind.ONEDNN

    def __init__(self, artifact: Artifact) -> None:
        if artifact.header["attention_bits"]:
            raise ArtifactError("policy 'paper' quantizes attention, which only the reference engine runs")
        self.encoder = assemble(artifact, onednn_kernel)

    def embed(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            embedding: Tensor = self.encoder(images)
        return embedding


def onednn_kernel(layer: QuantizedLayer) -> Kernel:
    """oneDNN's u8×s8 product for one layer, zero-point and bias within it."""
    ops = torch.ops.onednn
    prepacked = ops.qlinear_prepack(layer.weight, None)
    no_zero_points = torch.zeros(layer.weight.shape[0], dtype=torch.int64)

    def kernel(rows: Tensor) -> Tensor:
        result: Tensor = ops.qlinear_pointwise(
            rows, layer.input_scale, layer.input_zero_point, prepacked, layer.weight_scale, no_zero_points,
            layer.bias, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return result

    return kernel
