"""Full-precision SAM: our image encoders, segment-anything's prompt encoder and mask decoder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from monailabel_dfqsam.sam import efficient_sam
from monailabel_dfqsam.sam.encoder import ImageEncoder
from monailabel_dfqsam.sam.prompt_maps import BeginsAsSaid, PromptMaps
from monailabel_dfqsam.sam.tiny_vit import ImageEncoderTinyViT
from monailabel_dfqsam.sam.variants import Variant
from monailabel_dfqsam.sam.vit import ImageEncoderViT

if TYPE_CHECKING:
    from monailabel_dfqsam.sam.checkpoint import Checkpoint

_MODELING = "monailabel_dfqsam.sam._segment_anything_modeling"


def _segment_anything_modeling() -> ModuleType:
    """`segment_anything.modeling` without `segment_anything/__init__.py`.

    The package's __init__ imports torchvision, which the modules used here do not need, costs a second at
    start, and raises where torch is a CPU build and torchvision is not.
    """
    if _MODELING in sys.modules:
        return sys.modules[_MODELING]
    package = importlib.util.find_spec("segment_anything")
    if package is None or package.origin is None:
        raise ImportError("the package segment-anything is missing: pip install segment-anything")
    folder = Path(package.origin).parent / "modeling"
    spec = importlib.util.spec_from_file_location(
        _MODELING, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODELING] = module
    spec.loader.exec_module(module)
    return module


class Sam(nn.Module):
    """A SAM in full precision; attributes and call signatures are segment-anything's.

    `image_encoder(x [B, 3, S, S]) -> [B, C, G, G]`, `prompt_encoder(points, boxes, masks)`,
    `mask_decoder(image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings,
    multimask_output)`; all float32. S is the variant's `input_size`, G its `grid`, M its `mask_side`.
    """

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.image_encoder = build_encoder(variant)
        self.prompt_encoder, self.mask_decoder = build_decoder(variant)

    def forward(self, x: Tensor) -> Tensor:
        """The image embedding; prompts go to `prompt_encoder` and `mask_decoder`."""
        embedding: Tensor = self.image_encoder(x)
        return embedding

    def predict(
        self, embedding: Tensor, *, points: Tensor | None = None, boxes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Masks of N objects of one image, for a click into each, for a box around each, or for both.

        Args:
            embedding: [1, C, G, G] float32.
            points: [N, 2] float32, (x, y) in pixels of the model's input.
            boxes: [N, 4] float32, (x0, y0, x1, y1) in the same.

        Returns:
            logits [N, 4, M, M], the single answer and then the three candidates, and their predicted IoUs
            [N, 4].
        """
        decoder: Any = self.mask_decoder
        clicks = None
        if points is not None:
            clicks = points[:, None], torch.ones(len(points), 1, dtype=torch.int64, device=points.device)
        sparse, dense = self.prompt_encoder(clicks, boxes, None)
        logits, iou = decoder.predict_masks(
            image_embeddings=embedding,
            image_pe=self.prompt_encoder.get_dense_pe(),  # type: ignore[operator]
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        return logits, iou


def build_encoder(variant: Variant) -> ImageEncoder:
    """The image encoder of a variant, untrained, its batch norms not folded."""
    return ImageEncoderTinyViT(variant) if variant.stages else ImageEncoderViT(variant)


def build_decoder(variant: Variant) -> tuple[nn.Module, nn.Module]:
    """Prompt encoder and mask decoder of a variant, untrained."""
    modeling = _segment_anything_modeling()
    channels = variant.embed_channels
    activation = nn.GELU if variant.gelu_decoder else nn.ReLU
    kind = modeling.MaskDecoder
    if variant.said:
        kind = type("ResidualMaskDecoder", (BeginsAsSaid, kind), {})
    mask_decoder: nn.Module = kind(
        num_multimask_outputs=3,
        transformer=modeling.TwoWayTransformer(
            depth=2,
            embedding_dim=channels,
            mlp_dim=variant.decoder_mlp_dim,
            num_heads=8,
            activation=activation,
        ),
        transformer_dim=channels,
        iou_head_depth=3,
        iou_head_hidden_dim=channels,
    )
    if variant.gelu_decoder:
        efficient_sam.adapt_decoder(mask_decoder)
    return _prompt_encoder(modeling, variant), mask_decoder


def _prompt_encoder(modeling: ModuleType, variant: Variant) -> nn.Module:
    if variant.gelu_decoder:
        return efficient_sam.PromptEncoder(modeling, variant)
    kind = modeling.PromptEncoder
    if variant.taught_here:
        kind = type("MappedPromptEncoder", (PromptMaps, kind), {"said": variant.said})
    prompt_encoder: nn.Module = kind(
        embed_dim=variant.embed_channels,
        image_embedding_size=(variant.grid, variant.grid),
        input_image_size=(variant.input_size, variant.input_size),
        mask_in_chans=16,
    )
    return prompt_encoder


def build(checkpoint: Checkpoint) -> Sam:
    """A Sam in evaluation mode with the checkpoint's weights, loaded strictly and shared with it, not copied.

    Batch norms are folded.

    Raises:
        ValueError: when keys are missing, left over, or of another shape; the message names the first few.
    """
    sam = Sam(checkpoint.variant)
    try:
        sam.load_state_dict(checkpoint.state_dict, strict=True, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise ValueError(
            f"the checkpoint does not fit the model '{checkpoint.variant.name}': " + " ".join(lines)
        ) from None
    sam.image_encoder.fold()
    return sam.eval().requires_grad_(False)
