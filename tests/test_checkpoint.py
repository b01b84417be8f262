"""Reading checkpoints: every wrapping, and no code ever."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from monailabel_dfqsam.sam import CheckpointError, build, checkpoint, find_checkpoint, read_checkpoint
from monailabel_dfqsam.sam.checkpoint import LITE_MEDSAM, LITE_MEDSAM_SHA256, NAMED, file_sha256
from tests.models import seeded_sam


def _state() -> dict[str, torch.Tensor]:
    return seeded_sam("tiny").state_dict()


def test_embedded_default_loads_and_builds() -> None:
    checkpoint = read_checkpoint("tiny")
    assert checkpoint.variant.name == "tiny"
    assert len(checkpoint.sha256) == 64
    build(checkpoint)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_every_wrapping_reads_the_same(tmp_path: Path, wrapper: str | None, prefix: str, suffix: str) -> None:
    state = {prefix + key: value for key, value in _state().items()}
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        if wrapper:
            pytest.skip("safetensors files hold tensors alone, so there is nothing to wrap in")
        save_file(state, path)
    else:
        torch.save({wrapper: state} if wrapper else state, path)
    read = read_checkpoint(path).state_dict
    assert read.keys() == _state().keys()
    assert all(torch.equal(read[key], value) for key, value in _state().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_model_keeps_its_weights_when_its_file_changes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    save_file(_state(), path) if suffix == ".safetensors" else torch.save(_state(), path)
    sam = build(read_checkpoint(path))
    with path.open("r+b") as file:  # in place: another file under this name would be no danger
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(sam.state_dict()[key], value) for key, value in _state().items())


def test_pickled_adam_of_sam_med2d_is_skipped(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = tmp_path / "sam-med2d_b.pth"
    torch.save({"model": _state(), "optimizer": optimizer}, path)
    build(read_checkpoint(path))


class _Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.target), 0o700)


def test_any_other_global_is_refused_and_not_run(tmp_path: Path) -> None:
    path, target = tmp_path / "evil.pth", tmp_path / "was-run"
    torch.save({"model": _state(), "extra": _Payload(target)}, path)
    with pytest.raises(CheckpointError, match=r"never code.*mkdir"):
        read_checkpoint(path)
    assert not target.exists()


def _truncated(folder: Path) -> Path:
    path = folder / "short.pth"
    torch.save(_state(), path)
    path.write_bytes(path.read_bytes()[:50_000])
    return path


def _text(folder: Path) -> Path:
    path = folder / "text.pt"
    path.write_text("not a checkpoint")
    return path


def _other_model(folder: Path) -> Path:
    path = folder / "resnet.pth"
    torch.save({"conv1.weight": torch.zeros(3)}, path)
    return path


def _no_tensors(folder: Path) -> Path:
    path = folder / "empty.pth"
    torch.save({"epoch": 3}, path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_truncated, "damaged"),
        (_text, "damaged"),
        (_other_model, "image_encoder.pos_embed"),
        (_no_tensors, "no state dict"),
        (lambda folder: folder / "none.pth", "no checkpoint file"),
        (lambda folder: (folder / "a.png").write_bytes(b"x") and folder / "a.png", "expected .pth"),
    ],
)
def test_unusable_files_are_refused_with_a_sentence(tmp_path: Path, make: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(make(tmp_path))  # type: ignore[operator]


def test_unknown_variant_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(_state(), path)
    with pytest.raises(CheckpointError, match="unknown model 'huge'"):
        read_checkpoint(path, variant="huge")


def test_the_published_lite_medsam_is_read_strictly(lite_medsam: Path) -> None:
    found = read_checkpoint(LITE_MEDSAM)
    assert (found.path, found.sha256) == (lite_medsam, LITE_MEDSAM_SHA256)
    assert found.variant.name == "lite_medsam"
    build(found)  # raises for a tensor too many or too few


def test_the_first_stages_of_lite_are_the_published_ones(lite_medsam: Path) -> None:
    """Last stage, neck and decoder alone were trained: what the others know of real images is still there."""
    own, published = read_checkpoint("lite").state_dict, read_checkpoint(lite_medsam).state_dict
    assert set(own) == set(published)
    steady = {
        name
        for name in published
        if name.startswith("image_encoder.")
        and not name.startswith(("image_encoder.layers.3.", "image_encoder.neck."))
        and not name.endswith(".num_batches_tracked")
    }
    assert steady
    assert all(torch.equal(own[name], published[name].half().float()) for name in steady)
    assert any(not torch.equal(own[name], published[name].half().float()) for name in set(own) - steady)


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file where the published one would lie, in a package that must not be imported."""
    package = tmp_path / "foreign_medsam"
    (package / "asset").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('this package was imported')")
    file = package / "asset" / "lite_medsam.pth"
    torch.save(_state(), file)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(checkpoint, "_LITE_MEDSAM_PACKAGE", package.name)
    return file


def test_another_file_under_its_name_is_refused(foreign: Path) -> None:
    with pytest.raises(CheckpointError, match="another file than LiteMedSAM's published"):
        find_checkpoint(LITE_MEDSAM)


def test_its_package_is_not_imported(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "LITE_MEDSAM_SHA256", file_sha256(foreign))
    assert find_checkpoint(LITE_MEDSAM) == foreign
    assert read_checkpoint(LITE_MEDSAM).path == foreign


def test_without_its_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_LITE_MEDSAM_PACKAGE", "no_such_medsam")
    with pytest.raises(CheckpointError, match=r"install monailabel-dfqsam\[litemedsam\]"):
        find_checkpoint(LITE_MEDSAM)


@pytest.mark.parametrize("name", NAMED)
def test_the_packages_own_weights_have_names(name: str) -> None:
    assert find_checkpoint(name) == find_checkpoint(Path(name)) == NAMED[name]
    assert read_checkpoint(name).variant.name == name
    assert find_checkpoint(f"models/{name}") == Path("models", name)


def test_any_other_name_is_a_path() -> None:
    assert find_checkpoint("models/lite-medsam") == Path("models/lite-medsam")
    assert find_checkpoint("~/w.pth") == Path.home() / "w.pth"
