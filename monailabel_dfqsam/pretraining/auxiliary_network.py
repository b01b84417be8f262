"""Trains the embedded auxiliary network: which kind of phantom region each pixel belongs to.

Image synthesis asks it how much a region looks like a class of things. It is a small MONAI network, and its
weights file says in its metadata which class it is of and how it was constructed, so that whoever loads it
needs no more than the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from monailabel_dfqsam.pretraining.loop import PretrainConfig, Progress, export, run
from monailabel_dfqsam.pretraining.phantoms import PhantomClass
from monailabel_dfqsam.pretraining.targets import PhantomDataset
from monailabel_dfqsam.sam.preprocess import normalize

NETWORK = "UNet"
NETWORK_KWARGS: dict[str, Any] = {
    "spatial_dims": 2,
    "in_channels": 3,
    "out_channels": len(PhantomClass),
    "channels": [16, 32, 64, 96, 128],
    "strides": [2, 2, 2, 2],
    "num_res_units": 0,
    "norm": "batch",
}
# Half the model's input: what a region is shows in its shape, and four times as many phantoms fit in an hour.
INPUT_SIZE = 128
_CONSTRUCTION = {
    "network": NETWORK,
    "network_kwargs": json.dumps(NETWORK_KWARGS),
    "input_size": str(INPUT_SIZE),
}

AUXILIARY_CONFIG = PretrainConfig(
    steps=1500, batch=8, lr=3e-3, warmup=50, weight_decay=0.01, seed=1, save_every=50
)

# Share of pixels a class, measured over phantoms: its root, inverted, keeps rare classes from being ignored
# without making every thin structure a guess.
_CLASS_SHARE = (0.57, 0.12, 0.25, 0.042, 0.011, 0.0085)


def train_auxiliary(out: Path, config: PretrainConfig, device: torch.device, progress: Progress) -> Path:
    """Trains the auxiliary network and returns the safetensors file with its weights (float16).

    Args:
        out: folder for `auxiliary.pt` (everything needed to resume) and `dfqsam-tiny-auxiliary.safetensors`.
    """
    import monai.networks.nets  # slow to import

    torch.manual_seed(config.seed)
    network: nn.Module = getattr(monai.networks.nets, NETWORK)(**NETWORK_KWARGS).to(device).train()
    weights_file = out / "dfqsam-tiny-auxiliary.safetensors"
    weight = 1 / torch.tensor(_CLASS_SHARE, device=device).sqrt()

    def losses(seed: int, first: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        for batch in DataLoader(PhantomDataset(seed, first * config.batch, INPUT_SIZE), config.batch):
            target = batch["semantic"].to(device)
            logits = network(normalize(batch["image"].to(device) * 255))
            recall = mean_recall(logits.detach().argmax(1), target)
            yield F.cross_entropy(logits, target, weight=weight), {"mean recall of classes": recall}

    def write(average: nn.Module, steps: int, views: int) -> None:
        made_from = f"phantoms, {steps} steps, {views} views, seed {config.seed}"
        export(average, weights_file, {"made_from": made_from, **_CONSTRUCTION})

    run({"network": network}, out / "auxiliary.pt", config, device, progress, losses, write)
    return weights_file


def mean_recall(predicted: Tensor, target: Tensor) -> float:
    """Share of each class's pixels that were found, averaged over the classes present in `target` (int64)."""
    count = len(PhantomClass)
    truth = torch.bincount(target.flatten(), minlength=count)
    hit = torch.bincount(target[predicted == target].flatten(), minlength=count)
    return float((hit[truth > 0] / truth[truth > 0]).mean())
