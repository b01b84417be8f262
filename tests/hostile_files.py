"""Image files that no reader should follow: into other files, or into memory that is not there."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np

SECRET_VOXELS = bytes(range(64))

_NRRD = b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 4 4 4\nencoding: raw\n"
_MHA = b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\n"
_COMMENTS = (b"# " + b"x" * 200 + b"\n") * 400
_HUGE = b"4096 4096 1024"  # 17 billion voxels


def detached(secret: Path) -> dict[str, bytes]:
    """Name -> content of files that name `secret` as the place of their voxels, in all of ITK's spellings."""
    there = str(secret).encode()
    return {
        "plain.nrrd": _NRRD + b"data file: " + there + b"\n\n",
        "no_space.nrrd": _NRRD + b"datafile: " + there + b"\n\n",
        "capitals.nrrd": _NRRD + b"DATA FILE: " + there + b"\n\n",
        "long_header.nrrd": _NRRD + _COMMENTS + b"data file: " + there + b"\n\n",
        "carriage_returns.nrrd": (_NRRD + b"data file: " + there + b"\n\n").replace(b"\n", b"\r"),
        "both_ends.nrrd": _NRRD + b"# x\r\rdata\ndata file: " + there + b"\n\n",
        "list.nrrd": _NRRD + b"data file: LIST\n" + there + b"\n",
        "plain.mha": _MHA + b"ElementDataFile = " + there + b"\n",
        "tab.mha": _MHA + b"ElementDataFile\t= " + there + b"\n",
        "indented.mha": _MHA + b" ElementDataFile = " + there + b"\n",
        "colon.mha": _MHA + b"ElementDataFile : " + there + b"\n",
        "lower.mha": _MHA + b"elementdatafile = " + there + b"\n",
        "list.mha": _MHA + b"ElementDataFile = LIST\n" + there + b"\n",
        "local_path.mha": _MHA + b"ElementDataFile = LOCAL/../../" + there + b"\n",
        "in_comment.mha": _MHA + b"Comment = ElementDataFile = LOCAL\nElementDataFile = " + there + b"\n",
        "long_header.mha": _MHA + b"Comment = " + b"x" * 70_000 + b"\nElementDataFile = " + there + b"\n",
        "nrrd_inside.png": _NRRD + b"data file: " + there + b"\n\n",
        "mha_inside.nii": _MHA + b"ElementDataFile = " + there + b"\n",
        "hdf5_inside.png": b"\x89HDF\r\n\x1a\n" + bytes(500),
    }


def bombs() -> dict[str, bytes]:
    """Name -> content of small files that announce gigabytes, or sizes that cannot be."""
    nifti = nibabel.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4)).to_bytes()
    megabyte = bytes(1 << 20)
    return {
        "sizes.nrrd": _NRRD.replace(b"4 4 4", b"40000 40000 40000") + b"\n" + bytes(64),
        "gzip.nrrd": _NRRD.replace(b"4 4 4", _HUGE).replace(b"raw", b"gzip")
        + b"\n"
        + gzip.compress(megabyte),
        "short.nrrd": _NRRD.replace(b"4 4 4", b"400 400 400") + b"\n" + bytes(64),
        "negative.nrrd": _NRRD.replace(b"4 4 4", b"-4 4 4") + b"\n" + bytes(64),
        "sizes.mha": _MHA.replace(b"4 4 4", _HUGE) + b"ElementDataFile = LOCAL\n" + bytes(64),
        "huge.nii": _with_dimensions(nifti, 3, 32767, 32767, 32767),
        "negative.nii": _with_dimensions(nifti, 3, -4, 4, 4),
        "none.nii": _with_dimensions(nifti, 3, 0, 4, 4),
        "many.nii": _with_dimensions(nifti, 99, 4, 4, 4),
        "short.nii": _with_dimensions(nifti, 3, 400, 400, 400),
        "short.nii.gz": gzip.compress(_with_dimensions(nifti, 3, 100, 100, 100)),
        "cut.nii.gz": gzip.compress(np.random.default_rng(0).bytes(9000).join([nifti] * 2))[:5000],
        "bomb.nii.gz": gzip.compress(_with_dimensions(nifti, 3, 4096, 4096, 1024) + megabyte * 8),
        "bomb.png": _png(65_535, 65_535),
        "line.png": _png(1_000_000, 1_000_000),
        "short.png": _png(4_000, 4_000),
        "noise.dcm": np.random.default_rng(0).bytes(500),
    }


def _with_dimensions(nifti: bytes, *numbers: int) -> bytes:
    changed = bytearray(nifti)
    struct.pack_into(f"<{len(numbers)}h", changed, 40, *numbers)  # NIfTI-1's `dim` begins at byte 40
    return bytes(changed)


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")
