"""Code in a process of its own, where nothing has been imported yet."""

from __future__ import annotations

import subprocess
import sys

_SECONDS = 300


def printed(code: str) -> str:
    """What Python code prints; a failure is raised with what it said."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
