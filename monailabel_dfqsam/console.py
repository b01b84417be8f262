"""What the commands share: progress bars and errors on stderr, results on stdout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from monailabel_dfqsam.config import Progress as ProgressCallback
from monailabel_dfqsam.memory import MemoryShortage

errors = Console(stderr=True, highlight=False)
output = Console(highlight=False)


@contextmanager
def progress_bars() -> Iterator[ProgressCallback]:
    """A progress callback that draws one bar a stage on stderr."""
    bars = _bars()
    tasks: dict[str, TaskID] = {}

    def progress(stage: str, done: int, total: int) -> None:
        bars.start()  # not before there is something to show: an error would come after an empty line
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, text="")
        bars.update(tasks[stage], completed=done, total=total)

    try:
        yield progress
    finally:
        if tasks:
            bars.stop()


@contextmanager
def training_bar() -> Iterator[ProgressCallback]:
    """One bar whose text changes: the callback's first argument stands behind it."""
    bars = _bars()
    task = bars.add_task("training", text="")

    def progress(text: str, done: int, total: int) -> None:
        bars.start()  # of several processes that train together only one reports
        bars.update(task, completed=done, total=total, text=text)

    try:
        yield progress
    finally:
        bars.stop()


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
        console=errors,
    )


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turns what is wrong with the input into one sentence on stderr and exit code 1, without a traceback."""
    try:
        yield
    # CheckpointError and ArtifactError are ValueErrors.
    except (ValueError, OSError, MemoryShortage) as error:
        errors.print(f"Error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def print_rows(rows: Mapping[str, str]) -> None:
    """Names and values in two columns."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, text)
    output.print(table)
