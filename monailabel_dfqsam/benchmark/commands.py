"""The commands `dfqsam benchmark encoder`, `volume`, `click` and `load`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from monailabel_dfqsam.benchmark.plan import ENGINES, VARIANTS, VOLUME_ENGINES, EncoderPlan, Place, VolumePlan
from monailabel_dfqsam.config import Progress
from monailabel_dfqsam.console import plain_errors, progress_bars
from monailabel_dfqsam.files import replacing

benchmark = typer.Typer(
    help="Measures speed and memory, beside what one would use instead.", no_args_is_help=True
)

_INTERRUPTED = 130

JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write all that was found to this file.", show_default=False)
]


@benchmark.command()
def encoder(
    variant: Annotated[str, typer.Option(metavar="|".join(VARIANTS), help="The model.")],
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Images a call, may be repeated; 1 without it.", show_default=False),
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option(help=f"With commas between, of {', '.join(ENGINES)}.", show_default=False),
    ] = None,
    device: Annotated[Place, typer.Option(help="Where they run.")] = Place.CPU,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights; by seed without it.", show_default=False)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="For every engine; one a core without it.", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed calls of every engine.")] = EncoderPlan.repeats,
    profile: Annotated[bool, typer.Option("--profile", help="Also where the time of 'onednn' goes.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Times the image encoder on our engines and on others', interleaved, and the floor of its products.

    Ctrl-C ends it early and keeps what was measured.
    """
    with plain_errors():
        chosen = {"threads": threads, "batches": tuple(batch or ()) or None, "engines": _names(engines)}
        plan = EncoderPlan(
            variant=variant, place=device, checkpoint=checkpoint, repeats=repeats, profile=profile,
            **_given(chosen),
        )  # fmt: skip
        from monailabel_dfqsam.benchmark.encoder import measure_encoder
        from monailabel_dfqsam.benchmark.table import print_encoder

        _run(lambda save, progress: measure_encoder(plan, save, progress), print_encoder, json_file)


@benchmark.command()
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
            **_given({"threads": threads, "engines": _names(engines)}),
        )  # fmt: skip
        from monailabel_dfqsam.benchmark.table import print_volume
        from monailabel_dfqsam.benchmark.volume import measure_volume

        _run(lambda save, progress: measure_volume(plan, save, progress), print_volume, json_file)


@benchmark.command()
def click(
    clicks: Annotated[int, typer.Option(help="How many clicks on a cached slice.")] = 200,
    shape: Annotated[str, typer.Option(metavar="I,J,K", help="Of the volume.")] = "512,512,100",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights; the embedded ones without it.", show_default=False)
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Times clicks over HTTP as a viewer makes them, and what each one's time goes to."""
    with plain_errors():
        sizes = _shape(shape)
        from monailabel_dfqsam.benchmark.click import measure_clicks
        from monailabel_dfqsam.benchmark.machine import describe_run
        from monailabel_dfqsam.benchmark.table import print_clicks

        run = describe_run()
        with progress_bars() as progress:
            found = measure_clicks(clicks=clicks, shape=sizes, checkpoint=checkpoint, progress=progress)
        _write(json_file, {**run, **found})
    print_clicks(found)


@benchmark.command()
def load(
    clients: Annotated[int, typer.Option(help="Annotators at once, a volume each.")] = 8,
    seconds: Annotated[float, typer.Option(help="For how long they click.")] = 180.0,
    json_file: JsonFile = None,
) -> None:
    """Lets many annotators click at once while the server quantizes, and checks each of their masks.

    Exits with status 1 after an error or a wrong mask.
    """
    with plain_errors():
        from monailabel_dfqsam.benchmark.load import measure_load
        from monailabel_dfqsam.benchmark.machine import describe_run
        from monailabel_dfqsam.benchmark.table import print_load

        run = describe_run()
        with progress_bars() as progress:
            found = measure_load(clients=clients, seconds=seconds, progress=progress)
        _write(json_file, {**run, **found})
    print_load(found)
    if found["errors"] or found["wrong"]:
        raise typer.Exit(1)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def _given(chosen: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in chosen.items() if value is not None}


def _run(
    measure: Callable[[Callable[[dict[str, Any]], None], Progress], object],
    show: Callable[[dict[str, Any]], None],
    json_file: Path | None,
) -> None:
    """Measures, and shows what was found, after Ctrl-C too."""
    found: dict[str, Any] = {}

    def save(result: dict[str, Any]) -> None:
        found.update(result)
        _write(json_file, result)

    try:
        with progress_bars() as progress:
            measure(save, progress)
    except KeyboardInterrupt:
        if found:
            show(found)
        raise typer.Exit(_INTERRUPTED) from None
    show(found)


def _shape(text: str) -> tuple[int, int, int]:
    numbers = text.replace("×", ",").replace("x", ",").split(",")
    if len(numbers) != 3 or not all(number.strip().isdigit() for number in numbers):
        raise ValueError(f"--shape takes three sizes, like 512,512,100, not '{text}'")
    i, j, k = (int(number) for number in numbers)
    return i, j, k


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        with replacing(path) as partial:
            partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
