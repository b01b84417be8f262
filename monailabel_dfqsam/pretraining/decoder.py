"""Teaches a SAM with a trained image encoder to answer boxes, clicks and corrections, on phantoms.

The encoder stays as it is, so that what it knows of real images stays; prompt encoder and mask decoder learn.
An embedding takes longer than a step on it: phantoms are embedded in groups, kept in float16, and each is
asked about several times, other objects by other prompts. Half of the images are changed by what no eye minds
(a few grey levels, JPEG, brightness), since that moves embeddings by more than quantization does.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import count
from pathlib import Path

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
from monailabel_dfqsam.sam.model import Sam
from monailabel_dfqsam.sam.preprocess import to_input
from monailabel_dfqsam.sam.variants import VARIANTS, Variant

GROUP = 48
"""Phantoms embedded together: 100 MB of embeddings of the largest kind."""
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
    learning = nn.ModuleDict({"prompts": sam.prompt_encoder, "masks": sam.mask_decoder}).requires_grad_(True)
    weights_file = out / f"dfqsam-{variant.name}.safetensors"

    def losses(seed: int, first: int) -> Iterator[tuple[Tensor, dict[str, float]]]:
        views = embedded_views(sam, seed, first * config.batch, device)
        for step in count(first):
            batch_of = [next(views) for _ in range(config.batch)]
            embedding, batch = _batch(batch_of, _part(step), device)
            with torch.autocast(device.type, torch.bfloat16):
                yield prompted_loss(sam, embedding, batch, rounds_at(step))

    def write(average: nn.Module, steps: int, views: int) -> None:
        whole = nn.Module()
        whole.image_encoder = sam.image_encoder
        whole.prompt_encoder, whole.mask_decoder = average["prompts"], average["masks"]  # type: ignore[index]
        made_from = f"LiteMedSAM's encoder; phantoms, {steps} steps, {views} views, seed {config.seed}"
        export(whole, weights_file, {"made_from": made_from})

    run({"learning": learning}, out / "decoder.pt", config, device, progress, losses, write)
    return weights_file


def _part(step: int) -> int:
    """Of a step, the same in all processes: 1 for whole images, 2 for squares of half the side."""
    draw = float(torch.rand((), generator=Generator().manual_seed(~step)))
    return 2 if draw < PART_SHARE else 1


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
    # bfloat16 takes half the time and changes an embedding by less than one grey level of the image does.
    with torch.autocast(device.type, torch.bfloat16):
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
    views: list[tuple[Tensor, Example, Generator]], part: int, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings [B, C, G, G] float32 and `OBJECTS` of each image, newly prompted.

    Args:
        part: 1 for whole images; 2 for a square of half the side out of each, around a point of one of its
            objects, with what of the objects lies in it. Corners join the batch.
    """
    embeddings, asked, corners = [], [], []
    for embedding, example, g in views:
        order = torch.randperm(len(example.masks), generator=g)
        masks = example.masks[order]
        grid, size = embedding.shape[-1], masks.shape[-1]
        cell, side = size // grid, grid // part
        away = (torch.rand(2, generator=g) - 0.5) * (side / 2)
        corner = (example.points[order[0]] / cell + away - side / 2).round().long().clamp(0, grid - side)
        x, y = corner.tolist()
        masks = masks[:, y * cell : (y + side) * cell, x * cell : (x + side) * cell]
        area = masks.sum((1, 2))
        visible = masks[area >= min(MIN_AREA, int(area.max()))]
        chosen = visible[torch.arange(OBJECTS) % len(visible)].numpy().astype(bool)
        asked.append(prompted(g, example.image, example.regions, example.semantic, chosen))
        embeddings.append(embedding[:, :, y : y + side, x : x + side].float())
        corners.append(corner)
    batch = {
        key: torch.stack([getattr(one, key) for one in asked]).to(device)
        for key in ("masks", "boxes", "points")
    }
    return torch.cat(embeddings).to(device), {**batch, "corners": torch.stack(corners).to(device)}
