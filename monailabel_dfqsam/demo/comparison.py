"""Both models' answers to the same prompts, side by side: numbers, a table, pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from monailabel_dfqsam.demo import overlay
from monailabel_dfqsam.demo.objects import Case
from monailabel_dfqsam.evaluation import iou
from monailabel_dfqsam.server.runs.models import FULL_PRECISION

Prompt = Literal["point", "box"]
PROMPTS: tuple[Prompt, ...] = ("point", "box")  # in this order: the box finds the slice embedded

_LINE_WIDTHS = (9, 6, 2)  # of the true mask, full precision and the quantized model, in pixels


@dataclass(frozen=True, eq=False)
class Answer:
    """What the server said to one prompt.

    Attributes:
        mask: [I, J] bool on the slice asked about.
        model: the server's name for what answered.
        seconds: the round trip, what a person waits.
        cached: whether the slice had been embedded before.
        file: the mask file as it came.
    """

    mask: NDArray[np.bool_]
    model: str
    seconds: float
    cached: bool
    file: bytes


Answers = Mapping[tuple[int, Prompt], Answer]
"""By the case's index and the prompt."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What was asked, and the answers before and after the quantization."""

    cases: Sequence[Case]
    full: Answers
    quantized: Answers

    @property
    def strays(self) -> int:
        """How many answers came from another model than the one asked."""
        late = sum(answer.model != FULL_PRECISION for answer in self.full.values())
        early = sum(answer.model == FULL_PRECISION for answer in self.quantized.values())
        return late + early

    @property
    def quantized_name(self) -> str:
        """The server's name for the quantized model."""
        return self.quantized[0, "point"].model

    def rows(self) -> list[dict[str, Any]]:
        """One a case and prompt: IoU with the truth and with each other, 0 … 1; round trips in seconds."""
        rows = []
        for (index, prompt), after in self.quantized.items():
            case, before = self.cases[index], self.full[index, prompt]
            rows.append(
                {
                    "image": case.name,
                    "label": case.label,
                    "slice": case.click.k,
                    "prompt": prompt,
                    "iou_full_precision": round(iou(before.mask, case.truth), 4),
                    "iou_quantized": round(iou(after.mask, case.truth), 4),
                    "agreement": round(iou(before.mask, after.mask), 4),
                    "seconds_full_precision": round(before.seconds, 4),
                    "seconds_quantized": round(after.seconds, 4),
                    "cached_full_precision": before.cached,
                    "cached_quantized": after.cached,
                }
            )
        return rows

    def table(self) -> Table:
        """The rows as a person reads them."""
        short = self.quantized_name.split()[0]
        table = Table(
            title=f"Overlap (IoU) with the true mask, and the wait: full precision and {self.quantized_name}",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for head in ("object", "prompt"):
            table.add_column(head, overflow="fold")
        for head in ("full", short, "agreement", "full ms", f"{short} ms"):
            table.add_column(head, justify="right")
        for row in self.rows():
            table.add_row(
                f"{row['image']} {row['label']}",
                row["prompt"],
                *(f"{row[key]:.3f}" for key in ("iou_full_precision", "iou_quantized", "agreement")),
                *(f"{1000 * row[f'seconds_{m}']:.0f}" for m in ("full_precision", "quantized")),
                end_section=row["prompt"] == PROMPTS[-1],
            )
        return table

    def write_pictures(self, folder: Path) -> None:
        """Writes `<image>_<label>.png` of each case: a panel a prompt, with the outlines of all masks."""
        legend = [
            ("true mask", overlay.TRUTH),
            ("full precision", overlay.FULL_PRECISION),
            (self.quantized_name, overlay.QUANTIZED),
            ("prompt", overlay.PROMPT),
        ]
        for index, case in enumerate(self.cases):
            panels = [self._panel(index, prompt) for prompt in PROMPTS]
            overlay.write_overlay(panels, legend, folder / f"{case.name}_{case.label}.png")

    def _panel(self, index: int, prompt: Prompt) -> overlay.Panel:
        case = self.cases[index]
        masks = (case.truth, self.full[index, prompt].mask, self.quantized[index, prompt].mask)
        colours = (overlay.TRUTH, overlay.FULL_PRECISION, overlay.QUANTIZED)
        # Arrays run [i, j], pictures [row, column] = [j, i].
        i, j = case.click.point_ij
        i0, i1, j0, j1 = case.click.roi[:4]
        lines = zip(masks, colours, _LINE_WIDTHS, strict=True)
        return overlay.Panel(
            title=f"{case.name}, slice {case.click.k}, {prompt}",
            rgb=case.rgb.transpose(1, 0, 2),
            outlines=[overlay.Outline(mask.T, colour, width) for mask, colour, width in lines],
            point=(j, i) if prompt == "point" else None,
            box=(j0, j1, i0, i1) if prompt == "box" else None,
        )


def latencies(answers: Answers) -> str:
    """Median round trips: on a slice seen for the first time, and on one that is embedded."""
    parts = []
    for text, cached in (("first on a slice", False), ("again", True)):
        seconds = [answer.seconds for answer in answers.values() if answer.cached is cached]
        if seconds:
            parts.append(f"{text} {1000 * statistics.median(seconds):.0f} ms (median of {len(seconds)})")
    return ", ".join(parts)
