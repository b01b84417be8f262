"""Trains the embedded SAM on phantoms, on a CPU or one GPU.

A dense head, dropped afterwards, helps it to tell regions apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from monailabel_dfqsam.pretraining.loop import PretrainConfig, Progress, export, run
from monailabel_dfqsam.pretraining.losses import contrastive_loss, prompted_loss, rounds_at
from monailabel_dfqsam.pretraining.targets import PhantomDataset
from monailabel_dfqsam.sam.checkpoint import Checkpoint
from monailabel_dfqsam.sam.model import Sam
from monailabel_dfqsam.sam.preprocess import normalize
from monailabel_dfqsam.sam.variants import VARIANTS


class DenseHead(nn.Sequential):
    """Embedding [B, C, h, w] to unit vectors [B, 24, 4h, 4w]; helps training, not part of the model."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(channels, 64, 2, stride=2), nn.GELU(), nn.ConvTranspose2d(64, 24, 2, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x), dim=1)  # type: ignore[no-untyped-call]


def train_sam(
    out: Path,
    config: PretrainConfig,
    device: torch.device,
    progress: Progress,
    start: Checkpoint | None = None,
) -> Path:
    """Trains `dfqsam-tiny` and returns the safetensors file with its weights (float16).

    Args:
        out: folder for `sam.pt` (everything needed to resume) and `dfqsam-tiny.safetensors`.
        start: weights to begin with, when there is nothing to resume; random ones without it.

    Raises:
        ValueError: when `start` is of another model.
    """
    torch.manual_seed(config.seed)
    sam = Sam(VARIANTS["tiny"]).to(device).train()
    _initialise(sam)
    if start is not None:
        if start.variant != sam.variant:
            raise ValueError(f"a checkpoint of '{start.variant.name}' cannot start '{sam.variant.name}'")
        sam.load_state_dict(start.state_dict)
    dense = DenseHead(sam.variant.embed_channels).to(device)
    weights_file = out / "dfqsam-tiny.safetensors"

    def losses(seed: int, first: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        data = DataLoader(PhantomDataset(seed, first * config.batch), config.batch)
        for step, batch in enumerate(data, first):
            batch = {key: value.to(device) for key, value in batch.items()}
            with torch.autocast(device.type, torch.bfloat16):
                embedding = sam.image_encoder(normalize(batch["image"] * 255))
                contrast = contrastive_loss(dense(embedding), batch["regions"])
                loss, reached = prompted_loss(sam, embedding, batch, rounds_at(step))
            yield loss + 0.5 * contrast, {**reached, "contrast": float(contrast.detach())}

    def write(average: nn.Module, steps: int, views: int) -> None:
        made_from = f"phantoms, {steps} steps, {views} views, seed {config.seed}"
        export(average, weights_file, {"made_from": made_from})

    run({"sam": sam, "dense": dense}, out / "sam.pt", config, device, progress, losses, write)
    return weights_file


def _initialise(sam: Sam) -> None:
    for name, parameter in sam.image_encoder.named_parameters():
        if parameter.ndim == 2:
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name == "pos_embed":
            nn.init.trunc_normal_(parameter, std=0.2)
