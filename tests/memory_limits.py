"""Run as a process: what happens at real limits of memory; prints one JSON object."""

from __future__ import annotations

import gzip
import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import psutil
import torch

from monailabel_dfqsam import memory
from monailabel_dfqsam.sam import VARIANTS, Sam
from monailabel_dfqsam.segmentation.memory import embed_bytes
from monailabel_dfqsam.segmentation.segmenter import Segmenter, full_precision_segmenter
from monailabel_dfqsam.segmentation.volume import load_volume

HEADROOM = 150 << 20
# One global block whose attention takes half a gigabyte, as ViT-B's at 1024 pixels takes two.
VARIANT = replace(VARIANTS["sam_b_1024"], input_size=768, embed_dim=96, depth=1, global_blocks=(0,))


@contextmanager
def limit(which: int) -> Iterator[None]:
    """This process may take `HEADROOM` more; `memory.available` knows `RLIMIT_AS`, but not `RLIMIT_DATA`."""
    held = psutil.Process().memory_info()
    old = resource.getrlimit(which)
    now = held.vms if which == resource.RLIMIT_AS else held.data
    resource.setrlimit(which, (now + HEADROOM, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, old)


def outcome(work: Callable[[], Any]) -> list[str]:
    """The error's type and text, or ['done', '']."""
    try:
        work()
    except (MemoryError, ValueError, RuntimeError) as error:
        return [type(error).__name__, str(error)]
    return ["done", ""]


def bomb(folder: Path) -> Path:
    """A NIfTI of a few bytes whose header claims 2 GB."""
    path = folder / "bomb.nii.gz"
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((1024, 1024, 1024))
    header["vox_offset"], header["magic"] = 352, b"n+1\0"
    path.write_bytes(gzip.compress(header.binaryblock + b"\0" * 1000))
    return path


def large(folder: Path) -> Path:
    """A whole NRRD of 300 MB, most of it a hole on disk."""
    path = folder / "large.nrrd"
    head = b"NRRD0004\ntype: int16\ndimension: 3\nsizes: 512 512 600\nendian: little\nencoding: raw\n\n"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + 512 * 512 * 600 * 2)
    return path


def peak(segmenter: Segmenter, rgb: np.ndarray) -> int:
    """Bytes by which an embedding raises this process's memory at most."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest level so far
    before = psutil.Process().memory_info().rss
    segmenter.embed(rgb)
    status = Path("/proc/self/status").read_text()
    highest = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(highest.split()[1]) * 1024 - before


def main(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    segmenter = full_precision_segmenter(Sam(VARIANT).eval())
    rgb = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    found: dict[str, Any] = {"estimate": embed_bytes(VARIANT, None), "once": embed_bytes(VARIANT, None, 0)}
    with limit(resource.RLIMIT_AS):
        found["left"] = memory.available()
        found["embed refused"] = outcome(lambda: segmenter.embed(rgb))
        found["bomb refused"] = outcome(lambda: load_volume(bomb(folder)))
        found["large refused"] = outcome(lambda: load_volume(large(folder)))
    with limit(resource.RLIMIT_DATA):
        found["embed ran out"] = outcome(lambda: segmenter.embed(rgb))
        found["large ran out"] = outcome(lambda: load_volume(large(folder)))
    found["peak"] = peak(segmenter, rgb)
    found["embed after"] = outcome(lambda: segmenter.embed(rgb))
    found["large after"] = outcome(lambda: load_volume(large(folder)))
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
