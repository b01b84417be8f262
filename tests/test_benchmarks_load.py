"""Annotators at once on a real server, for a short while; and how memory's growth is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.load import _memory, measure_load

MIB = 1 << 20


@pytest.mark.slow
def test_annotators_at_once_get_what_each_would_get_alone(tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    done = CliRunner().invoke(app, ["load", "--clients", "4", "--seconds", "15", "--json", str(path)])
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    assert (found["errors"], found["wrong"]) == ([], 0)
    assert found["clicks"] > 4
    assert found["requantized"] == "published"
    assert 0 < found["min_s"] <= found["median_s"] <= found["p95_s"]


def test_growth_is_that_of_the_last_two_thirds_beside_the_cache() -> None:
    """A server that fills its caches and then leaks a MiB a second, while its cache takes a half more."""
    samples = [
        (float(t), int((100 + 20 * min(t, 10) + 1.5 * max(0, t - 10)) * MIB), max(0, t - 10) * MIB // 2)
        for t in range(30)
    ]
    found = _memory(samples, 30.0)
    assert found == {"start": 100, "third": 300, "end": 328.5, "cache": 9.5, "growth": 19}


def test_a_load_needs_somebody() -> None:
    with pytest.raises(ValueError, match="clients"):
        measure_load(clients=0)
