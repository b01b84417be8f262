"""The tables of docs/accuracy/tables.md, which this script writes beside the figures of record, tables.json.

    python docs/accuracy/tables.py all --data FOLDER        every table, one after another
    python docs/accuracy/tables.py sources --data FOLDER    what the ranges were taken from; the rest the same
    python docs/accuracy/tables.py ablation --data FOLDER   the parts of the method, added one by one
    python docs/accuracy/tables.py grid --data FOLDER       weights of the class and the similarity loss
    python docs/accuracy/tables.py seen --data FOLDER       what the model makes of each kind of image

FOLDER is one that `dfqsam evaluate --data` takes. What is slow is kept in the folder --work, from which a run
that was cut off goes on. --quick runs the same on next to nothing, to see that it works.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from calibration_study import PROMPT_NAMES, Settings, Study, over_seeds, record_tables, summary

from monailabel_dfqsam.benchmark.machine import describe_run
from monailabel_dfqsam.config import Policy, Preset, Recipe
from monailabel_dfqsam.synthesis.measures import mean_overlap, measure

HERE = Path(__file__).parent
PAPER = Recipe()
# Name of the recipe, policy, bits, recipe.
WAYS = [
    *(("paper", policy, bits, PAPER) for policy, bits in product(Policy, (4, 6, 8))),
    (Preset.STATIC.value, Policy.DEPLOY, 4, Preset.STATIC.config.recipe),
]
ALPHAS = (0.0, 0.5, 2.0)
BETAS = (0.0, 0.05, 0.2)
SOURCES = {
    "real images": Study.real,
    "Gaussian noise": Study.gaussian,
    "phantoms": Study.phantoms,
    "DFQ-SAM synthesis": Study.synthetic,
    "synthesis and phantoms": Study.both,
}
SEEN = {name: SOURCES[name] for name in ("real images", "phantoms", "DFQ-SAM synthesis", "Gaussian noise")}

Row = dict[str, Any]


def sources(study: Study) -> list[Row]:
    """Where calibration images come from, their number being the same: by the paper's recipe, and by ours."""
    settings = study.settings
    rows: list[Row] = [{"source": "full precision", **over_seeds([study.full_precision()])}]
    for (called, policy, bits, recipe), (name, take) in product(WAYS, SOURCES.items()):
        scores = [
            study.score(take(study, seed, settings.images), bits, policy, recipe) for seed in settings.seeds
        ]
        row = {"source": name, "recipe": called, "policy": policy.value, "bits": bits}
        rows.append({**row, **over_seeds(scores)})
    return rows


def ablation(study: Study) -> list[Row]:
    """The parts of the method one after another, W4A4, one image as in the paper."""
    plain = {"evolve": False, "beta": 0.0, "bounded": False}
    steps: list[tuple[str, dict[str, Any], bool]] = [
        ("noise optimised with a random label", plain, False),
        ("+ label evolution", {**plain, "evolve": True}, False),
        ("+ patch similarity", {"bounded": False}, False),
        ("+ reparameterization", {"bounded": False}, True),
        ("+ a bound on its entropy", {}, True),
    ]
    rows: list[Row] = []
    for policy, (name, options, reparameterize) in product(Policy, steps):
        recipe = Recipe(reparameterize=reparameterize)
        scores = [
            study.score(study.synthetic(seed, 1, **options), 4, policy, recipe)
            for seed in study.settings.seeds
        ]
        rows.append({"step": name, "policy": policy.value, "bits": 4, **over_seeds(scores)})
    return rows


def grid(study: Study) -> list[Row]:
    """α, the class loss's weight, and β, the patch-similarity loss's; W4A4, deploy, one image."""
    rows: list[Row] = []
    for alpha, beta in product(ALPHAS, BETAS):
        scores = [
            study.score(study.synthetic(seed, 1, alpha=alpha, beta=beta), 4, Policy.DEPLOY, PAPER)
            for seed in study.settings.seeds
        ]
        rows.append({"alpha": alpha, "beta": beta, "policy": "deploy", "bits": 4, **over_seeds(scores)})
    return rows


def seen(study: Study) -> list[Row]:
    """Entropy, class response and ranges of each kind of image, beside the real images evaluated on."""
    reference = measure(study.sam, study.inputs(), study.auxiliary)
    rows: list[Row] = [
        {
            "source": "real images, all evaluated",
            "entropies": reference.entropies,
            "response": summary([reference.response]),
            "shared": summary([1.0]),
            "distance": summary([0.0]),
            "ranges": reference.ranges,
        }
    ]
    for name, take in SEEN.items():
        found = [
            measure(study.sam, take(study, seed, study.settings.images), study.auxiliary)
            for seed in study.settings.seeds
        ]
        entropies = torch.tensor([one.entropies for one in found])
        distances = (entropies - torch.tensor(reference.entropies)).abs().mean(1).tolist()
        rows.append(
            {
                "source": name,
                "entropies": entropies.mean(0).tolist(),
                "response": summary([one.response for one in found]),
                "shared": summary([mean_overlap(one.ranges, reference.ranges) for one in found]),
                "distance": summary(distances),
                "ranges": {
                    layer: torch.tensor([one.ranges[layer] for one in found]).mean(0).tolist()
                    for layer in reference.ranges
                },
            }
        )
    return rows


TABLES: dict[str, Callable[[Study], list[Row]]] = {
    "sources": sources,
    "ablation": ablation,
    "grid": grid,
    "seen": seen,
}
TITLES = {
    "sources": "Where the calibration images come from",
    "ablation": "What the parts of the method add",
    "grid": "Weights of the class loss (α) and of the patch-similarity loss (β)",
    "seen": "What the model makes of the images",
}


def main(
    table: Annotated[str, typer.Argument(help=f"One of {', '.join(TABLES)}, or all.")],
    data: Annotated[Path, typer.Option(help="Images with true masks.")],
    work: Annotated[Path, typer.Option(help="What is slow is kept here.")] = Path("build/tables"),
    out: Annotated[Path, typer.Option(help="Folder of tables.json and tables.md.")] = HERE,
    images: Annotated[int, typer.Option(help="Calibration images a source and seed.")] = 4,
    seeds: Annotated[int, typer.Option(help="How many.")] = 3,
    iterations: Annotated[int, typer.Option(help="Of synthesis.")] = 300,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
    quick: Annotated[bool, typer.Option(help="A run on next to nothing.")] = False,
) -> None:
    """Computes tables and writes them down."""
    if table != "all" and table not in TABLES:
        raise typer.BadParameter(f"there is no table '{table}'")
    torch.set_num_threads(threads)
    run = describe_run()
    settings = Settings(data, work, tuple(range(seeds)), images, iterations)
    if quick:
        settings = Settings(data, work, (0,), 2, 2, limit=6)
    study = Study(settings)
    chosen = TABLES if table == "all" else {table: TABLES[table]}
    record = record_tables(out / "tables.json", study, run, chosen)
    (out / "tables.md").write_text(markdown(record))
    for name in chosen:
        typer.echo(section(name, record[name]))


def markdown(record: dict[str, Any]) -> str:
    """The whole page of the tables there are."""
    head = (
        "# Tables of record\n\nWritten by `docs/accuracy/tables.py`, which says what each is; "
        "figures in full in tables.json.\n"
    )
    return "\n".join([head, *(section(name, record[name]) for name in TABLES if name in record)])


def section(name: str, table: dict[str, Any]) -> str:
    """One table as markdown, below the command that makes it."""
    rows = table["rows"]
    images = table["images"] if name in ("sources", "seen") else 1
    words = (
        f"`python docs/accuracy/tables.py {name} --data FOLDER`: {len(table['seeds'])} seeds, {images} "
        f"calibration images each, {table['iterations']} iterations of synthesis, evaluated on "
        f"{table['evaluated']} images; mean ± deviation over seeds. Commit {str(table['commit'])[:12]}, "
        f"weights {table['weights_sha256'][:12]}, {table['machine']['cpu']}, {table['seconds']} s."
    )
    parts = [f"## {TITLES[name]}", words]
    if name == "seen":
        parts += [
            _table(*_seen_cells(rows)),
            "What each layer reads, from … to:",
            _table(*_range_cells(rows)),
        ]
    else:
        parts.append(_table(*_score_cells(rows)))
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *body)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _score_cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    names = [key for key in rows[-1] if key not in PROMPT_NAMES]
    measures = ("iou", "drop", "agreement")
    head = [*names, *(f"{measure} {prompt}" for measure in measures for prompt in PROMPT_NAMES)]
    body = [
        [str(row.get(key, "–")) for key in names]
        + [_number(row[prompt][measure], 3) for measure in measures for prompt in PROMPT_NAMES]
        for row in rows
    ]
    return head, body


def _seen_cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    blocks = len(rows[0]["entropies"])
    head = ["source", *(f"entropy {i}" for i in range(blocks)), "distance", "class response", "ranges shared"]
    body = [
        [
            row["source"],
            *(f"{value:.2f}" for value in row["entropies"]),
            *(_number(row[key], 2) for key in ("distance", "response", "shared")),
        ]
        for row in rows
    ]
    return head, body


def _range_cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    body = [
        [f"`{layer}`", *("{:.2f} … {:.2f}".format(*row["ranges"][layer]) for row in rows)]
        for layer in rows[0]["ranges"]
    ]
    return ["layer", *(row["source"] for row in rows)], body


def _number(value: dict[str, float], digits: int) -> str:
    text = f"{value['mean']:.{digits}f}"
    return f"{text} ± {value['deviation']:.{digits}f}" if value["deviation"] else text


if __name__ == "__main__":
    typer.run(main)
