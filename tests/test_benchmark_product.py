"""`dfqsam benchmark product`: every kernel here is timed, beside its peers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from monailabel_dfqsam.benchmark.product import FLOAT, FORMS, measure_products
from monailabel_dfqsam.cli import app
from monailabel_dfqsam.ops.product import available_sets

pytestmark = pytest.mark.skipif(not available_sets(), reason="no product library for this processor")


def test_every_kernel_and_form_is_timed() -> None:
    threads, shapes = torch.get_num_threads(), [(65, 40, 70), (64, 512, 256)]
    found = measure_products(shapes)
    assert torch.get_num_threads() == threads
    assert found["instructions"] == list(available_sets())
    ours = {(name, form) for name in available_sets() for form in FORMS}
    for m, n, k in shapes:
        rows = {(r["by"], r["form"]): r for r in found["rows"] if (r["m"], r["n"], r["k"]) == (m, n, k)}
        assert set(rows) >= ours | {(FLOAT, "")}
        assert rows[FLOAT, ""]["times_float"] == 1
        slowest = rows[FLOAT, ""]["gmacs_per_s"]
        for row in rows.values():
            assert row["times_float"] == pytest.approx(row["gmacs_per_s"] / slowest)
    for name in available_sets():
        assert min(found["tiles"][name].values()) > 1


def test_the_command_writes_what_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    done = CliRunner().invoke(app, ["benchmark", "product", "--shape", "32,64,64", "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert "×64" in done.stdout
    assert json.loads(path.read_text())["threads"] == 1
    for wrong in ("3,4", "0,1,1", "a,b,c"):
        done = CliRunner().invoke(app, ["benchmark", "product", "--shape", wrong])
        assert done.exit_code == 1
        assert "--shape takes three sizes" in done.output
