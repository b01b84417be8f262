"""The command line `dfqsam`.

Imports that cost more than a blink stand inside the commands, so that `dfqsam --help` answers at once.
Progress goes to stderr and results to stdout, so that `--json` can be piped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from monailabel_dfqsam.benchmark.commands import benchmark
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.console import (
    JsonFlag,
    output,
    plain_errors,
    print_rows,
    progress_bars,
    training_bar,
)
from monailabel_dfqsam.export.commands import export
from monailabel_dfqsam.files import replacing
from monailabel_dfqsam.machine import own_memory
from monailabel_dfqsam.numbers import in_bytes, in_seconds
from monailabel_dfqsam.quantize_command import quantize

app = typer.Typer(
    help="Segment Anything for MONAI Label, quantized to 4 bit without data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # locals may hold what a patient's file says
)
app.add_typer(benchmark, name="benchmark")
app.command()(quantize)
app.command()(export)


class Device(str, Enum):
    """Where training runs."""

    CPU = "cpu"
    CUDA = "cuda"


class Trained(str, Enum):
    """The embedded networks."""

    SAM = "sam"
    LITE = "lite"
    AUXILIARY = "auxiliary"


class InspectedKind(str, Enum):
    """What `inspect` found."""

    ARTIFACT = "artifact"
    CHECKPOINT = "checkpoint"


@app.command(context_settings={"allow_extra_args": True})
def serve(
    context: typer.Context,
    studies: Annotated[str, typer.Option(help="A folder of images, or the URL of a DICOMweb archive.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is everyone's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Weights to serve: a file, lite, tiny or lite-medsam; lite without it.", show_default=False
        ),
    ] = None,
    app_dir: Annotated[
        Path | None,
        typer.Option(
            "--app", help="Folder for models and logs; the user's data folder without it.", show_default=False
        ),
    ] = None,
) -> None:
    """Serves 3D Slicer and OHIF, and quantizes the model at the first start.

    Options of MONAI Label follow after --, for instance: -- --conf preset best
    """
    with plain_errors():
        from monailabel_dfqsam.server.serve import serve as run

        run(studies, host, port, checkpoint, app_dir, context.args)


@app.command()
def doctor(
    studies: Annotated[
        str | None,
        typer.Option(help="A folder of images, or the URL of a DICOMweb archive.", show_default=False),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Weights to serve: a file, lite, tiny or lite-medsam; lite without it.", show_default=False
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Says whether a server would serve here, how fast, and what to do about what is wrong.

    Exit status 1 when something prevents serving. Only the archive that is named is asked anything.
    """
    with plain_errors():
        from monailabel_dfqsam.doctor import diagnose
        from monailabel_dfqsam.doctor.telling import as_json as for_machines
        from monailabel_dfqsam.doctor.telling import print_diagnosis

        diagnosis = diagnose(studies, checkpoint)
    if as_json:
        typer.echo(json.dumps(for_machines(diagnosis), indent=2))
    else:
        print_diagnosis(diagnosis)
    if not diagnosis.serves:
        raise typer.Exit(1)


@app.command()
def demo(
    studies: Annotated[
        Path | None,
        typer.Option(
            help="Volumes with masks named <image>_<label>; phantoms without it.", show_default=False
        ),
    ] = None,
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="Weights to serve, as `serve` takes them: tiny is quantized in a minute or two, lite in "
            "a quarter of an hour on two cores."
        ),
    ] = Path("tiny"),
    out: Annotated[Path, typer.Option(help="Folder for pictures, report and results.")] = Path("demo-output"),
) -> None:
    """Plays a Slicer session against the real server: clicks, quantizes, clicks again, compares."""
    with plain_errors():
        from monailabel_dfqsam.demo.play import run
        from monailabel_dfqsam.slicer_session import ServerAnswer

        try:
            complete = run(studies, out, checkpoint)
        except ServerAnswer as error:
            raise ValueError(f"the server refused a request: {error}") from None
    if not complete:
        raise typer.Exit(1)


@app.command()
def evaluate(
    data: Annotated[
        Path,
        typer.Option(
            help="Pictures with manifest.jsonl, SAM-Med2D's JSON or its folder, volumes with masks, or "
            "imagesTr and labelsTr."
        ),
    ],
    model: Annotated[
        list[Path] | None,
        typer.Option(
            help="A checkpoint, lite, tiny, lite-medsam or an artifact, may be repeated; lite and tiny "
            "without it.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        list[EngineKind] | None,
        typer.Option(
            help="What runs artifacts, may be repeated; the fastest here without it.", show_default=False
        ),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(help="Kinds of prompts of box, jittered, point, points5, clicks5, with commas between."),
    ] = "box,point",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the rows to this file.", show_default=False)
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Also write a page with the tables and pictures of the worst and best answers.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Scores models on images with known masks, beside baselines that need no model.

    `points5` is one click and four corrective ones, each on a pixel that the model's last answer has wrong;
    of `clicks5` they lie in the middle of what it has wrong, as people click.
    """
    with plain_errors():
        for file in (json_file, html):
            if file is not None and not file.parent.is_dir():
                raise ValueError(f"there is no folder '{file.parent}' to write '{file.name}' in")
        from monailabel_dfqsam.benchmark.machine import describe_run
        from monailabel_dfqsam.evaluation import evaluate as score
        from monailabel_dfqsam.evaluation.models import beside_yardstick, load_groups
        from monailabel_dfqsam.evaluation.page import Gallery, run_facts, write_page
        from monailabel_dfqsam.evaluation.table import print_rows as print_scores

        run, begin = describe_run(), time.monotonic()
        gallery = Gallery()
        rows: list[dict[str, Any]] = []
        with progress_bars() as progress:
            for reference, segmenters in load_groups(model or [], engine or []):
                scored = beside_yardstick(reference, segmenters)
                rows += score(data, scored, reference, prompts.split(","), progress, gallery.add)
        if json_file is not None:
            with replacing(json_file) as partial:
                partial.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        cost = f"{in_seconds(time.monotonic() - begin)}, at most {in_bytes(own_memory('VmHWM'))} of memory"
        if html is not None:
            write_page(html, rows, gallery, run_facts(run, data, cost))
    print_scores(rows)
    output.print(f"The whole took {cost}.")


@app.command()
def inspect(
    file: Annotated[
        Path,
        typer.Argument(help="A checkpoint, lite, tiny, lite-medsam or an artifact of `dfqsam quantize`."),
    ],
    as_json: JsonFlag = False,
) -> None:
    """Shows what a checkpoint or an artifact is, after checking that it is whole."""
    with plain_errors():
        found = _inspect(file)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    layers = found.pop("layers", {})
    rows = {key.replace("_", " "): _one_line(value) for key, value in found.items()}
    if layers:
        rows["quantized layers"] = str(len(layers))
    print_rows(rows)


def _one_line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_one_line(inner)}" for key, inner in value.items())
    return str(value)


def _inspect(file: Path) -> dict[str, Any]:
    from monailabel_dfqsam.artifact import ArtifactError, read_artifact
    from monailabel_dfqsam.sam import CheckpointError, find_checkpoint, read_checkpoint

    file = find_checkpoint(file)
    if not file.is_file():
        raise ValueError(f"there is no file '{file}'")
    refused: ArtifactError | None = None
    if file.suffix == ".safetensors":
        try:
            return {"kind": InspectedKind.ARTIFACT.value, **read_artifact(file).header}
        except ArtifactError as error:
            refused = error
    try:
        checkpoint = read_checkpoint(file)
    except CheckpointError as error:
        if refused is not None:
            raise ValueError(f"neither an artifact ({refused}) nor a checkpoint ({error})") from None
        raise
    variant = checkpoint.variant
    return {
        "kind": InspectedKind.CHECKPOINT.value,
        "variant": variant.name,
        "sha256": checkpoint.sha256,
        "input_size": variant.input_size,
        "encoder": ", ".join(
            f"{len(list(equal))} blocks of width {dim}, {heads} heads"
            for (dim, heads), equal in groupby(variant.blocks, lambda block: (block.dim, block.heads))
        ),
        "tensors": len(checkpoint.state_dict),
        "parameters": sum(tensor.numel() for tensor in checkpoint.state_dict.values()),
        "bytes": file.stat().st_size,
    }


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder for the weights and the state to resume from.")],
    steps: Annotated[int, typer.Option(min=1, help="Training steps in all, those already done included.")],
    device: Annotated[Device, typer.Option(help="Where to train.")] = Device.CPU,
    what: Annotated[Trained, typer.Option(help="Which of the embedded networks.")] = Trained.SAM,
    start: Annotated[
        Path | None,
        typer.Option(
            help="Weights to begin with, as lite-medsam, unless the folder holds a state to resume from.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the phantoms; another one shows others.")] = 0,
) -> None:
    """Trains an embedded network on phantoms; resumes where the folder's last run stopped.

    On several cores: torchrun --nproc-per-node CORES --no-python -- dfqsam pretrain …
    """
    with plain_errors():
        import torch

        if device is Device.CUDA and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device here")
        train = _trainer(what, steps, start, seed)
        out.mkdir(parents=True, exist_ok=True)
        with training_bar() as progress:
            path = train(out, torch.device(device.value), progress)
    output.print(f"Wrote {path}", markup=False)


def _trainer(what: Trained, steps: int, start: Path | None, seed: int) -> Callable[..., Path]:
    """(out, device, progress) -> the file written."""
    if what is Trained.AUXILIARY and start is not None:
        raise ValueError("--start is for --what sam and --what lite alone")
    if what is Trained.LITE and start is None:
        raise ValueError("--what lite needs --start: lite, lite-medsam, or weights of an earlier training")
    from monailabel_dfqsam.sam import read_checkpoint

    begin = None if start is None else read_checkpoint(start)
    if what is not Trained.AUXILIARY:
        from monailabel_dfqsam.pretraining.decoder import DECODER_CONFIG, train_decoder
        from monailabel_dfqsam.pretraining.loop import PretrainConfig
        from monailabel_dfqsam.pretraining.train import train_sam

        lite = what is Trained.LITE
        train: Callable[..., Path] = train_decoder if lite else train_sam
        own = replace(DECODER_CONFIG if lite else PretrainConfig(steps=steps), steps=steps, seed=seed)
        return lambda out, device, progress: train(
            out, own, device, lambda done, total, text: progress(text, done, total), begin
        )
    from monailabel_dfqsam.pretraining.auxiliary_network import AUXILIARY_CONFIG, train_auxiliary

    config = replace(AUXILIARY_CONFIG, steps=steps, seed=AUXILIARY_CONFIG.seed + seed)
    return lambda out, device, progress: train_auxiliary(
        out, config, device, lambda done, total, text: progress(text, done, total)
    )
