"""From labelled images to samples to learn from: one object on one slice each, told apart by modality.

An image and all its slices lie on one side of the split, so that what is validated was never learned from.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.transforms import KeepLargestConnectedComponent
from numpy.typing import NDArray
from torch.utils.data import Sampler

from monailabel_dfqsam.config import Progress, Sampling, silent
from monailabel_dfqsam.segmentation.grids import on_grid
from monailabel_dfqsam.segmentation.loading import VolumeLoader
from monailabel_dfqsam.segmentation.volume import Volume, slice_rgb

logger = logging.getLogger(__name__)

OTHER = "other"
"""The modality of images that say none."""
SLICES = 8
"""Of one object of a volume, spread over it: neighbours are alike and would only outweigh other images."""
LEAST_PIXELS = 25
"""Of an object on its slice; what is smaller is lost in a model's masks, whose pixels are larger."""
LEAST_EPOCH = 64
"""Samples of an epoch, after which the model is judged."""
VALIDATION = 0.25
"""Share of the images, of each modality, that is kept to judge by."""


class NothingToLearn(ValueError):
    """Too few labels; the message says what is there and what is needed."""


@dataclass(frozen=True)
class Labelled:
    """An image with its finished label map, and the modality if somebody said it."""

    image: Path
    label: Path
    modality: str | None = None


@dataclass(frozen=True)
class Sample:
    """One object on one slice: where `label` has `value`, on slice `k` of `image`."""

    image: Path
    label: Path
    value: int
    k: int
    modality: str


class Reader:
    """Reads samples; the volumes read last are kept, so that slices of one follow each other fast."""

    def __init__(self, max_bytes: int = 1 << 29) -> None:
        self._volumes = VolumeLoader(max_bytes)

    def labels(self, labelled: Labelled | Sample) -> tuple[Volume, NDArray[np.generic]]:
        """An image and its labels [I, J, K] on the image's grid.

        Raises:
            ValueError: when one cannot be read (ImageError), or they do not lie on each other.
        """
        image, label = self._volumes.load(labelled.image), self._volumes.load(labelled.label)
        return image, on_grid(label, image)

    def read(self, sample: Sample) -> dict[str, NDArray[np.float32]]:
        """`image` [3, H, W] float32 in 0 … 255, W along i as people see it; `mask` [1, H, W] of 0 and 1.

        Of an object in several parts the largest counts, as SAM-Med2D evaluates: a click means one of them.
        """
        volume, labels = self.labels(sample)
        rgb = slice_rgb(volume, sample.k)
        mask = torch.from_numpy(sample.value == labels[:, :, sample.k].T)[None].float()
        largest = KeepLargestConnectedComponent()(mask).numpy()
        return {"image": rgb.transpose(2, 1, 0).astype(np.float32), "mask": largest.astype(np.float32)}


def find_samples(
    labelled: Sequence[Labelled], reader: Reader, progress: Progress = silent
) -> tuple[list[Sample], int]:
    """What there is to learn from.

    Returns:
        The samples in the order of the images, and the number of label maps that could not be used.
    """
    samples: list[Sample] = []
    refused = 0
    for done, one in enumerate(labelled):
        progress("labels", done, len(labelled))
        try:
            volume, labels = reader.labels(one)
        except (ValueError, MemoryError) as error:
            logger.debug("A label map is left out: %s", error)
            refused += 1
            continue
        modality = (one.modality or volume.modality or OTHER).strip().upper() or OTHER
        modality = OTHER if modality == OTHER.upper() else modality
        for value in np.unique(labels):
            if value:
                slices = _spread(labels == value)
                samples += [Sample(one.image, one.label, int(value), k, modality) for k in slices]
    progress("labels", len(labelled), len(labelled))
    return samples, refused


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """To learn from, and to judge by: `VALIDATION` of the images of each modality, at least one of several.

    An image's side hangs on its name alone, nearly: what was learned from before is not judged by later.

    Raises:
        NothingToLearn: when there are not two images with labels.
    """
    images: dict[str, set[Path]] = {}
    for sample in samples:
        images.setdefault(sample.modality, set()).add(sample.image)
    count = len({sample.image for sample in samples})
    if count < 2:
        raise NothingToLearn(
            f"{count} of the images has a finished label that can be learned from; at least 2 are needed, "
            "one of them to judge by"
        )
    judged: set[Path] = set()
    for group in images.values():
        if len(group) > 1:
            order = sorted(group, key=lambda path: hashlib.sha256(path.name.encode()).digest())
            judged.update(order[: max(1, round(VALIDATION * len(order)))])
    if not judged:  # as many modalities as images
        judged = {min(s.image for s in samples)}
    learned = [sample for sample in samples if sample.image not in judged]
    return learned, [sample for sample in samples if sample.image in judged]


class ModalitySampler(Sampler[int]):
    """Indices of an epoch's samples, in an order that hangs on seed and epoch alone.

    Balanced, every modality has the same share: as many as the largest has, at most `cap`; of a larger group
    others are drawn in each epoch, a smaller one is gone through several times. Natural, every sample comes
    equally often, and an epoch has as many as a balanced one. Few samples are gone through until an epoch has
    `LEAST_EPOCH`.
    """

    def __init__(self, modalities: Sequence[str], sampling: Sampling, seed: int, cap: int = 64) -> None:
        self._seed = seed
        groups: dict[str, list[int]] = {}
        for index, name in enumerate(modalities):
            groups.setdefault(name, []).append(index)
        largest = max(len(group) for group in groups.values())
        share = max(min(cap, largest), -(-LEAST_EPOCH // len(groups)))
        if sampling is Sampling.BALANCED:
            self._parts = [(group, share) for group in groups.values()]
        else:
            self._parts = [(list(range(len(modalities))), share * len(groups))]
        self._epoch = 0

    def __len__(self) -> int:
        return sum(share for _, share in self._parts)

    def state_dict(self) -> dict[str, int]:
        """How many epochs were drawn."""
        return {"epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from what `state_dict` said."""
        self._epoch = state["epoch"]

    def __iter__(self) -> Iterator[int]:
        """The next epoch."""
        self._epoch += 1
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)

        def shuffled(items: list[int]) -> list[int]:
            return [items[i] for i in torch.randperm(len(items), generator=generator)]

        chosen: list[int] = []
        for group, share in self._parts:
            whole, rest = divmod(share, len(group))
            chosen += group * whole + shuffled(group)[:rest]
        yield from shuffled(chosen)


def _spread(mask: NDArray[np.bool_]) -> list[int]:
    """Slices of an object [I, J, K], evenly over those that hold enough of it."""
    found = np.flatnonzero(np.count_nonzero(mask, axis=(0, 1)) >= LEAST_PIXELS)
    places = np.linspace(0, len(found) - 1, min(SLICES, len(found))).round().astype(int)
    return [int(found[place]) for place in places]
