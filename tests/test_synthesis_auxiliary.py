from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import UNet
from safetensors.torch import load_file, save_file

from monailabel_dfqsam.pretraining.auxiliary_network import mean_recall, train_auxiliary
from monailabel_dfqsam.pretraining.loop import PretrainConfig
from monailabel_dfqsam.pretraining.phantoms import PhantomClass
from monailabel_dfqsam.pretraining.targets import PhantomDataset
from monailabel_dfqsam.sam.preprocess import normalize
from monailabel_dfqsam.synthesis.auxiliary import (
    Auxiliary,
    AuxiliaryError,
    embedded_auxiliary,
    load_auxiliary,
)

KWARGS: dict[str, Any] = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [4, 8],
    "strides": [2],
    "num_res_units": 0,
}
CHANCE = 1 / len(PhantomClass)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return UNet(**KWARGS).eval()  # type: ignore[no-any-return]


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def expected_scores(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        scores: torch.Tensor = network(images().mean(1, keepdim=True)).softmax(1)
    return scores


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_network_by_name_gives_its_own_scores(tmp_path: Path, network: torch.nn.Module, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": network.state_dict()}, path)
    else:
        save_file(network.state_dict(), path)
    auxiliary = load_auxiliary(path, "UNet", KWARGS)
    torch.testing.assert_close(auxiliary.scores(images()), expected_scores(network))


def test_metadata_names_the_network(tmp_path: Path, network: torch.nn.Module) -> None:
    path = tmp_path / "weights.safetensors"
    metadata = {"network": "UNet", "network_kwargs": json.dumps(KWARGS), "input_size": "16"}
    save_file(network.state_dict(), path, metadata=metadata)
    scores = load_auxiliary(path).scores(images())
    assert scores.shape == (2, 2, 16, 16)
    torch.testing.assert_close(scores.sum(1), torch.ones(2, 16, 16))


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (witness,)

    torch.save({"state_dict": Evil()}, tmp_path / "weights.pt")
    with pytest.raises(AuxiliaryError, match="more than tensors"):
        load_auxiliary(tmp_path / "weights.pt", "UNet", KWARGS)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("system", {}, "no network 'system'"),
        ("UNet", {"channels": [4, 16]}, "does not fit"),
        ("UNet", {"no_such": 1}, "does not fit"),
        ("UNet", {"spatial_dims": 3}, "two-dimensional"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, network: torch.nn.Module, name: str, change: dict[str, Any], message: str
) -> None:
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(AuxiliaryError, match=message):
        load_auxiliary(tmp_path / "weights.pt", name, {**KWARGS, **change})


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no tensors")
    with pytest.raises(AuxiliaryError, match="no weights file"):
        load_auxiliary(tmp_path / "none.pt", "UNet", KWARGS)
    with pytest.raises(AuxiliaryError, match="not a readable"):
        load_auxiliary(damaged)


def test_one_output_channel_is_background_and_foreground() -> None:
    network = torch.nn.Conv2d(3, 1, 1)
    scores = Auxiliary(network).scores(images())
    assert scores.shape == (2, 2, 32, 32)
    torch.testing.assert_close(scores[:, 1:], network(images()).sigmoid())


def test_scores_are_differentiable_and_the_network_frozen() -> None:
    network = torch.nn.Conv2d(3, 2, 1)
    x = images().requires_grad_()
    Auxiliary(network).scores(x)[:, 1].sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    assert network.weight.grad is None


def test_embedded_network_tells_phantom_classes_apart_better_than_chance() -> None:
    auxiliary = embedded_auxiliary()
    assert auxiliary is not None
    assert sum(p.numel() for p in auxiliary.network.parameters()) <= 500_000
    examples = list(islice(PhantomDataset(seed=77), 24))
    x = torch.stack([example["image"] for example in examples])
    scores = auxiliary.scores(normalize(x * 255))
    target = torch.stack([example["semantic"] for example in examples])[:, 1::2, 1::2]
    assert scores.shape == (24, len(PhantomClass), 128, 128)
    assert mean_recall(scores.argmax(1), target) > 1.5 * CHANCE


def test_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    def train(folder: Path, steps: list[int]) -> dict[str, torch.Tensor]:
        for count in steps:
            # The schedule depends on the number of steps alone through its warm-up here.
            config = PretrainConfig(steps=count, batch=2, warmup=10, save_every=2)
            path = train_auxiliary(folder, config, torch.device("cpu"), lambda *_: None)
        return load_file(path)

    whole, resumed = train(tmp_path / "whole", [4]), train(tmp_path / "resumed", [2, 4])
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    weights = load_auxiliary(tmp_path / "whole" / "dfqsam-tiny-auxiliary.safetensors")
    assert weights.input_size == 128


def test_mean_recall_counts_only_classes_present() -> None:
    target = torch.tensor([0, 0, 0, 0, 2, 2])
    assert mean_recall(torch.tensor([0, 0, 0, 1, 2, 5]), target) == pytest.approx((3 / 4 + 1 / 2) / 2)
