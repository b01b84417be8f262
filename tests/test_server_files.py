"""Files as scanners, archives and other programs leave them, clicked on the real server.

Every picture is the same disc; a mask's IoU is taken against that disc, which no reader of ours has seen.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import requests
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image
from pydicom.uid import ExplicitVRBigEndian

from tests.dicom_series import Series, implicit_without_preamble
from tests.server_fixtures import OBJECT, SHAPE, WORK_SECONDS, Server, affine, checkpoint, new_server, wait

ROW, COLUMN, K = OBJECT
RADIUS = 10
GOOD = 0.9  # what the ordinary file reaches is above
TINY = 1e-3  # millimetres


def disc() -> NDArray[np.bool_]:
    """[I, J, K] on three slices."""
    i, j, k = np.indices(SHAPE)
    return (np.hypot(i - ROW, j - COLUMN) < RADIUS) & (abs(k - K) <= 1)


def values(dark: float = 60, bright: float = 320) -> NDArray[np.float64]:
    """[I, J, K] the disc on its ground, with noise of a thirtieth of what lies between."""
    noise = np.random.default_rng(0).normal(0, abs(bright - dark) / 30, SHAPE)
    return np.asarray(np.where(disc(), bright, dark) + noise)


def nifti(path: Path, array: NDArray[Any], matrix: NDArray[np.float64] | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, affine() if matrix is None else matrix), path)
    return path


def series(folder: Path, array: NDArray[np.float64], **tags: Any) -> Path:
    """Slices of int16; of a tag that is a list each slice has its own."""
    folder.mkdir()
    whole = Series()
    for k in range(SHAPE[2]):
        own = {name: tag[k] if isinstance(tag, list) else tag for name, tag in tags.items()}
        intercept, slope = own.get("RescaleIntercept", -1000), own.get("RescaleSlope", 1)
        stored = np.rint((array[:, :, k].T - intercept) / slope)
        kind = np.int16 if own.get("PixelRepresentation", 1) else np.uint16
        own["PixelData"] = stored.astype(kind).tobytes()
        whole.write(folder / f"{k}.dcm", array[:, :, k].T.astype(np.int64), k, **own)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With the ordinary file `ball`, and what the tests below put beside it before the start."""
    folder = tmp_path_factory.mktemp("files")
    made = new_server(folder, volumes=0)
    studies = folder / "studies"
    nifti(studies / "ball.nii.gz", values().astype(np.int16))
    _stored_studies(studies)
    try:
        made.start({"quantize": "false", "checkpoint": checkpoint(folder)})
        yield made
    finally:
        made.stop()


def _stored_studies(studies: Path) -> None:
    # CT whose surroundings are no number: read as 0, they would look like the disc.
    with_nan = values(-700, 0).astype(np.float32)
    i, j = np.indices(SHAPE[:2])
    with_nan[np.hypot(i - ROW, j - COLUMN) > 1.05 * RADIUS] = np.nan
    with_nan[0, 0] = np.inf
    nifti(studies / "frame.nii", with_nan[..., None])
    two = nibabel.Nifti1Image(values().astype(np.int16), None)
    moved = affine()
    moved[:3, 3] += (-30, -20, 10)
    two.set_sform(affine(), 2)
    two.set_qform(moved, 1)
    nibabel.save(two, studies / "two.nii.gz")
    nifti(studies / "flat.nii.gz", values().astype(np.int16)[:, :, K])
    nifti(studies / "unpacked.nii", values().astype(np.int16))
    (studies / "unpacked.nii").rename(studies / "unpacked.nii.gz")
    (studies / "packed.nii").write_bytes(gzip.compress((studies / "unpacked.nii.gz").read_bytes()))


def iou(mask: NDArray[Any], k: int = K) -> float:
    found, wanted = mask[:, :, k] != 0, disc()[:, :, K]
    assert set(np.flatnonzero(mask.any(axis=(0, 1)))) <= {k}
    return float((found & wanted).sum() / (found | wanted).sum())


def click(server: Server, folder: Path, image: str, path: Path | None = None, **options: Any) -> NDArray[Any]:
    """The mask [I, J, K] of a click on the disc's middle, of a stored image or of one in a session."""
    session = send(server, path) if path else None
    options = {"foreground": [list(OBJECT)], "result_extension": ".nrrd", **options}
    reply = server.session.infer_raw(image, options, session_id=session)
    (folder / reply.file_name).write_bytes(reply.image)
    array: NDArray[Any] = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / reply.file_name))).T
    return array if array.ndim == 3 else array[:, :, None]


def send(server: Server, path: Path) -> str:
    """The session of a file, or of a folder's files."""
    if path.is_file():
        return server.session.create_session(path)
    files = [("files", (file.name, file.read_bytes())) for file in sorted(path.iterdir())]
    answer = requests.put(f"{server.url}/session/", files=files, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["session_id"])


def test_the_ordinary_file_and_one_with_nan_in_one_frame(server: Server, tmp_path: Path) -> None:
    assert iou(click(server, tmp_path, "ball")) > GOOD
    assert iou(click(server, tmp_path, "frame")) > GOOD


@pytest.mark.parametrize("image", ["unpacked", "packed"])
def test_content_counts_where_the_name_is_wrong(server: Server, tmp_path: Path, image: str) -> None:
    assert iou(click(server, tmp_path, image)) > GOOD


def _first_slice_unlike(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """The first file can be stored as whole numbers from 0 on; a reader that goes by it loses the others."""
    array[:, :, 0] = array[:, :, 0].clip(0)
    return array


SERIES: dict[str, tuple[NDArray[np.float64], dict[str, Any]]] = {
    "PET with a slope for each slice": (
        values(0.06, 0.32),
        {
            "Modality": "PT", "RescaleSlope": [1, *[1e-5 * (1 + k) for k in range(6)]], "RescaleIntercept": 0,
            "PixelRepresentation": 0,
        },
    ),
    "intercepts": (
        values(-700, -100), {"RescaleIntercept": [0, *[-1000, -2000] * 3], "PixelRepresentation": 0}
    ),
    "signs": (values(-700, -100), {"RescaleIntercept": 0, "PixelRepresentation": [0, *[1] * 6]}),
}  # fmt: skip


@pytest.mark.parametrize("name", SERIES)
def test_each_slice_has_its_own_transform(server: Server, tmp_path: Path, name: str) -> None:
    array, tags = SERIES[name]
    path = series(tmp_path / "series", _first_slice_unlike(array.copy()), **tags)
    assert iou(click(server, tmp_path, "x", path)) > GOOD


def test_ct_without_hounsfield_units_is_not_all_white(server: Server, tmp_path: Path) -> None:
    path = series(tmp_path / "cone", values(1500, 2600))
    for window in ("auto", "ct soft tissue", "ct lung", "ct brain", "full range"):
        assert iou(click(server, tmp_path, "x", path, window=window)) > GOOD


def test_low_values_are_white_in_a_viewers_window_too(server: Server, tmp_path: Path) -> None:
    tags = {"PhotometricInterpretation": "MONOCHROME1", "Modality": "DX"}
    path = series(tmp_path / "dx", values(2000, 600), **tags)
    assert iou(click(server, tmp_path, "x", path, window_center=900, window_width=1000)) > GOOD
    assert iou(click(server, tmp_path, "x", path)) > GOOD


def test_dicom_without_preamble_is_read(server: Server, tmp_path: Path) -> None:
    path = series(tmp_path / "series", values())
    for file in path.iterdir():
        implicit_without_preamble(file)
    assert iou(click(server, tmp_path, "x", path)) > GOOD
    mask = click(server, tmp_path, "x", path / f"{K}.dcm", foreground=[[ROW, COLUMN, 0]])
    assert iou(mask, 0) > GOOD


def test_big_endian_of_32_bit_is_read(server: Server, tmp_path: Path) -> None:
    path = series(tmp_path / "dose", values())
    for k, file in enumerate(sorted(path.iterdir())):
        data = pydicom.dcmread(file)
        data.BitsAllocated, data.BitsStored, data.HighBit = 32, 32, 31
        data.Modality, data.PixelRepresentation = "RTDOSE", 0
        data.RescaleSlope, data.RescaleIntercept = 1e-4, 0
        data.PixelData = np.rint(values()[:, :, k].T.clip(0) * 1e4).astype(">u4").tobytes()
        data.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        data.is_little_endian, data.is_implicit_VR = False, False
        data.save_as(file, write_like_original=False)
    assert iou(click(server, tmp_path, "x", path)) > GOOD


@pytest.mark.parametrize("name", ["B.NII.GZ", "B.Nii.Gz", "B.PNG", "B.JPG", "B.Jpeg", "B.NRRD"])
def test_capital_endings_are_read(server: Server, tmp_path: Path, name: str) -> None:
    path, point = tmp_path / name, list(OBJECT)
    if name.lower().endswith((".nii.gz", ".nrrd")):
        nifti(tmp_path / "b.nii.gz", values().astype(np.int16))
        if name == "B.NRRD":
            sitk.WriteImage(sitk.ReadImage(str(tmp_path / "b.nii.gz")), str(tmp_path / "b.nrrd"))
        shutil.copy(tmp_path / ("b.nrrd" if name == "B.NRRD" else "b.nii.gz"), path)
    else:
        grey = (values()[:, :, K].T / 2).clip(0, 255).astype(np.uint8)
        Image.fromarray(grey).save(path, "png" if name == "B.PNG" else "jpeg", quality=95)
        point = [ROW, COLUMN, 0]
    assert iou(click(server, tmp_path, "x", path, foreground=[point]), point[2]) > GOOD


@pytest.mark.parametrize("extension", [".nii.gz", ".nii"])
@pytest.mark.parametrize("image", ["ball", "two", "flat"])
@pytest.mark.parametrize("dtype", ["uint8", "int16"])
def test_a_nifti_mask_lies_where_every_reader_sees_the_image(
    server: Server, tmp_path: Path, image: str, extension: str, dtype: str
) -> None:
    point = [ROW, COLUMN, 0 if image == "flat" else K]
    options = {"foreground": [point], "result_extension": extension, "result_dtype": dtype}
    reply = server.session.infer_raw(image, options)
    path = tmp_path / reply.file_name
    path.write_bytes(reply.image)
    mask, source = nibabel.load(path), nibabel.load(next(Path(server.studies).glob(f"{image}.*")))
    assert (mask.shape, mask.get_data_dtype()) == (source.shape, np.dtype(dtype))
    for form in ("get_sform", "get_qform"):
        found, expected = (getattr(x, form)(coded=True) for x in (mask, source))
        assert found[1] == expected[1]
        if expected[0] is not None:
            np.testing.assert_allclose(found[0], expected[0], atol=TINY)
    array = np.asarray(mask.dataobj)
    assert iou(array if array.ndim == 3 else array[:, :, None], point[2]) > GOOD
    seen = [sitk.ReadImage(str(next(Path(server.studies).glob(f"{image}.*")))), sitk.ReadImage(str(path))]
    assert seen[0].GetOrigin() == pytest.approx(seen[1].GetOrigin(), abs=TINY)


@pytest.mark.parametrize("image", ["two", "flat"])
def test_an_nrrd_mask_lies_where_slicer_sees_the_image(server: Server, tmp_path: Path, image: str) -> None:
    options = {"foreground": [[ROW, COLUMN, 0 if image == "flat" else K]], "result_extension": ".nrrd"}
    reply = server.session.infer_raw(image, options)
    (tmp_path / reply.file_name).write_bytes(reply.image)
    mask = sitk.ReadImage(str(tmp_path / reply.file_name))
    # ITK follows the qform here, and drops what is flat; of that the sform is all there is.
    matrix = affine()
    if image == "two":
        matrix[:3, 3] += (-30, -20, 10)
    lps = np.diag([-1, -1, 1]) @ matrix[:3]
    for index in ((0, 0, 0), (1, 0, 0), (0, 1, 0)):
        found = mask.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(found, lps @ [*index, 1], atol=TINY)


def refine(server: Server, mask: bytes, name: str, image: str = "ball") -> requests.Response:
    fields = {"params": (None, json.dumps({"result_extension": ".nrrd"})), "label": (name, mask)}
    url = f"{server.url}/infer/dfqsam?image={image}&output=image"
    return requests.post(url, files=fields, timeout=60)


def _mask() -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image(disc().astype(np.uint8) * (np.arange(SHAPE[2]) == K), affine())


def _slices_reversed(image: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    reversed_ = np.diag([1.0, 1, -1, 1])
    reversed_[2, 3] = SHAPE[2] - 1
    return nibabel.Nifti1Image(np.asarray(image.dataobj)[:, :, ::-1], image.affine @ reversed_)


def _axes_permuted(image: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    order = nibabel.orientations.axcodes2ornt(("S", "A", "L"))
    codes = nibabel.orientations.io_orientation(image.affine)
    return image.as_reoriented(nibabel.orientations.ornt_transform(codes, order))


def _nan_outside(image: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    array = np.where(np.asarray(image.dataobj) > 0, np.float32(0.5), np.float32("nan"))
    return _slices_reversed(nibabel.Nifti1Image(array, image.affine))


@pytest.mark.parametrize(
    "turn", [_nan_outside, nibabel.as_closest_canonical, _slices_reversed, _axes_permuted]
)
def test_a_mask_prompt_on_turned_axes_lies_where_it_lay(server: Server, tmp_path: Path, turn: Any) -> None:
    turned = turn(_mask())
    assert not np.allclose(turned.affine, affine())
    nibabel.save(turned, tmp_path / "turned.nii.gz")
    answer = refine(server, (tmp_path / "turned.nii.gz").read_bytes(), "turned.nii.gz")
    assert answer.status_code == 200, answer.text
    (tmp_path / "refined.nrrd").write_bytes(answer.content)
    assert iou(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "refined.nrrd"))).T) > GOOD


def _moved() -> nibabel.Nifti1Image:
    matrix = affine()
    matrix[:3, 3] += 200
    return nibabel.Nifti1Image(_mask().get_fdata().astype(np.uint8), matrix)


def _layered() -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image(np.zeros((*SHAPE, 2), np.uint8), affine())


def _coloured() -> nibabel.Nifti1Image:
    colour = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    return nibabel.Nifti1Image(np.zeros(SHAPE, colour), affine())


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (_moved, "'label' does not lie on the image"),
        (lambda: _mask().slicer[:40], "'label' does not lie on the image"),
        (_layered, "'label' has 4 dimensions, 72×56×7×2"),
        (_coloured, "'label' must hold one number a voxel"),
    ],
)
def test_a_refused_mask_prompt_is_named_as_the_user_knows_it(
    server: Server, tmp_path: Path, made: Any, sentence: str
) -> None:
    nibabel.save(made(), tmp_path / "m.nii")
    answer = refine(server, (tmp_path / "m.nii").read_bytes(), "m.nii")
    assert (answer.status_code, sentence in answer.text) == (400, True), answer.text
    assert "dfqsam-" not in answer.text
    wait(lambda: not list(server.temporary.glob("dfqsam-*")), WORK_SECONDS)


def test_a_refused_vector_mask_is_named_too(server: Server, tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.zeros((*SHAPE[::-1], 2), np.uint8), isVector=True)
    sitk.WriteImage(image, str(tmp_path / "layers.seg.nrrd"))
    answer = refine(server, (tmp_path / "layers.seg.nrrd").read_bytes(), "layers.seg.nrrd")
    assert (answer.status_code, "'label' holds 2 values a pixel" in answer.text) == (400, True), answer.text


def test_a_refused_image_sent_along_is_named_as_the_user_named_it(server: Server, tmp_path: Path) -> None:
    nibabel.save(_layered(), tmp_path / "m.nii.gz")
    answer = requests.post(
        f"{server.url}/infer/dfqsam",
        files={"file": ("head of 1.nii.gz", (tmp_path / "m.nii.gz").read_bytes())},
        data={"params": json.dumps({"foreground": [list(OBJECT)]})},
        timeout=60,
    )
    assert answer.status_code == 400
    assert answer.json()["detail"] == "'head of 1.nii.gz' has 4 dimensions, 72×56×7×2; a volume has 3"


def test_a_refused_file_of_a_series_is_named_and_not_the_servers_folder(
    server: Server, tmp_path: Path
) -> None:
    path = series(tmp_path / "s", values())
    (path / "4.dcm").write_bytes((path / "4.dcm").read_bytes()[:-1000])
    (path / "5.dcm").unlink()
    session = send(server, path)
    with pytest.raises(Exception, match=r"'0\.dcm and 5 more' has unevenly spaced slices"):
        server.session.infer("x", [OBJECT], session_id=session)
    (path / "6.dcm").unlink()
    session = send(server, path)
    with pytest.raises(Exception, match=r"'4\.dcm' cannot be read"):
        server.session.infer("x", [OBJECT], session_id=session)
