"""NIfTI files, compressed or not, and label maps that lie where their NIfTI image does.

A NIfTI says twice where it lies, by its sform and its qform. Where these differ, nibabel, and so MONAI,
takes the sform if it has a code; ITK, and so 3D Slicer, takes it only if its code is that of the scanner or
the qform has none. Neither is wrong: a label map carries both as its image does, so that every reader lays it
there.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import nibabel
import numpy as np
from nibabel.fileholders import FileHolder
from nibabel.spatialimages import HeaderDataError, ImageDataError
from numpy.typing import NDArray

from monailabel_dfqsam.segmentation.image import Image, ImageError, check_size, damaged, was_told

GZIP = b"\x1f\x8b"
HEADER_BYTES = 540
"""Of the longer of the two headers, NIfTI-2's; their first bytes tell them apart."""

_FORMS = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
_SCANNER = 1  # the code of coordinates of the scanner
_MILLIMETRES = {"meter": 1e3, "micron": 1e-3}
_RIGHT_ANGLE = 2e-4  # cosine between two axes up to which ITK takes them as orthogonal
_FLAT = 1e-9  # volume of the box of three unit axes, which 0 would be of three in one plane
_PART, _REST = 1 << 20, 16  # bytes, and how many times as many may follow the voxels
_SCALED_BYTES = 4  # of a value after slope and intercept

# It writes to the error stream about headers that it mends.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)


def is_nifti(head: bytes) -> bool:
    """Whether a file begins as a NIfTI does, or as the header of one whose voxels lie in another file."""
    return _image_class(head) is not None


def read_nifti(path: Path, name: str) -> Image:
    """An image of 2 or 3 dimensions, NaN and infinities as they are.

    Args:
        name: what a message calls it.

    Raises:
        ImageError, MemoryShortage: as `volume.load_volume` says.
    """
    try:
        with _unpacked(path) as file:
            source = _open(file, name)
            array = _values(source)
            # At its end a packed file says what its bytes add up to.
            for _ in range(_REST):
                if not file.read(_PART):
                    break
    except (zlib.error, gzip.BadGzipFile):
        raise damaged(name) from None
    except (OSError, EOFError):
        raise ImageError(f"'{name}' is incomplete: its header announces more voxels than it holds") from None
    except (HeaderDataError, ImageDataError, ValueError, OverflowError) as error:
        raise error if isinstance(error, ImageError) else damaged(name) from None
    affine = _itk_affine(source.header)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < _FLAT:
        raise ImageError(f"'{name}' lies nowhere: its axes do not span a space")
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    direction = (lps[:3, :3] / spacing).ravel()
    origin, spacing, direction = (tuple(one.tolist()) for one in (lps[:3, 3], spacing, direction))
    modality, inverted = was_told(bytes(source.header["descrip"].item()).decode("latin-1"))
    return Image(array, origin, spacing, direction, modality, inverted, source.header)


def nifti_on(mask: NDArray[np.generic], header: nibabel.Nifti1Header) -> nibabel.Nifti1Image:
    """A label map [I, J, K] that lies where the image with this header does, by each of its transforms."""
    flat = header.get_data_shape()[2:] == ()
    made = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    image = made(mask[:, :, 0] if flat else mask, None)
    for name in _FORMS:
        image.header[name] = header[name]
    return image


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, whatever its name says of their packing."""
    with path.open("rb") as file:
        packed = file.read(2) == GZIP
        file.seek(0)
        if not packed:
            yield file
            return
        with gzip.open(file) as unpacked:
            yield unpacked  # type: ignore[misc]


def _image_class(head: bytes) -> type[nibabel.Nifti1Image] | None:
    kinds = (nibabel.Nifti1Image, nibabel.Nifti2Image)
    return next((kind for kind in kinds if kind.header_class.may_contain_header(head)), None)


def _open(file: IO[bytes], name: str) -> nibabel.Nifti1Image:
    """The image without its voxels, which are read from `file` later."""
    head = file.read(HEADER_BYTES)
    file.seek(0)
    found = _image_class(head)
    if found is None:
        raise damaged(name)
    if head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0":
        raise ImageError(f"'{name}' keeps its voxels in another file")
    source = found.from_file_map({"image": FileHolder(fileobj=file)}, mmap=False)
    shape, dtype = source.shape, source.get_data_dtype()
    if dtype.kind == "c":
        raise ImageError(f"'{name}' holds complex numbers; expected real ones")
    if any(n > 1 for n in shape[3:]):
        raise ImageError(f"'{name}' has {len(shape)} dimensions, {'×'.join(map(str, shape))}; a volume has 3")
    scaled = (source.dataobj.slope, source.dataobj.inter) != (1, 0)
    check_size(shape, max(dtype.itemsize, _SCALED_BYTES) if scaled else dtype.itemsize, name)
    return source


def _values(source: nibabel.Nifti1Image) -> NDArray[np.generic]:
    """[I, J, K] after slope and intercept, in this machine's order of bytes; or [I, J, K, 3] uint8."""
    proxy = source.dataobj
    plain = (proxy.slope, proxy.inter) == (1, 0)
    array = np.asarray(proxy.get_unscaled() if plain else proxy, dtype=None if plain else np.float32)
    array = array.reshape((*array.shape, 1, 1)[:3], order="F")
    if array.dtype.names:  # colour, of which opacity is left out
        return np.stack([array[channel] for channel in array.dtype.names[:3]], axis=-1)
    if array.dtype.itemsize > np.dtype(np.float64).itemsize:
        return array.astype(np.float64)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _itk_affine(header: nibabel.Nifti1Header) -> NDArray[np.float64]:
    """[4, 4] RAS millimetres by ITK's rule, which is 3D Slicer's."""
    (sform, s_code), (qform, q_code) = header.get_sform(coded=True), header.get_qform(coded=True)
    scale = _MILLIMETRES.get(header.get_xyzt_units()[0], 1.0)
    if s_code and (not q_code or (s_code == _SCANNER and _at_right_angles(sform))):
        affine = sform
    elif q_code:
        affine = qform
    else:
        affine = np.diag([*np.array([-1.0, -1.0, 1.0]) * header["pixdim"][1:4], 1.0])
    found: NDArray[np.float64] = np.diag([scale] * 3 + [1.0]) @ affine
    return found


def _at_right_angles(affine: NDArray[np.float64]) -> bool:
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() < _RIGHT_ANGLE)
