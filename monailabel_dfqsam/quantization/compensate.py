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

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monailabel_dfqsam.config import Progress
from monailabel_dfqsam.ops import QuantizedLayer
from monailabel_dfqsam.quantization.quantizer import Affine, weight_scale
from monailabel_dfqsam.quantization.rounding import round_compensating
from monailabel_dfqsam.sam.encoder import ImageEncoder, TransformerBlock

RIDGE = 0.3  # of the mean square of the inputs: how much the weight is held to what it was
MAX_ROWS = 1024  # of a layer's inputs kept from each image


class _Simulated(nn.Module):
    """A quantized Linear in floating point: what an engine's integers give, but for rounding of floats."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.inputs = Affine(
            torch.tensor([layer.input_scale]),
            torch.tensor([float(layer.input_zero_point)]),
            layer.activation_bits,
        )
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
    quantized = copy.deepcopy(encoder)
    steps = encoder.steps()
    with torch.inference_mode():
        expected = actual = list(images.split(1))
        for done, ((name, exact), (_, step)) in enumerate(zip(steps, quantized.steps(), strict=True)):
            if isinstance(exact, TransformerBlock):
                assert isinstance(step, TransformerBlock)
                wanted, expected = _run(exact, exact.linears, expected)
                for part in exact.linears:
                    linear = exact.get_submodule(part)
                    assert isinstance(linear, nn.Linear)
                    got, _ = _run(step, (part,), actual)
                    layer = compensated(linear, ranges[f"{name}.{part}"], wanted[part], got[part], bits)
                    layers[f"{name}.{part}"] = layer
                    parent, _, child = part.rpartition(".")
                    setattr(step.get_submodule(parent), child, _Simulated(layer))
                _, actual = _run(step, (), actual)
            else:
                expected, actual = [exact(x) for x in expected], [step(x) for x in actual]
            progress("compensation", done + 1, len(steps))
    return layers


def compensated(
    linear: nn.Linear, inputs: Affine, exact: Tensor, actual: Tensor, bits: int
) -> QuantizedLayer:
    """One Linear whose quantized form, on `actual`, comes near to what it gives in full precision on `exact`.

    Args:
        inputs: the range that quantizes `actual`.
        exact: [T, K] float32, inputs in full precision.
        actual: [T, K] float32, the same as the layers before give them once they are quantized.
        bits: of the weight.
    """
    weight, bias = linear.weight.detach(), linear.bias.detach()
    seen = inputs.fake(actual)
    centre = seen.mean(0)
    seen = seen - centre
    target = F.linear(exact, weight, bias)
    mean = target.mean(0)
    gram = seen.T @ seen
    held = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    missing = (target - mean) - seen @ weight.T
    moved = weight + torch.linalg.solve(held, seen.T @ missing).T
    scale = weight_scale(moved, bits)
    integers = round_compensating(moved, gram, scale, bits)
    left = mean - (integers * scale[:, None]) @ centre
    return QuantizedLayer(
        integers, scale, left, float(inputs.scale), int(inputs.zero_point), bits, inputs.bits, None
    )


def _run(
    block: TransformerBlock, parts: tuple[str, ...], tokens: list[Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What some Linears of a block read, [T, K] each, rows the same for every block; and what it puts out."""
    rows: dict[str, list[Tensor]] = {part: [] for part in parts}

    def keep(part: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            rows[part].append(x[:: -(-len(x) // MAX_ROWS)].clone())

        return block.get_submodule(part).register_forward_pre_hook(hook)

    handles = [keep(part) for part in parts]
    try:
        outputs = [block(x) for x in tokens]
    finally:
        for handle in handles:
            handle.remove()
    return {part: torch.cat(chunks) for part, chunks in rows.items()}, outputs
