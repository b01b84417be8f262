"""Products of 8-bit integers on processors that sum neighbouring pairs of them in 16 bit.

Without VNNI, AMX or i8mm libraries use an instruction that puts x[k]·w[k] + x[k+1]·w[k+1] into a signed
number of 16 bit, and stops at 32,767 where the sum is larger. Halves of the weights, each within ±64, keep
every pair below: x·w = x·(w >> 1) + x·(w − (w >> 1)), one product of twice the length.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from monailabel_dfqsam.ops.integer import int_accumulate
from monailabel_dfqsam.ops.layer import Geometry, QuantizedLayer, StaticRange

logger = logging.getLogger(__name__)

WRONG = "its products of 8-bit integers are wrong or missing on this processor"

Product = Callable[[QuantizedLayer, Tensor], Tensor]

_LARGEST_PAIR = (1 << 15) - 1

# Rows and inputs: libraries choose kernels by size. Sums stay below 2^24, so that float32 holds them.
_SIZES, _OUTPUTS = ((1, 500), (33, 67), (64, 256)), 40
_CHANNELS, _SIDE = 48, 6


def may_saturate(layer: QuantizedLayer) -> bool:
    """Whether some input makes two neighbouring products exceed 16 bit together."""
    largest = int(layer.weight.to(torch.int16).abs().max())
    return 2 * layer.largest_input * largest > _LARGEST_PAIR


def halves(weight: Tensor) -> Tensor:
    """[N, K, …] int8 as [N, 2K, …] int8 within ±64, for an input that is repeated along K."""
    low = weight >> 1
    return torch.cat([low, weight - low], 1)


def needs_halves(engine: str, proof: Callable[[bool], bool]) -> bool | None:
    """Whether an engine is right here with weights in halves only; None where even then it is not.

    Args:
        engine: its name, for the log.
        proof: whether products are exact, of halves or not.
    """
    for split in (False, True):
        try:
            exact = proof(split)
        except RuntimeError as error:  # of a library that has no such product for this processor
            logger.info("%s: %s", engine, error)
            continue
        if exact and split:
            logger.info(
                "%s: sums of 8-bit products saturate on this processor, those of halves do not", engine
            )
        if exact:
            return split
    logger.warning("The engine %s is not used: %s", engine, WRONG)
    return None


def is_exact(product: Product) -> bool:
    """Whether an engine multiplies extreme integers as plain integers do.

    Args:
        product: of a Linear of scales 1, zero-point 0 and bias 0 and its input [M, K] uint8: [M, N] float32.
    """
    for rows, columns in _SIZES:
        layer = _extreme_layer(columns, None)
        x = _extremes(rows, columns, 0, 255).to(torch.uint8)
        if not torch.equal(product(layer, x), int_accumulate(x, layer.weight).float()):
            return False
    return True


def convolves_exactly(product: Product) -> bool:
    """As `is_exact`, of a convolution of 3 × 3 pixels: [1, C, H, W] uint8 to [1, N, H, W] float32."""
    geometry = Geometry(3, 1, 1)
    layer = _extreme_layer(_CHANNELS * geometry.kernel**2, geometry)
    x = _extremes(_CHANNELS, _SIDE**2, 0, 255).to(torch.uint8).view(1, _CHANNELS, _SIDE, _SIDE)
    sums = int_accumulate(geometry.gather(x, 0), geometry.arrange(layer.weight)).float()
    return torch.equal(product(layer, x), geometry.scatter(sums, 1, _SIDE, _SIDE))


def _extreme_layer(columns: int, geometry: Geometry | None) -> QuantizedLayer:
    weight = _extremes(_OUTPUTS, columns, -128, 127).to(torch.int8)
    ones, zeros = torch.ones(_OUTPUTS), torch.zeros(_OUTPUTS)
    return QuantizedLayer(weight, ones, zeros, StaticRange(1.0, 0), 8, 8, geometry)


def _extremes(rows: int, columns: int, low: int, high: int) -> Tensor:
    """[rows, columns] int64: rows of the highest, of the lowest, of both in turn, and of anything between."""
    values = torch.randint(low, high + 1, (rows, columns), generator=torch.Generator().manual_seed(0))
    values[0] = high
    values[1:2] = low
    values[2:3, ::2], values[2:3, 1::2] = high, low
    return values
