"""A process of its own for each engine, driven through a pipe.

Engines do not share a process: OpenMP's and TBB's threads would wait beside each other, and a peak of memory
could not be told apart. The parent calls methods of one object in the child; calls are answered in turn, so
that at most one engine computes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

_IDLE_SECONDS = 1.0
_EXIT_SECONDS = 5.0


class ChildError(RuntimeError):
    """The child's method raised, or the child is gone; the message is one sentence."""


class Child:
    """A process holding `make(*arguments)`.

    Args:
        make: importable by name; what it imports at module level is loaded before it runs.
        log: receives what the child prints.

    Raises:
        ChildError: when `make` raises.
    """

    def __init__(self, make: Callable[..., object], *arguments: object, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, log, make, arguments))
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: object) -> Any:
        """The result of one method of the child's object.

        Raises:
            ChildError: when the method raises, or the child is gone.
        """
        try:
            self._pipe.send((method, arguments))
        except OSError:
            raise ChildError(self._ended()) from None
        return self._answer()

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._pipe.close()
        self._process.join(_IDLE_SECONDS)  # an idle child ends when its pipe is gone
        for end in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                end()
                self._process.join(_EXIT_SECONDS)
        self._process.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> Any:
        try:
            error, result = self._pipe.recv()
        except (EOFError, OSError):
            raise ChildError(self._ended()) from None
        if error is not None:
            raise ChildError(error)
        return result

    def _ended(self) -> str:
        self._process.join(_EXIT_SECONDS)
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return "its process was killed, most likely for want of memory"
        return f"its process ended with code {code}"


def _serve(pipe: Connection, log: Path, make: Callable[..., object], arguments: tuple[object, ...]) -> None:
    # Ctrl-C reaches the whole process group; the parent decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        target = make(*arguments)
    except Exception as error:
        pipe.send((_sentence(error), None))
        return
    pipe.send((None, None))
    while True:
        try:
            method, given = pipe.recv()
        except EOFError:
            return
        answer: tuple[str | None, Any]
        try:
            answer = (None, getattr(target, method)(*given))
        except Exception as error:
            answer = (_sentence(error), None)
        pipe.send(answer)


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0][:200] if lines else "no message"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
