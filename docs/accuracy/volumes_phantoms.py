"""Random volumes with known objects, on which the constants of propagation were decided.

No patient is in them. Unlike the phantoms of the pretraining they have a third axis: ellipsoids that grow and
end, bent tubes, tubes that fork, all of random contrast among neighbours of random contrast.

`python docs/accuracy/volumes_phantoms.py ARTIFACT FIRST LAST` prints mean volumetric Dice over these seeds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks.propagation import PLACES, segment
from monailabel_dfqsam.artifact import read_artifact
from monailabel_dfqsam.evaluation import dice
from monailabel_dfqsam.segmentation.segmenter import load_segmenter
from monailabel_dfqsam.segmentation.volume import Volume, Window

# An object must be seen and must have slices to propagate through.
_MIN_SLICES, _MIN_AREA, _MIN_CONTRAST = 5, 40, 0.08
_MAX_OBJECTS = 3

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Phantom:
    """A volume [I, J, K] and the masks [I, J, K] bool of some of its objects."""

    volume: Volume
    masks: tuple[Mask, ...]


def phantom(seed: int) -> Phantom:
    """The same seed gives the same voxels."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(96, 161)), int(rng.integers(96, 161)), int(rng.integers(14, 33)))
    grid = np.stack(np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij"))
    regions = _scenery(rng, grid)
    objects = []
    for _ in range(int(rng.integers(5, 12))):
        inside = _object(rng, grid)
        if inside.any():
            regions[inside] = regions.max() + 1
            objects.append(int(regions.max()))
    image = _shown(rng, regions)
    masks = [mask for region in objects if (mask := _visible(regions == region, image)) is not None]
    picked = rng.permutation(len(masks))[:_MAX_OBJECTS]
    volume = Volume(
        image.astype(np.float32), (0.0,) * 3, (1.0, 1.0, 4.0), tuple(np.eye(3).ravel()), "MR", Window(0, 1)
    )
    return Phantom(volume, tuple(masks[i] for i in sorted(picked)))


def _smooth(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> Array:
    """Unit-variance noise, four times coarser between slices than within one, as thick slices are."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape), (sigma, sigma, sigma / 4))
    return np.asarray(field / field.std())


def _scenery(rng: np.random.Generator, grid: Array) -> NDArray[np.int64]:
    shape = grid.shape[1:]
    fields = np.stack([_smooth(rng, shape, float(rng.uniform(10, 24))) for _ in range(rng.integers(3, 7))])
    regions: NDArray[np.int64] = fields.argmax(0)
    if rng.random() < 0.6:
        radius = _radius(rng, grid, np.full(3, 0.5), np.array([*rng.uniform(0.35, 0.5, 2), 0.9]))
        regions[radius >= 1] = regions.max() + 1
    return regions


def _radius(rng: np.random.Generator, grid: Array, centre: Array, radii: Array) -> Array:
    """[I, J, K], 1 on a warped ellipsoid turned about the axis k, less inside."""
    angle = rng.uniform(0, np.pi)
    x, y, z = (grid - centre[:, None, None, None])[:]
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    u, v = u + rng.uniform(-0.3, 0.3) * z, v + rng.uniform(-0.3, 0.3) * z  # leans from slice to slice
    radius = np.sqrt((u / radii[0]) ** 2 + (v / radii[1]) ** 2 + (z / radii[2]) ** 2)
    return np.asarray(radius * np.exp(rng.uniform(0, 0.2) * _smooth(rng, grid.shape[1:], 8)))


def _object(rng: np.random.Generator, grid: Array) -> Mask:
    if rng.random() < 0.7:
        scale = np.exp(rng.uniform(np.log(0.04), np.log(0.22)))
        radii = np.array([scale, scale * rng.uniform(0.5, 1), rng.uniform(0.15, 0.5)])
        return _radius(rng, grid, rng.uniform(0.15, 0.85, 3), radii) < 1
    return _tube(rng, grid)


def _tube(rng: np.random.Generator, grid: Array) -> Mask:
    """Runs along k, bent; every second one forks."""
    x, y, z = grid
    centre, wide = rng.uniform(0.25, 0.75, 2), rng.uniform(0.03, 0.08)
    bend, start = rng.uniform(-0.15, 0.15, 2), rng.uniform(-0.2, 0.3)
    end, fork = start + rng.uniform(0.5, 1.2), rng.uniform(0.3, 0.7)
    apart = np.clip(z - fork, 0, 1) * rng.uniform(0.3, 0.6) * (rng.random() < 0.5)
    inside = np.zeros(grid.shape[1:], dtype=bool)
    for side in (-1, 1):
        cx = centre[0] + bend[0] * np.sin(3 * z) + side * apart
        cy = centre[1] + bend[1] * np.sin(4 * z)
        inside |= ((x - cx) ** 2 + (y - cy) ** 2 < wide**2) & (z >= start) & (z <= end)
    return inside


def _shown(rng: np.random.Generator, regions: NDArray[np.int64]) -> Array:
    count, shape = int(regions.max()) + 1, regions.shape
    mean = 0.5 + rng.uniform(0.5, 1.0) * (rng.random(count) - 0.5)
    texture = rng.random(count) * rng.uniform(0, 0.1)
    image = mean[regions] + texture[regions] * _smooth(rng, shape, 1.5)
    image = ndimage.gaussian_filter(image, (rng.uniform(0, 1.2),) * 2 + (rng.uniform(0, 0.4),))
    image = image * np.exp(rng.uniform(0, 0.2) * _smooth(rng, shape, 32))
    if rng.random() < 0.2:
        image = image * (1 + rng.uniform(0.1, 0.3) * _smooth(rng, shape, 1))
    return np.asarray(image + rng.uniform(0, 0.06) * rng.standard_normal(shape))


def _visible(mask: Mask, image: Array) -> Mask | None:
    """The largest part in three dimensions, or None where it is too small or too faint to be seen."""
    parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
    if not count:
        return None
    mask = parts == 1 + np.bincount(parts.ravel())[1:].argmax()
    areas = mask.sum((0, 1))
    ring = ndimage.binary_dilation(mask, np.ones((9, 9, 1))) & ~mask
    faint = not ring.any() or abs(image[mask].mean() - image[ring].mean()) < _MIN_CONTRAST
    return None if faint or (areas > 0).sum() < _MIN_SLICES or areas.max() < _MIN_AREA else mask


def main(artifact: Path, first: int, last: int) -> None:
    """Scores propagation on the phantoms of some seeds, the last one included."""
    segmenter = load_segmenter(read_artifact(artifact))
    scores: dict[str, list[float]] = {kind: [] for kind in PLACES}
    for one in map(phantom, range(first, last + 1)):
        for truth in one.masks:
            for kind, kept in scores.items():
                kept.append(dice(segment(segmenter, one.volume, truth, kind)[0].mask, truth))
    for kind, kept in scores.items():
        print(f"{kind:8} {np.mean(kept):.3f}  ({len(kept)} objects)")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
