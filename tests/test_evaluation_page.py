"""The page of an evaluation: whole, by itself, and with the answers it says it shows."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from monailabel_dfqsam.evaluation import Item, iou
from monailabel_dfqsam.evaluation.page import Gallery, write_page
from monailabel_dfqsam.evaluation.picture import SIDE, draw
from monailabel_dfqsam.evaluation.scoring import Answer, Scored
from monailabel_dfqsam.segmentation.segmenter import Prompts

FULL = {"model": "tiny", "engine": "torch", "policy": None}
QUANTIZED = {"model": "tiny <W4A4>", "engine": "onednn", "policy": "deploy"}
# Coordinates are rounded to 0.1.
PLACES = 0.11


def disc(height: int, width: int, row: float, column: float, radius: float) -> np.ndarray:
    y, x = np.indices((height, width)) + 0.5
    found: np.ndarray = (y - row) ** 2 + (x - column) ** 2 <= radius**2
    return found


def scored(
    number: int,
    names: dict[str, Any] = QUANTIZED,
    prompt: str = "box",
    truth: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    expected: np.ndarray | None = None,
    prompts: Prompts | None = None,
) -> Scored:
    """An answer about a disc in noise; without masks, wholly right."""
    truth = disc(80, 120, 40, 60, 20) if truth is None else truth
    mask = truth if mask is None else mask
    expected = mask if names is FULL else (truth if expected is None else expected)
    rgb = np.random.default_rng(number).integers(0, 256, (*truth.shape, 1), dtype=np.uint8).repeat(3, axis=2)
    scores = {
        "iou": iou(mask, truth),
        "drop": iou(expected, truth) - iou(mask, truth),
        "agreement": iou(mask, expected),
    }
    answer = Answer(mask, prompts or Prompts(box=np.array([40.0, 20, 80, 60])), 1.0, 1.0)
    return Scored(number, Item(rgb, truth, "CT"), names, prompt, answer, expected, scores)


def filled(path: str, size: tuple[int, int]) -> np.ndarray:
    """SVG path data of polygons, filled by the even-odd rule."""
    found = np.zeros(size[::-1], dtype=bool)
    for polygon in re.findall(r"M([^Z]*)Z", path):
        corners = [tuple(map(float, pair.split())) for pair in polygon.split("L")]
        image = Image.new("1", size)
        ImageDraw.Draw(image).polygon(corners, fill=1)
        found ^= np.array(image)
    return found


@pytest.mark.parametrize(("height", "width", "radius"), [(80, 120, 20), (900, 700, 300), (40, 30, 2)])
def test_a_picture_shows_the_object_and_each_mask(height: int, width: int, radius: float) -> None:
    truth = disc(height, width, height / 2, width / 2, radius)
    mask = disc(height, width, height / 2, width / 2 - radius / 2, radius)
    picture = draw(scored(7, truth=truth, mask=mask))
    assert max(picture.width, picture.height) == SIDE
    with Image.open(io.BytesIO(base64.b64decode(picture.src.split(",")[1]))) as image:
        assert image.size[0] / image.size[1] == pytest.approx(picture.width / picture.height, abs=0.02)
        assert max(image.size) <= SIDE
        assert image.mode == "L"
    assert [outline.whose for outline in picture.outlines] == ["truth", "full", "model"]
    size = (round(picture.width), round(picture.height))
    drawn = [filled(outline.path, size) for outline in picture.outlines]
    assert (drawn[0] == drawn[1]).all()
    # The view cuts nothing off: what is drawn overlaps as the masks do.
    assert iou(drawn[2], drawn[0]) == pytest.approx(iou(mask, truth), abs=0.1)
    assert picture.iou == iou(mask, truth)
    assert (picture.full_iou, picture.number, picture.modality) == (1, 7, "CT")


def test_outlines_lie_where_the_masks_and_the_prompts_do() -> None:
    """The box prompt, which is drawn by its corners, leads from the picture back to the image."""
    truth = disc(90, 140, 45, 70, 25)
    points, labels = np.array([[70.5, 45.5], [90.5, 50.5]]), np.array([1, 0])
    picture = draw(
        scored(1, truth=truth, prompts=Prompts(points, labels, np.array([45.0, 20.0, 95.0, 70.0])))
    )
    assert picture.box is not None
    x, y, box_width, box_height = picture.box
    scale = box_width / 50
    assert box_height == pytest.approx(box_width, abs=PLACES)
    size = (round(picture.width), round(picture.height))
    # Pixels of the drawn mask's rows and columns, at their centres, in the image.
    rows, columns = np.nonzero(filled(picture.outlines[0].path, size))
    assert (columns.mean() + 0.5 - x) / scale + 45 == pytest.approx(70, abs=0.5)
    assert (rows.mean() + 0.5 - y) / scale + 20 == pytest.approx(45, abs=0.5)
    assert len(rows) / scale**2 == pytest.approx(truth.sum(), rel=0.04)
    for (px, py, inside), (left, top), label in zip(picture.points, points, labels, strict=True):
        assert (px - x) / scale + 45 == pytest.approx(left, abs=PLACES)
        assert (py - y) / scale + 20 == pytest.approx(top, abs=PLACES)
        assert inside == bool(label)


@pytest.mark.parametrize("part", [0.02, 0.5, 0.98])
def test_a_ragged_mask_does_not_blow_a_picture_up(part: float) -> None:
    mask = np.random.default_rng(0).random((150, 200)) < part
    picture = draw(scored(1, truth=disc(150, 200, 70, 90, 30), mask=mask))
    assert all(len(outline.path) <= 5000 for outline in picture.outlines)


def test_a_model_that_says_nothing_can_be_drawn() -> None:
    picture = draw(scored(1, mask=np.zeros((80, 120), dtype=bool)))
    assert picture.outlines[-1].path == ""


def test_the_gallery_keeps_the_worst_and_the_best() -> None:
    gallery = Gallery()
    truth = disc(80, 120, 40, 60, 20)
    wider = {number: disc(80, 120, 40, 60, 20 + number) for number in range(30)}
    order = np.random.default_rng(1).permutation(30).tolist()
    for number in order:
        gallery.add(scored(number, mask=wider[number], expected=wider[29 - number], truth=truth))
    agreement = {number: iou(wider[number], wider[29 - number]) for number in order}
    shelves = [
        (heading.split()[0], [p.number for p in pictures])
        for heading, pictures in gallery.shelves("tiny <W4A4>, onednn, deploy, box prompts")
    ]
    assert shelves == [
        ("Worst", [29, 28, 27, 26, 25, 24, 23, 22]),
        ("Least", sorted(order, key=lambda number: (agreement[number], number))[:4]),
        ("Best", [0, 1, 2, 3]),
    ]


class Reader(HTMLParser):
    """Checks that tags close, and collects attributes and text."""

    VOID = frozenset({"meta", "input", "br", "image", "path", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def row(names: dict[str, Any], prompt: str, modality: str) -> dict[str, Any]:
    numbers = {
        "iou": 0.7123,
        "dice": 0.81,
        "nsd": 0.6,
        "drop": 0.0042,
        "agreement": 0.97,
        "agreement_median": 0.98,
    }
    times = {"embed_ms": 30.2, "predict_ms": 8.1}
    baselines = {"baseline_box": 0.71, "baseline_ellipse": 0.79, "baseline_otsu": 0.7}
    head = {**names, "prompt": prompt, "modality": modality, "n": 12}
    return {**head, **numbers, "drop_ci": [0.001, 0.009], **times, **baselines}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Of two models and two kinds of prompt."""
    gallery = Gallery()
    clicks = Prompts(np.array([[60.5, 40.5], [70.5, 40.5]]), np.array([1, 0]))
    rows = []
    for names in (FULL, QUANTIZED):
        for prompt in ("box", "points5"):
            rows += [row(names, prompt, modality) for modality in ("all", "CT")]
            for number in range(1, 13):
                mask = disc(80, 120, 40, 60, 8 + number)
                gallery.add(
                    scored(number, names, prompt, mask=mask, prompts=clicks if prompt != "box" else None)
                )
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, rows, gallery, {"machine": "two <cores>"})
    assert list(path.parent.iterdir()) == [path]
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def test_the_page_needs_nothing_but_itself(page: Reader) -> None:
    references = [
        (name, value) for _, name, value in page.attributes if name in ("href", "src", "srcset", "data")
    ]
    assert references
    for name, value in references:
        assert value.startswith(("#", "data:image/jpeg;base64,")), name
    ids = {value for _, name, value in page.attributes if name == "id"}
    assert {value[1:] for _, value in references if value.startswith("#")} <= ids
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    tags = {tag for tag, _, _ in page.attributes}
    assert not tags & {"script", "link", "iframe", "object", "base"}
    assert "url(" not in page.text
    assert "@import" not in page.text


def test_its_pictures_decode(page: Reader) -> None:
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("image", "href")]
    # Full precision agrees with itself: 8 worst and 4 best; the quantized model 4 more; for two prompts.
    assert len(pictures) == 2 * (12 + 16)
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1], validate=True))) as image:
            image.load()
            assert image.format == "JPEG"


def test_it_says_the_figures_and_escapes_names(page: Reader) -> None:
    for text in (
        "0.712",
        "[+0.001, +0.009]",
        "tiny <W4A4>, onednn, deploy",
        "two <cores>",
        "ellipse in it 0.790",
        "CT 12",
    ):
        assert text in page.text
    # Captions: the quantized model's pictures alone say how much it agrees.
    assert len(re.findall(r"agreement \d\.\d{3}", page.text)) == 2 * 16
