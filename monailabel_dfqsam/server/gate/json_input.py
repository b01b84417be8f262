"""JSON from clients, checked before anything keeps it.

MONAI Label writes what it is sent into its datastore's file and into replies. A NaN, half of a surrogate pair
or a thousand lists within each other pass its parser and fail its writer: from then on every reply that holds
them fails, and the datastore's file is left empty, on which the next start fails too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from monailabel_dfqsam.server.gate.guard import Refusal

MAX_DEPTH = 32
MAX_ENTRIES = 10_000
# The options of a batch travel to its process as one argument of a command, of which Linux takes 128 KiB.
_MAX_OPTIONS_BYTES = 1 << 16
_DEVICES = re.compile(r"(all|[0-9,]*)")
_WHOLE = 1 << 63  # what other readers of JSON hold


def read_object(text: str, what: str) -> dict[str, Any]:
    """A JSON object out of a form's field; nothing at all is an empty one.

    Args:
        text: at most a form field's 1 MiB.
        what: the field, for the message.

    Raises:
        Refusal: 400.
    """
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "too deep, or too long a number"
        raise Refusal(400, f"{what} must be JSON: {reason}") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"{what} must be a JSON object")
    check_value(value, what)
    return value


def check_value(value: Any, what: str) -> None:
    """Refuses what is JSON to Python's parser, but not to all who read it later.

    Args:
        value: out of a JSON parser.
        what: where it stood, for the message.

    Raises:
        Refusal: 400, for nesting beyond `MAX_DEPTH`, more than `MAX_ENTRIES` values, numbers that are not
            finite or whole ones beyond 64 bit, and text that is not Unicode.
    """
    waiting, seen = [(value, 1)], 0
    while waiting:
        item, depth = waiting.pop()
        seen += 1
        if depth > MAX_DEPTH or seen > MAX_ENTRIES:
            raise Refusal(
                400, f"{what} must be at most {MAX_DEPTH} levels deep and hold at most {MAX_ENTRIES} values"
            )
        if isinstance(item, Mapping):
            for key, inner in item.items():
                _check_text(str(key), what)
                waiting.append((inner, depth + 1))
        elif isinstance(item, list):
            waiting.extend((inner, depth + 1) for inner in item)
        elif isinstance(item, str):
            _check_text(item, what)
        elif isinstance(item, int):
            if abs(item) > _WHOLE:
                raise Refusal(400, f"{what} must hold whole numbers of at most 64 bit")
        elif isinstance(item, float) and not math.isfinite(item):
            raise Refusal(400, f"{what} must hold finite numbers")


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refusal(
            400, f"{what} must hold Unicode text; there is half of a surrogate pair in it"
        ) from None


def check_options(params: Mapping[str, Any] | None, run_sync: bool | None) -> None:
    """What holds for the options of anything that runs in a process of its own."""
    if run_sync:
        raise Refusal(400, "run_sync is not offered: it would hold up every other request")
    check_value(params or {}, "the options")
    if len(json.dumps(params)) > _MAX_OPTIONS_BYTES:
        raise Refusal(400, f"the options must be at most {_MAX_OPTIONS_BYTES >> 10} KiB")
    gpus = (params or {}).get("gpus") or "all"
    if not isinstance(gpus, str) or not _DEVICES.fullmatch(gpus):
        raise Refusal(400, "gpus must be 'all' or numbers with commas between them")


def check_own(params: Mapping[str, Any] | None, name: str) -> None:
    """What is for one of several stands under its name."""
    if not isinstance((params or {}).get(name) or {}, dict):
        raise Refusal(400, f"{name} must be an object of options")
