"""Processes driven by pipes: answers, errors, death, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from monailabel_dfqsam.benchmark.child import Child, ChildError


class Adder:
    def __init__(self, start: int) -> None:
        if start < 0:
            raise ValueError("a start must not be negative\nand more")
        print("made", flush=True)
        self.total = start

    def add(self, number: int) -> int:
        self.total += number
        return self.total

    def pid(self) -> int:
        return os.getpid()

    def fail(self) -> None:
        raise RuntimeError("no such product")

    def die(self, code: int) -> None:
        os.kill(os.getpid(), code)

    def sleep(self) -> None:
        time.sleep(3600)


def test_calls_reach_one_object_in_another_process(tmp_path: Path) -> None:
    with Child(Adder, 3, log=tmp_path / "log") as child:
        assert [child.call("add", 4), child.call("add", 5)] == [7, 12]
        assert child.call("pid") != os.getpid()
    assert (tmp_path / "log").read_text() == "made\n"


def test_errors_come_back_as_one_sentence_and_the_child_goes_on(tmp_path: Path) -> None:
    with pytest.raises(ChildError, match=r"^a start must not be negative$"):
        Child(Adder, -1, log=tmp_path / "log")
    with Child(Adder, 0, log=tmp_path / "log") as child:
        with pytest.raises(ChildError, match=r"^RuntimeError: no such product$"):
            child.call("fail")
        assert child.call("add", 1) == 1


def test_a_killed_child_is_told_apart(tmp_path: Path) -> None:
    with (
        Child(Adder, 0, log=tmp_path / "log") as child,
        pytest.raises(ChildError, match="killed, most likely for want of memory"),
    ):
        child.call("die", signal.SIGKILL)
    with Child(Adder, 0, log=tmp_path / "log") as child:
        with pytest.raises(ChildError, match="ended with code -6"):
            child.call("die", signal.SIGABRT)
        with pytest.raises(ChildError):
            child.call("add", 1)


def test_ctrl_c_is_the_parents_business(tmp_path: Path) -> None:
    with Child(Adder, 0, log=tmp_path / "log") as child:
        os.kill(child.call("pid"), signal.SIGINT)
        assert child.call("add", 1) == 1


def test_closing_ends_a_busy_child(tmp_path: Path) -> None:
    child = Child(Adder, 0, log=tmp_path / "log")
    pid = child.call("pid")
    child._pipe.send(("sleep", ()))
    child.close()  # its sleep is longer than this test may take
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
