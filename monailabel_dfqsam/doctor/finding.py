"""What the doctor says about one thing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(str, Enum):
    """How much it matters."""

    FINE = "fine"
    WARNING = "warning"  # it serves, but slower, or without something
    PROBLEM = "problem"  # it does not serve


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        part: what it belongs to: 'software', 'machine', 'engines', 'viewers', 'studies', 'settings', 'model'.
        name: of the thing looked at.
        text: what was found.
        remedy: what to do about it, a sentence; None where nothing is to be done.
    """

    part: str
    name: str
    text: str
    level: Level = Level.FINE
    remedy: str | None = None

    @classmethod
    def judged(
        cls, fine: bool, part: str, name: str, text: str, otherwise: Level, remedy: str | None
    ) -> Finding:
        """`otherwise` and `remedy` count where it is not fine."""
        return cls(part, name, text) if fine else cls(part, name, text, otherwise, remedy)
