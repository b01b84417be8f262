"""The evaluation as one HTML page that needs nothing but itself: tables, and pictures of examples.

`page.html.j2` holds the words and the looks. The page shows images of the data that was evaluated, so it may
go only where they may.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from monailabel_dfqsam.evaluation.baselines import BASELINES
from monailabel_dfqsam.evaluation.measures import NSD_TOLERANCE
from monailabel_dfqsam.evaluation.picture import Picture, draw
from monailabel_dfqsam.evaluation.scoring import NAMES, Scored
from monailabel_dfqsam.evaluation.table import title
from monailabel_dfqsam.files import replacing
from monailabel_dfqsam.numbers import in_bytes


@dataclass(frozen=True)
class _Shelf:
    """A kind of example: its heading, how many are shown, and what orders them, first ones first."""

    heading: str
    most: int
    order: Callable[[Scored], float]


_SHELVES = (
    _Shelf("Worst overlap with the truth", 8, lambda scored: scored.scores["iou"]),
    _Shelf("Least agreement with full precision", 4, lambda scored: scored.scores["agreement"]),
    _Shelf("Best overlap with the truth", 4, lambda scored: -scored.scores["iou"]),
)

PROMPT_WORDS = {
    "box": "the object's tight box",
    "jittered": "the tight box moved at random, as SAM-Med2D moves it in training",
    "point": "one click in the object's middle",
    "points5": "one click in the object's middle, then four corrective ones, each on a pixel that the "
    "model's last answer has wrong",
    "clicks5": "one click in the object's middle, then four corrective ones, each in the middle of what the "
    "model's last answer has wrong",
}

_BASELINE_WORDS = ("filled box", "ellipse in it", "Otsu in it")


class Gallery:
    """Keeps pictures of the worst and best answers of each model and kind of prompt, as they are scored.

    They are drawn when they enter, so that it holds no image of the data for longer.
    """

    def __init__(self) -> None:
        self._kept: dict[str, list[list[tuple[float, int, Picture]]]] = {}

    def add(self, scored: Scored) -> None:
        """Takes an answer if it is among the first of a kind; of equal ones the earlier."""
        shelves = self._kept.setdefault(
            title({**scored.names, "prompt": scored.prompt}), [[] for _ in _SHELVES]
        )
        for shelf, kept in zip(_SHELVES, shelves, strict=True):
            place = (shelf.order(scored), scored.number)
            if len(kept) < shelf.most or place < kept[-1][:2]:
                kept.append((*place, draw(scored)))
                kept.sort(key=lambda one: one[:2])
                del kept[shelf.most :]

    def shelves(self, name: str) -> list[tuple[str, list[Picture]]]:
        """(heading, pictures) of what `title` calls so; without agreement where all agree wholly."""
        found = []
        for shelf, kept in zip(_SHELVES, self._kept.get(name, []), strict=False):
            pictures = [picture for _, _, picture in kept]
            if "agreement" not in shelf.heading or any(picture.agreement < 1 for picture in pictures):
                found.append((shelf.heading, pictures))
        return found


def run_facts(run: Mapping[str, Any], data: Path, cost: str) -> dict[str, str]:
    """What an evaluation was of, made on and with, as names and texts for `write_page`.

    Args:
        run: as `describe_run` returns it.
        data: what was evaluated on.
        cost: in time and memory.
    """
    machine, versions = run["machine"], run["versions"]
    return {
        "data": data.resolve().name,
        "command": run["command"],
        "date": run["date"],
        "time and memory": f"{cost} (load before: {run['load_average_before'][0]:.1f})",
        "machine": f"{machine['cpu']}, {machine['cores_usable']} cores, {in_bytes(machine['memory_bytes'])}"
        + "".join(f", {gpu}" for gpu in machine["gpus"]),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "commit": f"{run['commit']}{' with changes' if run['dirty'] else ''}" if run["commit"] else "unknown",
    }


def write_page(
    path: Path, rows: Sequence[Mapping[str, Any]], gallery: Gallery, facts: Mapping[str, str]
) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: the HTML file, replaced where it exists; its folder must exist.
        rows: as `evaluate` returns them, at least one.
        gallery: what observed the evaluation.
        facts: what the evaluation was of, made on and with, as names and texts.
    """
    sections: list[dict[str, Any]] = [
        {"title": name, "rows": list(group), "shelves": gallery.shelves(name)}
        for name, group in groupby(rows, title)
    ]
    overall: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["modality"] == "all":
            overall.setdefault(row["prompt"], []).append(row)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("page.html.j2").render(
        sections=sections,
        overall=overall,
        names=NAMES,
        prompt_words=PROMPT_WORDS,
        baselines=dict(zip(BASELINES, _BASELINE_WORDS, strict=True)),
        modalities=[(row["modality"], row["n"]) for row in sections[0]["rows"][1:]],
        objects=rows[0]["n"],
        tolerance=f"{NSD_TOLERANCE:g}",
        facts=facts,
    )
    with replacing(path) as partial:
        partial.write_text(html, encoding="utf-8")
