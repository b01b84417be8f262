"""An artifact's key: another for everything that changes its content, the same for all that does not."""

from __future__ import annotations

import os
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from monailabel_dfqsam import identity
from monailabel_dfqsam.config import (
    Calibration,
    FinetuneConfig,
    Policy,
    QuantizationConfig,
    Recipe,
    Sampling,
    SynthesisConfig,
)
from monailabel_dfqsam.identity import artifact_key, finetuned_key
from monailabel_dfqsam.sam import VARIANTS, read_checkpoint
from monailabel_dfqsam.sam.checkpoint import identify

CONFIG = QuantizationConfig()
SHA = "a" * 64


def test_every_choice_changes_it() -> None:
    changes: dict[str, object] = {
        "bits": 8, "policy": Policy.PAPER, "calibration": Calibration.GAUSSIAN, "images": 2, "seed": 1,
        "synthesis": SynthesisConfig(iterations=3), "recipe": Recipe(views=2),
    }  # fmt: skip
    assert {*changes, "folder", "activation_bits", "fidelity"} == {
        field.name for field in fields(QuantizationConfig)
    }
    keys = [artifact_key(CONFIG, SHA, "sam_b_1024")]
    keys += [
        artifact_key(replace(CONFIG, **{name: value}), SHA, "sam_b_1024") for name, value in changes.items()
    ]  # type: ignore[arg-type]
    keys += [artifact_key(CONFIG, "b" * 64, "sam_b_1024"), artifact_key(CONFIG, SHA, "medsam")]
    run_time = replace(CONFIG, recipe=Recipe(run_time=True))
    keys += [artifact_key(replace(run_time, activation_bits=bits), SHA, "tiny") for bits in (None, 8)]
    keys += [artifact_key(run_time.changed(fidelity=kept), SHA, "tiny") for kept in ("auto", 0.9)]
    assert len(set(keys)) == len(keys) == 14
    assert all(len(key) == 16 for key in keys)


def test_another_algorithm_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = artifact_key(CONFIG, SHA, "tiny")
    assert before == artifact_key(CONFIG, SHA, "tiny")
    monkeypatch.setattr(identity, "ALGORITHM", identity.ALGORITHM + 1)
    assert artifact_key(CONFIG, SHA, "tiny") != before


def test_a_calibration_folder_counts_by_its_pictures(tmp_path: Path) -> None:
    """Their content, not where the folder lies; and only those that are calibrated on."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in (("a.png", b"first"), ("b.png", b"other"), ("c.png", b"third")):
        (folder / name).write_bytes(content)

    def key(where: Path) -> str:
        config = QuantizationConfig(calibration=Calibration.FOLDER, folder=str(where), images=2)
        return artifact_key(config, SHA, "tiny")

    before = key(folder)
    assert key(shutil.copytree(folder, tmp_path / "elsewhere")) == before
    (folder / "c.png").write_bytes(b"changed")
    (folder / "notes.txt").write_bytes(b"no picture")
    assert key(folder) == before
    times = (folder / "b.png").stat()
    (folder / "b.png").write_bytes(b"OTHER")
    os.utime(folder / "b.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert key(folder) != before
    (folder / "b.png").unlink()
    (folder / "c.png").unlink()
    with pytest.raises(ValueError, match=r"holds 1 pictures .* but 2 are asked for"):
        key(folder)


def test_fine_tuning_counts_every_choice_and_label() -> None:
    keys = {
        finetuned_key(config, start, labels)
        for config in (FinetuneConfig(), FinetuneConfig(seed=1), FinetuneConfig(sampling=Sampling.NATURAL))
        for start in ("0" * 16, "1" * 16)
        for labels in (["a", "b"], ["a"])
    }
    assert len(keys) == 12
    assert finetuned_key(FinetuneConfig(), "0" * 16, ["a", "b"]) == finetuned_key(
        FinetuneConfig(), "0" * 16, ["b", "a"]
    )


def test_a_checkpoint_is_identified_as_it_is_read(tmp_path: Path) -> None:
    """One file's bytes are two models under two names, and so under two keys."""
    shapes = {name: tensor.half() for name, tensor in _meta("sam_b_1024").items()}
    files = tmp_path / "sam.safetensors", tmp_path / "medsam.safetensors"
    save_file(shapes, files[0])
    os.link(*files)
    found = [identify(file) for file in files]
    assert [one.variant.name for one in found] == ["sam_b_1024", "medsam"]
    assert found[0].sha256 == found[1].sha256
    assert identify(files[0], "medsam").variant.name == "medsam"
    embedded = read_checkpoint("tiny")
    assert identify(embedded.path).variant is embedded.variant
    assert identify(embedded.path).sha256 == embedded.sha256


def _meta(variant: str) -> dict[str, torch.Tensor]:
    from monailabel_dfqsam.sam import Sam

    with torch.device("meta"):
        states = Sam(VARIANTS[variant]).state_dict()
    return {name: torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in states.items()}
