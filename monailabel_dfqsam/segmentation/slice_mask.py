"""A mask that lies in one slice, as a file of the whole volume, without making the volume.

Of 100 slices 99 are zeros, and writing these is what a click would mostly wait for. Only NRRD, the format
that viewers ask for, has this way; its header is SimpleITK's own. The layout of a compressed file:

    header of SimpleITK   "… encoding: gzip …", ends with an empty line
    gzip header           10 bytes
    deflate blocks        K × one slice; all but one are the same bytes, those of a slice of zeros
    deflate end           an empty last block
    CRC-32, length        of the K slices uncompressed, 4 bytes each, little-endian

Each slice ends with a full flush: its blocks begin at a whole byte and look back at nothing before them. To a
reader it is one ordinary gzip member.
"""

from __future__ import annotations

import re
import struct
import tempfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from monailabel_dfqsam.segmentation.volume import Volume, write_mask

_GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # deflate, no name, no time, unknown system
_RAW_DEFLATE = -15  # the largest window, without a header of zlib's own
_FAST, _SMALL = 1, 9
_ALL_ONES = 0xFFFFFFFF
_CRC_POLYNOMIAL = 0xEDB88320  # of CRC-32, lowest power in the highest bit
_UINT8 = np.dtype(np.uint8)
_CRC_ONE, _CRC_BYTE = 1 << 31, 1 << 23  # x⁰ and x⁸ in that order


def write_slice_mask(
    plane: NDArray[np.uint8],
    k: int,
    volume: Volume,
    path: str | Path,
    compress: bool = True,
    dtype: np.dtype[Any] = _UINT8,
) -> None:
    """Writes what `write_mask` would write for a mask that is zero outside slice k.

    Args:
        plane: [I, J] uint8.
        k: 0 … K − 1.
        path: .nrrd, .nii or .nii.gz.
        compress: for .nrrd; a NIfTI's name says it.
        dtype: of the voxels in the file.

    Raises:
        ValueError: for another shape, type or file name, or a slice that is not there.
    """
    if plane.shape != volume.shape[:2] or plane.dtype != np.uint8 or not 0 <= k < volume.shape[2]:
        raise ValueError(
            f"the mask must be {list(volume.shape[:2])} uint8 on one of {volume.shape[2]} slices, "
            f"not {list(plane.shape)} {plane.dtype} on slice {k}"
        )
    path = Path(path)
    if path.suffix != ".nrrd" or dtype != np.uint8:
        # In the file's order, so that the library need not turn it.
        mask = np.zeros(volume.shape, dtype=np.uint8, order="F")
        mask[:, :, k] = plane
        write_mask(mask, volume, path, compress, dtype)
        return
    header = _nrrd_header(volume.shape, volume.origin, volume.spacing, volume.direction, compress)
    voxels = np.ascontiguousarray(plane.T).tobytes()
    with path.open("wb") as file:
        if compress:
            file.writelines((header, *_gzip(voxels, k, volume.shape[2])))
        else:
            file.truncate(len(header) + len(voxels) * volume.shape[2])  # zeros that no disk has to hold
            file.write(header)
            file.seek(len(voxels) * k, 1)
            file.write(voxels)


@lru_cache(maxsize=16)
def _nrrd_header(
    shape: tuple[int, int, int],
    origin: tuple[float, ...],
    spacing: tuple[float, ...],
    direction: tuple[float, ...],
    compress: bool,
) -> bytes:
    """SimpleITK's header of a uint8 image: that of one voxel, and then the sizes put right."""
    image = sitk.Image([1] * len(spacing), sitk.sitkUInt8)
    image.SetOrigin(origin)
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "voxel.nrrd"
        sitk.WriteImage(image, str(path), useCompression=compress)
        header, end, _ = path.read_bytes().partition(b"\n\n")
    sizes = " ".join(str(n) for n in shape[: len(spacing)])
    return re.sub(rb"(?m)^sizes: .*$", f"sizes: {sizes}".encode(), header) + end


def _gzip(voxels: bytes, k: int, slices: int) -> tuple[bytes, ...]:
    """The parts of a gzip member of `slices` equally long slices, zero but for slice k."""
    empty = _deflated_zeros(len(voxels)) if slices > 1 else b""
    after = slices - 1 - k
    crc = zlib.crc32(voxels, _crc_after_zeros(0, len(voxels) * k))
    crc = _crc_after_zeros(crc, len(voxels) * after)
    length = len(voxels) * slices & _ALL_ONES
    end = zlib.compressobj(_FAST, zlib.DEFLATED, _RAW_DEFLATE).flush()
    return (
        _GZIP_HEADER,
        empty * k,
        _deflated(voxels, _FAST),
        empty * after,
        end,
        struct.pack("<II", crc, length),
    )


def _deflated(data: bytes, level: int) -> bytes:
    stream = zlib.compressobj(level, zlib.DEFLATED, _RAW_DEFLATE)
    return stream.compress(data) + stream.flush(zlib.Z_FULL_FLUSH)


@lru_cache(maxsize=4)
def _deflated_zeros(count: int) -> bytes:
    return _deflated(bytes(count), _SMALL)


def _crc_after_zeros(crc: int, count: int) -> int:
    """`zlib.crc32(bytes(count), crc)` without the bytes: each multiplies the register by x⁸."""
    return _crc_product(crc ^ _ALL_ONES, _crc_of_zeros(count)) ^ _ALL_ONES


@lru_cache(maxsize=4096)
def _crc_of_zeros(count: int) -> int:
    """x^(8·count) modulo the polynomial, by squaring."""
    result, power = _CRC_ONE, _CRC_BYTE
    while count:
        if count & 1:
            result = _crc_product(result, power)
        power = _crc_product(power, power)
        count >>= 1
    return result


def _crc_product(a: int, b: int) -> int:
    """Product of two polynomials over the field of two elements, modulo CRC-32's."""
    product = 0
    while a:
        if a & _CRC_ONE:
            product ^= b
        a = a << 1 & _ALL_ONES
        b = b >> 1 ^ (_CRC_POLYNOMIAL if b & 1 else 0)
    return product
