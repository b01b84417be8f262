"""Segmenters against ground truth: what quantization costs, beside baselines that need no model.

A tight box says most of the answer by itself, hence the baselines; and the IoU with the truth hardly sees
damage that the agreement with the full-precision mask shows, hence both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from monailabel_dfqsam.config import Progress, silent
from monailabel_dfqsam.phantom_study import click_for, find_pairs, interior_pixel
from monailabel_dfqsam.segmentation.prompts import tight_box
from monailabel_dfqsam.segmentation.segmenter import Prompts, Segmenter
from monailabel_dfqsam.segmentation.volume import load_volume, slice_rgb

Mask = NDArray[np.bool_]

NSD_TOLERANCE = 2.0
"""Pixels between two outlines that still count as the same."""

_RESAMPLES = 2000
_CONFIDENCE = (2.5, 97.5)


class EvaluationError(ValueError):
    """Data or prompts that cannot be evaluated; the message says why."""


@dataclass(frozen=True, eq=False)
class Item:
    """One object in one image: rgb [H, W, 3] uint8, mask [H, W] bool not empty, modality as for people."""

    rgb: NDArray[np.uint8]
    mask: Mask
    modality: str


def iou(a: Mask, b: Mask) -> float:
    """|A ∩ B| / |A ∪ B| of two masks of one shape; 1 when both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def dice(a: Mask, b: Mask) -> float:
    """2·|A ∩ B| / (|A| + |B|) of two masks of one shape; 1 when both are empty."""
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


def surface_dice(predicted: Mask, truth: Mask) -> float:
    """Normalised surface Dice of masks [H, W]: the part of both outlines within `NSD_TOLERANCE` of the other.

    An outline is a mask's pixels beside one outside it. 0 for an empty prediction.
    """
    if not predicted.any():
        return 0.0
    outlines = [mask & ~ndimage.binary_erosion(mask) for mask in (predicted, truth)]
    away = [ndimage.distance_transform_edt(~outline) for outline in outlines]
    close = [int((away[1 - side][outlines[side]] <= NSD_TOLERANCE).sum()) for side in (0, 1)]
    return sum(close) / sum(int(outline.sum()) for outline in outlines)


def box_baseline(item: Item) -> Mask:
    """The tight box, filled."""
    x0, y0, x1, y1 = tight_box(item.mask).astype(int)
    filled = np.zeros_like(item.mask)
    filled[y0:y1, x0:x1] = True
    return filled


def ellipse_baseline(item: Item) -> Mask:
    """The ellipse inscribed in the tight box."""
    x0, y0, x1, y1 = tight_box(item.mask)
    y, x = (np.indices(item.mask.shape) + 0.5)[:]
    inside: Mask = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1
    return inside


def otsu_baseline(item: Item) -> Mask:
    """Otsu's threshold on the grey values in the tight box; of both sides the one that fills its middle."""
    from skimage.filters import threshold_otsu

    x0, y0, x1, y1 = tight_box(item.mask).astype(int)
    crop = _grey(item.rgb[y0:y1, x0:x1])
    bright = crop > (threshold_otsu(crop) if crop.min() < crop.max() else crop.min() - 1)
    height, width = crop.shape
    middle = bright[height // 4 : height - height // 4, width // 4 : width - width // 4]
    result = np.zeros_like(item.mask)
    result[y0:y1, x0:x1] = bright if 2 * middle.sum() >= middle.size else ~bright
    return result


BASELINES: dict[str, Callable[[Item], Mask]] = {
    "baseline_box": box_baseline,
    "baseline_ellipse": ellipse_baseline,
    "baseline_otsu": otsu_baseline,
}


def _box_prompt(mask: Mask) -> Prompts:
    return Prompts(box=tight_box(mask))


def _point_prompt(mask: Mask) -> Prompts:
    row, column = interior_pixel(mask)
    return Prompts(points=np.array([[column + 0.5, row + 0.5]]), labels=np.array([1]))


PROMPTS: dict[str, Callable[[Mask], Prompts]] = {"box": _box_prompt, "point": _point_prompt}
"""Prompts as an ideal person would give them: the tight box, or one click in the object's middle."""


def read_items(data: Path) -> list[Callable[[], Item]]:
    """What there is to evaluate in a folder, each read when it is called.

    Args:
        data: a folder with `manifest.jsonl`, rows {image, mask, modality} of pictures beside it; or, without
            it, one with volumes and their masks by `find_pairs`, of which the slice with most of the object
            counts.

    Raises:
        EvaluationError: when there is neither, or a row is damaged.
    """
    manifest = data / "manifest.jsonl"
    if manifest.is_file():
        return [_picture(data, line, number) for number, line in _lines(manifest)]
    pairs = find_pairs(data) if data.is_dir() else []
    if not pairs:
        raise EvaluationError(
            f"'{data.name}' has neither a manifest.jsonl nor volumes with masks named <image>_<label>"
        )
    return [lambda image=image, mask=mask: _volume_item(image, mask) for image, mask in pairs]  # type: ignore[misc]


def evaluate(
    data: Path,
    segmenters: Sequence[tuple[Segmenter, Mapping[str, Any]]],
    reference: Segmenter,
    prompts: Sequence[str] = ("box", "point"),
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Scores segmenters on a folder of images with ground truth.

    Args:
        data: as `read_items` takes it.
        segmenters: each with what names it in its rows: {model, engine, policy}.
        reference: the model in full precision, to which `drop` and `agreement` compare.
        prompts: names from `PROMPTS`.
        progress: called with stage 'evaluation'.

    Returns:
        A row for each segmenter, prompt and modality, 'all' first: {model, engine, policy, prompt, modality,
        n, iou, dice, nsd, drop, drop_ci, agreement, baseline_box, baseline_ellipse, baseline_otsu}. All are
        means over n images, 0 … 1. drop: the reference's IoU minus this one's; drop_ci: [low, high], its
        95 % interval by bootstrap over images; agreement: IoU with the reference's mask; the baselines' IoU
        are of the tight box, whatever the prompt.

    Raises:
        EvaluationError: for a prompt that is not known, or as `read_items`.
    """
    unknown = [name for name in prompts if name not in PROMPTS]
    if unknown or not prompts:
        raise EvaluationError(f"prompts must be of {', '.join(PROMPTS)}, not '{','.join(unknown)}'")
    readers = read_items(Path(data))
    modalities: list[str] = []
    baselines: list[dict[str, float]] = []
    scores: list[list[dict[str, dict[str, float]]]] = [[] for _ in segmenters]
    for done, read in enumerate(readers):
        progress("evaluation", done, len(readers))
        item = read()
        modalities.append(item.modality)
        baselines.append({name: iou(make(item), item.mask) for name, make in BASELINES.items()})
        expected = _masks(reference, item, prompts)
        for kept, (segmenter, _) in zip(scores, segmenters, strict=True):
            masks = expected if segmenter is reference else _masks(segmenter, item, prompts)
            kept.append({name: _score(masks[name], expected[name], item.mask) for name in prompts})
    progress("evaluation", len(readers), len(readers))
    groups = ["all", *sorted(set(modalities))]
    rows = []
    for kept, (_, meta) in zip(scores, segmenters, strict=True):
        for name in prompts:
            for group in groups:
                member = [i for i, modality in enumerate(modalities) if group in ("all", modality)]
                row = _row([kept[i][name] for i in member], [baselines[i] for i in member])
                names = {key: meta.get(key) for key in ("model", "engine", "policy")}
                rows.append({**names, "prompt": name, "modality": group, **row})
    return rows


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the rows of `evaluate`, a table for each model and prompt, within 80 columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def title(row: Mapping[str, Any]) -> str:
        names = (row["model"], row["engine"], row["policy"], f"{row['prompt']} prompts")
        return ", ".join(str(name) for name in names if name)

    console = Console()
    scores = ("iou", "dice", "nsd", "agreement")
    for name, group in groupby(rows, title):
        table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        table.add_column("modality", no_wrap=True)
        for head in ("n", "IoU", "Dice", "NSD", "agrees", "drop ± 95 %", *BASELINES):
            table.add_column(head.removeprefix("baseline_"), justify="right", no_wrap=True)
        for row in group:
            low, high = row["drop_ci"]
            table.add_row(
                row["modality"],
                str(row["n"]),
                *(f"{row[key]:.3f}" for key in scores),
                f"{row['drop']:+.3f} ± {(high - low) / 2:.3f}",
                *(f"{row[key]:.3f}" for key in BASELINES),
            )
        console.print(table)


def _masks(segmenter: Segmenter, item: Item, prompts: Sequence[str]) -> dict[str, Mask]:
    embedding = segmenter.embed(item.rgb)
    return {name: segmenter.predict(embedding, PROMPTS[name](item.mask)).mask for name in prompts}


def _score(mask: Mask, expected: Mask, truth: Mask) -> dict[str, float]:
    reached = iou(mask, truth)
    return {
        "iou": reached,
        "dice": dice(mask, truth),
        "nsd": surface_dice(mask, truth),
        "drop": iou(expected, truth) - reached,
        "agreement": iou(mask, expected),
    }


def _row(scores: list[dict[str, float]], baselines: list[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"n": len(scores)}
    for key in scores[0]:
        row[key] = float(np.mean([score[key] for score in scores]))
    row["drop_ci"] = _interval([score["drop"] for score in scores])
    for key in baselines[0]:
        row[key] = float(np.mean([baseline[key] for baseline in baselines]))
    return row


def _interval(values: list[float]) -> list[float]:
    """95 % interval of the mean by bootstrap; the same for the same values."""
    sample = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    return [float(x) for x in np.percentile(np.array(values)[sample].mean(axis=1), _CONFIDENCE)]


def _grey(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[H, W, 3] to [H, W], luma of ITU-R BT.601 in whole numbers, 0 … 255."""
    grey: NDArray[np.float64] = np.rint(rgb @ np.array([0.299, 0.587, 0.114]))
    return grey


def _lines(manifest: Path) -> Iterator[tuple[int, str]]:
    with manifest.open(encoding="utf-8") as file:
        yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())


def _picture(data: Path, line: str, number: int) -> Callable[[], Item]:
    try:
        row = json.loads(line)
        image, mask, modality = data / row["image"], data / row["mask"], str(row["modality"])
    except (ValueError, KeyError, TypeError):
        raise EvaluationError(
            f"line {number} of manifest.jsonl must be a JSON object with image, mask and modality"
        ) from None
    return lambda: _picture_item(image, mask, modality)


def _picture_item(image: Path, mask: Path, modality: str) -> Item:
    """A picture as people see it: rows down, columns to the right."""
    from PIL import Image

    try:
        with Image.open(image) as file:
            rgb = np.array(file.convert("RGB"))
        with Image.open(mask) as file:
            truth = np.array(file.convert("L")) > 0
    except OSError:
        raise EvaluationError(f"'{image.name}' or '{mask.name}' is missing or no picture") from None
    return _item(rgb, truth, modality, image.name)


def _volume_item(image: Path, mask: Path) -> Item:
    volume, truth = load_volume(image), load_volume(mask).array != 0
    if truth.shape != volume.shape:
        raise EvaluationError(f"'{mask.name}' has not the shape of '{image.name}'")
    if not truth.any():
        raise EvaluationError(f"'{mask.name}' is empty")
    k = click_for(truth).k
    return _item(slice_rgb(volume, k), truth[:, :, k], volume.modality or "other", image.name)


def _item(rgb: NDArray[np.uint8], mask: Mask, modality: str, name: str) -> Item:
    if mask.shape != rgb.shape[:2] or not mask.any():
        raise EvaluationError(f"the mask of '{name}' is empty or has another shape than the image")
    return Item(rgb, mask, modality)
