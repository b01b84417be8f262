"""A volume like a CT, computed in a moment at any size: a body, and one organ through all slices.

Arrays are [I, J, K], as in `segmentation.volume`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

SPACING = (0.75, 0.75, 2.5)  # millimetres; a thoracic CT's
_TILT = 0.2  # radians, so that the grid is none of the patient's planes


def write_phantom(path: Path, shape: tuple[int, int, int]) -> None:
    """Writes [I, J, K] int16 in Hounsfield units: a body with a warped organ through all slices, and noise.

    The grid is anisotropic and tilted. The object is `organ(shape, k)`, its middle `organ_centre(shape, k)`.
    """
    i, j = _places(shape)
    body = ((i / shape[0] - 0.5) / 0.45) ** 2 + ((j / shape[1] - 0.5) / 0.38) ** 2 < 1
    random = np.random.default_rng(0)
    planes = []
    for k in range(shape[2]):
        values = np.where(organ(shape, k), 140, np.where(body, 30, -1000)).astype(np.float32)
        planes.append((values + random.standard_normal(values.shape, dtype=np.float32) * 12).T)
    image = sitk.GetImageFromArray(np.stack(planes).astype(np.int16))
    image.SetSpacing(SPACING)
    image.SetOrigin((-190.5, -185.25, 42.0))
    c, s = float(np.cos(_TILT)), float(np.sin(_TILT))
    image.SetDirection((1, 0, 0, 0, c, -s, 0, s, c))
    sitk.WriteImage(image, str(path))


def organ(shape: tuple[int, int, int], k: int) -> NDArray[np.bool_]:
    """[I, J] bool: where the phantom's organ is on slice k."""
    i, j = _places(shape)
    ci, cj = organ_centre(shape, k)
    angle = np.arctan2(j - cj, i - ci)
    radius = 0.16 * min(shape[:2]) * (1 + 0.12 * np.cos(3 * angle + k / 9))
    inside: NDArray[np.bool_] = np.hypot(i - ci, j - cj) < radius
    return inside


def organ_centre(shape: tuple[int, int, int], k: int) -> tuple[int, int]:
    """(i, j) of the phantom's organ on slice k."""
    shift = k / max(1, shape[2] - 1)
    return round(shape[0] * (0.42 + 0.1 * shift)), round(shape[1] * (0.55 - 0.08 * shift))


def _places(shape: tuple[int, int, int]) -> list[NDArray[np.float32]]:
    """Indices i and j of a slice's pixels, each [I, J] float32."""
    return list(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape[:2]), indexing="ij"))
