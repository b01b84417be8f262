"""Teaches a SAM with a trained image encoder to answer boxes, clicks and corrections, on phantoms.

The encoder stays as it is, so that what it knows of real images stays; prompt encoder and mask decoder learn.
An embedding takes longer than a step on it: phantoms are embedded in groups, kept in float16, and each is
asked about several times, other objects by other prompts. Half of the images are changed by what no eye minds
(a few grey levels, JPEG, brightness), since that moves embeddings by more than quantization does.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from monailabel_dfqsam.pretraining.phantoms import eight_bit, integer, uniform
from monailabel_dfqsam.pretraining.scenes import scene
from monailabel_dfqsam.pretraining.targets import MIN_AREA, Example, example_of, prompted
from monailabel_dfqsam.pretraining.train import (
    ROUNDS,
    export,
    join,
    load_state,
    prompted_loss,
    save_state,
    share_gradients,
)
from monailabel_dfqsam.sam.checkpoint import Checkpoint
from monailabel_dfqsam.sam.model import Sam
from monailabel_dfqsam.sam.preprocess import to_input
from monailabel_dfqsam.sam.variants import VARIANTS, Variant

GROUP = 48
"""Phantoms embedded together: 100 MB of embeddings of the largest kind."""
SHOWN = 8
"""Views of each, with other objects and prompts."""


@dataclass(frozen=True)
class DecoderConfig:
    """Training settings.

    Attributes:
        steps: in all.
        images: a step and process.
        objects: of each image.
        lr: AdamW's, after `warmup` steps; over the last `cooldown` of the steps it falls.
        average: weight that the exported average keeps at a step.
        save_every: steps.
    """

    steps: int
    images: int = 2
    objects: int = 2
    lr: float = 2e-4
    warmup: int = 50
    cooldown: float = 0.25
    weight_decay: float = 0.01
    average: float = 0.998
    seed: int = 0
    save_every: int = 50


def train_decoder(
    out: Path,
    config: DecoderConfig,
    device: torch.device,
    progress: Callable[[int, int, str], None],
    start: Checkpoint,
    variant: Variant = VARIANTS["lite"],
) -> Path:
    """Trains prompt encoder and mask decoder and returns the safetensors file of the whole model (float16).

    Args:
        out: folder for `decoder.pt` (everything needed to resume) and the weights.
        progress: called with (step, steps, text).
        start: weights to begin with, when there is nothing to resume; its encoder is kept.
        variant: whose shapes `start` has.

    Raises:
        ValueError: when `start` does not fit the variant.
    """
    rank, world = join()
    sam = Sam(variant)
    try:
        sam.load_state_dict(start.state_dict)
    except RuntimeError:
        raise ValueError(f"a checkpoint of '{start.variant.name}' cannot start '{variant.name}'") from None
    sam.requires_grad_(False).eval()
    sam.to(device)
    learning = nn.ModuleDict({"prompts": sam.prompt_encoder, "masks": sam.mask_decoder}).requires_grad_(True)
    parameters = list(learning.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    averaged = AveragedModel(learning, multi_avg_fn=get_ema_multi_avg_fn(config.average))  # type: ignore[no-untyped-call]
    parts = {"learning": learning, "optimizer": optimizer, "averaged": averaged}
    state_file, weights_file = out / "decoder.pt", out / f"dfqsam-{variant.name}.safetensors"
    first = load_state(state_file, device, parts)
    shown = {"box": 0.0, "point": 0.0}
    views = embedded_views(sam, config.seed * world + rank, first * config.images, device)
    started = time.monotonic()
    for step in range(first, config.steps):
        torch.manual_seed((config.seed * 1_000_003 + step) * world + rank)
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, config)
        draw = float(torch.rand((), generator=Generator().manual_seed(step)))
        rounds = 1 + next(i for i, share in enumerate(ROUNDS) if draw <= share)
        embedding, batch = _batch([next(views) for _ in range(config.images)], config.objects, device)
        with torch.autocast(device.type, torch.bfloat16):
            loss, reached = prompted_loss(sam, embedding, batch, rounds)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        share_gradients(parameters, world)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        averaged.update_parameters(learning)
        done = step + 1
        for name, value in reached.items():
            if value == value:  # a step may have no box, or boxes alone
                shown[name] += (value - shown[name]) * max(0.02, 1 / (done - first))
        if rank:
            continue
        if done % 10 == 0:
            seconds = (time.monotonic() - started) / (done - first)
            text = " ".join(f"{k} {v:.3f}" for k, v in shown.items())
            progress(done, config.steps, f"{text} loss {float(loss.detach()):.3f} {seconds:.2f} s/step")
        if done % config.save_every == 0 or done == config.steps:
            save_state(state_file, done, parts)
            _export(sam, averaged.module, weights_file, done, world, config)
    return weights_file


def embedded_views(
    sam: Sam, seed: int, start: int, device: torch.device
) -> Iterator[tuple[Tensor, Example, Generator]]:
    """An endless stream of phantoms' embeddings [1, C, G, G] float16, each `SHOWN` times in random order.

    The same for the same seed, from view `start` on; with each, the phantom and a generator for its prompts.
    """
    group, passed = divmod(start, GROUP * SHOWN)
    while True:
        g = Generator().manual_seed(seed * 1_000_003 + group)
        seeds = torch.randint(1 << 40, (GROUP,), generator=g).tolist()
        order = torch.cat([torch.randperm(GROUP, generator=g) for _ in range(SHOWN)]).tolist()[passed:]
        kept: dict[int, tuple[Tensor, Example]] = {}
        for position, index in enumerate(order, passed):
            if index not in kept:
                kept[index] = _embedded(sam, Generator().manual_seed(seeds[index]), device)
            yield (*kept[index], Generator().manual_seed((seeds[index] << 8) + position // GROUP))
        group, passed = group + 1, 0


@torch.inference_mode()
def _embedded(sam: Sam, g: Generator, device: torch.device) -> tuple[Tensor, Example]:
    size = sam.variant.input_size
    example = _cut(g, example_of(g, *scene(g, size)))
    rows, columns = example.image.shape[1:]
    x, _ = to_input(sam.variant, _disturbed(g, eight_bit(example.image[:, :rows, :columns])))
    return sam.image_encoder(x.to(device)).half().cpu(), example


def _cut(g: Generator, example: Example) -> Example:
    """A third of the images lose a side's end, as many scans are no squares; their objects stay in sight."""
    size = example.image.shape[1]
    rows, columns = size, size
    if uniform(g, 0, 1) < 0.33:
        kept = int(uniform(g, 0.6, 1) * size)
        rows, columns = (kept, size) if integer(g, 0, 1) else (size, kept)
    masks = example.masks.clone()
    masks[:, rows:] = 0
    masks[:, :, columns:] = 0
    if (masks.sum((1, 2)) < MIN_AREA).any():
        return example
    image = example.image[:, :rows, :columns]
    return Example(image, example.regions, example.semantic, masks, example.boxes, example.points)


def _disturbed(g: Generator, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 3] uint8; half of them brighter or darker, with a few grey levels of noise, or through JPEG."""
    if integer(g, 0, 1):
        return rgb
    seen = torch.from_numpy(rgb).float() * uniform(g, 0.9, 1.1)
    seen += uniform(g, 0, 3) * torch.randn(seen.shape[:2], generator=g)[:, :, None]
    changed: NDArray[np.uint8] = seen.round().clamp(0, 255).to(torch.uint8).numpy()
    if integer(g, 0, 1):
        file = io.BytesIO()
        Image.fromarray(changed).save(file, "JPEG", quality=integer(g, 40, 95))
        changed = np.array(Image.open(file))
    return changed


def _batch(
    views: list[tuple[Tensor, Example, Generator]], objects: int, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings [B, C, G, G] float32 and of each image so many objects, newly prompted."""
    embeddings, asked = [], []
    for embedding, example, g in views:
        chosen = torch.randperm(len(example.masks), generator=g)[:objects]
        masks = example.masks[chosen].numpy().astype(bool)
        asked.append(prompted(g, example.image, example.regions, example.semantic, masks))
        embeddings.append(embedding.float())
    batch = {
        key: torch.stack([getattr(one, key) for one in asked]).to(device)
        for key in ("masks", "boxes", "points")
    }
    return torch.cat(embeddings).to(device), batch


def _rate(step: int, config: DecoderConfig) -> float:
    left = (config.steps - step) / max(1.0, config.cooldown * config.steps)
    return config.lr * min(1.0, (step + 1) / config.warmup, max(left, 0.02))


def _export(sam: Sam, learned: nn.Module, path: Path, steps: int, world: int, config: DecoderConfig) -> None:
    whole = nn.Module()
    whole.image_encoder = sam.image_encoder
    whole.prompt_encoder, whole.mask_decoder = learned["prompts"], learned["masks"]  # type: ignore[index]
    views = steps * config.images * world
    export(whole, path, {"made_from": f"LiteMedSAM's encoder; phantoms, {steps} steps, {views} views, "
                                      f"seed {config.seed}"})  # fmt: skip
