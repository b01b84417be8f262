"""Files meant to do harm are refused before anything of them, or of another file, is read."""

from __future__ import annotations

import gzip
import time
from pathlib import Path

import nibabel
import numpy as np
import psutil
import pytest

from monailabel_dfqsam.segmentation.reading import MAX_VOXELS, ImageError, check_size, read_itk
from tests.hostile_files import SECRET_VOXELS, bombs, detached

SECONDS = 2.0  # measured: 0.1 at most; the tenfold and more for a busy machine
BOMBS = bombs()


@pytest.mark.parametrize("name", detached(Path("x")))
def test_no_file_leads_to_another(tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret.raw"
    secret.write_bytes(SECRET_VOXELS)
    path = tmp_path / name
    path.write_bytes(detached(secret)[name])
    begin = time.perf_counter()
    with pytest.raises(ImageError) as refused:
        read_itk(path)
    assert time.perf_counter() - begin < SECONDS
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BOMBS[name])
    before, begin = psutil.Process().memory_info().rss, time.perf_counter()
    with pytest.raises(ImageError):
        read_itk(path)
    assert time.perf_counter() - begin < SECONDS
    assert psutil.Process().memory_info().rss - before < 1 << 28


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_nifti_that_was_cut_off_is_not_read_as_zeros(
    tmp_path: Path, dtype: type[np.generic], suffix: str
) -> None:
    values = np.random.default_rng(0).integers(1, 900, (20, 20, 20)).astype(dtype)
    whole = nibabel.Nifti1Image(values, np.eye(4)).to_bytes()
    path = tmp_path / f"a{suffix}"
    pack = gzip.compress if suffix.endswith(".gz") else bytes
    cuts = [pack(whole[:-1]), pack(whole[: len(whole) // 2])]
    for content in [*cuts, pack(whole)[:-9]]:
        path.write_bytes(content)
        with pytest.raises(ImageError, match="incomplete"):
            read_itk(path)
    # Whole in one part, in two, and with something after the voxels.
    for content in (pack(whole), pack(whole[:900]) + pack(whole[900:]), pack(whole + b"more")):
        path.write_bytes(content)
        assert read_itk(path)[0].GetSize() == (20, 20, 20)


def test_size_and_memory_are_limits() -> None:
    check_size((512, 512, 1000), 2, "a")
    with pytest.raises(ImageError, match=str(MAX_VOXELS)):
        check_size((MAX_VOXELS, 2), 1, "a")
    with pytest.raises(ImageError, match="MB are free"):
        check_size((MAX_VOXELS,), 1 << 20, "a")
