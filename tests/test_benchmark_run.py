"""`dfqsam benchmark encoder` as a whole, on the smallest model."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from monailabel_dfqsam.benchmark.weights import Preparation
from monailabel_dfqsam.cli import app
from monailabel_dfqsam.engines import native, onednn
from monailabel_dfqsam.sam import checkpoint
from tests.server_fixtures import START_SECONDS, wait

COMMAND = ("benchmark", "encoder", "--variant", "tiny")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN quantized linear"),
]


@pytest.mark.skipif(native.why_unavailable() is not None, reason=f"{native.why_unavailable()}")
def test_rows_ratios_floor_and_profile(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    result = CliRunner().invoke(
        app,
        [*COMMAND, "--batch", "2", "--engines", "torch-eager,native,cutlass,gemm-floor", "--repeats", "3",
         "--threads", "1", "--profile", "--json", str(path)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    assert found["complete"] is True
    rows = {row["engine"]: row for row in found["rows"]}
    eager, own, absent, floor = (rows[n] for n in ("torch-eager", "native", "cutlass", "gemm-floor"))
    assert [row["repeats"] for row in rows.values()] == [3, 3, 0, 3]
    assert absent["median_s"] is None
    assert absent["reason"]
    assert "not measured" in result.stdout
    for row in (eager, own):
        assert 0 < row["min_s"] <= row["median_s"] <= row["p95_s"]
        assert 0 < row["imported_bytes"] < row["peak_bytes"]
    assert own["times_torch_eager"] == pytest.approx(eager["median_s"] / own["median_s"])
    assert own["times_openvino_int8"] is None
    parts = found["floors"][0]
    assert parts["integer_s"] == pytest.approx(sum(s["count"] * s["seconds"] for s in parts["shapes"]))
    assert parts["integer_s"] + parts["attention_s"] <= floor["min_s"] * 1.0001
    assert own["floor_share"] == pytest.approx((parts["integer_s"] + parts["attention_s"]) / own["median_s"])
    profile = found["profiles"][0]
    assert sum(profile["seconds"].values()) == pytest.approx(profile["call_s"], rel=0.2)
    assert statistics.fmean(op["calls"] for op in profile["ops"]) >= 1
    assert found["artifact"]["encoder_artifact_bytes"] < found["artifact"]["encoder_float_bytes"] / 5


def test_an_unreadable_checkpoint_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*COMMAND, "--checkpoint", str(tmp_path / "none.pth")])
    assert result.exit_code == 1
    assert "there is no checkpoint file 'none.pth'" in result.stderr


def test_the_published_lite_medsam_is_known_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_LITE_MEDSAM_PACKAGE", "no_such_medsam")
    with pytest.raises(ValueError, match=r"install monailabel-dfqsam\[litemedsam\]"):
        Preparation(tmp_path, "lite_medsam", Path("lite-medsam"), images=1, threads=1)


def _computed(benchmark: int, engine: str) -> float:
    """Seconds that an engine's process has computed; 0 when there is none."""
    for child in psutil.Process(benchmark).children():
        if any(file.path.endswith(f"/{engine}.log") for file in child.open_files()):
            return float(child.cpu_times().user)
    return 0.0


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "monailabel_dfqsam", *COMMAND, "--engines", "gemm-floor,onednn",
         "--repeats", "1000000", "--json", str(path)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True, stdout=subprocess.PIPE, text=True,
        # A shell that runs the tests in the background has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    wait(lambda: _computed(process.pid, "onednn") > 0, START_SECONDS)
    # The floor is idle while the other engine is loaded; in this time both have had many turns.
    before = _computed(process.pid, "gemm-floor")
    wait(lambda: _computed(process.pid, "gemm-floor") > before + 2, START_SECONDS)
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    found = json.loads(path.read_text())
    assert found["complete"] is False
    assert [row["engine"] for row in found["rows"]] == ["gemm-floor", "onednn"]
    assert all(0 < row["repeats"] < 1000000 for row in found["rows"])
    assert "gemm-floor" in text
    assert not list(tmp_path.glob("dfqsam-benchmark-*"))
