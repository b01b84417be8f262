"""Optimises images until the model sees objects and diverse patches in them (DFQ-SAM Algorithm 1, stage 1).

The images live in mean/std-normalised RGB, whatever the model takes, and are converted on their way into it;
learning rate and total variation thus mean the same for every model. Images are made one after another, each
from its own generator, so that image i of a seed does not depend on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from monailabel_dfqsam.config import Progress, SynthesisConfig
from monailabel_dfqsam.sam import Sam, Variant
from monailabel_dfqsam.sam.encoder import ImageEncoder
from monailabel_dfqsam.sam.preprocess import input_range, normalize
from monailabel_dfqsam.synthesis.auxiliary import Auxiliary
from monailabel_dfqsam.synthesis.label_evolution import (
    EvolutionRules,
    EvolutionStep,
    Region,
    class_candidates,
    evolve,
    label_confidence,
    own_candidates,
    random_ellipse,
    regions,
)
from monailabel_dfqsam.synthesis.losses import (
    class_loss,
    jitter_boxes,
    mask_loss,
    similarity_loss,
    total_variation,
)
from monailabel_dfqsam.synthesis.patch_similarity import attention_outputs, patch_entropy

ADAM_BETAS = (0.5, 0.9)
WARMUP = 100
CYCLE = 500
ROLL = 15 / 256  # largest roll, as a share of the input's side
COLOUR = 0.03  # of the channels' differences that is kept, see `mute`; compared in docs/accuracy
BOX_JITTER = 0.1  # of a box's extent
PROMPTS = 4  # boxes an iteration; a decoder run costs about as much as a block of the encoder
# Of an input whose blocks keep all that gradients need: at 1024 pixels, one map of attention is 0.8 GB.
KEPT_TOKENS = 1024
SNAPSHOTS = 10  # label maps kept of an evolution
LOSSES = ("total", "mask", "class", "similarity", "variation")


@dataclass(frozen=True)
class Synthesis:
    """Synthesized images and how they came about.

    Attributes:
        images: [N, 3, S, S] float32 on the CPU, as the model takes them.
        evolution: of each image, snapshots of its labels, the first before the first iteration.
        losses: of each image, by name ('total', 'mask', 'class', 'similarity', 'variation') the value at each
            iteration; 'similarity' is minus the sum of the blocks' patch entropies as far as they count,
            'class' 0 without an auxiliary model.
    """

    images: Tensor
    evolution: list[list[EvolutionStep]]
    losses: list[dict[str, list[float]]]


def synthesize(
    sam: Sam,
    config: SynthesisConfig,
    *,
    images: int,
    seed: int,
    auxiliary: Auxiliary | None,
    ceiling: Tensor | None,
    progress: Progress,
) -> Synthesis:
    """Makes images out of a model's weights alone.

    The same model, configuration, seed and number of threads give the same images bit for bit on one machine.

    Args:
        sam: in evaluation mode without gradients, on any device.
        images: how many, at least 1.
        seed: image i follows a generator of (seed, i).
        auxiliary: scores of classes, on the model's device; None to do without, as for models whose classes
            nobody knows: then the model's own predicted IoU chooses labels.
        ceiling: [blocks] float, the patch-similarity entropies in nats beyond which more earns nothing; None
            for no bound.
        progress: called with ('synthesis', iterations done, iterations in all).

    Raises:
        ValueError: when `images` is less than 1.
    """
    if images < 1:
        raise ValueError(f"images must be at least 1, not {images}")
    painters = []
    for index in range(images):

        def report(done: int, before: int = index * config.iterations) -> None:
            progress("synthesis", before + done, images * config.iterations)

        painter = _Painter(sam, config, auxiliary, ceiling, image_generator(seed, index))
        painter.paint(report)
        painters.append(painter)
    return Synthesis(
        torch.cat([painter.result() for painter in painters]),
        [painter.evolution for painter in painters],
        [painter.losses for painter in painters],
    )


def image_generator(seed: int, index: int) -> Generator:
    """The generator that everything about image `index` of a seed follows; on the CPU."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


def to_model(variant: Variant, normalized: Tensor) -> Tensor:
    """[N, 3, S, S] float in mean/std-normalised RGB to what a variant takes."""
    return _between(normalized, _black_and_white(), input_range(variant))


def from_model(variant: Variant, images: Tensor) -> Tensor:
    """The inverse of `to_model`."""
    return _between(images, input_range(variant), _black_and_white())


def _black_and_white() -> tuple[Tensor, Tensor]:
    """Black and white in mean/std-normalised RGB, each [3] float."""
    black, white = normalize(torch.tensor([0.0, 255.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    return black.flatten(), white.flatten()


def _between(x: Tensor, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """[N, 3, S, S] float from one range of black and white to another, a channel by itself."""
    if all(torch.equal(one, other) for one, other in zip(source, target, strict=True)):
        return x
    source_low, source_high, target_low, target_high = (
        bound.to(x).view(3, 1, 1) for bound in (*source, *target)
    )
    scale = (target_high - target_low) / (source_high - source_low)
    converted: Tensor = (x - source_low) * scale + target_low
    return converted


def mute(images: Tensor, bounds: tuple[Tensor, Tensor]) -> Tensor:
    """Nearly grey images: in each pixel, channels keep the share `COLOUR` of their distance from their mean.

    The channels of real images go together, those of medical ones most of all. Free channels are where
    optimisation goes first: complementary colours, which no training image had, make the similarities of
    patches span the whole range of the cosine, far beyond what real images reach.

    Args:
        images: [N, 3, S, S] float, mean/std-normalised.
        bounds: black and white, each [3, 1, 1], normalised likewise.

    Returns:
        The same shape, within the bounds if `images` was.
    """
    low, high = bounds
    unit = (images - low) / (high - low)
    grey = unit.mean(1, keepdim=True)
    return low + (grey + COLOUR * (unit - grey)) * (high - low)


def learning_rate(step: int, config: SynthesisConfig) -> float:
    """Adam's rate at a step: cycles of at most 500 steps, each a linear warm-up and half a cosine to zero."""
    cycles = math.ceil(config.iterations / CYCLE)
    length = math.ceil(config.iterations / cycles)
    warmup = WARMUP if config.iterations >= CYCLE else config.iterations // 5
    position = step % length
    if position < warmup:
        return config.learning_rate * (position + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (position - warmup) / (length - warmup)))


@dataclass(frozen=True)
class Augmentation:
    """A roll (down, right) in whole mask cells, so that label maps follow exactly, and a horizontal flip.

    Those cells are the pixels of the low-resolution masks.
    """

    down: int
    right: int
    flip: bool

    @classmethod
    def draw(cls, generator: Generator, size: int, cell: int) -> Augmentation:
        """A random one for `size`² pixels, `cell` of them along a mask cell's side."""
        reach = int(ROLL * size) // cell
        down, right = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
        return cls(down, right, bool(torch.randint(2, (), generator=generator)))

    def apply(self, x: Tensor, cell: int = 1) -> Tensor:
        """[..., h, w] rolled and flipped; `cell` is the side of a mask cell in elements of x."""
        x = torch.roll(x, (self.down * cell, self.right * cell), (-2, -1))
        return x.flip(-1) if self.flip else x

    def undo(self, x: Tensor) -> Tensor:
        """The inverse of `apply` for maps [..., g, g] on the mask grid."""
        x = x.flip(-1) if self.flip else x
        return torch.roll(x, (-self.down, -self.right), (-2, -1))


def embed(encoder: ImageEncoder, images: Tensor) -> Tensor:
    """What the encoder makes of images, to be differentiated, in bounded memory.

    With more than `KEPT_TOKENS` tokens, steps between patch embedding and neck keep only their inputs and run
    again in the backward pass.
    """
    (first, patches), *between, (_, neck) = encoder.steps()
    tokens = encoder.after(first, patches(images))
    for name, step in between:
        if tokens.shape[1] * tokens.shape[2] > KEPT_TOKENS:
            tokens = checkpoint(step, tokens, use_reentrant=False, preserve_rng_state=False)
        else:
            tokens = step(tokens)
        tokens = encoder.after(name, tokens)
    embedding: Tensor = neck(tokens)
    return embedding


class _Painter:
    """Optimises one image; owns its generator, labels and records, and is used once."""

    def __init__(
        self,
        sam: Sam,
        config: SynthesisConfig,
        auxiliary: Auxiliary | None,
        ceiling: Tensor | None,
        generator: Generator,
    ) -> None:
        self.sam, self.config, self.auxiliary, self.generator = sam, config, auxiliary, generator
        self.size = sam.variant.input_size
        self.grid, self.cell = sam.variant.mask_side, sam.variant.mask_cell
        self.rules = EvolutionRules.of(config, self.grid)
        device = next(sam.parameters()).device
        self.ceiling = None if ceiling is None else ceiling.to(device)
        black, white = (normalize(torch.full((3, 1, 1), value)).to(device) for value in (0.0, 255.0))
        self.bounds = black, white
        noise = torch.randn(1, 1, self.size, self.size, generator=generator).to(device)
        self.image = noise.expand(-1, 3, -1, -1).clamp(black, white).requires_grad_()
        # Class 0 of an auxiliary model is its background; without one there is a single class.
        self.kinds = [0]
        if auxiliary is not None:
            with torch.no_grad():
                self.kinds = list(range(1, auxiliary.scores(self._muted()).shape[1]))
        self.labels = random_ellipse(generator, self.grid, self.kinds, self.rules)
        self.evolution: list[EvolutionStep] = []
        self._remember(0, 0.0)
        self.losses: dict[str, list[float]] = {name: [] for name in LOSSES}

    def paint(self, report: Callable[[int], None]) -> None:
        """Runs all iterations; `report` is called with the number done."""
        optimizer = torch.optim.Adam([self.image], lr=self.config.learning_rate, betas=ADAM_BETAS)
        for step in range(self.config.iterations):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, self.config)
            optimizer.zero_grad(set_to_none=True)
            self._loss(step).backward()
            optimizer.step()
            with torch.no_grad():
                self.image.clamp_(*self.bounds)
            report(step + 1)

    def result(self) -> Tensor:
        """The image [1, 3, S, S] on the CPU, as the model takes it."""
        return to_model(self.sam.variant, self._muted().detach()).cpu()

    def _muted(self) -> Tensor:
        return mute(self.image, self.bounds)

    def _loss(self, step: int) -> Tensor:
        """Eq. 11 for one augmented view of the image; evolves the labels by what the model saw in it."""
        view = Augmentation.draw(self.generator, self.size, self.cell)
        image = self._muted()
        seen = view.apply(image, self.cell)
        with attention_outputs(self.sam.image_encoder) as outputs:
            embedding = embed(self.sam.image_encoder, to_model(self.sam.variant, seen))
        entropies = torch.stack([patch_entropy(tokens[0]) for tokens in outputs])
        similarity = similarity_loss(entropies, self.ceiling)
        labels = view.apply(self.labels)
        chosen = self._choose(labels)
        logits, iou = self.sam.predict(embedding, boxes=self._boxes(chosen).to(embedding.device))
        masks = torch.stack([region.mask for region in chosen]).to(logits.device)
        terms = {"mask": mask_loss(logits[:, 0], masks), "similarity": similarity}
        scores = None
        terms["class"] = torch.zeros_like(similarity)
        if self.auxiliary is not None:
            full = self.auxiliary.scores(seen)
            scores = F.interpolate(full, (self.grid, self.grid), mode="area")[0]
            terms["class"] = class_loss(scores, labels.to(scores.device))
        terms["variation"] = (total_variation(image) - self.config.tv_target).abs()
        config = self.config
        terms["total"] = (
            terms["mask"]
            + config.alpha * terms["class"]
            + config.beta * terms["similarity"]
            + config.tv_weight * terms["variation"]
        )
        for name, value in terms.items():
            self.losses[name].append(float(value.detach()))
        if config.evolve and step < config.evolution_iterations:
            seen_scores = None if scores is None else view.undo(scores.detach().cpu())
            self._evolve(step, view, chosen, logits.detach().cpu(), iou.detach().cpu(), seen_scores)
        return terms["total"]

    def _choose(self, labels: Tensor) -> list[Region]:
        """At most `PROMPTS` regions, at random; ones cut small by the roll only when there are no others."""
        found = regions(labels, self.rules.min_area) or regions(labels)
        order = torch.randperm(len(found), generator=self.generator).tolist()
        return [found[index] for index in order[:PROMPTS]]

    def _boxes(self, chosen: list[Region]) -> Tensor:
        """[K, 4] float32, the regions' boxes in pixels of the model's input, jittered."""
        boxes = torch.tensor([region.box for region in chosen], dtype=torch.float32) * self.cell
        return jitter_boxes(boxes, BOX_JITTER, self.size, self.generator)

    def _evolve(
        self,
        step: int,
        view: Augmentation,
        chosen: list[Region],
        logits: Tensor,
        iou: Tensor,
        scores: Tensor | None,
    ) -> None:
        """One iteration of label evolution, in the frame of the image; all tensors on the CPU.

        Args:
            chosen: the K regions prompted, in the frame of the view.
            logits: [K, 4, g, g] float, in the frame of the view.
            iou: [K, 4] float.
            scores: [C, g, g] float, the auxiliary model's, in the frame of the image.
        """
        probability = view.undo(logits.sigmoid())
        trained = slice(0, 1) if self.sam.variant.one_mask else slice(1, None)
        alternatives = probability[:, trained].flatten(0, 1)
        if scores is not None:
            candidates = class_candidates(alternatives > 0.5, scores, self.kinds)
            confidence = label_confidence(self.labels, scores)
        else:
            candidates = own_candidates(alternatives, iou[:, trained].flatten(), self.kinds[0])
            confidence = torch.full_like(probability[0, 0], math.nan)
            for index, region in enumerate(chosen):
                mask = view.undo(region.mask)
                confidence[mask] = (probability[index, 0] * iou[index, 0].clamp(0, 1))[mask]
        share = (step + 1) / self.config.evolution_iterations
        self.labels = evolve(self.labels, candidates, confidence, self.rules, share)
        every = max(1, self.config.evolution_iterations // SNAPSHOTS)
        if (step + 1) % every == 0:
            self._remember(step + 1, float(confidence.nanmean()))

    @torch.no_grad()
    def _remember(self, iteration: int, score: float) -> None:
        low, high = self.bounds
        unit = (self._muted() - low) / (high - low)
        small = F.interpolate(unit, scale_factor=0.5, mode="area")[0]
        image = (small.clamp(0, 1) * 255).round().byte().cpu()
        self.evolution.append(EvolutionStep(iteration, self.labels, score, image))
