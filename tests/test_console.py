"""Progress where no terminal is: the lines of a log, by a clock that the test turns."""

from __future__ import annotations

import subprocess
import sys

from monailabel_dfqsam.console import ProgressLines


class Log:
    """Lines, and the clock by which they are written."""

    def __init__(self) -> None:
        self.now = 100.0
        self.lines: list[str] = []
        self.progress = ProgressLines(self.lines.append, lambda: self.now)

    def later(self, seconds: float, stage: str, done: int, total: int, text: str = "") -> None:
        self.now += seconds
        self.progress.update(stage, done, total, text)


def test_a_line_every_ten_seconds_and_one_at_the_end() -> None:
    log = Log()
    log.later(0, "synthesis", 0, 200)
    for done in range(1, 201):
        log.later(0.125, "synthesis", done, 200)
    assert log.lines == [
        "synthesis: 80 of 200, 40 %, 10.0 s, about 15.0 s left",
        "synthesis: 160 of 200, 80 %, 20.0 s, about 5.0 s left",
        "synthesis: 200 of 200, 100 %, 25.0 s",
    ]


def test_a_long_step_is_no_silence() -> None:
    log = Log()
    log.later(0, "quantizing", 0, 1)
    for _ in range(25):
        log.now += 1
        log.progress.tick()
    log.later(5, "quantizing", 1, 1)
    assert log.lines == [
        "quantizing: 0 of 1, 0 %, 10.0 s",
        "quantizing: 0 of 1, 0 %, 20.0 s",
        "quantizing: 1 of 1, 100 %, 30.0 s",
    ]


def test_each_stage_has_its_own_clock_and_one_end() -> None:
    log = Log()
    log.later(0, "one", 1, 2)
    log.later(3, "one", 2, 2)
    log.later(20, "one", 2, 2)
    log.progress.tick()
    log.later(40, "two", 0, 2)
    log.later(1, "two", 2, 2)
    log.later(1, "two", 0, 2)  # the same again, of another model
    log.later(2, "two", 2, 2)
    assert [line for line in log.lines if "100 %" in line] == [
        "one: 2 of 2, 100 %, 3.0 s",
        "two: 2 of 2, 100 %, 1.0 s",
        "two: 2 of 2, 100 %, 2.0 s",
    ]


def test_work_that_is_resumed_is_estimated_by_what_this_run_did() -> None:
    log = Log()
    log.later(0, "training", 500, 1000)
    log.later(20, "training", 600, 1000, "loss 0.300")
    assert log.lines == ["training: 600 of 1000, 60 %, 20.0 s, about 1 min 20 s left; loss 0.300"]


def test_a_file_gets_lines_without_control_characters() -> None:
    code = (
        "from monailabel_dfqsam.console import progress_bars, training_bar\n"
        "with progress_bars() as progress: progress('a [stage]', 0, 2), progress('a [stage]', 2, 2)\n"
        "with training_bar() as progress: progress('loss 1', 3, 3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "a [stage]: 2 of 2, 100 %, 0.0 s",
        "training: 3 of 3, 100 %, 0.0 s; loss 1",
    ]
