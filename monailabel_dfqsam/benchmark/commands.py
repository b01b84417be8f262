"""The commands `dfqsam benchmark encoder`, `click` and `product`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from monailabel_dfqsam.benchmark.plan import ENGINES, VARIANTS, EncoderPlan, Place
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
    profile: Annotated[bool, typer.Option("--profile", help="Also where the time of 'native' goes.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Times the image encoder on our engines and on others', interleaved, and the floor of its products.

    Ctrl-C ends it early and keeps what was measured.
    """
    with plain_errors():
        chosen = {"threads": threads, "batches": tuple(batch or ()) or None, "engines": names(engines)}
        plan = EncoderPlan(
            variant=variant, place=device, checkpoint=checkpoint, repeats=repeats, profile=profile,
            **given(chosen),
        )  # fmt: skip
        from monailabel_dfqsam.benchmark.encoder import measure_encoder
        from monailabel_dfqsam.benchmark.table import print_encoder

        run(lambda save, progress: measure_encoder(plan, save, progress), print_encoder, json_file)


@benchmark.command()
def click(
    clicks: Annotated[int, typer.Option(help="How many clicks on a cached slice.")] = 200,
    shape: Annotated[str, typer.Option(metavar="I,J,K", help="Of the volume.")] = "512,512,100",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A file, lite, tiny or lite-medsam; lite without it.", show_default=False),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Times clicks over HTTP as a viewer makes them, and what each one's time goes to."""
    with plain_errors():
        sizes = _shape(shape, "--shape takes three sizes, like 512,512,100")
        from monailabel_dfqsam.benchmark.click import measure_clicks
        from monailabel_dfqsam.benchmark.machine import describe_run
        from monailabel_dfqsam.benchmark.table import print_clicks

        described = describe_run()
        with progress_bars() as progress:
            found = measure_clicks(clicks=clicks, shape=sizes, checkpoint=checkpoint, progress=progress)
        write_json(json_file, {**described, **found})
    print_clicks(found)


@benchmark.command()
def product(
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="M,N,K", help="May be repeated; ViTs' own without it.", show_default=False),
    ] = None,
    threads: Annotated[int, typer.Option(help="For all of them.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Times integer products alone: our kernels of every instruction set here, torch float32, oneDNN int8."""
    with plain_errors():
        shapes = [_shape(text, "--shape takes three sizes, like 256,3072,768") for text in shape or ()]
        from monailabel_dfqsam.benchmark.machine import describe_run
        from monailabel_dfqsam.benchmark.product import SHAPES, measure_products
        from monailabel_dfqsam.benchmark.table import print_products

        described = describe_run()
        with progress_bars() as progress:
            found = {**described, **measure_products(shapes or SHAPES, threads, progress)}
        write_json(json_file, found)
    print_products(found)


def names(text: str | None) -> tuple[str, ...] | None:
    """A text with commas as its parts."""
    return None if text is None else tuple(name.strip() for name in text.split(","))


def given(chosen: dict[str, Any]) -> dict[str, Any]:
    """What is not None."""
    return {key: value for key, value in chosen.items() if value is not None}


def run(
    measure: Callable[[Callable[[dict[str, Any]], None], Progress], object],
    show: Callable[[dict[str, Any]], None],
    json_file: Path | None,
) -> None:
    """Measures, and shows what was found, after Ctrl-C too."""
    found: dict[str, Any] = {}

    def save(result: dict[str, Any]) -> None:
        found.update(result)
        write_json(json_file, result)

    try:
        with progress_bars() as progress:
            measure(save, progress)
    except KeyboardInterrupt:
        if found:
            show(found)
        raise typer.Exit(_INTERRUPTED) from None
    show(found)


def _shape(text: str, wanted: str) -> tuple[int, int, int]:
    numbers = text.replace("×", ",").replace("x", ",").split(",")
    if len(numbers) != 3 or not all(number.strip().isdigit() and int(number) for number in numbers):
        raise ValueError(f"{wanted}, not '{text}'")
    i, j, k = (int(number) for number in numbers)
    return i, j, k


def write_json(path: Path | None, result: Any) -> None:
    """Writes a result; nothing without a path."""
    if path is not None:
        with replacing(path) as partial:
            partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
