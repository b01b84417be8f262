"""What the tables of tables.py are computed with: calibration images by source, and scores of what they give.

Everything slow is kept in a work folder: synthesized images under their settings and the digest of the code
and weights they depend on, scores under the digest of the calibration images. A run that was cut off goes on
where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import monailabel_dfqsam
from monailabel_dfqsam.config import Policy, QuantizationConfig, Recipe, SynthesisConfig, silent
from monailabel_dfqsam.engines import load_encoder
from monailabel_dfqsam.evaluation import PROMPTS, Item, iou, read_items
from monailabel_dfqsam.files import replacing
from monailabel_dfqsam.pipeline import (
    PHANTOM_SEED,
    PHANTOMS,
    gaussian_images,
    pack,
    phantom_entropies,
    phantom_images,
)
from monailabel_dfqsam.quantization.calibrate import calibrate
from monailabel_dfqsam.sam import build, read_checkpoint
from monailabel_dfqsam.sam.preprocess import to_input
from monailabel_dfqsam.segmentation.segmenter import Embedding, Segmenter, full_precision_segmenter
from monailabel_dfqsam.synthesis.auxiliary import embedded_auxiliary
from monailabel_dfqsam.synthesis.synthesize import synthesize

PROMPT_NAMES = ("box", "point")
MEASURES = ("iou", "drop", "agreement")
BATCH = 8
_PACKAGE = Path(monailabel_dfqsam.__file__).parent
_MAKES_IMAGES = ("synthesis", "sam", "pretraining")
_MAKES_SCORES = ("quantization", "ops", "engines", "sam", "segmentation", "evaluation")


@dataclass(frozen=True)
class Settings:
    """One study.

    Attributes:
        data: what `read_items` takes, images with true masks.
        work: folder for what is kept between runs.
        seeds: one calibration each; tables show mean and deviation over them.
        images: calibration images a source and seed.
        iterations: of synthesis, an image.
        limit: evaluate on so many images at most, evenly spread; None for all.
    """

    data: Path
    work: Path
    seeds: tuple[int, ...]
    images: int
    iterations: int
    limit: int | None = None


class Study:
    """The embedded model, the data, and what was computed so far."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        settings.work.mkdir(parents=True, exist_ok=True)
        self.checkpoint = read_checkpoint("tiny")
        self.sam = build(self.checkpoint)
        self.auxiliary = embedded_auxiliary()
        readers = read_items(settings.data)
        chosen = split(len(readers), settings.images * len(settings.seeds), settings.limit)
        self.left_out = [readers[i]().rgb for i in chosen.left_out]
        self.items: list[Item] = [readers[i]() for i in chosen.evaluated]

    def inputs(self) -> Tensor:
        """[N, 3, S, S] float32, the images evaluated on."""
        return torch.cat([to_input(self.sam.variant, item.rgb)[0] for item in self.items])

    # Calibration images, each [N, 3, S, S] float32 as the model takes them.

    def real(self, seed: int, count: int) -> Tensor:
        """Images that the evaluation leaves out, others for every seed."""
        seeds = self.settings.seeds
        dealt = self.left_out[seeds.index(seed) :: len(seeds)][:count]
        return torch.cat([to_input(self.sam.variant, rgb)[0] for rgb in dealt])

    def gaussian(self, seed: int, count: int) -> Tensor:
        """The paper's baseline."""
        return gaussian_images(self.sam.variant, count, seed)

    def phantoms(self, seed: int, count: int) -> Tensor:
        """Procedural phantoms, as the embedded model was trained on; no patient is in them either."""
        first = PHANTOM_SEED + PHANTOMS + 1000 * seed
        return phantom_images(self.sam.variant, range(first, first + count))

    def synthetic(self, seed: int, count: int, **options: Any) -> Tensor:
        """Images of `synthesize`; `options` are `SynthesisConfig`'s."""
        return torch.cat([self._synthesized(seed, index, options) for index in range(count)])

    def both(self, seed: int, count: int) -> Tensor:
        """Half synthesized, half phantoms; as many in all as of any other source."""
        half = count // 2
        return torch.cat([self.synthetic(seed, count - half), self.phantoms(seed, half)])

    @cached_property
    def _ceiling(self) -> Tensor:
        return phantom_entropies(self.sam)

    def _synthesized(self, seed: int, index: int, options: dict[str, Any]) -> Tensor:
        config = SynthesisConfig(**{"iterations": self.settings.iterations, **options})
        code = f"{code_sha256(_MAKES_IMAGES)} {self.checkpoint.sha256} {torch.get_num_threads()}"
        path = self._kept(f"image {seed} {index} {asdict(config)} {code}", "safetensors")
        if not path.is_file():
            # `synthesize` makes all images of a seed up to one; each has a seed of its own here.
            made = synthesize(
                self.sam,
                config,
                images=1,
                seed=1000 * seed + index,
                auxiliary=self.auxiliary,
                ceiling=self._ceiling if config.bounded else None,
                progress=silent,
            )
            with replacing(path) as partial:
                save_file({"image": made.images}, partial)
        return load_file(path)["image"]

    # Scores

    @cached_property
    def _reference(self) -> tuple[Segmenter, dict[str, list[Any]]]:
        """The model in full precision and its masks of all items, by prompt."""
        segmenter = full_precision_segmenter(self.sam)
        return segmenter, self._masks(segmenter, self.sam.image_encoder)

    def full_precision(self) -> dict[str, dict[str, float]]:
        """{prompt: {iou, drop, agreement}} of the model itself."""
        return self._compare(self._reference[1])

    def score(self, images: Tensor, bits: int, policy: Policy, recipe: Recipe) -> dict[str, dict[str, float]]:
        """{prompt: {iou, drop, agreement}} of the encoder calibrated on images, means over the items.

        iou: with the true mask. drop: that of full precision minus it. agreement: IoU with full precision's
        mask. The decoder stays in full precision.
        """
        digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        items = hashlib.sha256(b"".join(item.rgb.tobytes() + item.mask.tobytes() for item in self.items))
        code = f"{code_sha256(_MAKES_SCORES)} {self.checkpoint.sha256} {items.hexdigest()}"
        path = self._kept(f"score {digest} {bits} {policy.value} {recipe} {code}", "json")
        if not path.is_file():
            config = QuantizationConfig(bits=bits, policy=policy, images=len(images), recipe=recipe)
            quantized = calibrate(self.sam.image_encoder, images, bits, policy, recipe, silent)
            encoder = load_encoder(pack(self.checkpoint, config, self.sam, quantized, images))
            found = self._compare(self._masks(self._reference[0], encoder.embed))
            with replacing(path) as partial:
                partial.write_text(json.dumps(found))
        result: dict[str, dict[str, float]] = json.loads(path.read_text())
        return result

    def _masks(self, segmenter: Segmenter, embed: Any) -> dict[str, list[Any]]:
        masks: dict[str, list[Any]] = {name: [] for name in PROMPT_NAMES}
        for start in range(0, len(self.items), BATCH):
            group = self.items[start : start + BATCH]
            inputs = [to_input(self.sam.variant, item.rgb) for item in group]
            with torch.inference_mode():
                embedded = embed(torch.cat([x for x, _ in inputs]))
            for item, (_, frame), tensor in zip(group, inputs, embedded, strict=True):
                for name in PROMPT_NAMES:
                    prompts = PROMPTS[name].first(item.mask)
                    masks[name].append(segmenter.predict(Embedding(tensor[None], frame), prompts).mask)
        return masks

    def _compare(self, masks: dict[str, list[Any]]) -> dict[str, dict[str, float]]:
        expected = self._reference[1]
        rows = {}
        for name, found in masks.items():
            reached = [iou(mask, item.mask) for mask, item in zip(found, self.items, strict=True)]
            best = [iou(mask, item.mask) for mask, item in zip(expected[name], self.items, strict=True)]
            same = [iou(mask, other) for mask, other in zip(found, expected[name], strict=True)]
            numbers = (np.mean(reached), np.mean(best) - np.mean(reached), np.mean(same))
            rows[name] = dict(zip(MEASURES, map(float, numbers), strict=True))
        return rows

    def _kept(self, what: str, suffix: str) -> Path:
        return self.settings.work / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.{suffix}"


@dataclass(frozen=True)
class Split:
    """Places in the data: of images to calibrate on, and of those to evaluate on."""

    left_out: list[int]
    evaluated: list[int]


def split(count: int, wanted: int, limit: int | None) -> Split:
    """Leaves `wanted` of `count` images out of the evaluation, evenly spread.

    Neighbours in the data are of one collection, of which even spreading takes in proportion.

    Args:
        limit: of the images to evaluate on; None for all that remain.

    Raises:
        ValueError: when fewer than half would remain.
    """
    if not 0 < wanted <= count // 2:
        raise ValueError(f"{wanted} images to calibrate on are too many of {count}")
    places = [int((i + 0.5) * count / wanted) for i in range(wanted)]
    rest = [i for i in range(count) if i not in set(places)]
    if limit is not None and limit < len(rest):
        rest = [rest[int((i + 0.5) * len(rest) / limit)] for i in range(limit)]
    return Split(places, rest)


def summary(values: list[float]) -> dict[str, float]:
    """{mean, deviation} of the values of several seeds; the deviation of a sample, 0 of one value."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "deviation": deviation}


def over_seeds(scores: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """{prompt: {measure: {mean, deviation}}} of one {prompt: {measure: value}} a seed."""
    return {
        prompt: {name: summary([score[prompt][name] for score in scores]) for name in MEASURES}
        for prompt in PROMPT_NAMES
    }


def code_sha256(packages: tuple[str, ...]) -> str:
    """Digest of the modules of some sub-packages: what was computed by other code is computed again."""
    digest = hashlib.sha256()
    for package in packages:
        for file in sorted((_PACKAGE / package).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def record_tables(
    file: Path,
    study: Study,
    run: dict[str, Any],
    tables: Mapping[str, Callable[[Study], list[dict[str, Any]]]],
) -> dict[str, Any]:
    """Computes tables and writes each into a file of record as soon as it is there.

    Args:
        file: JSON, made where it is missing; its other tables stay.
        run: as `describe_run` returns it.
        tables: what computes the rows, by name.

    Returns:
        all tables in the file, by name.
    """
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for name, rows in tables.items():
        started = time.monotonic()
        found = rows(study)
        record[name] = {
            **run,
            "weights_sha256": study.checkpoint.sha256,
            "seeds": study.settings.seeds,
            "images": study.settings.images,
            "iterations": study.settings.iterations,
            "evaluated": len(study.items),
            "seconds": round(time.monotonic() - started, 1),
            "rows": found,
        }
        with replacing(file) as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n")
    return record
