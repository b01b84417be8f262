"""Numbers as people read them."""

from __future__ import annotations


def in_bytes(count: float) -> str:
    """Bytes for people, decimal units: 2.5 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def in_seconds(seconds: float) -> str:
    """A duration for people: 8.2 s, 3 min 20 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def in_thousands(count: float) -> str:
    """A count of operations for people, three digits: 1.53 G."""
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.3g} {unit}".strip()
        count /= 1000
    return f"{count:.3g} T"
