"""Files that change under the server: pixels, keys and embeddings always belong together."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from monailabel_dfqsam.sam import build, read_checkpoint
from monailabel_dfqsam.segmentation import loading
from monailabel_dfqsam.segmentation.loading import VolumeLoader, file_key
from monailabel_dfqsam.segmentation.segmenter import full_precision_segmenter
from monailabel_dfqsam.segmentation.volume import ImageError, Volume
from monailabel_dfqsam.server.answers.workbench import Shown, Workbench
from monailabel_dfqsam.server.runs.models import FULL_PRECISION, Models, Served
from monailabel_dfqsam.server.settings import Settings
from tests.dicom_series import Series
from tests.server_fixtures import checkpoint

SHAPE = (24, 20, 5)
OLD, NEW = 40, 200


def write(path: Path, value: int) -> Path:
    """A volume of one value and a corner of another, so that all versions are as long."""
    values = np.full(SHAPE, value, np.int16)
    values[:5, :5] = value // 2
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    return path


def value(volume: Volume) -> int:
    return int(volume.array[-1, -1, 0])


def in_place(path: Path) -> None:
    """New content in the old file, as `cp` writes it."""
    other = write(path.with_name("other.nii"), NEW)
    path.write_bytes(other.read_bytes())


def renamed(path: Path) -> None:
    """New content by renaming, as rsync does."""
    os.replace(write(path.with_name("other.nii"), NEW), path)


def with_its_times(replace: Callable[[Path], None]) -> Callable[[Path], None]:
    """The same, and the old file's times of access and modification, as `cp -p` and `rsync -t` set them."""

    def replaced(path: Path) -> None:
        old = path.stat()
        replace(path)
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))

    return replaced


REPLACEMENTS = {
    "in place": in_place,
    "renamed": renamed,
    "in place, same times": with_its_times(in_place),
    "renamed, same times": with_its_times(renamed),
}


@pytest.mark.parametrize("how", REPLACEMENTS)
def test_a_file_is_read_once_until_it_is_replaced(tmp_path: Path, how: str) -> None:
    loader, path = VolumeLoader(1 << 20), write(tmp_path / "a.nii", OLD)
    first = loader.load(path)
    assert loader.load(str(path)) is first
    assert first.key == file_key(path)
    REPLACEMENTS[how](path)
    second = loader.load(path)
    assert (value(first), value(second)) == (OLD, NEW)
    assert second.key != first.key


@pytest.mark.parametrize("how", REPLACEMENTS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, how: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old pixels never lie under the new file's key, nor the new ones under the old file's."""
    loader, path = VolumeLoader(1 << 20), write(tmp_path / "a.nii", OLD)
    original, before = loading.load_volume, file_key(path)

    def interrupted(*asked: Any) -> Volume:
        monkeypatch.setattr(loading, "load_volume", original)
        if when == "before":
            REPLACEMENTS[how](path)
        volume = original(*asked)
        if when == "after":
            REPLACEMENTS[how](path)
        return volume

    monkeypatch.setattr(loading, "load_volume", interrupted)
    found = loader.load(path)
    assert (value(found), found.key) == (NEW, file_key(path))
    assert found.key != before


def test_a_file_half_written_is_not_an_error_once_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, path = VolumeLoader(1 << 20), write(tmp_path / "a.nii", NEW)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    original = loading.load_volume

    def finishing(*asked: Any) -> Volume:
        monkeypatch.setattr(loading, "load_volume", original)
        try:
            return original(*asked)
        finally:
            path.write_bytes(whole)

    monkeypatch.setattr(loading, "load_volume", finishing)
    assert value(loader.load(path)) == NEW


def test_a_file_that_never_comes_to_rest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, path = VolumeLoader(1 << 20), write(tmp_path / "a.nii", OLD)
    original = loading.load_volume

    def always(*asked: Any) -> Volume:
        volume = original(*asked)
        in_place(path)
        return volume

    monkeypatch.setattr(loading, "load_volume", always)
    with pytest.raises(ImageError, match=r"'a\.nii' is being written to"):
        loader.load(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"there is no image 'b\.nii\.gz'"):
        VolumeLoader(1 << 20).load(tmp_path / "b.nii.gz")


def test_a_series_is_read_anew_when_one_of_its_files_is_another(tmp_path: Path) -> None:
    """Of the same size, under the same name, with the same times."""
    folder, other, series = tmp_path / "series", tmp_path / "other", Series()
    for where, number in ((folder, OLD), (other, NEW)):
        where.mkdir()
        for k in range(SHAPE[2]):
            series.write(where / f"{k}.dcm", np.full((SHAPE[1], SHAPE[0]), number), k)
    loader = VolumeLoader(1 << 20)
    first = loader.load(folder)
    for file in folder.iterdir():
        times = file.stat()
        shutil.copyfile(other / file.name, file)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (value(first), value(loader.load(folder))) == (OLD, NEW)


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(full_precision_segmenter(build(read_checkpoint("tiny"))), FULL_PRECISION, "torch")


@pytest.mark.parametrize("how", REPLACEMENTS)
@pytest.mark.parametrize("together", [False, True])
def test_an_image_replaced_between_a_click_and_its_neighbours_embedding(
    served: Served, tmp_path: Path, how: str, together: bool
) -> None:
    """What was embedded of the old pixels answers for nothing else."""
    path = write(tmp_path / "a.nii", OLD)
    bench = Workbench(Models(Settings(tmp_path, checkpoint=checkpoint(tmp_path))), 16)

    def embedding(shown: Shown, k: int) -> torch.Tensor:
        return (bench.embed_slices(shown, [k])[0] if together else bench.embed(shown, k)[0]).tensor

    clicked = Shown(served, bench.volume(path), None)
    embedding(clicked, 1)
    REPLACEMENTS[how](path)
    embedding(clicked, 2)  # the idle moment's work
    after = Shown(served, bench.volume(path), None)
    for k in (1, 2):
        expected = served.segmenter.embed_slices(after.volume, [k], None)[0].tensor
        assert torch.equal(embedding(after, k), expected)


def test_whether_an_embedding_was_there_is_the_requests_own(served: Served, tmp_path: Path) -> None:
    """Of another image's embeddings, found meanwhile, it says nothing."""
    bench = Workbench(Models(Settings(tmp_path, checkpoint=checkpoint(tmp_path))), 16)
    one, two = (Shown(served, bench.volume(write(tmp_path / name, OLD)), None) for name in ("a.nii", "b.nii"))
    bench.embed(two, 0)
    compute = bench._compute

    def meanwhile(shown: Shown, slices: list[int]) -> object:
        assert bench.embed(two, 0)[1]
        return compute(shown, slices)

    bench._compute = meanwhile  # type: ignore[method-assign, assignment]
    assert not bench.embed(one, 0)[1]
    assert bench.embed(one, 0)[1]
