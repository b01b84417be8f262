"""How faithful a quantized model is, measured without data: do both models draw the same masks?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from monailabel_dfqsam.engines import Encoder
from monailabel_dfqsam.sam.model import Sam
from monailabel_dfqsam.sam.preprocess import frame_of
from monailabel_dfqsam.segmentation.prompts import tight_box
from monailabel_dfqsam.segmentation.segmenter import Embedding, Prompts, Segmenter, full_precision_segmenter

GRID = 4
# A full-precision mask smaller than this, in low-resolution pixels, says nothing about agreement.
MIN_MASK = 12


def mask_agreement(
    sam: Sam, encoder: Encoder, images: Tensor, decoder: Segmenter | None = None
) -> tuple[float, int]:
    """Mean IoU of the masks of a quantized encoder and of full precision, same prompts.

    Prompts are a grid of single points, and the box of each mask that full precision gives for them.

    Args:
        images: [N, 3, S, S] float32, normalised.
        decoder: what draws masks out of the quantized encoder's embeddings, where that is not full
            precision's own.

    Returns:
        the mean IoU, 0 when no prompt gave a mask, and the number of masks compared.
    """
    segmenter = full_precision_segmenter(sam)
    quantized = decoder or segmenter
    size = sam.variant.input_size
    frame = frame_of(sam.variant, size, size)
    step = size / GRID
    ious: list[float] = []
    for image in images:
        with torch.inference_mode():
            float_embedding = Embedding(sam.image_encoder(image[None]), frame)
        int_embedding = Embedding(encoder.embed(image[None]), frame)
        for y in range(GRID):
            for x in range(GRID):
                point = np.array([[(x + 0.5) * step, (y + 0.5) * step]])
                prompts = Prompts(points=point, labels=np.ones(1, dtype=np.int64))
                expected = _low_res_mask(segmenter, float_embedding, prompts)
                if int(expected.sum()) < MIN_MASK:
                    continue
                ious.append(_iou(expected, _low_res_mask(quantized, int_embedding, prompts)))
                boxed = Prompts(box=tight_box(expected.numpy()) * (size / expected.shape[0]))
                expected = _low_res_mask(segmenter, float_embedding, boxed)
                ious.append(_iou(expected, _low_res_mask(quantized, int_embedding, boxed)))
    return (sum(ious) / len(ious) if ious else 0.0), len(ious)


def _low_res_mask(segmenter: Segmenter, embedding: Embedding, prompts: Prompts) -> Tensor:
    return segmenter.predict(embedding, prompts).low_res_logits[0, 0] > 0


def _iou(a: Tensor, b: Tensor) -> float:
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0
