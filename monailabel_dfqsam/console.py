"""What the commands share: progress and errors on stderr, results on stdout."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from monailabel_dfqsam.config import Progress as ProgressCallback
from monailabel_dfqsam.memory import MemoryShortage
from monailabel_dfqsam.numbers import in_seconds

errors = Console(stderr=True, highlight=False)
output = Console(highlight=False)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]

_LINE_SECONDS = 10.0

_Show = Callable[[str, int, int, str], None]
"""Stage, done, total, and a text that may be empty."""


@contextmanager
def progress_bars() -> Iterator[ProgressCallback]:
    """A progress callback that draws one bar a stage on stderr, or writes lines where that is no terminal."""
    with _shown() as show:
        yield lambda stage, done, total: show(stage, done, total, "")


@contextmanager
def training_bar() -> Iterator[ProgressCallback]:
    """The same for one stage whose text changes: the callback's first argument stands behind it."""
    with _shown() as show:
        yield lambda text, done, total: show("training", done, total, text)


class ProgressLines:
    """Progress for a log: a line about every ten seconds, and one at each stage's end.

    Safe between threads: `update` is the work's, `tick` that of whoever looks at the clock.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """`write` takes a line, `clock` gives seconds."""
        self._write, self._clock = write, clock
        self._lock = threading.Lock()
        self._stage, self._text = "", ""
        self._first = self._done = self._total = 0
        self._begin = self._written = clock()

    def update(self, stage: str, done: int, total: int, text: str = "") -> None:
        """The stage's first report, wherever that begins, starts its clock."""
        with self._lock:
            if stage != self._stage or done < self._done:
                self._begin, self._first = self._clock(), done
            elif self._done == self._total:
                return  # its end was told
            self._stage, self._done, self._total, self._text = stage, done, total, text
            if done >= total:
                self._tell()
        self.tick()

    def tick(self) -> None:
        """Writes where the last line is ten seconds old and the stage goes on."""
        with self._lock:
            if self._done < self._total and self._clock() - self._written >= _LINE_SECONDS:
                self._tell()

    def _tell(self) -> None:
        self._written = self._clock()
        elapsed, done = self._written - self._begin, self._done - self._first
        left = self._total - self._done
        line = f"{self._stage}: {self._done} of {self._total}, {100 * self._done // max(1, self._total)} %, "
        line += in_seconds(elapsed)
        if left and done:
            line += f", about {in_seconds(elapsed / done * left)} left"
        self._write(f"{line}; {self._text}" if self._text else line)


def _shown() -> AbstractContextManager[_Show]:
    return _bars() if sys.stderr.isatty() else _lines()


@contextmanager
def _lines() -> Iterator[_Show]:
    lines = ProgressLines(lambda line: errors.print(line, markup=False, soft_wrap=True))
    over = threading.Event()

    def look() -> None:
        while not over.wait(1.0):  # a step of the work may take longer than there should be silence
            lines.tick()

    looking = threading.Thread(target=look, name="dfqsam-progress", daemon=True)
    looking.start()
    try:
        yield lines.update
    finally:
        over.set()
        looking.join()


@contextmanager
def _bars() -> Iterator[_Show]:
    bars = Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
        console=errors,
    )
    tasks: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int, text: str) -> None:
        # Not before there is something: an error would come after an empty line, and of several processes
        # that train together only one reports.
        bars.start()
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, text=text)
        bars.update(tasks[stage], completed=done, total=total, text=text)

    try:
        yield show
    finally:
        if tasks:
            bars.stop()


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
