"""`python -m benchmarks volume`, `load` and `propagation`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.volume import VOLUME_ENGINES, VolumePlan
from monailabel_dfqsam.benchmark.commands import JsonFile, given, names, run, write_json
from monailabel_dfqsam.benchmark.plan import VARIANTS
from monailabel_dfqsam.console import plain_errors, progress_bars

app = typer.Typer(help="Measures what only developers ask.", no_args_is_help=True)


@app.command()
def volume(
    variant: Annotated[str, typer.Option(metavar="|".join(VARIANTS), help="The model.")] = VolumePlan.variant,
    engines: Annotated[
        str | None,
        typer.Option(help=f"With commas between, of {', '.join(VOLUME_ENGINES)}.", show_default=False),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Weights; without it by seed, for 'tiny' the embedded ones.", show_default=False),
    ] = None,
    slices: Annotated[int, typer.Option(help="How many at most.")] = VolumePlan.slices,
    image: Annotated[
        Path | None,
        typer.Option("--volume", help="An image file; a phantom without it.", show_default=False),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="Of an object in it, whose boxes are the prompts.", show_default=False),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="For every engine; one a core without it.", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(help="Of the volume on every engine.")] = VolumePlan.repeats,
    json_file: JsonFile = None,
) -> None:
    """Times a whole CT volume, slice by slice with a box each, from pixels to masks, on several engines.

    Ctrl-C ends it early and keeps what was measured.
    """
    with plain_errors():
        plan = VolumePlan(
            variant=variant, checkpoint=checkpoint, slices=slices, volume=image, mask=mask, repeats=repeats,
            **given({"threads": threads, "engines": names(engines)}),
        )  # fmt: skip
        from benchmarks.tables import print_volume
        from benchmarks.volume import measure_volume

        run(lambda save, progress: measure_volume(plan, save, progress), print_volume, json_file)


@app.command()
def load(
    clients: Annotated[int, typer.Option(help="Annotators at once, a volume each.")] = 8,
    seconds: Annotated[float, typer.Option(help="For how long they click.")] = 180.0,
    json_file: JsonFile = None,
) -> None:
    """Lets many annotators click at once while the server quantizes, and checks each of their masks.

    Exits with status 1 after an error or a wrong mask.
    """
    with plain_errors():
        from benchmarks.load import measure_load
        from benchmarks.tables import print_load
        from monailabel_dfqsam.benchmark.machine import describe_run

        described = describe_run()
        with progress_bars() as progress:
            found = measure_load(clients=clients, seconds=seconds, progress=progress)
        write_json(json_file, {**described, **found})
    print_load(found)
    if found["errors"] or found["wrong"]:
        raise typer.Exit(1)


@app.command()
def propagation(
    folder: Annotated[Path, typer.Argument(help="Volumes with masks named <image>_<label>.")],
    model: Annotated[
        list[Path] | None,
        typer.Option(help="An artifact or a checkpoint, may be repeated; lite and tiny without it."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Scores objects through volumes, prompted as an ideal person would."""
    with plain_errors():
        from benchmarks.propagation import evaluate_volumes
        from benchmarks.tables import print_propagation
        from monailabel_dfqsam.evaluation.models import load_groups
        from monailabel_dfqsam.phantom_study import find_pairs

        rows: list[dict[str, Any]] = []
        for reference, named in load_groups(model or [], ()):
            scored = [one for one in named if one[0] is not reference]
            meta = {"model": reference.variant.name, "engine": "torch"}
            rows += evaluate_volumes(find_pairs(folder), reference, [(reference, meta), *scored])
        write_json(json_file, rows)
    print_propagation(rows)


if __name__ == "__main__":
    app()
