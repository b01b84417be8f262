"""Blocks of Linears quantized one after another, each made to undo what was lost before it.

The calibration images run through the encoder twice, in full precision and through what is already quantized.
Of each Linear, in the order of their running:

1. the weight is moved so that on the inputs as quantization left them its outputs come as near as they can to
   those of full precision, by ridge regression towards the weight itself;
2. it is rounded so that later columns make up for earlier ones (`rounding`);
3. the bias takes up what is left on average (arXiv 1906.04721), in each output channel.

All of it is linear algebra: no gradient, and nothing that runs later changes but integers and biases.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monailabel_dfqsam.config import Progress
from monailabel_dfqsam.ops import QuantizedLayer, StaticRange
from monailabel_dfqsam.quantization.modules import read_by, run, shared_copy
from monailabel_dfqsam.quantization.quantizer import Affine, weight_scale
from monailabel_dfqsam.quantization.rounding import round_compensating
from monailabel_dfqsam.sam.encoder import ImageEncoder, TransformerBlock

RIDGE = 0.3  # of the mean square of the inputs: how much the weight is held to what it was
MAX_ROWS = 1024  # of a layer's inputs kept from each image


class _Simulated(nn.Module):
    """A quantized Linear in floating point: what an engine's integers give, but for rounding of floats."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        assert layer.input_range is not None
        scale, zero_point = layer.input_range
        self.inputs = Affine(torch.tensor([scale]), torch.tensor([float(zero_point)]), layer.activation_bits)
        self.weight, self.bias = layer.weight * layer.weight_scale[:, None], layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inputs.fake(x), self.weight, self.bias)


def compensate(
    encoder: ImageEncoder, ranges: Mapping[str, Affine], images: Tensor, bits: int, progress: Progress
) -> dict[str, QuantizedLayer]:
    """Quantizes the four Linears of every transformer block; what else there is runs in full precision.

    Args:
        encoder: in full precision, reparameterized if it is to be; left as it is.
        ranges: of the inputs of these Linears, by name, one range a tensor.
        images: [N, 3, S, S] float32, normalised.
        bits: of weights.

    Returns:
        the layers by name, 'blocks.0.attn.qkv' …
    """
    layers: dict[str, QuantizedLayer] = {}
    with torch.inference_mode():
        expected, actual = list(images.split(1)), list(images.split(1))
        *steps, _ = encoder.steps()
        for done, (name, step) in enumerate(steps):
            if isinstance(step, TransformerBlock):
                block, found = _quantized(step, name, ranges, expected, actual, bits)
                layers |= found
                _move_on(encoder, name, block, actual)
            else:
                _move_on(encoder, name, step, expected)
                if layers:
                    _move_on(encoder, name, step, actual)
                else:  # nothing is quantized so far
                    actual = list(expected)
            progress("compensation", done + 1, len(steps))
    return layers


def _quantized(
    exact: TransformerBlock,
    place: str,
    ranges: Mapping[str, Affine],
    expected: list[Tensor],
    actual: list[Tensor],
    bits: int,
) -> tuple[TransformerBlock, dict[str, QuantizedLayer]]:
    """A block as quantized, and its layers by name; the tokens in full precision move on past it."""
    layers = {}
    block = shared_copy(exact)
    wanted = _outputs(exact, expected)
    for part in exact.linears:
        name = f"{place}.{part}"
        linear = exact.get_submodule(part)
        assert isinstance(linear, nn.Linear)
        seen = _inputs(block, part, ranges[name], actual)
        layers[name] = compensated(linear.weight, ranges[name], wanted.pop(part), seen, bits)
        parent, _, child = part.rpartition(".")
        setattr(block.get_submodule(parent), child, _Simulated(layers[name]))
    return block, layers


def compensated(weight: Tensor, inputs: Affine, wanted: Tensor, seen: Tensor, bits: int) -> QuantizedLayer:
    """One Linear whose quantized form comes near to what it gives in full precision.

    Args:
        weight: [N, K] float32.
        inputs: the range that quantizes what it reads.
        wanted: [T, N] float32, its outputs in full precision, bias added; overwritten.
        seen: [T, K] float32, its inputs as the layers before give them once they are quantized, after a round
            trip through the integers; overwritten.
        bits: of the weight.
    """
    centre, mean = seen.mean(0), wanted.mean(0)
    seen -= centre
    wanted -= mean
    wanted -= seen @ weight.T
    gram = seen.T @ seen
    held = gram.clone()
    held.diagonal().add_(RIDGE * gram.diagonal().mean())
    moved = weight + torch.linalg.solve(held, seen.T @ wanted).T
    scale = weight_scale(moved, bits)
    integers = round_compensating(moved, gram, scale, bits)
    left = mean - (integers * scale[:, None]) @ centre
    return QuantizedLayer(
        integers, scale, left, StaticRange(float(inputs.scale), int(inputs.zero_point)), bits, inputs.bits
    )


def _move_on(encoder: ImageEncoder, name: str, step: nn.Module, flow: list[Tensor]) -> None:
    """Runs all images' tokens through a step, one image at a time."""
    for index, x in enumerate(flow):
        flow[index] = encoder.after(name, step(x))


class _Rows:
    """Rows of several images, in one tensor as they come: joined at the end, they would be held twice."""

    def __init__(self, images: int) -> None:
        self._images, self._blocks = images, torch.empty(0)

    def put(self, index: int, x: Tensor) -> None:
        """Evenly spaced ones of an image's rows [1, H, W, C]."""
        rows = x.flatten(0, -2)
        rows = rows[:: -(-len(rows) // MAX_ROWS)]
        if index == 0:
            self._blocks = rows.new_empty(self._images, *rows.shape)
        self._blocks[index] = rows

    def joined(self) -> Tensor:
        return self._blocks.flatten(0, 1)


def _outputs(block: TransformerBlock, flow: list[Tensor]) -> dict[str, Tensor]:
    """What a block's Linears put out, [T, N] each; the images' tokens in `flow` move on past the block."""
    rows = {part: _Rows(len(flow)) for part in block.linears}
    for index, x in enumerate(flow):
        flow[index], calls = run(block, block.linears, x)
        for part in block.linears:
            rows[part].put(index, calls[part].output)
    return {part: rows[part].joined() for part in block.linears}


def _inputs(block: TransformerBlock, part: str, inputs: Affine, flow: list[Tensor]) -> Tensor:
    """What one Linear of a block reads, [T, K], of the same rows, after a round trip through the integers."""
    rows = _Rows(len(flow))
    for index, x in enumerate(flow):
        rows.put(index, inputs.fake(read_by(block, part, x)))
    return rows.joined()
