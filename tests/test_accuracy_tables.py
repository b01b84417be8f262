"""The study behind docs/accuracy: its pure parts, and one run on next to nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from monailabel_dfqsam.config import Policy

DOCS = Path(__file__).parents[1] / "docs" / "accuracy"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    import tables

    return tables


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    import calibration_study

    return calibration_study


@pytest.mark.parametrize("count", [24, 169])
def test_what_is_calibrated_on_is_not_evaluated_on(study: ModuleType, count: int) -> None:
    found = study.split(count, 12, None)
    assert len(set(found.left_out)) == 12
    assert sorted(found.left_out + found.evaluated) == list(range(count))
    gaps = np.diff(found.left_out)
    assert gaps.max() - gaps.min() <= 1


def test_fewer_to_evaluate_on_are_spread_over_the_rest(study: ModuleType) -> None:
    found = study.split(100, 10, 9)
    assert len(set(found.evaluated)) == 9
    assert not set(found.evaluated) & set(found.left_out)
    assert found.evaluated[0] < 10
    assert found.evaluated[-1] >= 90


@pytest.mark.parametrize("wanted", [0, 6, 10])
def test_an_evaluation_on_less_than_half_is_refused(study: ModuleType, wanted: int) -> None:
    with pytest.raises(ValueError, match="of 10"):
        study.split(10, wanted, None)


def test_mean_and_deviation_are_of_a_sample(study: ModuleType) -> None:
    assert study.summary([1.0, 2.0, 6.0]) == pytest.approx({"mean": 3.0, "deviation": 7**0.5})
    assert study.summary([0.5]) == {"mean": 0.5, "deviation": 0.0}


def test_other_code_has_another_digest(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sam").mkdir()
    (tmp_path / "ops").mkdir()
    monkeypatch.setattr(study, "_PACKAGE", tmp_path)
    module = tmp_path / "sam" / "vit.py"
    module.write_text("a = 1\n")
    first = study.code_sha256(("sam", "ops"))
    module.write_text("a = 2\n")
    assert study.code_sha256(("sam", "ops")) != first
    module.write_text("a = 1\n")
    assert study.code_sha256(("sam", "ops")) == first


def test_a_table_of_scores_names_its_command_and_shows_every_row(tables: ModuleType) -> None:
    score = {name: {"mean": 0.75, "deviation": 0.01} for name in ("iou", "drop", "agreement")}
    fixed = {name: {"mean": 0.8, "deviation": 0.0} for name in ("iou", "drop", "agreement")}
    table = {
        "seeds": [0, 1, 2],
        "images": 4,
        "iterations": 300,
        "evaluated": 157,
        "commit": "abcdef0123456789",
        "weights_sha256": "9" * 64,
        "machine": {"cpu": "a processor"},
        "seconds": 12.0,
        "rows": [
            {"source": "full precision", "box": fixed, "point": fixed},
            {"source": "phantoms", "policy": "deploy", "bits": 4, "box": score, "point": score},
        ],
    }
    text = tables.markdown({"sources": table})
    assert "`python docs/accuracy/tables.py sources --data FOLDER`: 3 seeds, 4 calibration images" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[0].split(" | ")[-1] == "agreement point |"
    assert rows[1] == "| full precision | – | – " + "| 0.800 " * 6 + "|"
    assert rows[2] == "| phantoms | deploy | 4 " + "| 0.750 ± 0.010 " * 6 + "|"


def test_a_quick_run_and_one_that_goes_on(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study of record on twelve drawn squares: two images a source, two iterations."""
    rng = np.random.default_rng(0)
    lines = []
    for index in range(12):
        mask = np.zeros((48, 48), dtype=np.uint8)
        mask[10 + index : 30 + index, 12:40] = 255
        image = np.clip(mask // 2 + rng.integers(0, 60, mask.shape), 0, 255).astype(np.uint8)
        Image.fromarray(np.stack([image] * 3, axis=-1)).save(tmp_path / f"{index}.png")
        Image.fromarray(mask).save(tmp_path / f"{index}_mask.png")
        lines.append(json.dumps({"image": f"{index}.png", "mask": f"{index}_mask.png", "modality": "CT"}))
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(tables, "WAYS", [("paper", Policy.DEPLOY, 4, tables.PAPER)])
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    threads = torch.get_num_threads()
    arguments = {"data": tmp_path, "work": work, "out": out, "quick": True, "threads": threads}
    tables.main("sources", **arguments)
    tables.main("seen", **arguments)
    record = json.loads((out / "tables.json").read_text())
    rows = record["sources"]["rows"]
    assert [row["source"] for row in rows[:3]] == ["full precision", "real images", "Gaussian noise"]
    assert len(rows) == 1 + len(tables.SOURCES)
    full = rows[0]["box"]
    assert full["agreement"]["mean"] == 1
    assert full["drop"]["mean"] == 0
    for row in rows[1:]:
        for prompt in ("box", "point"):
            got = {name: row[prompt][name]["mean"] for name in ("iou", "drop", "agreement")}
            assert got["drop"] == pytest.approx(rows[0][prompt]["iou"]["mean"] - got["iou"])
            assert 0 < got["agreement"] < 1
    seen = {row["source"]: row for row in record["seen"]["rows"]}
    assert 0 < seen["Gaussian noise"]["shared"]["mean"] < 1
    assert "blocks.0.attn.qkv" in (out / "tables.md").read_text()
    kept = {path: path.stat().st_mtime_ns for path in work.iterdir()}
    tables.main("sources", **arguments)
    assert {path: path.stat().st_mtime_ns for path in work.iterdir()} == kept
    assert json.loads((out / "tables.json").read_text())["sources"]["rows"] == rows
