"""`--conf` pairs and training options: what is taken, what is refused, and with which words."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from monailabel_dfqsam.config import Calibration, Policy, Preset
from monailabel_dfqsam.sam import checkpoint
from monailabel_dfqsam.server.gate.options import OptionError
from monailabel_dfqsam.server.runs.options import defaults, read_options
from monailabel_dfqsam.server.settings import DEFAULT_LABELS, Settings, read_settings

APP = Path("/app")


def test_without_conf_each_layer_of_the_embedded_model_has_the_bits_it_needs() -> None:
    settings = read_settings({}, APP)
    assert settings.quantize
    assert (settings.quantization.bits, settings.quantization.fidelity) == (None, "auto")
    assert settings.quantization == Preset.FAST.config
    assert settings.labels == DEFAULT_LABELS
    assert settings.model_dir == APP / "model"


def test_every_key_is_read(tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    weights.touch()
    conf = {
        "checkpoint": str(weights), "variant": "medsam", "labels": " liver , spleen,", "quantize": "False",
        "preset": "best", "images": "3", "bits": "8", "min_fidelity": "0.9", "cache_mb": "7",
        "window": "ct lung", "model_dir": str(tmp_path), "trusted_hosts": "PACS.example",
        "server_mode": "true", "max_upload_mb": "9",
    }  # fmt: skip
    settings = read_settings(conf, APP)
    assert (settings.checkpoint, settings.variant) == (weights, "medsam")
    assert settings.labels == ("liver", "spleen")
    assert not settings.quantize
    assert settings.quantization.recipe == Preset.BEST.config.recipe
    assert (settings.quantization.images, settings.quantization.bits) == (3, 8)
    assert (settings.min_fidelity, settings.cache_mb, settings.window) == (0.9, 7, "ct lung")
    assert settings.model_dir == tmp_path
    assert settings.trusted_hosts == ("pacs.example",)
    assert settings.max_upload_mb == 9


def test_the_published_lite_medsam_is_known_by_its_name(lite_medsam: Path) -> None:
    assert read_settings({"checkpoint": "lite-medsam"}, APP).checkpoint == lite_medsam


def test_without_its_package_the_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_LITE_MEDSAM_PACKAGE", "no_such_medsam")
    with pytest.raises(OptionError, match=r"--conf checkpoint: .*litemedsam"):
        read_settings({"checkpoint": "lite-medsam"}, APP)


def test_iterations_win_over_the_preset() -> None:
    conf = {"preset": "best", "iterations": "17"}
    assert read_settings(conf, APP).quantization.synthesis.iterations == 17


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("iteration", "5"), ("quantize", "maybe"), ("bits", "5"), ("bits", "four"), ("images", "0"),
        ("iterations", "1.5"), ("min_fidelity", "1.01"), ("min_fidelity", "nan"), ("cache_mb", "-1"),
        ("max_upload_mb", "0"),
        ("preset", "slow"), ("variant", "sam3"), ("window", "c"), ("checkpoint", "/no/such/file.pth"),
    ],
)  # fmt: skip
def test_a_wrong_pair_is_named(key: str, value: str) -> None:
    with pytest.raises(OptionError, match=key):
        read_settings({key: value}, APP)


def test_training_options_as_slicer_and_ohif_send_them() -> None:
    settings = Settings(APP)
    shown = defaults(settings)
    from_slicer = {
        **shown,
        "bits": "8",
        "policy": ["paper", "deploy"],
        "client_id": "user-xyz",
        "model": "dfqsam",
    }
    config, checkpoint = read_options(from_slicer, settings, "dfqsam")
    assert (config.bits, config.policy, config.calibration) == (8, Policy.PAPER, Calibration.SYNTHETIC)
    assert checkpoint == settings.checkpoint
    from_ohif = {"model": "dfqsam", "gpus": "all", "dfqsam": {"bits": 6, "seed": "3"}}
    config, _ = read_options(from_ohif, settings, "dfqsam")
    assert (config.bits, config.seed, config.preset) == (6, 3, Preset.STATIC)
    assert read_options(shown, settings, "dfqsam")[0] == settings.quantization


def test_a_number_of_bits_wins_over_the_fidelity_that_viewers_send_beside_it() -> None:
    settings = Settings(APP)
    config, _ = read_options({**defaults(settings), "bits": "4"}, settings, "dfqsam")
    assert (config.bits, config.fidelity) == (4, None)
    assert config.recipe == Preset.FAST.config.recipe
    config, _ = read_options({"fidelity": "0.95"}, settings, "dfqsam")
    assert (config.bits, config.fidelity) == (None, 0.95)
    fixed = read_settings({"bits": "8"}, APP)
    assert (fixed.quantization.bits, fixed.quantization.fidelity) == (8, None)
    assert read_options({"bits": "auto"}, fixed, "dfqsam")[0] == Preset.FAST.config
    static = read_settings({"preset": "static"}, APP)
    assert (static.quantization.bits, static.quantization.recipe.run_time) == (4, False)
    assert read_options({"bits": "auto"}, static, "dfqsam")[0] == Preset.FAST.config


def test_a_request_says_only_what_differs() -> None:
    settings = read_settings({"images": "2", "iterations": "40"}, APP)
    config, _ = read_options({"calibration": "gaussian"}, settings, "dfqsam")
    assert (config.images, config.synthesis.iterations) == (2, 40)
    assert read_options({}, settings, "dfqsam")[0] == settings.quantization
    best, _ = read_options({"preset": "best"}, settings, "dfqsam")
    assert best == Preset.BEST.config
    some, _ = read_options({"preset": "best", "images": 3}, settings, "dfqsam")
    assert some == replace(Preset.BEST.config, images=3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_epochs", 5), ("bits", 3), ("bits", "many"), ("fidelity", "high"), ("fidelity", 0),
        ("fidelity", 1.1), ("fidelity", True), ("fidelity", "nan"), ("bits", True), ("bits", 4.0),
        ("images", 0),
        ("iterations", 0), ("iterations", 10**9), ("seed", -1), ("policy", "all"), ("calibration", "folder"),
        ("checkpoint", "../weights.pth"), ("checkpoint", "/etc/passwd"),
        ("checkpoint", ".."), ("checkpoint", "not-there.pth"), ("checkpoint", 5),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named(option: str, value: object) -> None:
    with pytest.raises(OptionError, match=option):
        read_options({option: value}, Settings(APP), "dfqsam")


def test_a_checkpoint_in_the_model_folder_can_be_named(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    _, checkpoint = read_options({"checkpoint": "other.pth"}, Settings(tmp_path), "dfqsam")
    assert checkpoint == tmp_path / "other.pth"


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("never made",)


@pytest.mark.parametrize(
    ("name", "word"), [("x.pkl", "expected .pth"), ("x.pth", "never code"), ("old.pt", "never code")]
)
def test_a_checkpoint_that_holds_code_is_refused_before_training(
    tmp_path: Path, name: str, word: str
) -> None:
    torch.save({"weight": _Evil()}, tmp_path / name, _use_new_zipfile_serialization=name != "old.pt")
    with pytest.raises(OptionError, match=word):
        read_options({"checkpoint": name}, Settings(tmp_path), "dfqsam")
    assert not Path("never made").exists()
