"""The models this project knows, as one table: sizes, preprocessing, and how a checkpoint is told apart."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any


class Preprocessing(str, Enum):
    """How a family's own evaluation turns an image into model input."""

    SAM = "sam"  # longest side to S, mean/std, zero padding right and bottom
    SAM_MED2D = "sam_med2d"  # mean/std, then squashed to S×S, nearest neighbour
    MEDSAM = "medsam"  # squashed to S×S, bicubic, min-max to [0, 1]
    TINY = "tiny"  # squashed to S×S, bilinear with anti-aliasing, then mean/std
    LITE_MEDSAM = "lite_medsam"  # longest side to S by areas, min-max to [0, 1], zero padding
    EFFICIENT_SAM = "efficient_sam"  # squashed to S×S, bilinear, then mean/std


@dataclass(frozen=True)
class Stage:
    """Equal blocks of a TinyViT: `depth` of them, `dim` channels wide, a token every `pixels` of the input.

    `window` is the side of the attention windows in tokens; without `heads` they are bottlenecks of
    convolutions.
    """

    dim: int
    depth: int
    heads: int
    window: int
    pixels: int


@dataclass(frozen=True)
class BlockSizes:
    """A transformer block on grid² tokens; `window` is the side of its windows in tokens."""

    dim: int
    heads: int
    grid: int
    window: int


@dataclass(frozen=True)
class Variant:
    """Sizes of one SAM: what `build` needs to make the modules.

    `input_size` is the side S of the square model input in pixels; the embedding has side S // `patch_size`
    and `embed_channels` channels. A ViT has `depth` blocks of width `embed_dim`, and `window_size` 0 means
    that every block attends globally; `relative_position` is SAM's, computed from queries. A TinyViT has
    `stages` in place of all these. What was `taught_here` has prompts also drawn into its mask prompt; it
    answers a box with the one of all the decoder's masks that also fits the box, clicks with the single
    answer; other families as their own evaluation chooses. Its answers begin as the share `said` of those
    maps. With `one_mask`, the decoder's single answer alone was trained. A
    `gelu_decoder` is EfficientSAM's, which differs from segment-anything's.
    """

    name: str
    input_size: int
    preprocessing: Preprocessing
    embed_dim: int = 0
    depth: int = 0
    num_heads: int = 0
    global_blocks: tuple[int, ...] = ()
    stages: tuple[Stage, ...] = ()
    window_size: int = 14
    relative_position: bool = True
    adapters: bool = False
    patch_size: int = 16
    mlp_ratio: int = 4
    embed_channels: int = 256
    decoder_mlp_dim: int = 2048
    taught_here: bool = False
    said: float = 0.0
    one_mask: bool = False
    gelu_decoder: bool = False

    @property
    def grid(self) -> int:
        """Side of the embedding in tokens."""
        return self.input_size // self.patch_size

    @property
    def mask_cell(self) -> int:
        """Model-input pixels along one side of a pixel of the decoder's masks, and of mask prompts."""
        return self.patch_size // 4

    @property
    def mask_side(self) -> int:
        """Side of the decoder's masks, and of mask prompts, in pixels."""
        return 4 * self.grid

    @property
    def widest(self) -> int:
        """Numbers in the token tensor of the encoder's step that has most of them."""
        stages = self.stages or (Stage(self.embed_dim, self.depth, self.num_heads, 0, self.patch_size),)
        return max((self.input_size // stage.pixels) ** 2 * stage.dim for stage in stages)

    @property
    def blocks(self) -> tuple[BlockSizes, ...]:
        """The transformer blocks of the encoder, in the order of their running."""
        if self.stages:
            return tuple(
                BlockSizes(stage.dim, stage.heads, self.input_size // stage.pixels, stage.window)
                for stage in self.stages
                if stage.heads
                for _ in range(stage.depth)
            )
        return tuple(
            BlockSizes(self.embed_dim, self.num_heads, self.grid, self.window_of(block) or self.grid)
            for block in range(self.depth)
        )

    def window_of(self, block: int) -> int:
        """Side of the attention window of a block in tokens, 0 for global attention."""
        return 0 if block in self.global_blocks else self.window_size


_SAM_B: dict[str, Any] = {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_blocks": (2, 5, 8, 11)}


def _tiny_vit_5m(pixels: int) -> tuple[Stage, ...]:
    """The stages of TinyViT-5M behind a patch embedding that makes a token of pixels²."""
    return (
        Stage(64, 2, 0, 0, pixels),
        Stage(128, 2, 4, 7, 2 * pixels),
        Stage(160, 6, 5, 14, 4 * pixels),
        Stage(320, 2, 10, 7, 4 * pixels),
    )


VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant(
            "tiny", 256, embed_dim=144, depth=6, num_heads=4, global_blocks=tuple(range(6)), window_size=0,
            preprocessing=Preprocessing.TINY, relative_position=False, embed_channels=128,
            decoder_mlp_dim=256, taught_here=True,
        ),
        Variant("sam_b_256", 256, preprocessing=Preprocessing.SAM_MED2D, **_SAM_B),
        Variant("sam_med2d_b", 256, preprocessing=Preprocessing.SAM_MED2D, adapters=True, **_SAM_B),
        Variant("sam_b_1024", 1024, preprocessing=Preprocessing.SAM, **_SAM_B),
        Variant("medsam", 1024, preprocessing=Preprocessing.MEDSAM, one_mask=True, **_SAM_B),
        Variant(
            "sam_l_1024", 1024, embed_dim=1024, depth=24, num_heads=16, global_blocks=(5, 11, 17, 23),
            preprocessing=Preprocessing.SAM,
        ),
        Variant(
            "sam_h_1024", 1024, embed_dim=1280, depth=32, num_heads=16, global_blocks=(7, 15, 23, 31),
            preprocessing=Preprocessing.SAM,
        ),
        Variant(
            "lite_medsam", 256, stages=_tiny_vit_5m(1), patch_size=4, preprocessing=Preprocessing.LITE_MEDSAM,
            relative_position=False, one_mask=True,
        ),
        Variant(
            "lite", 256, stages=_tiny_vit_5m(1), patch_size=4, preprocessing=Preprocessing.LITE_MEDSAM,
            relative_position=False, taught_here=True, said=0.5,
        ),
        Variant(
            "mobile_sam", 1024, stages=_tiny_vit_5m(4), preprocessing=Preprocessing.SAM,
            relative_position=False,
        ),
        Variant(
            "efficient_sam_ti", 1024, embed_dim=192, depth=12, num_heads=3, global_blocks=tuple(range(12)),
            window_size=0, preprocessing=Preprocessing.EFFICIENT_SAM, relative_position=False,
            gelu_decoder=True,
        ),
    )
}  # fmt: skip


def detect(shapes: dict[str, tuple[int, ...]], hint: str = "") -> Variant:
    """The variant a state dict belongs to, from its tensor shapes alone.

    Some have the same tensors, which `hint` tells apart: SAM ViT-B from MedSAM ("medsam" anywhere in it), and
    our own LiteMedSAM from the published one (a file's name that ends in "lite").

    Args:
        shapes: state-dict key -> shape.
        hint: a file name or the name of a variant.

    Raises:
        ValueError: when the keys are not those of a known model; the message says what was missing.
    """
    if "image_encoder.layers.0.blocks.0.conv1.c.weight" in shapes:
        return _detect_tiny_vit(shapes, hint)
    pos = shapes.get("image_encoder.pos_embed")
    if pos is None or len(pos) != 4:
        raise ValueError(
            "not a Segment Anything checkpoint with a ViT or TinyViT encoder: there is no tensor "
            "'image_encoder.pos_embed' of 4 dimensions in it"
        )
    depth = len({key.split(".")[2] for key in shapes if key.startswith("image_encoder.blocks.")})
    adapters = any(".Adapter." in key for key in shapes)
    found = [
        v
        for v in VARIANTS.values()
        if (v.grid, v.embed_dim, v.depth, v.adapters) == (pos[1], pos[3], depth, adapters)
    ]
    if not found:
        raise ValueError(
            f"no known model has a {depth}-block encoder of width {pos[3]} on {pos[1]}×{pos[2]} tokens"
            f"{' with adapters' if adapters else ''}; known are: {', '.join(VARIANTS)}"
        )
    if len(found) > 1 and "medsam" in hint.lower():
        return next(v for v in found if v.preprocessing is Preprocessing.MEDSAM)
    return found[0]


def _detect_tiny_vit(shapes: dict[str, tuple[int, ...]], hint: str) -> Variant:
    """As `detect`, by the stages' widths, the kernel of the patch embedding, and the end of the name."""
    numbers = range(len({key.split(".")[2] for key in shapes if key.startswith("image_encoder.layers.")}))
    widths = tuple(
        shapes.get(f"image_encoder.layers.{n}.blocks.0.{last}.weight", (0,))[0]
        for n in numbers
        for last in (("mlp.fc2",) if n else ("conv3.c",))
    )
    kernel = shapes.get("image_encoder.patch_embed.seq.0.c.weight", (0,))[-1]
    # A patch embedding that keeps the resolution looks at single pixels.
    found = [
        v
        for v in VARIANTS.values()
        if tuple(stage.dim for stage in v.stages) == widths
        and [1 if stage.pixels == 1 else 3 for stage in v.stages[:1]] == [kernel]
    ]
    if found:
        name = PurePath(hint).stem.lower()
        return next((v for v in found if name.endswith(v.name)), found[0])
    raise ValueError(
        f"no known model has a TinyViT encoder with stages of {', '.join(map(str, widths))} channels and a "
        f"patch embedding of {kernel}×{kernel} pixels; known are: {', '.join(VARIANTS)}"
    )
