"""The table of forms.md on any checkpoint: uniform forms, a fidelity to keep, and what is calibrated on.

    python docs/accuracy/forms.py --checkpoint lite-medsam --data FOLDER --work FOLDER

FOLDER of --data is one that `dfqsam evaluate --data` takes. Artifacts are kept in --work, from which a run
that was cut off goes on; rows go to stdout as JSON, a line each. --ways and --seeds choose among them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from monailabel_dfqsam.artifact import Artifact, label, read_artifact, write_artifact
from monailabel_dfqsam.config import Calibration, EngineKind, Preset, QuantizationConfig
from monailabel_dfqsam.console import progress_bars
from monailabel_dfqsam.evaluation.models import beside_yardstick
from monailabel_dfqsam.evaluation.scoring import evaluate
from monailabel_dfqsam.identity import artifact_key
from monailabel_dfqsam.pipeline import quantize
from monailabel_dfqsam.sam import Checkpoint, build, find_checkpoint, read_checkpoint
from monailabel_dfqsam.segmentation.segmenter import full_precision_segmenter, load_segmenter

FAST = Preset.FAST.config
# Without synthesis, which takes longest, but where it is what is looked at.
DRAWN = FAST.changed(calibration=Calibration.NONE)
ALONE = FAST.changed(bits=4, activation_bits=8, recipe=replace(FAST.recipe, drawn=0))


def synthesized(**options: Any) -> QuantizationConfig:
    """W4A8 on images synthesized with some of `SynthesisConfig`'s options, and no others."""
    return replace(ALONE, synthesis=replace(ALONE.synthesis, **options))


WAYS: dict[str, QuantizationConfig] = {
    "auto": DRAWN,
    "W8A8": DRAWN.changed(bits=8),
    "W4A8": DRAWN.changed(bits=4, activation_bits=8),
    "W4A4": DRAWN.changed(bits=4),
    "auto, synthesized too": FAST,
    "W4A8, synthesized too": FAST.changed(bits=4, activation_bits=8),
    "W4A8, noise with a random label": synthesized(evolve=False, beta=0.0, bounded=False),
    "W4A8, labels evolved": synthesized(beta=0.0, bounded=False),
    "W4A8, patch similarity": synthesized(bounded=False),
    "W4A8, synthesized alone": ALONE,
    "W4A8, noise alone": ALONE.changed(calibration=Calibration.GAUSSIAN),
    "W4A8, one drawn image": DRAWN.changed(bits=4, activation_bits=8, recipe=replace(FAST.recipe, drawn=1)),
    "W4A8, no images": DRAWN.changed(
        bits=4, activation_bits=8, recipe=replace(FAST.recipe, drawn=0, compensate=False)
    ),
    "W4A4, preset static": Preset.STATIC.config,
    "W4A4, preset paper": Preset.PAPER.config,
}


def made(checkpoint: Checkpoint, config: QuantizationConfig, work: Path) -> Artifact:
    """The artifact of a configuration, kept in a folder."""
    path = work / f"{artifact_key(config, checkpoint.sha256, checkpoint.variant.name)}.safetensors"
    if not path.is_file():
        with progress_bars() as progress:
            write_artifact(quantize(checkpoint, config, progress=progress).artifact, path)
    return read_artifact(path)


def main(
    data: Annotated[Path, typer.Option()],
    work: Annotated[Path, typer.Option()],
    checkpoint: Annotated[Path, typer.Option()] = Path("lite-medsam"),
    ways: Annotated[str, typer.Option(help="With semicolons between.")] = "auto;W8A8;W4A8;W4A4",
    seeds: Annotated[str, typer.Option(help="With commas between.")] = "0,1,2",
    prompts: Annotated[str, typer.Option(help="With commas between.")] = "box,jittered",
    engine: Annotated[EngineKind, typer.Option()] = EngineKind.REFERENCE,
) -> None:
    """Quantizes in some ways and scores each beside full precision one grey level away."""
    work.mkdir(parents=True, exist_ok=True)
    source = read_checkpoint(find_checkpoint(checkpoint))
    reference = full_precision_segmenter(build(source))
    scored, facts = [], {}
    for way in ways.split(";"):
        for seed in map(int, seeds.split(",")):
            artifact = made(source, replace(WAYS[way], seed=seed), work)
            name, header = f"{way}, seed {seed}", artifact.header
            scored.append((load_segmenter(artifact, engine), {"model": name, "engine": engine.value}))
            facts[name] = {
                "checkpoint": source.variant.name,
                "form": label(header),
                "four_bit": header.get("four_bit"),
                "fidelity": header["fidelity"],
                "bytes": header["sizes"]["artifact_bytes"],
                "seconds": header["seconds"],
            }
    with progress_bars() as progress:
        rows = evaluate(data, beside_yardstick(reference, scored), reference, prompts.split(","), progress)
    for row in rows:
        told: dict[str, Any] = {**row, **facts.get(str(row["model"]), {})}
        typer.echo(json.dumps(told))


if __name__ == "__main__":
    typer.run(main)
