"""A mask of one slice, written without its volume: the same file to every reader, on any grid."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monailabel_dfqsam.segmentation.slice_mask import write_slice_mask
from monailabel_dfqsam.segmentation.volume import Volume, load_volume, write_mask

SUFFIXES = (".nrrd", ".nii", ".nii.gz")


def volume_of(shape: tuple[int, ...], angles: tuple[float, float], flips: tuple[int, int, int]) -> Volume:
    """An empty volume on a grid turned about two axes, any of whose axes may run backwards."""
    a, b = angles
    turn_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    direction = turn_z @ turn_x @ np.diag(flips)
    array = np.zeros(shape, dtype=np.int16)
    return Volume(array, (-31.1, 17.3, 1e3 / 3), (0.7, 1.1, 10 / 3), tuple(direction.ravel()), None, None)


def plane_of(shape: tuple[int, ...], seed: int, dense: bool) -> np.ndarray:
    """[I, J] uint8: noise, which does not compress, or a rectangle of some value."""
    random = np.random.default_rng(seed)
    if dense:
        return random.integers(0, 256, shape[:2], dtype=np.uint8)
    plane = np.zeros(shape[:2], dtype=np.uint8)
    plane[random.integers(shape[0]) :, : 1 + random.integers(shape[1])] = random.integers(1, 256)
    return plane


def whole(plane: np.ndarray, k: int, volume: Volume) -> np.ndarray:
    mask = np.zeros(volume.shape, dtype=np.uint8)
    mask[:, :, k] = plane
    return mask


def payload(path: Path) -> bytes:
    return path.read_bytes().partition(b"\n\n")[2]


shapes = st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 12))
angle = st.floats(-3.2, 3.2)
flip = st.sampled_from((-1, 1))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=shapes,
    angles=st.tuples(angle, angle),
    flips=st.tuples(flip, flip, flip),
    place=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 9),
    dense=st.booleans(),
    compress=st.booleans(),
)
def test_simpleitk_reads_what_its_own_writer_would_have_written(
    tmp_path: Path,
    shape: tuple[int, int, int],
    angles: tuple[float, float],
    flips: tuple[int, int, int],
    place: float,
    seed: int,
    dense: bool,
    compress: bool,
) -> None:
    volume, k = volume_of(shape, angles, flips), int(place * shape[2])
    plane = plane_of(shape, seed, dense)
    own, library = tmp_path / "own.nrrd", tmp_path / "library.nrrd"
    write_slice_mask(plane, k, volume, own, compress)
    write_mask(whole(plane, k, volume), volume, library, compress)
    found, expected = sitk.ReadImage(str(own)), sitk.ReadImage(str(library))
    assert found.GetPixelID() == expected.GetPixelID()
    assert found.GetOrigin() == expected.GetOrigin()
    assert found.GetSpacing() == expected.GetSpacing()
    assert found.GetDirection() == expected.GetDirection()
    assert np.array_equal(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(expected))
    headers = [path.read_bytes().partition(b"\n\n")[0] for path in (own, library)]
    assert headers[0] == headers[1]
    if not compress:
        assert own.read_bytes() == library.read_bytes()


@pytest.mark.parametrize("k", [0, 4, 10])
def test_the_compressed_voxels_are_one_gzip_member_with_the_right_sum(tmp_path: Path, k: int) -> None:
    volume = volume_of((130, 90, 11), (0.3, -0.2), (1, -1, 1))
    plane = plane_of(volume.shape, 3, dense=True)
    write_slice_mask(plane, k, volume, tmp_path / "m.nrrd")
    expected = whole(plane, k, volume).tobytes(order="F")
    data = payload(tmp_path / "m.nrrd")
    assert gzip.decompress(data) == expected
    # Readers that stop after the first member, or do not check its sum, must be right too.
    member = zlib.decompressobj(31)
    assert member.decompress(data) == expected
    assert member.eof
    assert member.unused_data == b""


def test_pynrrd_reads_the_same(tmp_path: Path) -> None:
    volume = volume_of((40, 30, 5), (0.4, 0.1), (-1, 1, 1))
    plane = plane_of(volume.shape, 1, dense=False)
    for compress in (True, False):
        write_slice_mask(plane, 3, volume, tmp_path / "m.nrrd", compress)
        array, header = nrrd.read(str(tmp_path / "m.nrrd"))
        assert np.array_equal(array, whole(plane, 3, volume))
        lps = np.array(volume.direction).reshape(3, 3) * np.array(volume.spacing)
        assert np.allclose(header["space directions"], lps.T)
        assert np.allclose(header["space origin"], volume.origin)


def test_a_large_volume_is_small_when_compressed_and_its_sum_still_right(tmp_path: Path) -> None:
    volume = volume_of((512, 512, 40), (0.0, 0.2), (1, 1, 1))
    plane = plane_of(volume.shape, 2, dense=False)
    write_slice_mask(plane, 17, volume, tmp_path / "m.nrrd")
    assert (tmp_path / "m.nrrd").stat().st_size < 20_000
    assert gzip.decompress(payload(tmp_path / "m.nrrd")) == whole(plane, 17, volume).tobytes(order="F")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_holds_the_mask(tmp_path: Path, suffix: str) -> None:
    volume = volume_of((9, 14, 4), (0.3, 0.2), (1, 1, -1))
    plane = plane_of(volume.shape, 5, dense=True)
    path = tmp_path / f"m{suffix}"
    write_slice_mask(plane, 2, volume, path)
    again = load_volume(path)
    assert np.array_equal(again.array, whole(plane, 2, volume))
    assert np.allclose(again.affine, volume.affine, atol=1e-4)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_picture_keeps_its_two_axes(tmp_path: Path, suffix: str) -> None:
    volume = Volume(np.zeros((6, 4, 1), np.uint8), (0.0, 0.0), (1.0, 2.0), (1.0, 0.0, 0.0, 1.0), None, None)
    plane = plane_of(volume.shape, 6, dense=True)
    write_slice_mask(plane, 0, volume, tmp_path / f"m{suffix}")
    image = sitk.ReadImage(str(tmp_path / f"m{suffix}"))
    assert image.GetSize() == (6, 4)
    assert image.GetSpacing() == (1.0, 2.0)
    assert np.array_equal(sitk.GetArrayFromImage(image).T, plane)


@pytest.mark.parametrize(
    ("plane", "k", "name"),
    [
        (np.zeros((5, 6), np.uint8), 0, "m.nrrd"),
        (np.zeros((5, 7), np.int16), 0, "m.nrrd"),
        (np.zeros((5, 7), np.uint8), 3, "m.nrrd"),
        (np.zeros((5, 7), np.uint8), -1, "m.nrrd"),
        (np.zeros((5, 7), np.uint8), 0, "m.png"),
    ],
)
def test_other_masks_are_refused(tmp_path: Path, plane: np.ndarray, k: int, name: str) -> None:
    volume = volume_of((5, 7, 3), (0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match="mask"):
        write_slice_mask(plane, k, volume, tmp_path / name)
    assert not (tmp_path / name).exists()
