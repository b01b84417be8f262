"""Everything that can be chosen, as frozen dataclasses and enums, checked once when they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

AUTO = "auto"
"""The fidelity that full precision has to itself one grey level away."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all); a stage is one word: 'synthesis', 'fidelity' …"""


def silent(stage: str, done: int, total: int) -> None:
    """The progress callback that reports nothing."""


class Policy(str, Enum):
    """What is quantized (METHOD in the README): every engine runs `deploy`; `paper` is for comparison."""

    DEPLOY = "deploy"  # Linears at `bits`, patch embedding, neck and convolutions at 8, attention in float
    PAPER = "paper"  # all of it at `bits`, attention matmuls and softmax too; reference engine only


class Calibration(str, Enum):
    """Where calibration images come from."""

    SYNTHETIC = "synthetic"  # out of the model's own weights
    GAUSSIAN = "gaussian"  # plain noise, the paper's baseline
    NONE = "none"  # none but those that a recipe draws
    FOLDER = "folder"  # images on disk, the paper's 'real data' row


class EngineKind(str, Enum):
    """The implementations of the quantized image encoder."""

    REFERENCE = "reference"
    NATIVE = "native"
    ONEDNN = "onednn"
    OPENVINO = "openvino"
    CUTLASS = "cutlass"


class Preset(str, Enum):
    """How a model is quantized; docs/accuracy says what each part brings."""

    FAST = "fast"  # each layer in a form of its own, ranges at run time; fits a server's start
    BEST = "best"  # the same on more images
    STATIC = "static"  # fixed ranges, one scale a channel, as the GPU kernels multiply
    PAPER = "paper"  # as published

    @property
    def config(self) -> QuantizationConfig:
        """What it stands for."""
        if self is Preset.PAPER:
            return QuantizationConfig()
        if self is Preset.STATIC:
            recipe = Recipe(views=16, compensate=True)
            return QuantizationConfig(synthesis=SynthesisConfig(iterations=300), recipe=recipe)
        images, iterations, drawn = (1, 60, 16) if self is Preset.FAST else (4, 300, 40)
        return QuantizationConfig(
            None,
            fidelity=AUTO,
            images=images,
            synthesis=SynthesisConfig(iterations=iterations),
            recipe=Recipe(views=4, compensate=True, run_time=True, drawn=drawn),
        )


@dataclass(frozen=True)
class SynthesisConfig:
    """Image synthesis (DFQ-SAM Algorithm 1, stage 1); defaults are the paper's and its authors' code's.

    Attributes:
        iterations: optimisation steps an image; labels evolve during the first third, 500 at most.
        alpha: weight of the class loss (Eq. 5).
        beta: weight of the patch-similarity loss (Eq. 11).
        bounded: a block's patch-similarity entropy earns nothing beyond what the model shows on procedural
            phantoms; without, it is driven on, as in the paper.
        tv_weight: weight of the total-variation term.
        tv_target: total variation aimed at, mean absolute difference of neighbours in normalised units.
        learning_rate: Adam's, betas (0.5, 0.9), cosine with warm-up.
        min_score: ε1, a pseudo-label's least confidence.
        min_area: ε2, a pseudo-label's least area as a fraction of the image (80 pixels at 256²).
        max_area: largest fraction of the image that one region may take.
        evolve: labels evolve; without, the first, random one stays, as the paper's ablation begins.
    """

    iterations: int = 1500
    alpha: float = 0.5
    beta: float = 0.05
    bounded: bool = True
    tv_weight: float = 0.01
    tv_target: float = 0.05
    learning_rate: float = 0.2
    min_score: float = 0.5
    min_area: float = 80 / 256**2
    max_area: float = 0.09
    evolve: bool = True

    def __post_init__(self) -> None:
        _require(self.iterations >= 1, "iterations must be at least 1", self.iterations)

    @property
    def evolution_iterations(self) -> int:
        """Steps during which pseudo-labels evolve."""
        return min(500, max(1, self.iterations // 3))


@dataclass(frozen=True)
class Recipe:
    """What calibration does with its images; the default is the paper's.

    Attributes:
        reparameterize: per-channel ranges after each LayerNorm, folded into one range a tensor (Eq. 10–16);
            without it, one range a tensor from the start.
        views: of each image, to calibrate on in its place: shifted, enlarged, blurred, cut out;
            0 for the images as they are.
        compensate: quantizes layers one after another, each made to undo what was lost before it, on the
            images as quantization left them; without it, each by itself to the nearest integers.
        run_time: ranges of activations are found at run time, for each token, and 4-bit weights go in groups;
            nothing is reparameterized then.
        drawn: pictures to calibrate on beside the images: phantoms, scattered shapes, clouds.
    """

    reparameterize: bool = True
    views: int = 0
    compensate: bool = False
    run_time: bool = False
    drawn: int = 0

    def __post_init__(self) -> None:
        _require(0 <= self.views <= 256, "views must be 0 to 256", self.views)
        _require(0 <= self.drawn <= 256, "drawn must be 0 to 256", self.drawn)
        _require(self.run_time or not self.drawn, "drawn pictures go with ranges at run time", self.drawn)


@dataclass(frozen=True)
class QuantizationConfig:
    """One way to quantize; equal configurations of one checkpoint give the same artifact.

    Attributes:
        bits: of the weights of Linears, 4, 6 or 8 (4 or 8 with ranges at run time); None where each layer
            has its own, by `fidelity`.
        activation_bits: of the activations of Linears, where not the same; with ranges at run time alone.
        fidelity: the agreement to keep, mean IoU with full precision, 0 … 1, by the cheapest forms of layers
            that do; `AUTO` for what full precision has to itself one grey level away, on average
            and on at least half of the masks.
        images: how many calibration images.
        seed: of every random choice.
        folder: images to calibrate on, for `Calibration.FOLDER` alone.

    Raises:
        ValueError: for values outside these; the message names the field and what it may be.
    """

    bits: int | None = 4
    policy: Policy = Policy.DEPLOY
    calibration: Calibration = Calibration.SYNTHETIC
    images: int = 1
    seed: int = 0
    folder: str | None = None
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    recipe: Recipe = field(default_factory=Recipe)
    activation_bits: int | None = None
    fidelity: float | str | None = None

    def __post_init__(self) -> None:
        self._check_bits()
        _require(1 <= self.images <= 256, "images must be 1 to 256", self.images)
        _require(self.seed >= 0, "seed must not be negative", self.seed)
        with_folder = self.calibration is Calibration.FOLDER
        _require(
            with_folder == (self.folder is not None), "calibration 'folder' goes with a folder", self.folder
        )

    def _check_bits(self) -> None:
        run_time = self.recipe.run_time
        if self.fidelity is not None:
            known = self.fidelity == AUTO or (not isinstance(self.fidelity, str) and 0 < self.fidelity <= 1)
            _require(known, "fidelity must be 'auto' or a number above 0, at most 1", self.fidelity)
            _require(self.bits is None, "bits are not chosen where a fidelity is", self.bits)
            _require(
                run_time, "a fidelity to keep goes with preset 'fast' or 'best': choose bits", self.fidelity
            )
            seen = self.calibration is not Calibration.NONE or self.recipe.drawn > 0
            _require(seen, "a fidelity to keep needs images to calibrate on, or drawn ones", self.calibration)
        else:
            allowed = (4, 8) if run_time else (4, 6, 8)
            _require(self.bits in allowed, f"bits must be {_in_words(allowed)}", self.bits)
        deploy = self.policy is Policy.DEPLOY
        _require(
            deploy or not run_time, "policy 'paper' goes with the presets 'static' and 'paper'", run_time
        )
        own = self.activation_bits
        free = own is None or (run_time and self.bits is not None and own in (4, 8) and own >= self.bits)
        _require(free, "activation_bits must be 4 or 8, not less than bits, with ranges at run time", own)

    def changed(
        self,
        *,
        preset: Preset | None = None,
        bits: int | str | None = None,
        fidelity: float | str | None = None,
        iterations: int | None = None,
        **fields: Any,
    ) -> QuantizationConfig:
        """The same with what is chosen.

        Args:
            preset: brings its own of all but seed and calibration.
            bits: `AUTO` leaves each layer's to the fidelity to keep.
            fidelity: of no account where `bits` is a number.
            iterations: of the synthesis.
            fields: of the configuration, by name; None leaves one as it was.

        Without a preset, what the present one cannot do brings the one that can: policy `paper` and 6 bits
        fixed ranges, `AUTO` ranges at run time.

        Raises:
            ValueError: for values that do not go together; the message says what does.
        """
        chosen: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
        preset = preset or self._needed(bits, chosen.get("policy"))
        base = self
        if preset is not None:
            base = preset.config
            chosen = {"calibration": self.calibration, "folder": self.folder, "seed": self.seed, **chosen}
        if bits is not None and bits != AUTO:
            chosen |= {"bits": bits, "fidelity": None}
        elif bits == AUTO or fidelity is not None:
            kept = (base.fidelity or AUTO) if fidelity is None else fidelity
            chosen |= {"bits": None, "activation_bits": None, "fidelity": kept}
        if iterations is not None:
            chosen["synthesis"] = replace(base.synthesis, iterations=iterations)
        return replace(base, **chosen)

    def _needed(self, bits: int | str | None, policy: Policy | None) -> Preset | None:
        if self.recipe.run_time and policy is Policy.PAPER:
            return Preset.PAPER
        if self.recipe.run_time and bits == 6:
            return Preset.STATIC
        return Preset.FAST if bits == AUTO and not self.recipe.run_time else None

    @property
    def preset(self) -> Preset | None:
        """The preset whose images, synthesis and recipe these are, or None."""

        def way(config: QuantizationConfig) -> tuple[object, ...]:
            return config.calibration, config.images, config.synthesis, config.recipe

        return next((preset for preset in Preset if way(preset.config) == way(self)), None)


class Sampling(str, Enum):
    """Which samples an epoch of fine-tuning goes through."""

    BALANCED = "balanced"
    NATURAL = "natural"


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune on labels.

    Attributes:
        sampling: balanced, every modality has an equal share; natural, every sample comes as often.
        max_epochs: at most so many.
        patience: epochs without a better score after which it ends.
        batch: samples a step.
        learning_rate: AdamW's.
        seed: of every random choice.

    Raises:
        ValueError: for values outside these; the message names the field and what it may be.
    """

    sampling: Sampling = Sampling.BALANCED
    max_epochs: int = 40
    patience: int = 12
    batch: int = 8
    learning_rate: float = 2e-4
    seed: int = 0

    def __post_init__(self) -> None:
        _require(1 <= self.max_epochs <= 1000, "max_epochs must be 1 to 1000", self.max_epochs)
        _require(self.seed >= 0, "seed must not be negative", self.seed)


def _in_words(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}"


def _require(condition: bool, message: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{message}, not {value!r}")
