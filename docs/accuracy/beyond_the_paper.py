"""What the parts of the presets' recipe bring: the tables below the line of beyond_the_paper.md.

    python docs/accuracy/beyond_the_paper.py parts    the recipe's parts, added one by one and left out
    python docs/accuracy/beyond_the_paper.py ridge    how much a weight is held to what it was
    python docs/accuracy/beyond_the_paper.py all      both

Decided on phantoms of seeds that training never used, written as pictures to the folder --work. What is slow
is kept there too: a run that was cut off goes on. --quick runs the same on next to nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from calibration_study import PROMPT_NAMES, Settings, Study, over_seeds, record_tables
from PIL import Image
from torch import Tensor

from monailabel_dfqsam.benchmark.machine import describe_run
from monailabel_dfqsam.config import Policy, Preset, Recipe
from monailabel_dfqsam.pretraining.targets import make_example
from monailabel_dfqsam.quantization import compensate

HERE = Path(__file__).parent
LINE = "<!-- written by beyond_the_paper.py from here on -->"
PHANTOM_SEED = 900_000
STATIC = replace(Preset.STATIC.config, images=4)
PAPER = Recipe()
RIDGES = (0.05, 0.3, 1.0, 3.0)

Take = Callable[[Study, int, int], Tensor]
Row = dict[str, Any]


def mixed(study: Study, seed: int, count: int) -> Tensor:
    """Synthesized images and as many phantoms again."""
    return torch.cat([study.synthetic(seed, count), study.phantoms(seed, count)])


def parts(study: Study) -> list[Row]:
    """Rows {images, of them, recipe, bits, policy, scores}."""
    synthetic, deploy, many, full = Study.synthetic, Policy.DEPLOY, study.settings.images, _full(study)
    ways: list[tuple[str, Take, int, Recipe, int, Policy]] = [
        ("synthesized", synthetic, 1, PAPER, 4, deploy),
        ("synthesized", synthetic, 1, replace(PAPER, reparameterize=False), 4, deploy),
        ("synthesized", synthetic, many, PAPER, 4, deploy),
        ("synthesized", synthetic, 1, replace(full, compensate=False), 4, deploy),
        ("synthesized", synthetic, 1, replace(full, views=0), 4, deploy),
        ("synthesized", synthetic, 1, replace(full, reparameterize=False), 4, deploy),
        ("synthesized", synthetic, 1, full, 4, deploy),
        ("synthesized", synthetic, many, replace(full, compensate=False), 4, deploy),
        ("synthesized", synthetic, many, replace(full, views=full.views // 2), 4, deploy),
        ("synthesized", synthetic, many, full, 4, deploy),
        ("Gaussian noise", Study.gaussian, 1, PAPER, 4, deploy),
        ("Gaussian noise", Study.gaussian, many, full, 4, deploy),
        ("phantoms", Study.phantoms, full.views, PAPER, 4, deploy),
        ("phantoms", Study.phantoms, full.views, replace(full, views=0), 4, deploy),
        ("synthesized, and as many phantoms", mixed, many, full, 4, deploy),
        ("synthesized", synthetic, 1, PAPER, 4, Policy.PAPER),
        ("synthesized", synthetic, many, full, 4, Policy.PAPER),
        ("synthesized", synthetic, 1, PAPER, 8, deploy),
        ("synthesized", synthetic, many, full, 8, deploy),
    ]
    return [
        {
            "images": f"{count} {name}",
            "recipe": _recipe(recipe),
            "bits": bits,
            "policy": policy.value,
            **_scores(study, take, count, recipe, bits, policy),
        }
        for name, take, count, recipe, bits, policy in ways
    ]


def ridge(study: Study) -> list[Row]:
    """Rows {ridge, scores}, of what preset `fast` makes."""
    rows, settings, held = [], study.settings, compensate.RIDGE
    for value in RIDGES:
        images = {seed: study.synthetic(seed, 1) for seed in settings.seeds}
        compensate.RIDGE = value
        study.settings = replace(settings, work=settings.work / f"ridge-{value}")
        study.settings.work.mkdir(exist_ok=True)
        found = _scores(
            study, lambda _, seed, __, images=images: images[seed], 1, _full(study), 4, Policy.DEPLOY
        )
        rows.append({"ridge": value, **found})
        study.settings, compensate.RIDGE = settings, held
    return rows


TABLES: dict[str, tuple[str, Callable[[Study], list[Row]]]] = {
    "parts": ("What each part brings", parts),
    "ridge": ("How much a weight is held to what it was", ridge),
}


def main(
    table: Annotated[str, typer.Argument(help=f"One of {', '.join(TABLES)}, or all.")],
    work: Annotated[Path, typer.Option(help="What is slow is kept here.")] = Path("build/beyond"),
    out: Annotated[Path, typer.Option(help="Folder of beyond_the_paper.json and .md.")] = HERE,
    phantoms: Annotated[int, typer.Option(help="Evaluated on.")] = 160,
    seeds: Annotated[int, typer.Option(help="Calibrations a row.")] = 3,
    quick: Annotated[bool, typer.Option(help="A run on next to nothing.")] = False,
) -> None:
    """Computes tables and writes them down."""
    if table != "all" and table not in TABLES:
        raise typer.BadParameter(f"there is no table '{table}'")
    torch.set_num_threads(1)
    settings = Settings(
        work / "phantoms", work, tuple(range(1, seeds + 1)), STATIC.images, STATIC.synthesis.iterations
    )
    if quick:
        phantoms, settings = 3, Settings(work / "phantoms", work, (1,), 1, 2, limit=3)
    # The study leaves some out of the evaluation, for calibrations on real images.
    write_phantoms(settings.data, phantoms + settings.images * len(settings.seeds))
    study, run = Study(settings), describe_run()
    chosen = {name: TABLES[name][1] for name in (TABLES if table == "all" else [table])}
    record = record_tables(out / "beyond_the_paper.json", study, run, chosen)
    page = out / "beyond_the_paper.md"
    words = page.read_text().partition(LINE)[0] if page.is_file() else ""
    page.write_text(
        words + "\n\n".join([LINE, *(_section(n, record[n]) for n in TABLES if n in record)]) + "\n"
    )


def write_phantoms(folder: Path, count: int) -> None:
    """Pictures, a mask each, and the manifest that `dfqsam evaluate` reads; nothing where they are."""
    manifest = folder / "manifest.jsonl"
    if manifest.is_file() and len(manifest.read_text().splitlines()) == count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        example = make_example(torch.Generator().manual_seed(PHANTOM_SEED + index))
        names = {"image": f"{index}.png", "mask": f"{index}-mask.png"}
        pixels = (example.image * 255).round().to(torch.uint8).permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / names["image"])
        Image.fromarray(example.masks[0].numpy() * 255).save(folder / names["mask"])
        rows.append(json.dumps({**names, "modality": "phantom"}))
    manifest.write_text("\n".join(rows) + "\n")


def _full(study: Study) -> Recipe:
    """The presets' recipe; of a quick run, with fewer views."""
    return STATIC.recipe if study.settings.limit is None else replace(STATIC.recipe, views=2)


def _scores(study: Study, take: Take, count: int, recipe: Recipe, bits: int, policy: Policy) -> Row:
    return over_seeds(
        [study.score(take(study, seed, count), bits, policy, recipe) for seed in study.settings.seeds]
    )


def _recipe(recipe: Recipe) -> str:
    chosen = [
        "reparameterized" if recipe.reparameterize else "",
        f"{recipe.views} views" if recipe.views else "",
        "compensated" if recipe.compensate else "",
    ]
    return ", ".join(filter(None, chosen)) or "plain"


def _section(name: str, table: Row) -> str:
    rows = table["rows"]
    names = [key for key in rows[0] if key not in PROMPT_NAMES]
    measures = [(measure, prompt) for measure in ("agreement", "drop") for prompt in PROMPT_NAMES]
    lines = [
        f"## {TABLES[name][0]}\n",
        f"`python docs/accuracy/beyond_the_paper.py {name}`: {len(table['seeds'])} seeds, "
        f"{table['evaluated']} phantoms; mean ± deviation over seeds. Commit {str(table['commit'])[:12]}, "
        f"weights {table['weights_sha256'][:12]}, {table['machine']['cpu']}, {table['seconds']} s.\n",
        "| " + " | ".join([*names, *(" ".join(pair) for pair in measures)]) + " |",
        "|" + "---|" * (len(names) + len(measures)),
    ]
    for row in rows:
        cells = [
            "{mean:.4f} ± {deviation:.4f}".format(**row[prompt][measure]) for measure, prompt in measures
        ]
        lines.append("| " + " | ".join([*(str(row[key]) for key in names), *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
