"""Where DICOM slices lie, and whether they make one volume.

ITK stacks the files or frames of a series whatever their positions are, and says nothing a viewer would hear:
with a slice missing, every other one ends up in the wrong place. A volume here is a regular grid, or refused.
Directions, positions (LPS) and distances are DICOM's, in millimetres.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

Vector = NDArray[np.float64]

# How far a slice may lie off its place on the grid, in distances between slices: positions are often rounded
# to a tenth of a millimetre.
_JITTER = 0.1
# The same for directions and, relatively, for pixel sizes: several digits worse than any scanner writes.
_SAME = 1e-3
_NOTHING = 1e-6  # millimetres
DAMAGED = (
    InvalidDicomError, OSError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError,
    NotImplementedError, struct.error,
)  # fmt: skip
"""What pydicom raises, and numpy, for values that DICOM does not allow."""
TAGS = [
    "NumberOfFrames", "Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "SliceThickness", "SpacingBetweenSlices", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
"""What `grid_of` looks at."""


class GeometryError(ValueError):
    """Slices that are no volume; the message says why, and goes on from the image's name."""


@dataclass(frozen=True)
class Slice:
    """One file or frame.

    Attributes:
        position: [3] of its first pixel's centre.
        axes: [2, 3] unit vectors along a row and down a column.
        pixel: [2] distances between rows and between columns.
        distance: between slices, or a slice's thickness; 0 where the header says neither.
        size: rows and columns.
    """

    position: Vector
    axes: Vector
    pixel: Vector
    distance: float
    size: tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """Slices in their order on a regular grid; origin, spacing and direction as ITK takes them."""

    order: list[int]
    origin: tuple[float, ...]
    spacing: tuple[float, ...]
    direction: tuple[float, ...]


def grid_of(headers: Sequence[Dataset]) -> Grid | None:
    """The grid of a series.

    Args:
        headers: of one file of one or several frames, or of several of one frame each.

    Returns:
        None for images without a place in space.

    Raises:
        GeometryError: when there is no such grid, or a header holds what DICOM does not allow.
    """
    try:
        each = [_slices_of(header) for header in headers]
    except GeometryError:
        raise
    except DAMAGED:
        raise GeometryError("cannot be read: it is damaged, or of a rare kind") from None
    several = len(headers) > 1
    if several and any(len(slices) > 1 for slices in each):
        raise GeometryError("holds several files of many frames each; one such file is one volume")
    return regular_grid([s for slices in each for s in slices], sort=several)


def regular_grid(slices: Sequence[Slice | None], sort: bool) -> Grid | None:
    """The grid on which slices lie; None when none of them has a place.

    Args:
        slices: of one series, at least one.
        sort: orders them along their normal; otherwise their order is kept, which must be one of the two.

    Raises:
        GeometryError: when there is no such grid.
    """
    placed = [s for s in slices if s is not None]
    if not placed:
        return None
    if len(placed) < len(slices):
        raise GeometryError(
            f"has slices without a place in space, {len(slices) - len(placed)} of {len(slices)}"
        )
    _check_alike(placed)
    row, column = placed[0].axes
    normal = np.cross(row, column)
    heights = np.array([s.position @ normal for s in placed])
    order = [int(n) for n in np.argsort(heights, kind="stable")] if sort else list(range(len(placed)))
    step = _step(heights[order])
    places = np.stack([placed[n].position for n in order])
    _check_upright(places, normal, abs(step))
    # A single slice is as deep as it is thick.
    depth = abs(step) or placed[0].distance or 1.0
    axes = np.stack([row, column, normal if step >= 0 else -normal], axis=1)
    spacing = (placed[0].pixel[1], placed[0].pixel[0], depth)
    return Grid(order, tuple(places[0].tolist()), tuple(map(float, spacing)), tuple(axes.ravel().tolist()))


def _slices_of(header: Dataset) -> list[Slice | None]:
    """A file's frames; None for those that have no place in space, as those of ultrasound and radiographs."""
    count = int(header.get("NumberOfFrames") or 1)
    if count == 1 and "PerFrameFunctionalGroupsSequence" not in header:
        return [_slice(header, [header])]
    each = header.get("PerFrameFunctionalGroupsSequence") or []
    if len(each) != count:
        return [None] * count
    shared = [group for s in header.get("SharedFunctionalGroupsSequence") or [] for group in _groups(s)]
    return [_slice(header, [*_groups(frame), *shared]) for frame in each]


def _slice(header: Dataset, sources: Sequence[Dataset]) -> Slice | None:
    """From the first of the sources that has each attribute."""

    def find(name: str) -> object:
        return next((source[name].value for source in sources if source.get(name) is not None), None)

    position, axes, pixel = (
        find("ImagePositionPatient"),
        find("ImageOrientationPatient"),
        find("PixelSpacing"),
    )
    if position is None or axes is None or pixel is None:
        return None
    directions = np.array(axes, dtype=np.float64).reshape(2, 3)
    if np.abs(directions @ directions.T - np.eye(2)).max() > _SAME:
        raise GeometryError("has slices whose orientation is none: its directions are not at right angles")
    distance = abs(float(find("SpacingBetweenSlices") or find("SliceThickness") or 0))  # type: ignore[arg-type]
    return Slice(
        np.array(position, dtype=np.float64).reshape(3),
        directions,
        np.array(pixel, dtype=np.float64).reshape(2),
        distance,
        (int(header.Rows), int(header.Columns)),
    )


def _groups(frame: Dataset) -> list[Dataset]:
    """The contents of a frame's functional groups."""
    names = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
    return [frame[name].value[0] for name in names if frame.get(name)]


def _check_alike(slices: Sequence[Slice]) -> None:
    first = slices[0]
    if any(s.size != first.size for s in slices):
        raise GeometryError("has slices of different sizes")
    if any(np.abs(s.axes - first.axes).max() > _SAME for s in slices):
        raise GeometryError("has slices of different orientations, as when an overview is among them")
    if any(np.abs(s.pixel / first.pixel - 1).max() > _SAME for s in slices):
        raise GeometryError("has slices of different pixel sizes")


def _step(heights: Vector) -> float:
    """The distance from one slice to the next, negative when they go down; 0 for one slice."""
    if len(heights) == 1:
        return 0.0
    gaps = np.diff(heights)
    step = float(heights[-1] - heights[0]) / len(gaps)
    upwards = gaps * np.sign(step)
    smallest, largest = int(upwards.argmin()), int(upwards.argmax())
    if upwards[smallest] <= max(_JITTER * upwards[largest], _NOTHING):
        pair = f"slices {smallest + 1} and {smallest + 2} of {len(heights)}"
        raise GeometryError(
            f"is no single stack of slices: {pair} are at the same place or out of order, as when a "
            "series holds several times or echoes"
        )
    off = np.abs(heights - heights[0] - step * np.arange(len(heights)))
    if off.max() > _JITTER * abs(step):
        raise GeometryError(
            f"has unevenly spaced slices: between slices {largest + 1} and {largest + 2} of {len(heights)} "
            f"lie {upwards[largest]:.2f} mm, elsewhere {upwards[smallest]:.2f} mm; is one missing?"
        )
    return step


def _check_upright(places: Vector, normal: Vector, distance: float) -> None:
    """Whether slices lie straight above each other, as they do not where the gantry was tilted."""
    offsets = places - places[0]
    sideways = np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1)
    if sideways.max() > _JITTER * distance:
        raise GeometryError(
            f"has slices that are shifted against each other, up to {sideways.max():.2f} mm, as with a "
            "tilted gantry; resample it to upright slices"
        )
