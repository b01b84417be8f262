"""The quantization report: one HTML page that needs nothing but itself, beside each artifact.

`report.html.j2` holds the words and the looks; this module turns a result into what the template shows:
texts, PNG data URIs, and chart coordinates. Calibration images read from a folder are never drawn, since they
may show a patient and the page is meant to be passed on.
"""

from __future__ import annotations

import base64
import colorsys
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from monailabel_dfqsam.config import Calibration, Policy
from monailabel_dfqsam.numbers import in_bytes, in_seconds, in_thousands
from monailabel_dfqsam.sam.checkpoint import EMBEDDED
from monailabel_dfqsam.sam.preprocess import input_range

if TYPE_CHECKING:
    from monailabel_dfqsam.pipeline import QuantizationResult
    from monailabel_dfqsam.sam.checkpoint import Checkpoint
    from monailabel_dfqsam.sam.variants import Variant
    from monailabel_dfqsam.synthesis.label_evolution import EvolutionStep
    from monailabel_dfqsam.synthesis.synthesize import Synthesis

# Patch-similarity entropies of real medical images under the embedded weights, measured once; for comparison
# alone, nothing is fitted to them.
REAL_IMAGES = EMBEDDED.with_name("dfqsam-tiny-real-images.json")
MAX_IMAGES = 8
MAX_STRIPS = 4
MAX_STEPS = 8
MAX_CURVE_POINTS = 200
PICTURE_SIDE = 448  # pixels, twice what the page shows, for dense screens
STRIP_SIDE = 128
MARKED_LAYERS = 3

LOSS_NAMES = {
    "total": "Total",
    "mask": "Mask loss: 1 − soft IoU",
    "class": "Class loss of the auxiliary model",
    "similarity": "Minus the patch-similarity entropy",
    "variation": "Total variation",
}

POLICY_WORDS = {
    Policy.DEPLOY: "deploy: linear layers at the bits named above, patch embedding and neck at 8 bit, "
    "attention products in floating point. Every engine runs it.",
    Policy.PAPER: "paper: everything in the encoder at the bits named above, attention products and softmax "
    "too. For comparison with published figures; the reference engine alone runs it.",
}


@dataclass(frozen=True)
class Series:
    """One polyline: `points` in SVG's own notation, `dots` the same as (x, y) pairs or empty."""

    name: str
    colour: int
    points: str
    dots: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in SVG units."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A small line chart in SVG units, y downwards."""

    title: str
    series: Sequence[Series]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    legend: bool
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


def write_report(result: QuantizationResult, checkpoint: Checkpoint, path: Path) -> None:
    """Writes the report of one quantization, whole or not at all.

    Args:
        result: as `quantize` returns it.
        checkpoint: what was quantized.
        path: the HTML file, replaced where it exists; its folder must exist.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    html = environment.get_template("report.html.j2").render(_context(result, checkpoint))
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, path)


def _context(result: QuantizationResult, checkpoint: Checkpoint) -> dict[str, Any]:
    header = result.artifact.header
    config = header["config"]
    calibration = Calibration(config["calibration"])
    synthesis = result.synthesis
    return {
        **_headline(header),
        "model": checkpoint.variant.name,
        "precision": f"W{config['bits']}A{config['bits']}",
        "policy": Policy(config["policy"]).value,
        "policy_words": POLICY_WORDS[Policy(config["policy"])],
        **_calibration_words(calibration, len(result.calibration_images)),
        "images": _pictures(result.calibration_images, checkpoint.variant, calibration),
        "evolution": _strips(synthesis) if synthesis else [],
        "losses": _loss_charts(synthesis) if synthesis else [],
        **_entropies(result.entropies, checkpoint.sha256),
        "layers": _layer_rows(result.layer_errors),
        "provenance": _provenance(header, config),
    }


# Numbers and words


def _headline(header: Mapping[str, Any]) -> dict[str, str]:
    sizes = header["sizes"]
    return {
        "source_name": header["source_name"],
        "created": header["created"],
        "key": header["key"],
        "seed": str(header["seed"]),
        "fidelity": f"{header['fidelity']['mean_iou']:.3f}",
        "fidelity_n": str(header["fidelity"]["n"]),
        "size_before": in_bytes(sizes["checkpoint_bytes"]),
        "size_after": in_bytes(sizes["artifact_bytes"]),
        "size_ratio": f"{sizes['checkpoint_bytes'] / sizes['artifact_bytes']:.1f}×",
        "macs": in_thousands(header["macs"]),
        "bops": in_thousands(header["bops"]),
        "bops_float": in_thousands(header["bops_float"]),
        "bops_ratio": f"{header['bops_float'] / header['bops']:.0f}×",
        "seconds": in_seconds(header["seconds"]),
    }


def _calibration_words(calibration: Calibration, count: int) -> dict[str, str]:
    images = "one image" if count == 1 else f"{count} images"
    if calibration is Calibration.SYNTHETIC:
        return {
            "story": "No data was used. The ranges of the low-bit arithmetic were set on "
            f"{images} synthesized out of the model's own weights.",
            "images_title": "Synthetic images",
            "images_words": "Made from noise by gradient steps until the model finds distinct objects in "
            "them. They show no patient, since no image was ever read.",
        }
    if calibration is Calibration.GAUSSIAN:
        return {
            "story": f"No data was used. The ranges of the low-bit arithmetic were set on {images} of plain "
            "noise, the baseline that synthesis has to be better than.",
            "images_title": "Calibration images: plain noise",
            "images_words": "Gaussian noise in the model's input range.",
        }
    return {
        "story": f"The ranges of the low-bit arithmetic were set on {images} from a folder.",
        "images_title": "Calibration images",
        "images_words": "They came from a folder and are not shown here, because they may show a patient and "
        "this page may be passed on.",
    }


def _provenance(header: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("artifact key", header["key"]),
        ("format version", header["format_version"]),
        ("checkpoint sha256", header["source_sha256"]),
        ("created", header["created"]),
    ]
    for name, value in config.items():
        if isinstance(value, Mapping):
            rows += [(f"{name}: {inner}", setting) for inner, setting in value.items()]
        elif name != "folder":  # a path may name a patient
            rows.append((name, value.value if isinstance(value, (Policy, Calibration)) else value))
    rows += [(f"version of {name}", version) for name, version in header["versions"].items()]
    rows += [(f"sha256 of image {i}", digest) for i, digest in enumerate(header["images_sha256"], start=1)]
    return [(name.replace("_", " "), str(value)) for name, value in rows]


def _layer_rows(errors: Mapping[str, float]) -> list[dict[str, Any]]:
    finite = [value for value in errors.values() if math.isfinite(value)]
    largest = max(finite, default=0.0) or 1.0
    marked = sorted(errors, key=lambda name: errors[name], reverse=True)[:MARKED_LAYERS]
    return [
        {
            "name": name,
            "text": f"{100 * value:.2f} %",
            "width": round(100 * min(value / largest, 1.0), 1) if math.isfinite(value) else 100,
            "high": name in marked,
        }
        for name, value in errors.items()
    ]


# Pictures


def _png(pixels: NDArray[np.uint8]) -> str:
    """[H, W, 3] uint8 as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _to_rgb(images: Tensor, variant: Variant) -> NDArray[np.uint8]:
    """Model inputs [N, 3, S, S] as [N, H, W, 3] uint8, at most `PICTURE_SIDE` pixels a side."""
    low, high = (limit.view(3, 1, 1) for limit in input_range(variant))
    unit = ((images.detach().cpu().float() - low) / (high - low)).clamp(0, 1)
    if unit.shape[-1] > PICTURE_SIDE:
        unit = F.interpolate(unit, size=(PICTURE_SIDE, PICTURE_SIDE), mode="area")
    pixels: NDArray[np.uint8] = (unit * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return pixels


def _pictures(images: Tensor, variant: Variant, calibration: Calibration) -> list[dict[str, str]]:
    if calibration is Calibration.FOLDER:
        return []
    shown = _to_rgb(images[:MAX_IMAGES], variant)
    total = len(images)
    kind = "synthetic image" if calibration is Calibration.SYNTHETIC else "noise image"
    return [
        {"src": _png(pixels), "caption": f"{kind} {index} of {total}"}
        for index, pixels in enumerate(shown, start=1)
    ]


def _label_colours(count: int) -> NDArray[np.uint8]:
    """[count + 1, 3] uint8: black for no label, then well separated hues."""
    golden = 0.618034
    hues = [(0.52 + golden * index) % 1.0 for index in range(count)]
    colours = [(0.0, 0.0, 0.0), *(colorsys.hsv_to_rgb(hue, 0.6, 0.95) for hue in hues)]
    return (np.array(colours) * 255).astype(np.uint8)


def _strips(synthesis: Synthesis) -> list[dict[str, Any]]:
    strips = []
    total = len(synthesis.evolution)
    for index, steps in enumerate(synthesis.evolution[:MAX_STRIPS], start=1):
        if steps:
            chosen = [steps[i] for i in _spread(len(steps), MAX_STEPS)]
            strips.append(
                {"title": f"Image {index} of {total}", "steps": [_strip_step(step) for step in chosen]}
            )
    return strips


def _strip_step(step: EvolutionStep) -> dict[str, str]:
    labels = step.labels.detach().cpu()
    small = F.interpolate(labels[None, None].float(), size=(STRIP_SIDE, STRIP_SIDE), mode="nearest")
    index = small[0, 0].long().numpy()
    return {
        "src": _png(_label_colours(int(labels.max()))[index]),
        "iteration": str(step.iteration),
        "score": f"{step.score:.2f}",
    }


def _spread(count: int, most: int) -> list[int]:
    """At most `most` different indices below `count`, evenly spread, first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


# Charts


def _loss_charts(synthesis: Synthesis) -> list[Chart]:
    names = dict.fromkeys(name for curves in synthesis.losses for name in curves)
    charts = []
    for name in names:
        curves = [curves[name] for curves in synthesis.losses if len(curves.get(name, ())) > 1]
        if any(any(curve) for curve in curves):  # a term that is not used is 0 throughout
            length = min(len(curve) for curve in curves)
            mean = np.mean([curve[:length] for curve in curves], axis=0).tolist()
            charts.append(_line_chart(LOSS_NAMES.get(name, name), {name: mean}, dots=False))
    return charts


def _entropies(measured: Mapping[str, Sequence[float]], weights_sha256: str) -> dict[str, Any]:
    """The chart of entropies, and, for weights measured on real images, how far each kind lies from those."""
    if not measured:
        return {"entropy": None, "entropy_rows": []}
    curves = dict(measured)
    reference = json.loads(REAL_IMAGES.read_text(encoding="utf-8"))
    rows: list[tuple[str, str, str]] = []
    if reference["weights_sha256"] == weights_sha256:
        real = reference["mean"]
        for name, curve in curves.items():
            distance = float(np.abs(np.subtract(curve, real)).mean())
            rows.append((name, f"{np.mean(curve):.2f}", f"{distance:.2f}"))
        name = f"{reference['images']} real images"
        rows.append((name, f"{np.mean(real):.2f}", "0"))
        curves[name] = real
    title = "mean patch-similarity entropy by encoder block (0 is the first)"
    return {"entropy": _line_chart(title, curves, dots=True), "entropy_rows": rows}


def _line_chart(title: str, curves: Mapping[str, Sequence[float]], *, dots: bool) -> Chart:
    """Curves over 0, 1, 2 …; values that are not finite are left out."""
    width, height = (640, 240) if dots else (340, 180)
    left, right, top, bottom = 52, width - 12, 12, height - 24
    values = [v for curve in curves.values() for v in curve if math.isfinite(v)] or [0.0]
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    last = max(max(len(curve) for curve in curves.values()) - 1, 1)

    def place(index: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * index / last
        return round(x, 1), round(bottom - (bottom - top) * (value - low) / (high - low), 1)

    series = []
    for colour, (name, curve) in enumerate(curves.items()):
        places = [
            place(i, curve[i]) for i in _spread(len(curve), MAX_CURVE_POINTS) if math.isfinite(curve[i])
        ]
        points = " ".join(f"{x},{y}" for x, y in places)
        series.append(Series(name.replace("_", " "), colour % 4, points, places if dots else ()))
    return Chart(
        title,
        series,
        x_ticks=[Tick(place(i, low)[0], str(i)) for i in _x_ticks(last, dots)],
        y_ticks=[Tick(place(0, value)[1], f"{value:.3g}") for value in (low, (low + high) / 2, high)],
        legend=len(curves) > 1,
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
    )


def _x_ticks(last: int, each: bool) -> Iterable[int]:
    if each and last <= 12:
        return range(last + 1)
    return sorted({0, last // 2, last})
