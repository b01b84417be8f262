"""Layers quantized one after another, each made to undo what was lost before it.

The calibration images run through the encoder twice, in full precision and through what is already quantized.
Of each Linear and 1×1 convolution, in the order of their running:

1. the weight is moved so that on the inputs as quantization left them its outputs come as near as they can to
   those of full precision, by ridge regression towards the weight itself;
2. it is rounded so that later columns make up for earlier ones (`rounding`);
3. the bias takes up what is left on average (arXiv 1906.04721), in each output channel.

All of it is linear algebra: no gradient, and nothing that runs later changes but integers and biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from monailabel_dfqsam.config import Progress
from monailabel_dfqsam.ops import Geometry, QuantizedLayer, StaticRange, float_product
from monailabel_dfqsam.quantization.modules import put_module, read_by, run, shared_copy
from monailabel_dfqsam.quantization.quantizer import Affine, RunTime, weight_scale
from monailabel_dfqsam.quantization.rounding import round_compensating, round_in_groups
from monailabel_dfqsam.sam.encoder import ImageEncoder

RIDGE = 0.3  # of the mean square of the inputs: how much the weight is held to what it was
MAX_ROWS = 1024  # of a layer's inputs kept from each image


class Wish(NamedTuple):
    """How a layer is to be quantized.

    Attributes:
        weight_bits: 4 or 8 with ranges at run time, where 4 go in groups; 2 … 8 with a static range.
        inputs: the range of what it reads.
    """

    weight_bits: int
    inputs: Affine | RunTime


class Simulated(nn.Module):
    """A quantized layer in floating point: what an engine's integers give, but for rounding of floats."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.layer = layer
        self.inputs: Affine | RunTime = RunTime(layer.activation_bits)
        if layer.input_range is not None:
            scale, zero_point = (torch.tensor([float(number)]) for number in layer.input_range)
            self.inputs = Affine(scale, zero_point, layer.activation_bits)
        self.weight = layer.weight * layer.weight_scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N], or [B, C, H, W] to [B, N, H', W'], float32."""
        if self.layer.geometry is None:
            x = self.inputs.fake(x)
        elif self.layer.by_image:
            x = self.inputs.fake(x.flatten(1)).view_as(x)
        else:
            x = self.inputs.fake(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return float_product(x, self.weight, self.layer.bias, self.layer.geometry)


def compensate(
    encoder: ImageEncoder, wishes: Mapping[str, Wish], images: Tensor, progress: Progress
) -> dict[str, QuantizedLayer]:
    """Quantizes some of an encoder's Linears and 1×1 convolutions; what else there is runs in full precision.

    Args:
        encoder: in full precision, batch norms folded, reparameterized if it is to be; left as it is.
        wishes: by the layers' names, 'blocks.0.attn.qkv' …
        images: [N, 3, S, S] float32, normalised.

    Returns:
        the layers by name.
    """
    layers: dict[str, QuantizedLayer] = {}
    with torch.inference_mode():
        expected, actual = list(images.split(1)), list(images.split(1))
        steps = encoder.steps()
        for done, (name, step) in enumerate(steps):
            own = {n: wishes[f"{name}.{n}"] for n, _ in step.named_modules() if f"{name}.{n}" in wishes}
            quantized, found = _quantized(step, own, expected, actual)
            layers |= {f"{name}.{part}": layer for part, layer in found.items()}
            if done + 1 < len(steps):
                expected = [encoder.after(name, x) for x in expected]
                actual = [encoder.after(name, quantized(x)) for x in actual] if layers else list(expected)
            progress("compensation", done + 1, len(steps))
    return layers


def _quantized(
    exact: nn.Module, wishes: Mapping[str, Wish], expected: list[Tensor], actual: list[Tensor]
) -> tuple[nn.Module, dict[str, QuantizedLayer]]:
    """A step as quantized, and its layers by name; what is expected moves on past the step, in place."""
    layers: dict[str, QuantizedLayer] = {}
    step = shared_copy(exact)
    wanted = _outputs(exact, wishes, expected)
    for part, wish in wishes.items():
        module = exact.get_submodule(part)
        assert isinstance(module, (nn.Linear, nn.Conv2d))
        seen = _inputs(step, part, wish.inputs, isinstance(module, nn.Conv2d), actual)
        layers[part] = compensated(module, wish, wanted.pop(part), seen)
        put_module(step, part, Simulated(layers[part]))
    return step, layers


def compensated(module: nn.Linear | nn.Conv2d, wish: Wish, wanted: Tensor, seen: Tensor) -> QuantizedLayer:
    """One layer whose quantized form comes near to what it gives in full precision.

    Args:
        module: a Linear [N, K] or a 1×1 convolution of K to N channels.
        wanted: [T, N] float32, its outputs in full precision, bias added; overwritten.
        seen: [T, K] float32, its inputs as the layers before give them once they are quantized, after a round
            trip through the integers; overwritten.
    """
    weight = module.weight.flatten(1)
    geometry = Geometry(1, 1, 0) if isinstance(module, nn.Conv2d) else None
    centre, mean = seen.mean(0), wanted.mean(0)
    seen -= centre
    wanted -= mean
    wanted -= seen @ weight.T
    gram = seen.T @ seen
    held = gram.clone()
    held.diagonal().add_(RIDGE * gram.diagonal().mean())
    moved = weight + torch.linalg.solve(held, seen.T @ wanted).T
    bits, inputs, groups = wish.weight_bits, wish.inputs, None
    if isinstance(inputs, RunTime) and bits == 4:
        integers, scale, groups = round_in_groups(moved, gram)
    else:
        scale = weight_scale(moved, bits)
        integers = round_compensating(moved, gram, scale, bits)
    left = mean - (integers * scale[:, None]) @ centre
    static = None if isinstance(inputs, RunTime) else StaticRange(float(inputs.scale), int(inputs.zero_point))
    return QuantizedLayer(integers, scale, left, static, bits, inputs.bits, geometry, groups)


class Samples:
    """Rows that a layer reads or gives, in one tensor as images come: joined at the end, they would be held
    twice.
    """

    def __init__(self, images: int) -> None:
        self._images, self._blocks = images, torch.empty(0)

    def put(self, index: int, x: Tensor, image: bool) -> None:
        """Evenly spaced ones of rows [1, H, W, C], or of an image's pixels [1, C, H, W]."""
        rows = (x.permute(0, 2, 3, 1) if image else x).flatten(0, -2)
        rows = rows[:: -(-len(rows) // MAX_ROWS)]
        if index == 0:
            self._blocks = rows.new_empty(self._images, *rows.shape)
        self._blocks[index] = rows

    def joined(self) -> Tensor:
        return self._blocks.flatten(0, 1)


def _outputs(step: nn.Module, parts: Mapping[str, Wish], flow: list[Tensor]) -> dict[str, Tensor]:
    """What some of a step's layers put out, [T, N] each; the images in `flow` move on past the step."""
    rows = {part: Samples(len(flow)) for part in parts}
    for index, x in enumerate(flow):
        flow[index], calls = run(step, parts, x)
        for part in parts:
            image = isinstance(step.get_submodule(part), nn.Conv2d)
            rows[part].put(index, calls[part].output, image)
    return {part: rows[part].joined() for part in parts}


def _inputs(step: nn.Module, part: str, inputs: Affine | RunTime, image: bool, flow: list[Tensor]) -> Tensor:
    """What one layer of a step reads, [T, K], of the same rows, after a round trip through the integers."""
    rows = Samples(len(flow))
    for index, x in enumerate(flow):
        rows.put(index, read_by(step, part, x), image)
    return inputs.fake(rows.joined())
