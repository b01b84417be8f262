"""The report: self-contained, complete, and truthful about what it shows."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from monailabel_dfqsam.artifact import layer_forms
from monailabel_dfqsam.config import Calibration, Policy, QuantizationConfig, SynthesisConfig
from monailabel_dfqsam.numbers import in_bytes, in_seconds, in_thousands
from monailabel_dfqsam.pipeline import QuantizationResult, quantize
from monailabel_dfqsam.quantization.cost import layer_costs
from monailabel_dfqsam.report import REAL_IMAGES, write_report
from monailabel_dfqsam.report.charts import range_strip
from monailabel_dfqsam.report.pictures import MAX_STEPS, STRIP_SIDE, TINT, drawn_over, label_colours
from monailabel_dfqsam.sam import VARIANTS, Checkpoint, Sam, read_checkpoint
from monailabel_dfqsam.sam.preprocess import PIXEL_MEAN, PIXEL_STD

ITERATIONS = 4
IMAGES = 2
ONE_GREY_LEVEL = 1


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """A tiny model with random weights: what the report says does not depend on how good it is."""
    torch.manual_seed(3)
    sam = Sam(VARIANTS["tiny"])
    return Checkpoint(sam.variant, dict(sam.state_dict()), "ab" * 32, Path("random.safetensors"))


@pytest.fixture(scope="module")
def result(checkpoint: Checkpoint) -> QuantizationResult:
    config = QuantizationConfig(images=IMAGES, synthesis=SynthesisConfig(iterations=ITERATIONS))
    return quantize(checkpoint, config)


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def images(self, alt: str) -> list[np.ndarray]:
        """[H, W, 3] uint8 of each picture whose alternative text begins so."""
        found = [a["src"] for tag, a in self.tags if tag == "img" and (a["alt"] or "").startswith(alt)]
        return [
            np.array(Image.open(io.BytesIO(base64.b64decode(str(src).split(",", 1)[1]))).convert("RGB"))
            for src in found
        ]


@pytest.fixture(scope="module")
def page(
    result: QuantizationResult, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Page:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(result, checkpoint, path)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return Page(path)


def with_header(result: QuantizationResult, **changes: object) -> QuantizationResult:
    artifact = dataclasses.replace(result.artifact, header={**result.artifact.header, **changes})
    return dataclasses.replace(result, artifact=artifact)


def test_nothing_is_loaded_from_anywhere(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            assert (attributes.get(name) or "data:image/png;base64,").startswith("data:image/png;base64,")
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy[0]).startswith("default-src 'none'")


def test_the_page_is_closed_properly(page: Page) -> None:
    assert page.open == []


def test_the_headline_says_what_the_header_says(page: Page, result: QuantizationResult) -> None:
    header = result.artifact.header
    sizes = header["sizes"]
    for expected in (
        "tiny in W4A4, policy deploy",
        f"{header['fidelity']['mean_iou']:.3f}",
        f"{header['fidelity']['n']} masks",
        f"median {header['fidelity']['median_iou']:.3f}",
        f"{header['fidelity']['grey_level']['mean_iou']:.3f}",
        f"median {header['fidelity']['grey_level']['median_iou']:.3f}",
        in_bytes(sizes["checkpoint_bytes"]),
        f"{sizes['checkpoint_bytes'] / sizes['artifact_bytes']:.1f}× smaller",
        f"{header['bops_float'] / header['bops']:.0f}× less work",
        in_thousands(header["macs"]),
        header["key"],
        header["source_sha256"],
        *header["images_sha256"],
        *header["versions"].values(),
    ):
        assert str(expected) in page.text


def test_a_picture_shows_what_the_model_was_given(page: Page, result: QuantizationResult) -> None:
    shown = page.images("synthetic image")
    assert len(shown) == IMAGES
    for picture, image in zip(shown, result.calibration_images, strict=True):
        expected = np.empty((256, 256, 3))
        for channel in range(3):
            expected[:, :, channel] = image[channel].numpy() * PIXEL_STD[channel] + PIXEL_MEAN[channel]
        assert np.abs(picture - expected.clip(0, 255)).max() <= ONE_GREY_LEVEL


def test_labels_are_outlined_in_their_colour_and_leave_the_rest_of_the_image_as_it_is() -> None:
    labels = torch.zeros(64, 64, dtype=torch.int64)
    labels[10:30, 20:50] = 2
    image = torch.full((3, 128, 128), 100, dtype=torch.uint8)
    drawn = drawn_over(image, labels)
    assert drawn.shape == (STRIP_SIDE, STRIP_SIDE, 3)
    colour = label_colours(2)[2].astype(float)
    inside = np.zeros((STRIP_SIDE, STRIP_SIDE), dtype=bool)
    inside[40:120, 80:200] = True
    assert (drawn[~inside] == 100).all()
    assert (drawn[40:42, 80:200] == colour).all()
    assert (drawn[40:120, 198:200] == colour).all()
    tinted = (1 - TINT) * 100 + TINT * colour
    assert np.abs(drawn[44:116, 84:196] - tinted).max() <= ONE_GREY_LEVEL


def test_the_strip_shows_every_step_of_the_evolution(page: Page, result: QuantizationResult) -> None:
    assert result.synthesis is not None
    strips = page.images("labels at iteration")
    assert all(len(steps) <= MAX_STEPS for steps in result.synthesis.evolution)
    steps = [step for steps in result.synthesis.evolution for step in steps]
    assert len(strips) == len(steps) > IMAGES
    for picture, step in zip(strips, steps, strict=True):
        assert np.array_equal(picture, drawn_over(step.image, step.labels))
        assert f"{float((step.labels > 0).float().mean()):.0%}" in page.text


def test_ranges_are_drawn_to_one_scale_with_zero_on_it() -> None:
    strip = range_strip("a layer", [(-1.0, 3.0), (1.0, 2.0)], [0, 2])
    one, other = strip.bars
    assert (one.x, one.width, one.colour) == (0, 320, 0)
    assert (other.x, other.width, other.colour) == (160, 80, 2)
    assert strip.zero == 80
    assert (strip.low, strip.high) == ("-1", "3")
    positive = range_strip("a layer", [(2.0, 4.0)], [0])
    assert (positive.zero, positive.bars[0].x) == (0, 160)


def test_every_layer_shows_the_ranges_of_every_kind_of_image(page: Page, result: QuantizationResult) -> None:
    bars = [a for tag, a in page.tags if tag == "rect"]
    layers = result.measures["synthetic"].ranges
    assert len(bars) == 2 * len(layers) > 0
    assert [
        a["aria-label"] for tag, a in page.tags if tag == "svg" and "ranges of" in str(a["aria-label"])
    ] == [f"ranges of {name}" for name in layers]
    for measures in result.measures.values():
        low, high = measures.ranges["blocks.2.mlp.lin2"]
        assert f"{low:.3g} … {high:.3g}" in page.text


def test_every_layer_has_a_bar_in_proportion(page: Page, result: QuantizationResult) -> None:
    found = [a for tag, a in page.tags if tag == "div" and str(a.get("class")).startswith("bar")]
    errors = list(result.layer_errors.values())
    sizes, bars = found[::2], found[1::2]
    assert len(sizes) == len(bars) == len(errors) > 0
    header = result.artifact.header
    costs = layer_costs(VARIANTS[header["variant"]], layer_forms(header))
    widths = [float(str(bar["style"]).removeprefix("width:").removesuffix("%")) for bar in sizes]
    largest = max(cost.bytes for cost in costs.values())
    assert widths == pytest.approx(
        [100 * costs[name].bytes / largest for name in result.layer_errors], abs=0.1
    )
    assert {str(cost.form) for cost in costs.values()} == {"W4A4", "W8A8"}
    assert "W4A4" in page.text
    assert "W8A8" in page.text
    widths = [float(str(bar["style"]).removeprefix("width:").removesuffix("%")) for bar in bars]
    assert widths == pytest.approx([100 * error / max(errors) for error in errors], abs=0.1)
    marked = [i for i, bar in enumerate(bars) if "high" in str(bar["class"])]
    assert set(marked) == set(np.argsort(errors)[-3:].tolist())
    for name, error in result.layer_errors.items():
        assert name in page.text
        assert f"{100 * error:.2f} %" in page.text


def test_the_loss_curves_are_the_losses(page: Page, result: QuantizationResult) -> None:
    """The total's curve, read back from its polyline, is a linear map of the mean over images."""
    assert result.synthesis is not None
    titles = [a["aria-label"] for tag, a in page.tags if tag == "svg"]
    lines = [str(a["points"]) for tag, a in page.tags if tag == "polyline"]
    points = np.array([p.split(",") for p in lines[titles.index("Total")].split()], dtype=float)
    mean = np.mean([curves["total"] for curves in result.synthesis.losses], axis=0)
    assert len(points) == ITERATIONS
    assert np.corrcoef(points[:, 1], -mean)[0, 1] == pytest.approx(1, abs=1e-3)
    assert np.allclose(np.diff(points[:, 0]), points[1, 0] - points[0, 0], atol=0.2)


def test_text_from_files_cannot_become_markup(
    result: QuantizationResult, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    write_report(with_header(result, source_name="<script>alert(1)</script>"), checkpoint, path)
    page = Page(path)
    assert "script" not in [tag for tag, _ in page.tags]
    assert "<script>alert(1)</script>" in page.text


def test_images_from_a_folder_are_neither_shown_nor_named(
    result: QuantizationResult, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config = {
        **result.artifact.header["config"],
        "calibration": Calibration.FOLDER.value,
        "folder": "/studies/Doe^Jane",
    }
    path = tmp_path / "report.html"
    write_report(dataclasses.replace(with_header(result, config=config), synthesis=None), checkpoint, path)
    page = Page(path)
    assert "img" not in [tag for tag, _ in page.tags]
    assert "Doe" not in path.read_text(encoding="utf-8")
    assert "are not shown here" in page.text


def test_gaussian_noise_under_the_paper_policy(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = QuantizationConfig(
        policy=Policy.PAPER,
        calibration=Calibration.GAUSSIAN,
        synthesis=SynthesisConfig(iterations=ITERATIONS),
    )
    path = tmp_path / "report.html"
    write_report(quantize(checkpoint, config), checkpoint, path)
    page = Page(path)
    assert "tiny in W4A4, policy paper" in page.text
    assert len(page.images("noise image")) == 1
    assert page.images("labels at iteration") == []
    assert "How the pseudo-labels evolved" not in page.text


def test_an_old_report_is_replaced_whole(
    result: QuantizationResult, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    broken = with_header(result, sizes={})
    with pytest.raises(KeyError):
        write_report(broken, checkpoint, path)
    assert path.read_text() == "old"
    write_report(result, checkpoint, path)
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (in_bytes(999), "999 B"),
        (in_bytes(2_460_000), "2.5 MB"),
        (in_bytes(357_700_000), "358 MB"),
        (in_bytes(2_560_000_000), "2.56 GB"),
        (in_seconds(8.21), "8.2 s"),
        (in_seconds(200.4), "3 min 20 s"),
        (in_thousands(0), "0"),
        (in_thousands(19_866e9), "19.9 T"),
        (in_thousands(346e9), "346 G"),
    ],
)
def test_numbers_for_people(text: str, expected: str) -> None:
    assert text == expected


def test_synthetic_images_lie_nearer_to_real_ones_than_noise_does(tmp_path: Path) -> None:
    embedded = read_checkpoint("tiny")
    config = QuantizationConfig(synthesis=SynthesisConfig(iterations=60))
    made = quantize(embedded, config)
    reference = json.loads(REAL_IMAGES.read_text())
    assert reference["weights_sha256"] == embedded.sha256, "measure the real images again for these weights"
    real = reference["entropies"]
    distance = {
        kind: np.abs(np.subtract(found.entropies, real)).mean() for kind, found in made.measures.items()
    }
    assert distance["synthetic"] < distance["gaussian"]
    assert list(reference["ranges"]) == list(made.measures["synthetic"].ranges)
    write_report(made, embedded, tmp_path / "report.html")
    text = Page(tmp_path / "report.html").text
    assert f"{reference['images']} real images" in text
    assert f"{distance['synthetic']:.2f}" in text
    assert f"{reference['response']:.2f}" in text
