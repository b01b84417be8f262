"""Trains the embedded SAM on phantoms, on a CPU or one GPU, resumable at every checkpoint.

Two choices get a model this small off the all-background plateau: the mask loss counts mostly in the
target's neighbourhood, and a dense head, dropped afterwards, pulls embeddings of one region together and
those of different regions apart (supervised contrastive loss, arXiv 2004.11362).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from monailabel_dfqsam.pretraining.targets import PhantomDataset
from monailabel_dfqsam.sam.model import Sam
from monailabel_dfqsam.sam.preprocess import normalize
from monailabel_dfqsam.sam.variants import VARIANTS


@dataclass(frozen=True)
class PretrainConfig:
    """Training settings; the defaults made the embedded weights."""

    steps: int = 1900
    batch: int = 8
    lr: float = 8e-4
    warmup: int = 200
    weight_decay: float = 0.02
    seed: int = 0
    save_every: int = 100
    workers: int = 1


class DenseHead(nn.Sequential):
    """Embedding [B, C, h, w] to unit vectors [B, 24, 4h, 4w]; helps training, not part of the model."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(channels, 64, 2, stride=2), nn.GELU(), nn.ConvTranspose2d(64, 24, 2, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x), dim=1)  # type: ignore[no-untyped-call]


def contrastive_loss(
    features: Tensor, regions: Tensor, temperature: float = 0.1, pixels: int = 256
) -> Tensor:
    """Supervised contrastive loss over random pixels of each image.

    Args:
        features: [B, C, h, w] float, unit length over C.
        regions: [B, h, w] int64.
    """
    b, c, h, w = features.shape
    pick = torch.randint(h * w, (b, pixels), device=features.device)
    f = features.flatten(2).gather(2, pick[:, None].expand(b, c, pixels))
    r = regions.flatten(1).gather(1, pick)
    logits = torch.einsum("bci,bcj->bij", f, f) / temperature
    eye = torch.eye(pixels, dtype=torch.bool, device=f.device)
    same = (r[:, :, None] == r[:, None, :]) & ~eye
    log_prob = logits - logits.masked_fill(eye, -torch.inf).logsumexp(2, keepdim=True)
    positives = same.sum(2)
    per_pixel = -(log_prob * same).sum(2) / positives.clamp_min(1)
    return per_pixel[positives > 0].mean()


def mask_losses(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Per-mask loss 2·BCE + Dice and the IoU reached.

    Args:
        logits: [N, K, h, w] float, K candidate masks.
        target: [N, 1, h, w] float in [0, 1].

    Returns:
        loss [N, K] and IoU [N, K] (detached).
    """
    near = F.max_pool2d(target, 15, stride=1, padding=7)
    weight = torch.where(near > 0, 1.0, 0.05)
    t = target.expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits, t, reduction="none")
    bce = (bce * weight).sum((2, 3)) / weight.sum((2, 3))
    p = logits.sigmoid()
    dice = 1 - (2 * (p * t).sum((2, 3)) + 1) / (p.sum((2, 3)) + t.sum((2, 3)) + 1)
    with torch.no_grad():
        hit, truth = logits > 0, t > 0.5
        iou = (hit & truth).sum((2, 3)) / (hit | truth).sum((2, 3)).clamp_min(1)
    return 2 * bce + dice, iou


def _prompt_loss(
    sam: Sam, embedding: Tensor, example: dict[str, Tensor], kind: float
) -> tuple[Tensor, Tensor]:
    """Loss and box-or-point IoU of one image's objects for one randomly drawn kind of prompt."""
    target = F.avg_pool2d(example["masks"][:, None].float(), 4)
    boxes = points = masks = None
    if kind < 0.6:
        boxes = example["boxes"]
    if kind >= 0.5:
        count = 1 if kind < 0.85 else 1 + int((kind - 0.85) / 0.15 * 5)
        points = (example["points"][:, :count], example["labels"][:, :count])
    rounds = 2 if int(kind * 1000) % 5 == 0 else 1
    loss = embedding.new_zeros(())
    iou = embedding.new_zeros(())
    for _ in range(rounds):
        sparse, dense = sam.prompt_encoder(points, boxes, masks)
        logits, predicted = sam.mask_decoder.predict_masks(  # type: ignore[operator]
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.get_dense_pe(),  # type: ignore[operator]
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        losses, ious = mask_losses(logits.float(), target)
        ambiguous = boxes is None and points is not None and points[0].shape[1] == 1
        loss = loss + losses[:, 1:].min(1).values.mean() + (0.5 if ambiguous else 1.0) * losses[:, 0].mean()
        loss = loss + F.mse_loss(predicted.float(), ious)
        best = predicted[:, 1:].argmax(1) + 1
        iou = ious.gather(1, best[:, None]).mean()
        chosen = logits.gather(1, best[:, None, None, None].expand(-1, 1, *logits.shape[2:]))
        masks = chosen.detach()
    return loss / rounds, iou


def train_sam(
    out: Path, config: PretrainConfig, device: torch.device, progress: Callable[[int, int, str], None]
) -> Path:
    """Trains `dfqsam-tiny` and returns the safetensors file with its weights (float16).

    Args:
        out: folder for `sam.pt` (everything needed to resume) and `dfqsam-tiny.safetensors`.
        progress: called with (step, steps, text).
    """
    torch.manual_seed(config.seed)
    sam = Sam(VARIANTS["tiny"]).to(device).train()
    _initialise(sam)
    dense = DenseHead(sam.variant.embed_channels).to(device)
    parameters = [*sam.parameters(), *dense.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    state_file = out / "sam.pt"
    first = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        sam.load_state_dict(state["sam"])
        dense.load_state_dict(state["dense"])
        optimizer.load_state_dict(state["optimizer"])
        first = int(state["step"])
    data = PhantomDataset(config.seed, first * config.batch, (config.steps - first) * config.batch)
    loader = DataLoader(data, batch_size=config.batch, num_workers=config.workers)
    average = {"box": 0.0, "point": 0.0, "contrast": 0.0}
    started = time.monotonic()
    for step, batch in enumerate(loader, start=first):
        rate = schedule(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = {key: value.to(device) for key, value in batch.items()}
        draws = torch.rand(config.batch, generator=torch.Generator().manual_seed(step)).tolist()
        with torch.autocast(device.type, torch.bfloat16):
            embedding = sam.image_encoder(normalize(batch["image"] * 255))
            contrast = contrastive_loss(dense(embedding), batch["regions"])
            loss = 0.5 * contrast
            for i, kind in enumerate(draws):
                example = {key: value[i] for key, value in batch.items()}
                part, iou = _prompt_loss(sam, embedding[i : i + 1], example, kind)
                loss = loss + part / config.batch
                name = "box" if kind < 0.6 else "point"
                average[name] = 0.97 * average[name] + 0.03 * float(iou)
        average["contrast"] = 0.97 * average["contrast"] + 0.03 * float(contrast.detach())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        done = step + 1
        if done % 10 == 0:
            seconds = (time.monotonic() - started) / (done - first)
            text = " ".join(f"{k} {v:.3f}" for k, v in average.items())
            progress(done, config.steps, f"{text} loss {float(loss.detach()):.3f} {seconds:.2f} s/step")
        if done % config.save_every == 0 or done == config.steps:
            _save(state_file, sam=sam, dense=dense, optimizer=optimizer, step=done)
            export(sam, out / "dfqsam-tiny.safetensors", f"phantoms, {done} steps, seed {config.seed}")
    return out / "dfqsam-tiny.safetensors"


def schedule(step: int, config: PretrainConfig) -> float:
    """Learning rate: linear warm-up, then half a cosine to 2 % of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    t = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * t)))


def export(model: nn.Module, path: Path, made_from: str) -> None:
    """Writes a model's weights as float16 safetensors, whole or not at all."""
    tensors = {key: value.detach().cpu().half().contiguous() for key, value in model.state_dict().items()}
    partial = path.with_suffix(".tmp")
    save_file(tensors, partial, metadata={"format": "pt", "made_from": made_from})
    os.replace(partial, path)


def _initialise(sam: Sam) -> None:
    for name, parameter in sam.image_encoder.named_parameters():
        if parameter.ndim == 2:
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name == "pos_embed":
            nn.init.trunc_normal_(parameter, std=0.2)


def _save(path: Path, step: int, **modules: nn.Module | torch.optim.Optimizer) -> None:
    partial = path.with_suffix(".tmp")
    torch.save({"step": step, **{name: m.state_dict() for name, m in modules.items()}}, partial)
    os.replace(partial, path)
