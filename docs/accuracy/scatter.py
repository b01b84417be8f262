"""Fidelity on phantoms against agreement on real images, of rows that forms.py printed: figures, a picture.

python docs/accuracy/scatter.py ROWS [ROWS …] --picture docs/pictures/fidelity.svg
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.stats import spearmanr

LEFT, SIDE = 60, 420
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")


def points(files: list[Path], prompt: str) -> list[dict[str, Any]]:
    """Of each quantized model: its name, checkpoint, fidelity's mean and agreement's."""
    found = []
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line) if line.startswith("{") else {}
            if row.get("prompt") == prompt and row.get("modality") == "all" and "fidelity" in row:
                found.append(
                    {
                        "name": row["model"],
                        "checkpoint": row["checkpoint"],
                        "fidelity": row["fidelity"]["mean_iou"],
                        "real": row["agreement"],
                    }
                )
    return found


def picture(found: list[dict[str, Any]]) -> str:
    """The points as SVG, both axes from the tenth below all of them to 1."""
    least = min(math.floor(10 * min(point["fidelity"], point["real"])) for point in found) / 10

    def place(value: float) -> float:
        return (value - least) / (1 - least) * SIDE

    kinds = sorted({point["checkpoint"] for point in found})
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE + 90} {SIDE + 70}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="100%" fill="white"/><g transform="translate({LEFT} 15)">',
        f'<rect width="{SIDE}" height="{SIDE}" fill="none" stroke="#888"/>',
        f'<line x1="0" y1="{SIDE}" x2="{SIDE}" y2="0" stroke="#bbb" stroke-dasharray="4"/>',
    ]
    for tick in np.arange(least, 1.001, 0.1):
        at = place(float(tick))
        lines.append(f'<text x="{at:.0f}" y="{SIDE + 16}" text-anchor="middle">{tick:.1f}</text>')
        lines.append(f'<text x="-8" y="{SIDE - at + 4:.0f}" text-anchor="end">{tick:.1f}</text>')
    lines.append(f'<text x="{SIDE / 2}" y="{SIDE + 38}" text-anchor="middle">fidelity, on phantoms</text>')
    lines.append(
        f'<text transform="translate(-40 {SIDE / 2}) rotate(-90)" text-anchor="middle">'
        "agreement on real images, tight boxes</text>"
    )
    for point in found:
        x, y = place(point["fidelity"]), SIDE - place(point["real"])
        colour = COLOURS[kinds.index(point["checkpoint"])]
        title = f"<title>{point['name']}</title>"
        lines.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity="0.7">{title}</circle>'
        )
    for index, kind in enumerate(kinds):
        y = 20 + 18 * index
        lines.append(f'<circle cx="16" cy="{y - 4}" r="4" fill="{COLOURS[index]}"/>')
        lines.append(f'<text x="26" y="{y}">{kind}</text>')
    return "\n".join([*lines, "</g></svg>", ""])


def main(
    rows: list[Path],
    out: Annotated[Path | None, typer.Option("--picture", help="An SVG file.")] = None,
    prompt: Annotated[str, typer.Option()] = "box",
) -> None:
    """Prints what both have to do with each other, of all models and of each checkpoint's, and draws them."""
    found = points(rows, prompt)
    if not found:
        raise typer.BadParameter(f"no row there is of a quantized model and prompt '{prompt}'")
    for kind in (None, *sorted({point["checkpoint"] for point in found})):
        own = [point for point in found if kind in (None, point["checkpoint"])]
        fidelity, real = (np.array([point[name] for point in own]) for name in ("fidelity", "real"))
        off, rank = fidelity - real, spearmanr(fidelity, real).statistic
        typer.echo(
            f"{kind or 'all'}: {len(own)} models, rank correlation {rank:.3f}, "
            f"mean error {np.abs(off).mean():.3f}, mean of fidelity − agreement {off.mean():+.3f}"
        )
    if out is not None:
        out.write_text(picture(found))


if __name__ == "__main__":
    typer.run(main)
