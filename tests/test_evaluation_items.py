"""What is found in folders of each form, and how what is wrong with them is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from monailabel_dfqsam.evaluation.items import EvaluationError, modality_of, read_items


def write_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def rectangle(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((12, 16), dtype=bool)
    mask[rows, columns] = True
    return mask


LIVER, AORTA = rectangle(slice(2, 7), slice(3, 9)), rectangle(slice(8, 10), slice(1, 4))


@pytest.fixture
def sam_med2d(tmp_path: Path) -> Path:
    """`data_demo` as SAM-Med2D has it: paths start at its parent, masks of 0 and 1 or of 0 and 255."""
    folder = tmp_path / "data_demo"
    write_picture(folder / "images" / "ct_00--set--one.png", np.full((12, 16), 80))
    write_picture(folder / "masks" / "liver_000.png", LIVER * 255)
    write_picture(folder / "masks" / "aorta_000.png", AORTA)
    image = "data_demo/images/ct_00--set--one.png"
    masks = ["data_demo/masks/liver_000.png", "data_demo/masks/aorta_000.png"]
    (folder / "label2image_test.json").write_text(json.dumps(dict.fromkeys(masks, image)))
    (folder / "image2label_train.json").write_text(json.dumps({image: masks}))
    return folder


def test_sam_med2ds_own_lists_are_read(sam_med2d: Path) -> None:
    for data in (sam_med2d, sam_med2d / "label2image_test.json", sam_med2d / "image2label_train.json"):
        items = [read() for read in read_items(data)]
        assert [item.modality for item in items] == ["CT", "CT"]
        for item, truth in zip(items, (LIVER, AORTA), strict=True):
            assert (item.mask == truth).all()
            assert item.rgb.shape == (12, 16, 3)
            assert (item.rgb == 80).all()


def test_its_paths_may_start_at_the_lists_folder(sam_med2d: Path) -> None:
    pair = {"masks/liver_000.png": "images/ct_00--set--one.png"}
    (sam_med2d / "label2image_test.json").write_text(json.dumps(pair))
    assert len(read_items(sam_med2d)) == 1


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("ct_00--AbdomenCT1K--Case_00011--x_0040.png", "CT"),
        ("mr_t1--BraTS2021--BraTS2021_00218--z_0141.png", "MR"),
        ("x_ray--covid_19_ct_cxr--16660_5_1--2d_none.png", "X-ray"),
        ("dermoscopy--isic2018--0001--2d.png", "dermoscopy"),
        ("mr_case7.png", "MR"),
        ("amos_0004_75.png", "other"),
        ("s0619_32.png", "other"),
    ],
)
def test_modalities_are_told_by_the_names_of_sa_med2d_20m(name: str, modality: str) -> None:
    assert modality_of(name) == modality


def write_volume(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


def test_each_label_of_a_decathlon_is_an_object(tmp_path: Path) -> None:
    """Arrays here are [k, j, i]."""
    labels = np.zeros((3, 12, 16), dtype=np.uint8)
    labels[1][LIVER], labels[2][AORTA] = 1, 2
    labels[2, 4, 4] = 1
    image = np.arange(labels.size, dtype=np.int16).reshape(labels.shape)
    for name in ("liver_1.nii.gz", "liver_2_0000.nii.gz"):
        write_volume(tmp_path / "imagesTr" / name, image)
    for name in ("liver_1.nii.gz", "liver_2.nii.gz"):
        write_volume(tmp_path / "labelsTr" / name, labels)
    (tmp_path / "labelsTr" / "._liver_1.nii.gz").write_bytes(b"what macOS leaves")
    items = [read() for read in read_items(tmp_path)]
    assert len(items) == 4
    for item, truth in zip(items, (LIVER, AORTA, LIVER, AORTA), strict=True):
        assert (item.mask == truth).all()
    (tmp_path / "imagesTr" / "liver_2_0000.nii.gz").unlink()
    with pytest.raises(EvaluationError, match=r"'liver_2.nii.gz', but imagesTr has no image"):
        read_items(tmp_path)


ENDINGS = [".nii.gz", ".nii", ".nrrd", ".mha", ".NII", ".NRRD"]


@pytest.mark.parametrize("image_end", ENDINGS)
@pytest.mark.parametrize("mask_end", ENDINGS)
def test_volumes_of_every_ending_are_scored(tmp_path: Path, image_end: str, mask_end: str) -> None:
    truth = np.zeros((3, 12, 16), dtype=np.uint8)
    truth[1][LIVER] = 1
    grey = np.arange(truth.size, dtype=np.int16).reshape(truth.shape)
    for end, stem, array in ((image_end, "case.1", grey), (mask_end, "case.1_liver", truth)):
        write_volume(tmp_path / f"{stem}{end.lower()}", array)
        (tmp_path / f"{stem}{end.lower()}").rename(tmp_path / f"{stem}{end}")
    (tmp_path / "._case.1_liver.nii").write_bytes(b"what macOS leaves")
    (item,) = [read() for read in read_items(tmp_path)]
    assert (item.mask == LIVER).all()
    assert item.rgb.shape == (12, 16, 3)


@pytest.mark.parametrize("end", [".png", ".PNG", ".jpg", ".jpeg"])
def test_pictures_of_every_ending_are_scored_upright(tmp_path: Path, end: str) -> None:
    write_picture(tmp_path / f"scan{end}", np.repeat(np.arange(12)[:, None] * 9, 16, axis=1))
    write_picture(tmp_path / "labels" / "scan_liver.png", LIVER * 255)
    (item,) = [read() for read in read_items(tmp_path)]
    assert (item.mask == LIVER).all()
    assert item.rgb[-1].mean() > item.rgb[0].mean() + 80


def test_an_image_is_found_in_whatever_format_and_a_mask_in_each(tmp_path: Path) -> None:
    grey = np.arange(3 * 12 * 16, dtype=np.int16).reshape(3, 12, 16)
    truth = np.zeros((3, 12, 16), dtype=np.uint8)
    truth[1][LIVER] = 1
    for name in ("a.nii", "a.nii.gz", "imagesTr/b_0000.nrrd"):
        write_volume(tmp_path / name, grey)
    for name in ("a_liver.nii", "a_liver.nrrd", "labelsTr/b.nii"):
        write_volume(tmp_path / name, truth)
    items = [read() for read in read_items(tmp_path)]
    assert len(items) == 3
    assert all((item.mask == LIVER).all() for item in items)


def test_volumes_whose_masks_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.nii.gz", np.ones((3, 4, 5), dtype=np.uint8))
    write_volume(tmp_path / "a_x.nii.gz", np.ones((3, 4, 4), dtype=np.uint8))
    with pytest.raises(EvaluationError, match=r"'a_x.nii.gz' has 4×4×3 voxels and 'a.nii.gz' 5×4×3"):
        read_items(tmp_path)[0]()
    write_volume(tmp_path / "a_x.nii.gz", np.zeros((3, 4, 5), dtype=np.uint8))
    with pytest.raises(EvaluationError, match=r"'a_x.nii.gz' is empty"):
        read_items(tmp_path)[0]()


GOOD = {"image": "x.png", "mask": "y.png", "modality": "A"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "line 1 of manifest.jsonl must be"),
        ('{"image": "a.png"}', "line 1 of manifest.jsonl must be"),
        ("\n{", "line 2 of manifest.jsonl must be"),
        (json.dumps(GOOD), "line 1 of manifest.jsonl: 'y.png' is missing"),
        (json.dumps({**GOOD, "mask": "broken.png"}), "'x.png' or 'broken.png' is no picture"),
        (json.dumps({**GOOD, "mask": "small.png"}), "'small.png' has 3×4 pixels and 'x.png' 12×16"),
        (json.dumps({**GOOD, "mask": "black.png"}), "'black.png' is empty"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_said(tmp_path: Path, text: str, sentence: str) -> None:
    write_picture(tmp_path / "x.png", LIVER * 9)
    write_picture(tmp_path / "small.png", LIVER[:3, :4])
    write_picture(tmp_path / "black.png", LIVER * 0)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "manifest.jsonl").write_text(text)
    with pytest.raises(EvaluationError, match=sentence):
        [read() for read in read_items(tmp_path)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        ('{"a": 3}', "must be a JSON object"),
        ('{"a": ["b", null]}', "must be a JSON object"),
        ("{}", "names no images"),
        ('{"mask.png": "images/absent.png"}', "names 'images/absent.png', which is missing"),
    ],
)
def test_what_is_wrong_with_sam_med2ds_list_is_said(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "label2image_test.json"
    file.write_text(text)
    for data in (tmp_path, file):
        with pytest.raises(EvaluationError, match=sentence):
            read_items(data)


def test_no_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"neither a manifest.jsonl"):
        read_items(tmp_path)
    with pytest.raises(EvaluationError, match=r"there is no folder and no file .*absent"):
        read_items(tmp_path / "absent")
