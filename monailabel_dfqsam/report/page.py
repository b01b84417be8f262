"""What the report's template shows, as texts and numbers.

Calibration images read from a folder are never drawn, since they may show a patient and the page is meant to
be passed on.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from monailabel_dfqsam.artifact import Header, label, layer_forms
from monailabel_dfqsam.config import Calibration, Policy
from monailabel_dfqsam.files import replacing
from monailabel_dfqsam.numbers import in_bytes, in_seconds, in_thousands
from monailabel_dfqsam.ops import Form
from monailabel_dfqsam.quantization.cost import KEPT, LayerCost, layer_costs
from monailabel_dfqsam.report.charts import Chart, line_chart, range_strip
from monailabel_dfqsam.report.pictures import calibration_pictures, class_key, class_names, evolution_strips
from monailabel_dfqsam.sam.checkpoint import NAMED
from monailabel_dfqsam.sam.variants import Variant
from monailabel_dfqsam.synthesis.measures import Measures, mean_overlap, overlap

if TYPE_CHECKING:
    from monailabel_dfqsam.pipeline import QuantizationResult
    from monailabel_dfqsam.sam.checkpoint import Checkpoint
    from monailabel_dfqsam.synthesis.synthesize import Synthesis

# What the embedded weights make of real medical images, measured once; for comparison alone, nothing is
# fitted to it.
REAL_IMAGES = NAMED["tiny"].with_name("dfqsam-tiny-real-images.json")
MARKED_LAYERS = 3
# The same kind of image has the same colour wherever it appears.
_COLOURS = {"synthetic": 0, "gaussian": 1, "real": 2, "folder": 3, "drawn": 3}
_KIND_NAMES = {
    "synthetic": "synthetic", "drawn": "drawn", "gaussian": "Gaussian noise", "folder": "from the folder",
}  # fmt: skip
_FORM_COLOURS = {(4, 4): 2, (4, 8): 0, (8, 8): 3, (16, 16): 1}

LOSS_NAMES = {
    "total": "Total",
    "mask": "Mask loss: 1 − soft IoU",
    "class": "Class loss of the auxiliary model",
    "similarity": "Minus the patch-similarity entropy",
    "variation": "Total variation",
}

POLICY_WORDS = {
    Policy.DEPLOY: "deploy: each layer in the form that the table of layers shows, attention products in "
    "floating point. Ranges found at run time run on the CPU engines, fixed ones on every engine.",
    Policy.PAPER: "paper: everything in the encoder at the bits named above, attention products and softmax "
    "too. For comparison with published figures; the reference engine alone runs it.",
}


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
    with replacing(path) as partial:
        partial.write_text(html, encoding="utf-8")


def _context(result: QuantizationResult, checkpoint: Checkpoint) -> dict[str, Any]:
    header = result.artifact.header
    config = header["config"]
    calibration = Calibration(config["calibration"])
    synthesis, drawn = result.synthesis, len(result.calibration_images) - result.sources
    classes = class_names(checkpoint.variant)
    return {
        **_headline(header),
        "model": checkpoint.variant.name,
        "precision": label(header),
        "policy": Policy(config["policy"]).value,
        "policy_words": POLICY_WORDS[Policy(config["policy"])],
        **_calibration_words(calibration, len(result.calibration_images) - drawn, drawn),
        "images": calibration_pictures(result.calibration_images, drawn, checkpoint.variant, calibration),
        "evolution": evolution_strips(synthesis, classes) if synthesis else [],
        "class_key": class_key(synthesis, classes) if synthesis else [],
        "losses": _loss_charts(synthesis) if synthesis else [],
        **_seen(result.measures, checkpoint.sha256),
        "four_bit": f"{100 * header.get('four_bit', 0.0):.0f} %",
        "forms": _form_rows(header, checkpoint.variant),
        "layers": _layer_rows(result.layer_errors, layer_costs(checkpoint.variant, layer_forms(header))),
        "provenance": _provenance(header, config),
    }


# Numbers and words


def _headline(header: Mapping[str, Any]) -> dict[str, str]:
    sizes, fidelity = header["sizes"], header["fidelity"]
    return {
        "source_name": header["source_name"],
        "created": header["created"],
        "key": header["key"],
        "seed": str(header["seed"]),
        "fidelity": f"{fidelity['mean_iou']:.3f}",
        "fidelity_median": f"{fidelity['median_iou']:.3f}",
        "fidelity_n": str(fidelity["n"]),
        "grey_level": f"{fidelity['grey_level']['mean_iou']:.3f}",
        "grey_level_median": f"{fidelity['grey_level']['median_iou']:.3f}",
        "size_before": in_bytes(sizes["checkpoint_bytes"]),
        "size_after": in_bytes(sizes["artifact_bytes"]),
        "size_ratio": f"{sizes['checkpoint_bytes'] / sizes['artifact_bytes']:.1f}×",
        "macs": in_thousands(header["macs"]),
        "bops": in_thousands(header["bops"]),
        "bops_float": in_thousands(header["bops_float"]),
        "bops_ratio": f"{header['bops_float'] / header['bops']:.0f}×",
        "seconds": in_seconds(header["seconds"]),
    }


def _calibration_words(calibration: Calibration, count: int, drawn: int) -> dict[str, str]:
    images = "one image" if count == 1 else f"{count} images"
    beside = f", and on {drawn} drawn pictures" if drawn else ""
    if calibration is Calibration.SYNTHETIC:
        return {
            "story": "No data was used. The low-bit arithmetic was fitted on "
            f"{images} synthesized out of the model's own weights{beside}.",
            "images_title": "Synthetic images",
            "images_words": "Made from noise by gradient steps until the model finds distinct objects in "
            "them. They show no patient, since no image was ever read.",
        }
    if calibration is Calibration.GAUSSIAN:
        return {
            "story": f"No data was used. The low-bit arithmetic was fitted on {images} of plain "
            f"noise, the baseline that synthesis has to be better than{beside}.",
            "images_title": "Calibration images: plain noise",
            "images_words": "Gaussian noise in the model's input range.",
        }
    if calibration is Calibration.NONE:
        return {
            "story": f"No data was used. The low-bit arithmetic was fitted on {drawn} drawn pictures."
            if drawn
            else "No data was used, and no image: each weight was rounded to the nearest.",
            "images_title": "Drawn pictures",
            "images_words": "Phantoms, scattered shapes and clouds, drawn at random. They show no patient.",
        }
    return {
        "story": f"The low-bit arithmetic was fitted on {images} from a folder{beside}.",
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


def _form_rows(header: Header, variant: Variant) -> list[tuple[str, int, str]]:
    """Each form that layers have, its colour, and its share of their multiplications, the largest first."""
    macs: Counter[str] = Counter()
    colours: dict[str, int] = {}
    for cost in layer_costs(variant, layer_forms(header)).values():
        words = _form_words(cost.form)
        macs[words] += cost.macs
        colours[words] = _form_colour(cost.form)
    total = sum(macs.values())
    return [(form, colours[form], f"{100 * count / total:.0f} %") for form, count in macs.most_common()]


def _form_words(form: Form) -> str:
    return "16-bit floats" if form == KEPT else str(form)


def _form_colour(form: Form) -> int:
    return _FORM_COLOURS.get((form.weight_bits, form.activation_bits), 0)


def _layer_rows(errors: Mapping[str, float], costs: Mapping[str, LayerCost]) -> list[dict[str, Any]]:
    finite = [value for value in errors.values() if math.isfinite(value)]
    largest = max(finite, default=0.0) or 1.0
    most = max(cost.bytes for cost in costs.values())
    marked = sorted(errors, key=lambda name: errors[name], reverse=True)[:MARKED_LAYERS]
    return [
        {
            "name": name,
            "form": _form_words(costs[name].form),
            "colour": _form_colour(costs[name].form),
            "bytes": in_bytes(costs[name].bytes),
            "bytes_width": round(100 * costs[name].bytes / most, 1),
            "text": f"{100 * value:.2f} %",
            "width": round(100 * min(value / largest, 1.0), 1) if math.isfinite(value) else 100,
            "high": name in marked,
        }
        for name, value in errors.items()
    ]


# Charts


def _loss_charts(synthesis: Synthesis) -> list[Chart]:
    names = dict.fromkeys(name for curves in synthesis.losses for name in curves)
    charts = []
    for name in names:
        curves = [curves[name] for curves in synthesis.losses if len(curves.get(name, ())) > 1]
        if any(any(curve) for curve in curves):  # a term that is not used is 0 throughout
            length = min(len(curve) for curve in curves)
            mean = np.mean([curve[:length] for curve in curves], axis=0).tolist()
            charts.append(line_chart(LOSS_NAMES.get(name, name), {name: mean}, [0], dots=False))
    return charts


def _seen(measures: Mapping[str, Measures], weights_sha256: str) -> dict[str, Any]:
    """What the model makes of each kind of image, beside real ones for weights measured on some."""
    kinds = {kind: (_KIND_NAMES[kind], found) for kind, found in measures.items()}
    reference = json.loads(REAL_IMAGES.read_text(encoding="utf-8"))
    real = None
    if reference["weights_sha256"] == weights_sha256:
        real = real_measures(reference)
        kinds["real"] = (f"{reference['images']} real images", real)
    colours = [_COLOURS[kind] for kind in kinds]
    title = "mean patch-similarity entropy by encoder block (0 is the first)"
    entropy = line_chart(title, {name: m.entropies for name, m in kinds.values()}, colours, dots=True)
    return {
        "entropy": entropy,
        "seen_rows": [_seen_row(name, found, real) for name, found in kinds.values()],
        "with_real": real is not None,
        "range_key": [(name, _COLOURS[kind]) for kind, (name, _) in kinds.items()],
        "ranges": [
            {
                "strip": range_strip(layer, [m.ranges[layer] for _, m in kinds.values()], colours),
                "overlaps": [f"{overlap(m.ranges[layer], real.ranges[layer]):.2f}" for m in measures.values()]
                if real
                else [],
            }
            for layer in next(iter(measures.values())).ranges
        ],
        "overlap_names": [_KIND_NAMES[kind] for kind in measures] if real else [],
    }


def real_measures(reference: Mapping[str, Any]) -> Measures:
    """The measures that `REAL_IMAGES` holds, of its JSON object."""
    ranges = {name: (low, high) for name, (low, high) in reference["ranges"].items()}
    return Measures(reference["entropies"], ranges, reference["response"])


def _seen_row(name: str, found: Measures, real: Measures | None) -> dict[str, str]:
    row = {
        "name": name,
        "entropy": f"{np.mean(found.entropies):.2f}",
        "response": f"{found.response:.2f}" if math.isfinite(found.response) else "–",
    }
    if real is not None:
        distance = np.abs(np.subtract(found.entropies, real.entropies)).mean()
        row["distance"] = f"{distance:.2f}"
        row["overlap"] = f"{mean_overlap(found.ranges, real.ranges):.2f}"
    return row
