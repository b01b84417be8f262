"""What the archive is told of a label's segments."""

from __future__ import annotations

from typing import Any

import pytest

from monailabel_dfqsam.server.upstream.segmentations import segments


def told(values: list[int], label_info: list[dict[str, Any]]) -> dict[int, str]:
    return {segment["labelID"]: segment["SegmentLabel"] for segment in segments(values, label_info)}


@pytest.mark.parametrize(
    ("values", "idx", "expected"),
    [
        ([1, 2], [1, 2], {1: "a", 2: "b"}),
        ([2], [1, 2], {2: "b"}),
        ([3, 7], [7, 3], {3: "b", 7: "a"}),
        # Slicer, with a background that it counts and does not send.
        ([1, 2], [2, 3], {1: "a", 2: "b"}),
        ([2], [None, None], {2: "b"}),
        ([5], [None, None], {5: "unknown"}),
    ],
)
def test_values_choose_names(values: list[int], idx: list[int | None], expected: dict[int, str]) -> None:
    info = [{"name": name, **({} if i is None else {"idx": i})} for name, i in zip("ab", idx, strict=True)]
    assert told(values, info) == expected


@pytest.mark.parametrize(
    ("name", "category", "kind"),
    [
        ("Spleen", "Anatomical Structure", "Spleen"),
        ("spinal cord", "Anatomical Structure", "Spinal cord"),
        ("lesion", "Morphologically Abnormal Structure", "Lesion"),
        ("tumour", "Morphologically Abnormal Structure", "Neoplasm"),
        ("organ", "Anatomical Structure", "Organ"),
        ("vessel", "Tissue", "Blood vessel"),
        ("bone", "Tissue", "Bone"),
        ("other", "Tissue", "Tissue"),
        ("hypothesis 7b", "Tissue", "Tissue"),
        ("hip joint", "Tissue", "Tissue"),  # of which DICOM has two
    ],
)
def test_codes_are_those_of_dicom_or_plain_tissue(name: str, category: str, kind: str) -> None:
    (attribute,) = segments([1], [{"name": name, "idx": 1}])
    assert attribute["SegmentLabel"] == name
    assert attribute["SegmentedPropertyCategoryCodeSequence"]["CodeMeaning"] == category
    assert attribute["SegmentedPropertyTypeCodeSequence"]["CodeMeaning"] == kind
    assert attribute["SegmentedPropertyTypeCodeSequence"]["CodingSchemeDesignator"] == "SCT"


@pytest.mark.parametrize(
    ("color", "expected"),
    [
        ("rgb(10, 200, 30)", [10, 200, 30]),
        ("rgba(10,200,30,0.5)", [10, 200, 30]),
        ([10, 200, 30, 255], [10, 200, 30]),
        ([300, -1, 30.7], [255, 0, 30]),
        ("greenish", [241, 214, 145]),
        ([1, 2], [241, 214, 145]),
        (None, [241, 214, 145]),
    ],
)
def test_a_colour_in_words_is_read_and_nonsense_left(color: Any, expected: list[int]) -> None:
    (segment,) = segments([1], [{"name": "bone", "idx": 1, "color": color}])
    assert segment["recommendedDisplayRGBValue"] == expected


def test_what_the_client_says_itself_stands() -> None:
    (segment,) = segments([4], [{"name": "x", "idx": 4, "segmentAttribute": {"SegmentLabel": "own"}}])
    assert segment["SegmentLabel"] == "own"
    assert segment["labelID"] == 4
