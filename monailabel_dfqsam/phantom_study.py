"""A small study of procedural volumes with ground truth, for the demonstration and the tests.

No patient is in it. Each volume is asymmetric along every axis and anisotropic, and the grids differ
(flipped, oblique), so that an exchange of axes or a lost direction shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from monailabel_dfqsam.files import IMAGE_ENDINGS, is_image_name, split_name
from monailabel_dfqsam.masks import interior_pixel, tight_box

LABELS = "labels"
"""Sub-folder of the masks: a server that lists a study's images must not list them."""


Array = NDArray[np.float64]
Triple = tuple[float, float, float]


class Click(NamedTuple):
    """Ideal prompts for an object: slice k, its most interior voxel (i, j), its box (x0, y0, x1, y1)."""

    k: int
    point_ij: tuple[int, int]
    box: tuple[float, float, float, float]

    @property
    def roi(self) -> list[int]:
        """[i0, i1, j0, j1, k, k], the box as a viewer sends it, last voxels included."""
        x0, y0, x1, y1 = (int(v) for v in self.box)
        return [y0, y1 - 1, x0, x1 - 1, self.k, self.k]


class StudyItem(NamedTuple):
    """A volume of the study, a mask of one of its objects, and what they show."""

    image: Path
    mask: Path
    modality: str
    label: str


@dataclass(frozen=True)
class _Blob:
    """A warped ellipsoid: centre and half axes as fractions of the volume's sides, value and texture.

    `label` names it in the ground truth; None for scenery. `warp` is how far it departs from an ellipsoid.
    """

    centre: Triple
    radii: Triple
    value: float
    texture: float = 0.0
    label: str | None = None
    warp: float = 0.1


@dataclass(frozen=True)
class _Scene:
    """One volume: size (I, J, K) in voxels, spacing in mm, direction cosines row by row (LPS)."""

    modality: str
    size: tuple[int, int, int]
    spacing: Triple
    direction: tuple[float, ...]
    background: float
    blobs: tuple[_Blob, ...]
    noise: float
    bias: float
    speckle: float


def _tilt(degrees: float) -> tuple[float, ...]:
    """A rotation about the first axis."""
    c, s = float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees)))
    return (1.0, 0.0, 0.0, 0.0, c, -s, 0.0, s, c)


_SCENES = (
    _Scene(
        "CT", (144, 120, 24), (1.9, 1.9, 5.0), (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0), -1000.0,
        (
            _Blob((0.50, 0.52, 0.50), (0.46, 0.40, 0.90), -90.0, 12.0),
            _Blob((0.50, 0.52, 0.50), (0.42, 0.35, 0.90), 35.0, 14.0),
            _Blob((0.52, 0.80, 0.50), (0.07, 0.08, 0.90), 420.0, 90.0),
            _Blob((0.60, 0.40, 0.30), (0.08, 0.07, 0.30), -650.0, 60.0),
            _Blob((0.31, 0.47, 0.56), (0.16, 0.20, 0.34), 125.0, 10.0, "organ", warp=0.3),
            _Blob((0.73, 0.58, 0.40), (0.09, 0.11, 0.22), 165.0, 10.0),
        ),
        noise=14.0, bias=0.0, speckle=0.0,
    ),
    _Scene(
        "MR", (112, 136, 18), (1.2, 1.2, 4.0), _tilt(14.0), 0.0,
        (
            _Blob((0.50, 0.49, 0.50), (0.44, 0.43, 0.75), 260.0, 25.0),
            _Blob((0.50, 0.49, 0.50), (0.39, 0.39, 0.68), 520.0, 60.0),
            _Blob((0.50, 0.42, 0.46), (0.10, 0.16, 0.25), 190.0, 15.0),
            _Blob((0.64, 0.63, 0.60), (0.12, 0.10, 0.26), 900.0, 50.0, "lesion", warp=0.3),
        ),
        noise=28.0, bias=0.25, speckle=0.0,
    ),
    _Scene(
        "US", (128, 104, 14), (0.6, 0.6, 1.5), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0), 95.0,
        (
            _Blob((0.50, 0.14, 0.50), (0.70, 0.10, 0.90), 150.0, 25.0),
            _Blob((0.30, 0.72, 0.60), (0.18, 0.12, 0.60), 125.0, 15.0),
            _Blob((0.61, 0.47, 0.42), (0.19, 0.18, 0.36), 22.0, 4.0, "cyst", warp=0.3),
        ),
        noise=5.0, bias=0.1, speckle=0.35,
    ),
)  # fmt: skip


def write_phantom_study(folder: Path, seed: int = 0) -> list[StudyItem]:
    """Writes `phantom_ct.nii.gz` (HU), `phantom_mr.nii.gz` and `phantom_us.nii.gz`, masks under `labels/`.

    The same seed gives the same voxels. A mask's name is `<image>_<label>.nii.gz`, 1 in the object.

    Args:
        folder: made if need be; files of these names in it are replaced.
    """
    (folder / LABELS).mkdir(parents=True, exist_ok=True)
    items = []
    for index, scene in enumerate(_SCENES):
        image, masks = _paint(scene, np.random.default_rng([seed, index]))
        name = f"phantom_{scene.modality.lower()}"
        path = folder / f"{name}.nii.gz"
        _write(image, scene, path)
        for label, mask in masks.items():
            mask_path = folder / LABELS / f"{name}_{label}.nii.gz"
            _write(mask, scene, mask_path)
            items.append(StudyItem(path, mask_path, scene.modality, label))
    return items


def find_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Images with their masks, sorted by name: `<image>.nii.gz` and `<image>_<label>.nii.gz`.

    Every ending that is read counts, in any case. A mask lies beside its image or in `labels/`. Files that
    match nothing are left out; an image with two masks comes twice.
    """
    files = _images_in(folder)
    here = {split_name(path.name)[0]: path for path in sorted(files, key=_rank, reverse=True)}
    # A name that prolongs another one's is that one's mask.
    images = [name for name in here if not any(name.startswith(f"{other}_") for other in here)]
    pairs = []
    for path in {path.name: path for path in [*files, *_images_in(folder / LABELS)]}.values():
        owners = [image for image in images if split_name(path.name)[0].startswith(f"{image}_")]
        if owners:
            pairs.append((here[max(owners, key=len)], path))
    return sorted(pairs, key=lambda pair: (split_name(pair[1].name)[0], pair[1].name))


def click_for(mask: NDArray[np.generic]) -> Click:
    """Where an ideal person would click for an object: on the slice with most of it.

    Args:
        mask: [I, J, K], not 0 in the object.

    Raises:
        ValueError: when it is empty.
    """
    inside = mask != 0
    areas = inside.sum(axis=(0, 1))
    if not areas.any():
        raise ValueError("the mask is empty: there is nothing to click on")
    k = int(areas.argmax())
    x0, y0, x1, y1 = (float(v) for v in tight_box(inside[:, :, k]))
    return Click(k, interior_pixel(inside[:, :, k]), (x0, y0, x1, y1))


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if is_image_name(path.name)]


def _rank(path: Path) -> tuple[int, str]:
    """Of images that share a stem, the least counts."""
    return IMAGE_ENDINGS.index(split_name(path.name)[1].lower()), path.name


def _smooth_noise(rng: np.random.Generator, size: tuple[int, int, int], sigma: Triple) -> Array:
    """Smooth random field [I, J, K] of unit variance."""
    field = ndimage.gaussian_filter(rng.standard_normal(size), sigma)
    return np.asarray(field / field.std(), dtype=np.float64)


def _paint(scene: _Scene, rng: np.random.Generator) -> tuple[Array, dict[str, Array]]:
    """Voxels [I, J, K] of a scene, and the masks [I, J, K] (0 or 1) of its labelled objects."""
    size = scene.size
    grid = [np.linspace(0, 1, n) for n in size]
    i, j, k = np.meshgrid(*grid, indexing="ij")
    image = np.full(size, scene.background)
    masks = {}
    for blob in scene.blobs:
        radius = sum(
            ((x - c) / r) ** 2 for x, c, r in zip((i, j, k), blob.centre, blob.radii, strict=True)
        ) * np.exp(blob.warp * _smooth_noise(rng, size, (8.0, 8.0, 3.0)))
        inside = radius < 1
        texture = blob.texture * _smooth_noise(rng, size, (1.5, 1.5, 0.7))
        image = np.where(inside, blob.value + texture, image)
        if blob.label:
            masks[blob.label] = inside.astype(np.float64)
    image = ndimage.gaussian_filter(image, (0.7, 0.7, 0.0))
    image = image * np.exp(scene.bias * _smooth_noise(rng, size, (30.0, 30.0, 8.0)))
    image = image * (1 + scene.speckle * _smooth_noise(rng, size, (1.2, 0.8, 0.0)))
    return image + scene.noise * rng.standard_normal(size), masks


def _write(voxels: Array, scene: _Scene, path: Path) -> None:
    is_mask = voxels.max() <= 1
    low, kind = (0, np.uint8) if is_mask else (-1024 if scene.background < 0 else 0, np.int16)
    stored = np.rint(voxels).clip(low, np.iinfo(kind).max).astype(kind)
    image = sitk.GetImageFromArray(np.ascontiguousarray(stored.T))
    image.SetSpacing(scene.spacing)
    image.SetDirection(scene.direction)
    image.SetOrigin((11.0, -23.0, 37.0))
    sitk.WriteImage(image, str(path), useCompression=True)
