"""Trains the embedded auxiliary network: which kind of phantom region each pixel belongs to.

Image synthesis asks it how much a region looks like a class of things. It is a small MONAI network, and its
weights file says in its metadata which class it is of and how it was constructed, so that whoever loads it
needs no more than the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from monailabel_dfqsam.pretraining.phantoms import PhantomClass
from monailabel_dfqsam.pretraining.targets import PhantomDataset
from monailabel_dfqsam.pretraining.train import PretrainConfig, export, load_state, save_state
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


def train_auxiliary(
    out: Path, config: PretrainConfig, device: torch.device, progress: Callable[[int, int, str], None]
) -> Path:
    """Trains the auxiliary network and returns the safetensors file with its weights (float16).

    Args:
        out: folder for `auxiliary.pt` (everything needed to resume) and `dfqsam-tiny-auxiliary.safetensors`.
        progress: called with (step, steps, text).
    """
    import monai.networks.nets  # slow to import

    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    network: nn.Module = getattr(monai.networks.nets, NETWORK)(**NETWORK_KWARGS).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    parts = {"network": network, "optimizer": optimizer}
    state_file, weights_file = out / "auxiliary.pt", out / "dfqsam-tiny-auxiliary.safetensors"
    first = load_state(state_file, device, parts)
    data = PhantomDataset(config.seed, first * config.batch, INPUT_SIZE)
    weight = 1 / torch.tensor(_CLASS_SHARE, device=device).sqrt()
    average = torch.zeros(2)
    for done, batch in zip(range(first + 1, config.steps + 1), DataLoader(data, config.batch), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = schedule(done - 1, config)
        target = batch["semantic"].to(device)
        logits = network(normalize(batch["image"].to(device) * 255))
        loss = F.cross_entropy(logits, target, weight=weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        recall = mean_recall(logits.detach().argmax(1), target)
        average += (0.05 if done > first + 1 else 1.0) * (
            torch.tensor([float(loss.detach()), recall]) - average
        )
        if done % 10 == 0:
            progress(done, config.steps, f"loss {average[0]:.3f}, mean recall of classes {average[1]:.3f}")
        if done % config.save_every == 0 or done == config.steps:
            save_state(state_file, done, parts)
            made_from = f"phantoms, {done} steps, seed {config.seed}"
            export(network, weights_file, {"made_from": made_from, **_CONSTRUCTION})
    return weights_file


def schedule(step: int, config: PretrainConfig) -> float:
    """Learning rate: linear warm-up, then half a cosine to 2 % of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    t = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * t)))


def mean_recall(predicted: Tensor, target: Tensor) -> float:
    """Share of each class's pixels that were found, averaged over the classes present in `target` (int64)."""
    count = len(PhantomClass)
    truth = torch.bincount(target.flatten(), minlength=count)
    hit = torch.bincount(target[predicted == target].flatten(), minlength=count)
    return float((hit[truth > 0] / truth[truth > 0]).mean())
