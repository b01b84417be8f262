"""Engines measured together: each in a process of its own, asked in turn, round after round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from monailabel_dfqsam.benchmark.child import Child, ChildError
from monailabel_dfqsam.config import Progress


class Session:
    """The engines' processes, and what they have told so far, which is complete after every round.

    Attributes:
        answers: by engine, what each call of its `turn` gave.
        facts: by engine, what its `facts` gave last.
        reasons: why an engine was not measured, or not to the end.
    """

    def __init__(
        self,
        engines: Sequence[str],
        start: Callable[[str], Child],
        reasons: dict[str, str],
        progress: Progress,
        label: str = "",
    ) -> None:
        """Starts nothing yet.

        Args:
            start: a process holding an object with the methods `turn` and `facts`.
            reasons: why some of the engines cannot be measured.
            label: what the progress says beside its stages.
        """
        self._engines, self._start = engines, start
        self.reasons = dict(reasons)
        self._progress, self._label = progress, label
        self._children: dict[str, Child] = {}
        self.answers: dict[str, list[Any]] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def load(self) -> None:
        """Starts and warms up every engine that can be measured, one after the other."""
        names = [name for name in self._engines if name not in self.reasons]
        for done, name in enumerate(names):
            self._progress(f"loading{self._label}", done, len(names))
            try:
                self._children[name] = self._start(name)
                self.facts[name] = self._children[name].call("facts")
            except ChildError as error:
                self._drop(name, str(error))
        self._progress(f"loading{self._label}", len(names), len(names))

    def measure(self, rounds: int) -> None:
        """Calls every engine once a round; each round begins with another, so that none always follows the
        same one."""
        for index in range(rounds):
            names = list(self._children)
            start = index % max(1, len(names))
            for turn, name in enumerate(names[start:] + names[:start]):
                self._progress(f"rounds{self._label}", index * len(names) + turn, rounds * len(names))
                self._turn(name)
        turns = rounds * max(1, len(self._children))
        self._progress(f"rounds{self._label}", turns, turns)

    def ask(self, name: str, method: str) -> Any:
        """What a method of an engine's object gives, None where the engine is not there.

        Raises:
            ChildError: when it raises, or the process is gone.
        """
        return self._children[name].call(method) if name in self._children else None

    def close(self) -> None:
        """Ends all processes."""
        for child in self._children.values():
            child.close()
        self._children.clear()

    def reason(self, name: str) -> str | None:
        """Why an engine has fewer answers than were asked for; None where it has them all."""
        count = len(self.answers.get(name, []))
        if not count:
            return self.reasons.get(name, "interrupted")
        return f"after {count} rounds: {self.reasons[name]}" if name in self.reasons else None

    def _turn(self, name: str) -> None:
        try:
            answer = self._children[name].call("turn")
            self.facts[name] = self._children[name].call("facts")
        except ChildError as error:
            self._drop(name, str(error))
            return
        self.answers.setdefault(name, []).append(answer)

    def _drop(self, name: str, reason: str) -> None:
        self.reasons[name] = reason
        if name in self._children:
            self._children.pop(name).close()


def statistics_of(seconds: Sequence[float]) -> dict[str, float | None]:
    """{median_s, min_s, p95_s, spread} of durations, `spread` = (p95 − min) / median; None each of none."""
    if not seconds:
        return dict.fromkeys(("median_s", "min_s", "p95_s", "spread"))
    median = statistics.median(seconds)
    p95 = float(np.percentile(seconds, 95))
    return {
        "median_s": median,
        "min_s": min(seconds),
        "p95_s": p95,
        "spread": (p95 - min(seconds)) / median,
    }
