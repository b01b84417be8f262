"""Teaches a SAM with a trained image encoder to answer boxes, clicks and corrections, on phantoms.

Prompt encoder and mask decoder learn, and slowly the encoder's last steps; those before them stay as they
are. What these give takes longer than a step on it: phantoms go through them in groups, that is kept in
float16, and each is asked about several times, other objects by other prompts.

Half of the images are changed by what no eye minds (a few grey levels, JPEG, brightness), since that moves
embeddings by more than quantization does. The embedding is drawn towards what the encoder gave of the
unchanged image before all training: so it becomes calm, and what it knew of real images stays.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor, nn

from monailabel_dfqsam.pretraining.loop import PretrainConfig, Progress, export, run
from monailabel_dfqsam.pretraining.losses import prompted_loss, rounds_at
from monailabel_dfqsam.pretraining.phantoms import eight_bit, integer, uniform
from monailabel_dfqsam.pretraining.scenes import scene
from monailabel_dfqsam.pretraining.targets import MIN_AREA, Example, example_of, prompted
from monailabel_dfqsam.sam.checkpoint import Checkpoint
from monailabel_dfqsam.sam.encoder import ImageEncoder
from monailabel_dfqsam.sam.model import Sam
from monailabel_dfqsam.sam.preprocess import to_input
from monailabel_dfqsam.sam.variants import VARIANTS, Variant

GROUP = 48
"""Phantoms embedded together: 225 MB of the largest kind."""
LEARNING_STEPS = 3
"""The encoder's last steps, which learn: TinyViT's last stage and the neck."""
KEPT = 5.0
"""Weight of the embedding's squared distance from the one to keep, in terms of that one's square."""
SHOWN = 8
"""Views of each, with other objects and prompts."""
OBJECTS = 2
"""Of an image, asked about in a step."""
PART_SHARE = 0.5
"""Of the steps that see a square of half the image's side only, at a quarter of the cost."""
DECODER_CONFIG = PretrainConfig(steps=40_000, batch=2, lr=2e-4, warmup=50, weight_decay=0.01, save_every=50)


def train_decoder(
    out: Path,
    config: PretrainConfig,
    device: torch.device,
    progress: Progress,
    start: Checkpoint,
    variant: Variant = VARIANTS["lite"],
) -> Path:
    """Trains prompt encoder and mask decoder and returns the safetensors file of the whole model (float16).

    Args:
        out: folder for `decoder.pt` (everything needed to resume) and the weights.
        start: weights to begin with, when there is nothing to resume; its encoder is kept.
        variant: whose shapes `start` has.

    Raises:
        ValueError: when `start` does not fit the variant.
    """
    sam = Sam(variant)
    try:
        sam.load_state_dict(start.state_dict)
    except RuntimeError:
        raise ValueError(f"a checkpoint of '{start.variant.name}' cannot start '{variant.name}'") from None
    sam.requires_grad_(False).eval()
    sam.to(device)
    before = copy.deepcopy(sam.image_encoder)
    last = nn.ModuleList(step for _, step in sam.image_encoder.steps()[-LEARNING_STEPS:])
    parts = {"prompts": sam.prompt_encoder, "masks": sam.mask_decoder, "encoder": last}
    learning = nn.ModuleDict(parts).requires_grad_(True)
    weights_file = out / f"dfqsam-{variant.name}.safetensors"

    def losses(seed: int, first: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        stream = embedded_views(before, variant, seed, first * config.batch, device)
        for step in count(first):
            views = [next(stream) for _ in range(config.batch)]
            tokens = torch.cat([view.tokens for view in views]).to(device).float()
            kept = torch.cat([view.embedding for view in views]).to(device).float()
            with torch.autocast(device.type, torch.bfloat16):
                embedding = _through(sam.image_encoder, slice(-LEARNING_STEPS, None), tokens).float()
                moved = (embedding - kept).square().sum() / kept.square().sum()
                seen, batch = _batch(embedding, views, _part(step), device)
                loss, told = prompted_loss(sam, seen, batch, rounds_at(step))
            yield loss + KEPT * moved, {**told, "moved": float(moved.detach()) ** 0.5}

    def write(average: nn.Module, steps: int, views: int) -> None:
        whole = copy.deepcopy(sam)
        averages: Any = average
        whole.prompt_encoder, whole.mask_decoder = averages["prompts"], averages["masks"]
        taught = whole.image_encoder.steps()[-LEARNING_STEPS:]
        for (_, step), own in zip(taught, averages["encoder"], strict=True):
            step.load_state_dict(own.state_dict())
        made_from = f"LiteMedSAM's encoder; phantoms, {steps} steps, {views} views, seed {config.seed}"
        export(whole, weights_file, {"made_from": made_from})

    run(
        {"learning": learning},
        out / "decoder.pt",
        config,
        device,
        progress,
        losses,
        write,
        list(last.parameters()),
    )
    return weights_file


def _through(encoder: ImageEncoder, some: slice, x: Tensor) -> Tensor:
    """What some of the encoder's steps make of what they read."""
    for name, step in encoder.steps()[some]:
        x = encoder.after(name, step(x))
    return x


def _part(step: int) -> int:
    """Of a step, the same in all processes: 1 for whole images, 2 for squares of half the side."""
    draw = float(torch.rand((), generator=Generator().manual_seed(~step)))
    return 2 if draw < PART_SHARE else 1


@dataclass(frozen=True)
class View:
    """A phantom, as a step sees it.

    Attributes:
        tokens: [1, H, W, C] float16, what the learning steps of the encoder read, of the image disturbed or
            not.
        embedding: [1, C, G, G] float16, what the encoder as it was gives of the image undisturbed.
        example: the phantom.
        g: draws the prompts.
    """

    tokens: Tensor
    embedding: Tensor
    example: Example
    g: Generator


def embedded_views(
    encoder: ImageEncoder, variant: Variant, seed: int, start: int, device: torch.device
) -> Iterator[View]:
    """An endless stream of phantoms, each `SHOWN` times in random order.

    The same for the same seed, from view `start` on.
    """
    group, passed = divmod(start, GROUP * SHOWN)
    while True:
        g = Generator().manual_seed(seed * 1_000_003 + group)
        seeds = torch.randint(1 << 40, (GROUP,), generator=g).tolist()
        order = torch.cat([torch.randperm(GROUP, generator=g) for _ in range(SHOWN)]).tolist()[passed:]
        kept: dict[int, tuple[Tensor, Tensor, Example]] = {}
        for position, index in enumerate(order, passed):
            if index not in kept:
                kept[index] = _embedded(encoder, variant, Generator().manual_seed(seeds[index]), device)
            yield View(*kept[index], Generator().manual_seed((seeds[index] << 8) + position // GROUP))
        group, passed = group + 1, 0


@torch.inference_mode()
def _embedded(
    encoder: ImageEncoder, variant: Variant, g: Generator, device: torch.device
) -> tuple[Tensor, Tensor, Example]:
    example = _cut(g, example_of(g, *scene(g, variant.input_size)))
    rows, columns = example.image.shape[1:]
    rgb = eight_bit(example.image[:, :rows, :columns])

    def tokens(image: NDArray[np.uint8]) -> Tensor:
        return _through(encoder, slice(-LEARNING_STEPS), to_input(variant, image)[0].to(device))

    disturbed = _disturbed(g, rgb)
    # bfloat16 takes half the time and changes an embedding by less than one grey level of the image does.
    with torch.autocast(device.type, torch.bfloat16):
        plain = tokens(rgb)
        seen = plain if disturbed is rgb else tokens(disturbed)
        embedding = _through(encoder, slice(-LEARNING_STEPS, None), plain)
    return seen.half().cpu(), embedding.half().cpu(), example


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
    embedding: Tensor, views: list[View], part: int, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of embeddings [B, C, G, G] what is seen, [B, C, g, g], and `OBJECTS` of each image, newly prompted.

    Args:
        part: 1 for whole images; 2 for a square of half the side out of each, around a point of one of its
            objects, with what of the objects lies in it. Corners join the batch.
    """
    seen, asked, corners = [], [], []
    for one, view in zip(embedding, views, strict=True):
        example, g = view.example, view.g
        order = torch.randperm(len(example.masks), generator=g)
        masks = example.masks[order]
        grid, size = one.shape[-1], masks.shape[-1]
        cell, side = size // grid, grid // part
        away = (torch.rand(2, generator=g) - 0.5) * (side / 2)
        corner = (example.points[order[0]] / cell + away - side / 2).round().long().clamp(0, grid - side)
        x, y = corner.tolist()
        masks = masks[:, y * cell : (y + side) * cell, x * cell : (x + side) * cell]
        area = masks.sum((1, 2))
        visible = masks[area >= min(MIN_AREA, int(area.max()))]
        chosen = visible[torch.arange(OBJECTS) % len(visible)].numpy().astype(bool)
        asked.append(prompted(g, example.image, example.regions, example.semantic, chosen))
        seen.append(one[:, y : y + side, x : x + side])
        corners.append(corner)
    batch = {
        key: torch.stack([getattr(one, key) for one in asked]).to(device)
        for key in ("masks", "boxes", "points")
    }
    return torch.stack(seen), {**batch, "corners": torch.stack(corners).to(device)}
