"""An artifact as a model that can learn, its encoder quantized by Brevitas, and back.

Weights start on the artifact's own integers and scales on its own, so that before the first step the model
draws what the artifact draws. Gradients pass rounding as if it were not there; those of scales are what
learned step sizes have (arXiv 1902.08153). Zero-points stay.
"""

from __future__ import annotations

import copy

import torch
from brevitas.core.function_wrapper import Identity
from brevitas.core.quant import IntQuant
from brevitas.core.restrict_val import LogFloatRestrictValue
from brevitas.core.scaling import ParameterScaling
from brevitas.function.ops import tensor_clamp
from brevitas.function.ops_ste import round_ste
from torch import Tensor, nn

from monailabel_dfqsam.artifact import Artifact, encode_layer, stored
from monailabel_dfqsam.engines.encoder import assemble_modules
from monailabel_dfqsam.ops import Groups, QuantizedLayer, StaticRange, float_product, row_rounded
from monailabel_dfqsam.ops.layer import spread
from monailabel_dfqsam.sam.model import Sam
from monailabel_dfqsam.sam.variants import VARIANTS
from monailabel_dfqsam.segmentation.segmenter import load_decoder


class Quantizer(nn.Module):
    """Floats to those of a few levels, by Brevitas: a learned scale, positive, and a fixed zero-point."""

    bits: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: int, bits: int, signed: bool) -> None:
        """Makes a quantizer.

        Args:
            scale: of any shape that multiplies what is quantized, > 0.
            signed: levels lie on both sides of 0, one more below it.
        """
        super().__init__()
        self.int_quant = IntQuant(narrow_range=False, signed=signed, input_view_impl=Identity())
        # By its logarithm, so that a step of learning changes small scales as much as large ones.
        self.scaling = ParameterScaling(
            scale, tuple(scale.shape), restrict_scaling_impl=LogFloatRestrictValue()
        )
        self.register_buffer("bits", torch.tensor(float(bits)))
        self.register_buffer("zero_point", torch.tensor(float(zero_point)))

    def scale(self) -> Tensor:
        """Of the shape it was made with, > 0."""
        scale: Tensor = self.scaling(self.bits)
        return scale

    def integers(self, x: Tensor) -> Tensor:
        """x as float tensor of whole numbers."""
        integers: Tensor = self.int_quant.to_int(self.scale(), self.zero_point, self.bits, x)
        return integers

    def forward(self, x: Tensor) -> Tensor:
        """x as it is after quantizing and back, float of the same shape."""
        quantized: Tensor = self.int_quant(self.scale(), self.zero_point, self.bits, x)
        return quantized


class GroupedWeights(Quantizer):
    """The quantizer of weights in groups: a learned scale for each row; the groups' own numbers stay."""

    multiplier: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, scale: Tensor, groups: Groups, columns: int) -> None:
        super().__init__(scale, 0, 4, signed=False)
        self.groups = groups
        parts = (groups.multiplier, groups.zero_point, *groups.bounds)
        for name, part in zip(("multiplier", "offset", "low", "high"), parts, strict=True):
            self.register_buffer(name, spread(part.float(), columns))

    def integers(self, x: Tensor) -> Tensor:
        """x as float tensor of whole numbers, those that engines multiply."""
        levels: Tensor = round_ste(x / (self.scale() * self.multiplier)) + self.offset
        levels = tensor_clamp(levels, self.low, self.high)
        return (levels - self.offset) * self.multiplier

    def forward(self, x: Tensor) -> Tensor:
        return self.integers(x) * self.scale()


class RunTimeRange(nn.Module):
    """What a layer reads, rounded in ranges found from it, of rows or images; gradients pass unchanged."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.bits, self.by_image = layer.activation_bits, layer.by_image
        self.pixels = layer.geometry is not None

    def forward(self, x: Tensor) -> Tensor:
        """x as it is after quantizing and back, float of the same shape."""
        given = x.detach()
        if self.by_image:
            rounded = row_rounded(given.flatten(1), self.bits).view_as(x)
        elif self.pixels:
            rounded = row_rounded(given.movedim(1, -1), self.bits).movedim(-1, 1)
        else:
            rounded = row_rounded(given, self.bits)
        return rounded + (x - given)


class TrainableLayer(nn.Module):
    """A Linear or convolution whose weight and input are quantized while it learns.

    Attributes:
        weight: [N, K] float, of convolutions with the shape that torch gives theirs flattened.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        scale = layer.weight_scale[:, None]
        self.weight = nn.Parameter(layer.weight.float() * scale)
        self.bias = nn.Parameter(layer.bias.clone())
        self.weight_quantizer = (
            Quantizer(scale, 0, layer.weight_bits, signed=True)
            if layer.groups is None
            else GroupedWeights(scale, layer.groups, layer.weight.shape[1])
        )
        self.input_quantizer = (
            RunTimeRange(layer)
            if layer.input_range is None
            else Quantizer(
                torch.tensor([layer.input_range.scale]), layer.input_range.zero_point, layer.activation_bits,
                signed=False,
            )
        )  # fmt: skip
        self.activation_bits, self.geometry = layer.activation_bits, layer.geometry

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] or [B, C, H, W] float, to [..., N] or [B, N, H', W'] float."""
        weight = self.weight_quantizer(self.weight)
        return float_product(self.input_quantizer(x), weight, self.bias, self.geometry)

    @torch.no_grad()
    def quantized(self) -> QuantizedLayer:
        """Its numbers as an artifact holds them."""
        inputs, weights = self.input_quantizer, self.weight_quantizer
        fixed = None
        if isinstance(inputs, Quantizer):
            fixed = StaticRange(float(inputs.scale()), int(inputs.zero_point))
        return QuantizedLayer(
            weight=weights.integers(self.weight).to(torch.int8),
            weight_scale=weights.scale().flatten().clone(),
            bias=self.bias.detach().clone(),
            input_range=fixed,
            weight_bits=int(weights.bits),
            activation_bits=self.activation_bits,
            geometry=self.geometry,
            groups=weights.groups if isinstance(weights, GroupedWeights) else None,
        )


def trainable(artifact: Artifact) -> Sam:
    """The model of an artifact in training mode; image encoder and mask decoder are free to learn.

    Args:
        artifact: of policy `deploy`.

    Raises:
        ArtifactError: when the artifact's tensors are not those of its model.
    """
    sam = Sam(VARIANTS[artifact.header["variant"]])
    # What is assembled shares tensors with the artifact, which learning must not change.
    sam.image_encoder = copy.deepcopy(assemble_modules(artifact, TrainableLayer))
    sam.prompt_encoder, sam.mask_decoder = load_decoder(artifact)
    sam.train().requires_grad_(True)
    sam.prompt_encoder.requires_grad_(False)
    return sam


@torch.no_grad()
def to_artifact(sam: Sam, start: Artifact) -> Artifact:
    """What a model of `trainable(start)` has become, under the header of `start`."""
    tensors = {key: value for key, value in start.tensors.items() if key.startswith("prompt_encoder.")}
    layers = {}
    learned = {
        name: module
        for name, module in sam.image_encoder.named_modules()
        if isinstance(module, TrainableLayer)
    }
    for name, module in learned.items():
        layers[name], parts = encode_layer(name, module.quantized())
        tensors.update(parts)
    for key, value in (*sam.image_encoder.named_parameters(), *sam.image_encoder.named_buffers()):
        if not any(key.startswith(f"{name}.") for name in learned):
            tensors[f"image_encoder.{key}"] = stored(value.detach())
    tensors.update(
        {f"mask_decoder.{key}": stored(value) for key, value in sam.mask_decoder.state_dict().items()}
    )
    # Engines and files have them on the CPU, wherever they learned.
    return Artifact({**start.header, "layers": layers}, {key: value.cpu() for key, value in tensors.items()})
