"""What a model makes of images, in numbers: do synthetic ones look to it as real ones do?

Three things: how diverse it finds their patches, which the synthesis maximises; what its layers read, since
the ranges of that are all that calibration takes from images; and how sure the auxiliary model is of the
class of what it segments in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monailabel_dfqsam.sam import Sam
from monailabel_dfqsam.synthesis.auxiliary import Auxiliary
from monailabel_dfqsam.synthesis.label_evolution import class_candidates
from monailabel_dfqsam.synthesis.patch_similarity import attention_outputs, patch_entropy
from monailabel_dfqsam.synthesis.synthesize import from_model

Range = tuple[float, float]
"""The least and the greatest value, rare ones left out."""

TAIL = 0.001
"""Share of an input's values that lie below its range, and as many above."""

_SAMPLES = 1 << 18  # values of an input that its range is taken of, about
_POINTS = 4  # clicks a side, in whose masks the class response is looked up
_MIN_SHARE = 80 / 256**2  # a mask that takes less of the image is not asked about


@dataclass(frozen=True)
class Measures:
    """Means over images.

    Attributes:
        entropies: patch-similarity entropy of each block, in nats.
        ranges: of what each Linear and convolution of the encoder reads, by its name.
        response: mean class score, 0 to 1, inside the masks that the model draws for clicks all over the
            image, each for the class it fits best; NaN without an auxiliary model or without masks.
    """

    entropies: list[float]
    ranges: dict[str, Range]
    response: float


@torch.no_grad()
def measure(sam: Sam, images: Tensor, auxiliary: Auxiliary | None) -> Measures:
    """Measures images under a model, each by itself; the results are means over the images.

    Args:
        sam: in evaluation mode.
        images: [N, 3, S, S] float32, as the model takes them, on its device; N at least 1.
        auxiliary: None where nobody knows the classes.
    """
    entropies, ranges, responses = [], [], []
    for image in images:
        found: dict[str, Tensor] = {}
        handles = [
            module.register_forward_pre_hook(_range_of(name, found))
            for name, module in sam.image_encoder.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
        ]
        try:
            with attention_outputs(sam.image_encoder) as outputs:
                embedding = sam.image_encoder(image[None])
        finally:
            for handle in handles:
                handle.remove()
        entropies.append(torch.stack([patch_entropy(tokens[0]) for tokens in outputs]))
        ranges.append(found)
        if auxiliary is not None:
            responses.append(class_response(sam, image, embedding, auxiliary))
    return Measures(
        torch.stack(entropies).mean(0).tolist(),
        {name: _pair(torch.stack([found[name] for found in ranges]).mean(0)) for name in ranges[0]},
        float(torch.tensor(responses).nanmean()),
    )


def overlap(one: Range, other: Range) -> float:
    """What two ranges share of what they span together, 0 to 1; 1 for the same range."""
    shared = min(one[1], other[1]) - max(one[0], other[0])
    spanned = max(one[1], other[1]) - min(one[0], other[0])
    return max(0.0, shared) / spanned if spanned > 0 else 1.0


def mean_overlap(ones: Mapping[str, Range], others: Mapping[str, Range]) -> float:
    """`overlap` averaged over the layers of `others`, which `ones` must have too."""
    return sum(overlap(ones[name], others[name]) for name in others) / len(others)


@torch.no_grad()
def class_response(sam: Sam, image: Tensor, embedding: Tensor, auxiliary: Auxiliary) -> float:
    """How sure the auxiliary model is of the classes of what the model segments; see `Measures.response`.

    Args:
        image: [3, S, S] float32, as the model takes it.
        embedding: [1, C, G, G] float32, of that image.
    """
    masks = _clicked_masks(sam, embedding)
    scores = auxiliary.scores(from_model(sam.variant, image[None]))
    # Class 0 is the background; what is segmented is an object.
    kinds = list(range(1, scores.shape[1]))
    scores = F.interpolate(scores, masks.shape[-2:], mode="area")[0]
    kept = masks[masks.flatten(1).sum(1) >= _MIN_SHARE * sam.variant.mask_side**2]
    if len(kept) == 0:
        return float("nan")
    return float(class_candidates(kept, scores, kinds).scores.mean())


def _clicked_masks(sam: Sam, embedding: Tensor) -> Tensor:
    """[16, M, M] bool: for clicks on a regular grid, of the three masks the one the model rates best."""
    size = sam.variant.input_size
    place = (torch.arange(_POINTS, device=embedding.device) + 0.5) * size / _POINTS
    logits, iou = sam.predict(embedding, points=torch.cartesian_prod(place, place))
    best = 1 + iou[:, 1:].argmax(1)
    return logits[torch.arange(len(logits), device=logits.device), best] > 0


def _range_of(name: str, found: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].permute(0, 2, 3, 1) if isinstance(module, nn.Conv2d) else inputs[0]
        # Whole rows: every channel counts alike.
        rows = x.flatten(0, -2)
        values = rows[:: -(-rows.numel() // _SAMPLES)].float().flatten()
        rank = round(TAIL * (len(values) - 1))
        # Two selections take a tenth of the time of the sort that `torch.quantile` is.
        ends = [values.kthvalue(k).values for k in (1 + rank, len(values) - rank)]
        found[name] = torch.stack(ends).cpu()

    return hook


def _pair(range_: Tensor) -> Range:
    low, high = range_.tolist()
    return low, high
