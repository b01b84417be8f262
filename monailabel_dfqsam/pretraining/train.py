"""Trains the embedded SAM on phantoms, on a CPU or one GPU, resumable at every checkpoint.

Two choices get a model this small off the all-background plateau: the mask loss counts mostly in the
target's neighbourhood, and a dense head, dropped afterwards, pulls embeddings of one region together and
those of different regions apart (supervised contrastive loss, arXiv 2004.11362).

The weights exported are an exponential average over the steps. Several processes (`torchrun`) share a
step, each on one core and with phantoms of its own. A training that has ended is continued by asking for more
steps: its rate then rises again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from monailabel_dfqsam.files import replacing
from monailabel_dfqsam.pretraining.prompting import corrected, decode, first_prompts
from monailabel_dfqsam.pretraining.targets import PhantomDataset
from monailabel_dfqsam.sam.checkpoint import Checkpoint
from monailabel_dfqsam.sam.model import Sam
from monailabel_dfqsam.sam.preprocess import normalize
from monailabel_dfqsam.sam.variants import VARIANTS

ROUNDS = (0.5, 0.78, 0.9, 0.94, 0.96, 0.97, 0.98, 0.99, 1.0)
"""Cumulative shares of steps with one, two, … rounds of prompts: the first and up to eight corrections."""
LEARNED_ROUNDS = 2
"""The last of a step's rounds, from which it learns; those before them only lead there."""
ESTIMATE = 5.0
"""Weight of the predicted IoUs' error: by them one of three candidates is chosen, where most of a click's
quality is won or lost."""


@dataclass(frozen=True)
class PretrainConfig:
    """Training settings; those of the embedded weights, but for the number of steps.

    `batch` is of each process; `average` is the weight that the exported average keeps at a step; `cooldown`
    is the share of the steps, at the end, over which the rate falls.
    """

    steps: int
    batch: int = 8
    lr: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.02
    average: float = 0.998
    seed: int = 0
    save_every: int = 100
    cooldown: float = 0.25


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
    # On a grid of 64: at the size of a large mask, a neighbourhood as wide takes longer than all else here.
    cell = max(1, target.shape[-1] // 64)
    near = F.max_pool2d(F.max_pool2d(target, cell), 15, stride=1, padding=7)
    near = near.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
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


def prompted_loss(
    sam: Sam, embedding: Tensor, batch: dict[str, Tensor], rounds: int
) -> tuple[Tensor, dict[str, float]]:
    """Loss over all objects of a batch, prompted at random and then corrected, and IoUs of the first round.

    Args:
        embedding: [B, C, h, w] float; whole, or of each image a square that begins at its corner.
        batch: of `Example`s, in pixels from the corners; with `corners` [B, 2] int64, (x, y) in cells of the
            embedding, where they are not the whole's.
        rounds: at least 1; each further one corrects where the last answer was wrong.
    """
    masks = batch["masks"]
    objects, size = masks.shape[1], masks.shape[-1]
    target = F.avg_pool2d(masks.flatten(0, 1)[:, None].float(), sam.variant.mask_cell)
    image = embedding.repeat_interleave(objects, 0)
    corners = batch.get("corners", torch.zeros(len(masks), 2, dtype=torch.int64, device=masks.device))
    prompts = first_prompts(
        batch["boxes"].flatten(0, 1),
        batch["points"].flatten(0, 1),
        target[:, 0],
        corners.repeat_interleave(objects, 0),
        size,
    )
    loss = embedding.new_zeros((), dtype=torch.float32)
    reached: dict[str, float] = {}
    for turn in range(rounds):
        learned = turn >= rounds - LEARNED_ROUNDS
        with torch.set_grad_enabled(learned):
            logits, predicted = decode(sam, image, prompts)
        logits = logits.float()
        losses, ious = mask_losses(logits, target)
        # One click may mean a part or the whole: only the best of the three candidates learns much from it.
        open_to_doubt = ~prompts.boxed if turn == 0 else torch.zeros_like(prompts.boxed)
        all_three = torch.where(open_to_doubt, 0.05, 0.3) * losses[:, 1:].mean(1)
        single = torch.where(open_to_doubt, 0.5, 1.0) * losses[:, 0]
        if learned:
            loss = loss + (losses[:, 1:].min(1).values + all_three + single).mean()
            loss = loss + ESTIMATE * F.mse_loss(predicted.float(), ious)
        best = predicted[:, 1:].argmax(1) + 1
        if turn == 0:
            iou = ious.gather(1, best[:, None])[:, 0]
            reached = {"box": float(iou[prompts.boxed].mean()), "point": float(iou[~prompts.boxed].mean())}
        if turn + 1 < rounds:
            prompts = corrected(prompts, logits[torch.arange(len(best)), best].detach(), target[:, 0], size)
    return loss / min(rounds, LEARNED_ROUNDS), reached


def train_sam(
    out: Path,
    config: PretrainConfig,
    device: torch.device,
    progress: Callable[[int, int, str], None],
    start: Checkpoint | None = None,
) -> Path:
    """Trains `dfqsam-tiny` and returns the safetensors file with its weights (float16).

    Args:
        out: folder for `sam.pt` (everything needed to resume) and `dfqsam-tiny.safetensors`.
        progress: called with (step, steps, text).
        start: weights to begin with, when there is nothing to resume; random ones without it.

    Raises:
        ValueError: when `start` is of another model.
    """
    rank, world = join()
    torch.manual_seed(config.seed)
    sam = Sam(VARIANTS["tiny"]).to(device).train()
    _initialise(sam)
    if start is not None:
        if start.variant != sam.variant:
            raise ValueError(f"a checkpoint of '{start.variant.name}' cannot start '{sam.variant.name}'")
        sam.load_state_dict(start.state_dict)
    dense = DenseHead(sam.variant.embed_channels).to(device)
    parameters = [*sam.parameters(), *dense.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    averaged = AveragedModel(sam, multi_avg_fn=get_ema_multi_avg_fn(config.average))  # type: ignore[no-untyped-call]
    parts = {"sam": sam, "dense": dense, "optimizer": optimizer, "averaged": averaged}
    state_file, weights_file = out / "sam.pt", out / "dfqsam-tiny.safetensors"
    first = load_state(state_file, device, parts)
    data = PhantomDataset(config.seed * world + rank, first * config.batch)
    shown = {"box": 0.0, "point": 0.0, "contrast": 0.0}
    started = time.monotonic()
    for step, batch in zip(range(first, config.steps), DataLoader(data, config.batch), strict=False):
        torch.manual_seed((config.seed * 1_000_003 + step) * world + rank)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        batch = {key: value.to(device) for key, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16):
            embedding = sam.image_encoder(normalize(batch["image"] * 255))
            contrast = contrastive_loss(dense(embedding), batch["regions"])
            loss, reached = prompted_loss(sam, embedding, batch, rounds_at(step))
        learn(loss + 0.5 * contrast, optimizer, parameters, world)
        averaged.update_parameters(sam)
        done = step + 1
        for name, value in {**reached, "contrast": float(contrast.detach())}.items():
            shown[name] += (value - shown[name]) * max(0.03, 1 / (done - first))
        if rank:
            continue
        if done % 10 == 0:
            seconds = (time.monotonic() - started) / (done - first)
            text = " ".join(f"{k} {v:.3f}" for k, v in shown.items())
            progress(done, config.steps, f"{text} loss {float(loss.detach()):.3f} {seconds:.2f} s/step")
        if done % config.save_every == 0 or done == config.steps:
            save_state(state_file, done, parts)
            views = done * config.batch * world
            made_from = f"phantoms, {done} steps, {views} views, seed {config.seed}"
            export(averaged.module, weights_file, {"made_from": made_from})
    return weights_file


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, constant, then linear down to 2 % of the peak."""
    left = (config.steps - step) / max(1.0, config.cooldown * config.steps)
    return config.lr * min(1.0, (step + 1) / config.warmup, max(left, 0.02))


def rounds_at(step: int) -> int:
    """Rounds of prompts of a step, the same in all processes."""
    draw = float(torch.rand((), generator=torch.Generator().manual_seed(step)))
    return 1 + next(i for i, share in enumerate(ROUNDS) if draw <= share)


def learn(loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], world: int) -> None:
    """One step of an optimizer by the gradients of all processes, their norm at most 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    _share_gradients(parameters, world)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def load_state(path: Path, device: torch.device, parts: dict[str, Any]) -> int:
    """Loads what `save_state` saved; returns the steps done, 0 without a file.

    Args:
        parts: what has a `load_state_dict`, by name.
    """
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])


def save_state(path: Path, step: int, parts: dict[str, Any]) -> None:
    """Saves everything needed to resume, whole or not at all."""
    with replacing(path) as partial:
        torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, partial)


def export(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Writes a model's weights as float16 safetensors, whole or not at all."""
    tensors = {key: value.detach().cpu().half().contiguous() for key, value in model.state_dict().items()}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt", **metadata})


def join() -> tuple[int, int]:
    """Rank and number of the processes that `torchrun` started; (0, 1) without it."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    return dist.get_rank(), dist.get_world_size()


def _share_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """The mean of all processes' gradients to each of them."""
    if world == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _initialise(sam: Sam) -> None:
    for name, parameter in sam.image_encoder.named_parameters():
        if parameter.ndim == 2:
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name == "pos_embed":
            nn.init.trunc_normal_(parameter, std=0.2)
