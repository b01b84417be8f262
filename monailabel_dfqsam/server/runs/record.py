"""What a run is: one frozen record with an id, written before its process starts; the process updates it.

    queued → running → published | rejected | failed | stopped

`published`: its artifact serves. `rejected`: made, but not good enough to serve. `failed`: it ended without a
result, `error` says why. `stopped`: somebody stopped it, or its server ended.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import Any

from monailabel_dfqsam.agreement import Fidelity

_ID = re.compile(r"[0-9a-f]{32}")


class RunState(str, Enum):
    """Where a run is."""

    QUEUED = "queued"
    RUNNING = "running"
    PUBLISHED = "published"
    REJECTED = "rejected"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self not in (RunState.QUEUED, RunState.RUNNING)


def _new_id() -> str:
    return uuid.uuid4().hex


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


@dataclass(frozen=True)
class Run:
    """One quantization or fine-tuning.

    Attributes:
        trainer: its trainer's name.
        options: what was chosen, whole, by its name in a request.
        id: 32 hexadecimal digits.
        created: when it was accepted, ISO 8601 in UTC.
        ended: when it ended, likewise, or "".
        stage: what it does now, a word; "" before its process says so.
        step, steps: how much of the stage is done.
        seconds: since its process began to work.
        key: of the artifact it makes, "" before that is known.
        fidelity: agreement with full precision, where it was measured.
        error: why it was not published, a sentence, or "".
        pid: of its process, None before there is one.
        began: when that process began, seconds after the machine's start; None as long as `pid` is.
    """

    trainer: str
    options: Mapping[str, Any]
    id: str = field(default_factory=_new_id)
    created: str = field(default_factory=_now)
    ended: str = ""
    state: RunState = RunState.QUEUED
    stage: str = ""
    step: int = 0
    steps: int = 1
    seconds: float = 0.0
    key: str = ""
    fidelity: Fidelity | None = None
    error: str = ""
    pid: int | None = None
    began: float | None = None

    def after(self, last: Run | None) -> Run:
        """This run, created later than another one even if the clock has been set back since."""
        if last is None or last.created < self.created:
            return self
        with contextlib.suppress(ValueError):  # of a record that somebody wrote by hand
            moment = datetime.fromisoformat(last.created) + timedelta(microseconds=1)
            return replace(self, created=moment.isoformat(timespec="microseconds"))
        return self

    def end(self, state: RunState, error: str = "", fidelity: Fidelity | None = None) -> Run:
        """The record of this run ended now."""
        return replace(self, state=state, error=error, fidelity=fidelity, ended=_now())

    def as_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "state": self.state.value}

    def told(self) -> dict[str, Any]:
        """As plain JSON values for clients, whom its process does not concern."""
        values = self.as_json()
        del values["pid"], values["began"]
        return values


def run_from_json(values: Any) -> Run:
    """The inverse of `Run.as_json`.

    Raises:
        ValueError: for anything else.
    """
    names = {one.name for one in fields(Run)}
    # Records of earlier versions do not say when their process began.
    whole = isinstance(values, dict) and set(values) | {"began"} == names
    if not whole or not is_run_id(values["id"]):
        raise ValueError("this is not the record of a run")
    # Those of earlier versions say a mean without its yardstick.
    fidelity = values["fidelity"] if isinstance(values["fidelity"], dict) else None
    return Run(**{**values, "state": RunState(values["state"]), "fidelity": fidelity})


def is_run_id(text: object) -> bool:
    """Whether a text can be a run's id, and so never a path."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None
