"""What fine-tuning on labels brings, through the real server: the tables below the line of finetuning.md.

    python docs/accuracy/finetuning.py --data FOLDER --work FOLDER

The data are pictures with a manifest.jsonl. Half of them, whole sources at a time, become a server's studies
and are labelled by the protocol of Slicer; the others are never shown to it. For each seed and sampling a
server is started that has nothing but the artifact quantized without data, `POST /train/dfqsam_qat` is sent,
and what it serves then answers about the other half. A run that was cut off goes on; --quick runs the same
on next to nothing. With another model than the embedded one, the tables are printed and not recorded.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import requests
import SimpleITK as sitk
import typer
from PIL import Image

from monailabel_dfqsam.artifact import read_artifact
from monailabel_dfqsam.benchmark.machine import describe_run
from monailabel_dfqsam.config import AUTO, Sampling
from monailabel_dfqsam.demo.server import DemoServer
from monailabel_dfqsam.evaluation import evaluate
from monailabel_dfqsam.files import replacing
from monailabel_dfqsam.sam import build, find_checkpoint, read_checkpoint
from monailabel_dfqsam.segmentation.segmenter import Segmenter, full_precision_segmenter, load_segmenter
from monailabel_dfqsam.server.runs.finetuning import NAME
from monailabel_dfqsam.slicer_session import SlicerSession

HERE = Path(__file__).parent
LINE = "<!-- written by finetuning.py from here on -->"
PROMPTS = ("box", "point")


@dataclass(frozen=True)
class Arm:
    """One run: what is asked of the trainer."""

    bits: str
    sampling: Sampling
    seed: int

    @property
    def name(self) -> str:
        return f"{form(self.bits)} {self.sampling.value} {self.seed}"


def form(bits: str) -> str:
    """Of a model's Linears, as the tables name it."""
    return bits if bits == AUTO else f"W{bits}A{bits}"


def halves(data: Path, limit: int | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the manifest to label and rows to judge by; of each modality half of the sources."""
    rows = [json.loads(line) for line in (data / "manifest.jsonl").read_text().splitlines() if line.strip()]
    labelled: list[dict[str, Any]] = []
    unseen: list[dict[str, Any]] = []
    for modality in sorted({row["modality"] for row in rows}):
        group = [row for row in rows if row["modality"] == modality]
        sources = sorted({_source(row) for row in group})
        random.Random(0).shuffle(sources)
        own = set(sources[: len(sources) // 2])
        labelled += [row for row in group if _source(row) in own][:limit]
        unseen += [row for row in group if _source(row) not in own][:limit]
    return labelled, unseen


def _source(row: dict[str, Any]) -> tuple[str, str]:
    return row["source_repo"], row["source_path"]


def label_everything(
    session: SlicerSession, data: Path, rows: Iterable[dict[str, Any]], folder: Path
) -> None:
    """Saves a finished label for every image of the study, and says its modality, over HTTP."""
    for number, row in enumerate(rows):
        image, label = f"study{number:03d}", folder / f"study{number:03d}.nrrd"
        mask = (np.array(Image.open(data / row["mask"]).convert("L")) > 0).astype(np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(mask), str(label))
        session.save_label(image, label, [{"name": row["label"], "idx": 1}])
        told = requests.put(
            f"{session.url}/datastore/image/info",
            params={"image": image},
            data={"info": json.dumps({"modality": row["modality"]})},
            timeout=60,
        )
        told.raise_for_status()


def run_arm(
    arm: Arm, data: Path, rows: list[dict[str, Any]], work: Path, checkpoint: Path | None, epochs: int | None
) -> dict[str, Any]:
    """Trains through a server of its own; {bits, sampling, seed, state, key, error, seconds}."""
    home = work / arm.name.replace(" ", "-")
    done = home / "result.json"
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    shutil.rmtree(home, ignore_errors=True)
    studies, app, labels = home / "studies", home / "app", home / "labels"
    for folder in (studies, labels):
        folder.mkdir(parents=True)
    for number, row in enumerate(rows):
        shutil.copy(data / row["image"], studies / f"study{number:03d}.png")
    start = work / "start"
    if start.is_dir():
        shutil.copytree(start, app)
    with DemoServer(studies, app, home / "server.log", checkpoint) as server:
        session = SlicerSession(server.url)
        for run in session.settled()["runs"]:
            session.ended_run(run["id"])
        if not start.is_dir():
            shutil.copytree(app, start)
        label_everything(session, data, rows, labels)
        options = {} if epochs is None else {"max_epochs": epochs}
        asked = session.train(NAME, bits=arm.bits, sampling=arm.sampling.value, seed=arm.seed, **options)
        run = session.ended_run(asked)
    result = {
        "bits": arm.bits,
        "sampling": arm.sampling.value,
        "seed": arm.seed,
        "state": run["state"],
        "key": run["key"],
        "error": run["error"] or None,
        "seconds": run["seconds"],
    }
    with replacing(done) as partial:
        partial.write_text(json.dumps(result))
    return result


def scored(path: Path, data: Path, reference: Segmenter) -> list[dict[str, Any]]:
    """Rows {prompt, modality, n, iou, dice, agreement, baseline_ellipse} of an artifact."""
    artifact = read_artifact(path)
    names = {"model": artifact.label, "engine": None, "policy": None}
    kept = ("prompt", "modality", "n", "iou", "dice", "agreement", "baseline_ellipse")
    rows = evaluate(data, [(load_segmenter(artifact), names)], reference, PROMPTS)
    return [{name: row[name] for name in kept} for row in rows]


def mean(rows: list[dict[str, Any]], prompt: str, measure: str = "iou") -> tuple[float, float]:
    """Over all objects, and over modalities."""
    own = [row for row in rows if row["prompt"] == prompt]
    every = next(row[measure] for row in own if row["modality"] == "all")
    return every, statistics.mean(row[measure] for row in own if row["modality"] != "all")


def tables(runs: list[dict[str, Any]], before: dict[str, list[dict[str, Any]]]) -> str:
    """The page's tables, in Markdown."""
    lines = [
        "| model | ended | box | point | box, mean of modalities | point, likewise | seconds |",
        "|---|---|---|---|---|---|---|",
    ]

    def line(name: str, state: str, rows: list[dict[str, Any]], seconds: str) -> str:
        found = [mean(rows, prompt) for prompt in PROMPTS]
        figures = " | ".join(f"{f[index]:.3f}" for index in (0, 1) for f in found)
        return f"| {name} | {state} | {figures} | {seconds} |"

    for bits, rows in before.items():
        lines.append(line(f"{form(bits)} without data", "", rows, ""))
    for run in runs:
        name = f"{form(run['bits'])}, {run['sampling']}, seed {run['seed']}"
        lines.append(line(name, run["state"], run["rows"], f"{run['seconds']:.0f}"))
    lines += ["", "Gain over no labels, mean and deviation over seeds:", ""]
    lines += ["| | box | point | box, mean of modalities | point, likewise |", "|---|---|---|---|---|"]
    for bits, sampling in dict.fromkeys((run["bits"], run["sampling"]) for run in runs):
        group = [run for run in runs if (run["bits"], run["sampling"]) == (bits, sampling)]
        cells = []
        for index in (0, 1):
            for prompt in PROMPTS:
                base = mean(before[bits], prompt)[index]
                gains = [mean(run["rows"], prompt)[index] - base for run in group]
                deviation = statistics.stdev(gains) if len(gains) > 1 else 0.0
                cells.append(f"{statistics.mean(gains):+.3f} ± {deviation:.3f}")
        lines.append(f"| {form(bits)}, {sampling} | {' | '.join(cells)} |")
    lines += ["", "IoU by modality, mean over seeds:", ""]
    modalities = sorted({row["modality"] for rows in before.values() for row in rows} - {"all"})
    lines += [
        f"| | {' | '.join(f'{m} {p}' for m in modalities for p in PROMPTS)} |",
        "|---" * (1 + 2 * len(modalities)) + "|",
    ]

    def by_modality(groups: list[list[dict[str, Any]]]) -> str:
        found = []
        for modality in modalities:
            for prompt in PROMPTS:
                own = [
                    row["iou"]
                    for rows in groups
                    for row in rows
                    if (row["modality"], row["prompt"]) == (modality, prompt)
                ]
                found.append(f"{statistics.mean(own):.3f}")
        return " | ".join(found)

    for bits, rows in before.items():
        lines.append(f"| {form(bits)} without data | {by_modality([rows])} |")
        for sampling in dict.fromkeys(run["sampling"] for run in runs if run["bits"] == bits):
            group = [run["rows"] for run in runs if (run["bits"], run["sampling"]) == (bits, sampling)]
            lines.append(f"| {form(bits)}, {sampling} | {by_modality(group)} |")
    return "\n".join(lines) + "\n"


def main(
    data: Annotated[Path, typer.Option(help="Pictures with a manifest.jsonl.")],
    work: Annotated[Path, typer.Option(help="What is slow is kept here.")],
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The embedded model without it.", show_default=False)
    ] = None,
    bits: Annotated[str, typer.Option(help="4, 8 or auto, with commas between.")] = "4",
    samplings: Annotated[str, typer.Option(help="With commas between.")] = "balanced,natural",
    epochs: Annotated[
        int | None, typer.Option(help="At most, instead of the trainer's.", show_default=False)
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="Two images a modality, one epoch, one seed; records nothing.")
    ] = False,
) -> None:
    """Runs every arm and writes finetuning.json and the tables of finetuning.md."""
    work.mkdir(parents=True, exist_ok=True)
    run = describe_run()
    source = read_checkpoint("tiny") if checkpoint is None else read_checkpoint(find_checkpoint(checkpoint))
    reference = full_precision_segmenter(build(source))
    labelled, unseen = halves(data, 2 if quick else None)
    judged = work / "unseen"
    judged.mkdir(exist_ok=True)
    for row in unseen:
        row["image"], row["mask"] = str((data / row["image"]).resolve()), str((data / row["mask"]).resolve())
    (judged / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unseen))
    arms = [
        Arm(width, sampling, seed)
        for width in bits.split(",")
        for sampling in map(Sampling, samplings.split(","))
        for seed in range(1 if quick else seeds)
    ]
    runs, before = [], {}
    for arm in arms:
        found = run_arm(arm, data, labelled, work, checkpoint, 1 if quick else epochs)
        models = work / arm.name.replace(" ", "-") / "app" / "model"
        first = next(p for p in sorted(models.glob("*.safetensors")) if _is_start(p, arm.bits))
        if arm.bits not in before:
            before[arm.bits] = scored(first, judged, reference)
        served = models / f"{found['key']}.safetensors" if found["state"] == "published" else first
        finetuned = read_artifact(served).header.get("finetuning")
        runs.append({**found, "rows": scored(served, judged, reference), "finetuning": finetuned})
        reached = [round(figure, 4) for prompt in PROMPTS for figure in mean(runs[-1]["rows"], prompt)]
        typer.echo(f"{arm.name}: {found['state']}, {reached}")
    page = tables(runs, before)
    typer.echo(page)
    if quick or checkpoint is not None:
        return
    record = {
        **run,
        "labelled": len(labelled),
        "unseen": len(unseen),
        "max_epochs": epochs,
        "before": before,
        "runs": runs,
    }
    with replacing(HERE / "finetuning.json") as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")
    text = (HERE / "finetuning.md").read_text().partition(LINE)[0]
    with replacing(HERE / "finetuning.md") as partial:
        partial.write_text(f"{text}{LINE}\n\n{page}")


def _is_start(path: Path, bits: str) -> bool:
    header = read_artifact(path).header
    return "finetuning" not in header and str(header["config"]["bits"] or AUTO) == bits


if __name__ == "__main__":
    typer.run(main)
