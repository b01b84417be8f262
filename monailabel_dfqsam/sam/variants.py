"""The models this project knows, as one table: sizes, preprocessing, and how a checkpoint is told apart."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Preprocessing(str, Enum):
    """How a family's own evaluation turns an image into model input."""

    SAM = "sam"  # longest side to S, mean/std, zero padding right and bottom
    SAM_MED2D = "sam_med2d"  # mean/std, then squashed to S×S, nearest neighbour
    MEDSAM = "medsam"  # squashed to S×S, bicubic, min-max to [0, 1]
    TINY = "tiny"  # squashed to S×S, bilinear with anti-aliasing, then mean/std


@dataclass(frozen=True)
class Variant:
    """Sizes of one SAM: what `build` needs to make the modules.

    `input_size` is the side S of the square model input in pixels; the embedding has side S // 16 and
    `embed_channels` channels. `window_size` 0 means that every block attends globally. With `prompt_maps`,
    prompts are also drawn into the mask prompt. With `chosen_by_box`, the answer to a box is chosen out of
    all the decoder's masks, and also by how well they fit the box; otherwise as the family's own evaluation
    chooses.
    """

    name: str
    input_size: int
    embed_dim: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]
    preprocessing: Preprocessing
    window_size: int = 14
    relative_position: bool = True
    adapters: bool = False
    patch_size: int = 16
    mlp_ratio: int = 4
    embed_channels: int = 256
    decoder_mlp_dim: int = 2048
    prompt_maps: bool = False
    chosen_by_box: bool = False

    @property
    def grid(self) -> int:
        """Side of the embedding in tokens."""
        return self.input_size // self.patch_size

    def window_of(self, block: int) -> int:
        """Side of the attention window of a block in tokens, 0 for global attention."""
        return 0 if block in self.global_blocks else self.window_size


_SAM_B: dict[str, Any] = {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_blocks": (2, 5, 8, 11)}

VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant(
            "tiny", 256, embed_dim=144, depth=6, num_heads=4, global_blocks=tuple(range(6)), window_size=0,
            preprocessing=Preprocessing.TINY, relative_position=False, embed_channels=128,
            decoder_mlp_dim=256, prompt_maps=True, chosen_by_box=True,
        ),
        Variant("sam_b_256", 256, preprocessing=Preprocessing.SAM_MED2D, **_SAM_B),
        Variant("sam_med2d_b", 256, preprocessing=Preprocessing.SAM_MED2D, adapters=True, **_SAM_B),
        Variant("sam_b_1024", 1024, preprocessing=Preprocessing.SAM, **_SAM_B),
        Variant("medsam", 1024, preprocessing=Preprocessing.MEDSAM, **_SAM_B),
        Variant(
            "sam_l_1024", 1024, embed_dim=1024, depth=24, num_heads=16, global_blocks=(5, 11, 17, 23),
            preprocessing=Preprocessing.SAM,
        ),
        Variant(
            "sam_h_1024", 1024, embed_dim=1280, depth=32, num_heads=16, global_blocks=(7, 15, 23, 31),
            preprocessing=Preprocessing.SAM,
        ),
    )
}  # fmt: skip


def detect(shapes: dict[str, tuple[int, ...]], hint: str = "") -> Variant:
    """The variant a state dict belongs to, from its tensor shapes alone.

    SAM ViT-B and MedSAM have the same tensors and differ in preprocessing only; `hint`, a file name, tells
    them apart ("medsam" anywhere in it).

    Args:
        shapes: state-dict key -> shape.
        hint: a file name or the name of a variant.

    Raises:
        ValueError: when the keys are not those of a known model; the message says what was missing.
    """
    pos = shapes.get("image_encoder.pos_embed")
    if pos is None or len(pos) != 4:
        raise ValueError(
            "not a Segment Anything checkpoint with a ViT encoder: there is no tensor "
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
