"""The rows of `evaluate` as a person reads them on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from monailabel_dfqsam.evaluation.baselines import BASELINES
from monailabel_dfqsam.evaluation.scoring import NAMES

_SCORES = ("iou", "dice", "nsd", "agreement", "agreement_median")


def title(row: Mapping[str, Any]) -> str:
    """What one table is about: model, engine, policy and prompts."""
    return ", ".join(str(name) for name in (*(row[key] for key in NAMES), f"{row['prompt']} prompts") if name)


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the rows of `evaluate`, a table for each model and prompt, within 80 columns."""
    console = Console()
    for name, group in groupby(rows, title):
        table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        table.add_column("modality", no_wrap=True)
        for head in ("n", "IoU", "Dice", "NSD", "agrees", "median", "drop ± 95 %", *BASELINES):
            table.add_column(head.removeprefix("baseline_"), justify="right", no_wrap=True)
        for row in group:
            low, high = row["drop_ci"]
            table.add_row(
                row["modality"],
                str(row["n"]),
                *(f"{row[key]:.3f}" for key in _SCORES),
                f"{row['drop']:+.3f} ± {(high - low) / 2:.3f}",
                *(f"{row[key]:.3f}" for key in BASELINES),
            )
            if row["modality"] == "all":
                times = f"{row['embed_ms']:.0f} ms to embed an image, {row['predict_ms']:.0f} ms a prompt"
        table.caption, table.caption_justify = f"medians: {times}", "left"
        console.print(table)
