"""An image and prompts to a mask: the slow embedding and the fast prompting are two calls.

Every model is the same `Segmenter`, whether its image encoder runs in full precision or on an integer
engine; prompt encoder and mask decoder are always segment-anything's, in float32. In shapes, S is the side of
the model's input, G of its embedding and M of its masks: `input_size`, `grid` and `mask_side` of the variant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from monailabel_dfqsam.artifact import Artifact, float_tensors
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines import load_encoder
from monailabel_dfqsam.memory import require, shortage_told
from monailabel_dfqsam.sam.model import Sam, build_decoder
from monailabel_dfqsam.sam.preprocess import Frame, to_image, to_input
from monailabel_dfqsam.sam.variants import VARIANTS, Preprocessing, Variant
from monailabel_dfqsam.segmentation.mask_decoding import OneMaskDecoder, channels_last
from monailabel_dfqsam.segmentation.memory import embed_bytes
from monailabel_dfqsam.segmentation.volume import Volume, Window, slice_rgb

# segment-anything's prompt encoder takes pixel indices and adds this to reach pixel centres. Prompts here
# count from the pixel's edge, so it is taken off again.
_PIXEL_CENTRE = 0.5
# Of model input at a time: 8 images of 256², or one of 1024², whose attention takes a gigabyte as it is.
_PIXELS_AT_ONCE = 8 * 256 * 256
# Floats of all copies of an image's embedding that are decoded at once.
_BATCH_NUMBERS = 1 << 19


@dataclass(frozen=True, eq=False)
class Prompts:
    """What a person pointed at in one image, in image pixels (x, y); a pixel's centre is at +0.5.

    Attributes:
        points: [N, 2] float, 0 … W and 0 … H; N may be 0.
        labels: [N] int, 1 inside the object, 0 outside it.
        box: [4] float (x0, y0, x1, y1) with x0 < x1 and y0 < y1, the object's outer edges, or None.
        mask_logits: [1, 1, M, M] float32, `Prediction.low_res_logits` of the prediction to refine.
    """

    points: NDArray[Any] = field(default_factory=lambda: np.zeros((0, 2)))
    labels: NDArray[Any] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    box: NDArray[Any] | None = None
    mask_logits: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Embedding:
    """An image as the mask decoder needs it: tensor [1, C, G, G] float32, and where the image lies."""

    tensor: Tensor
    frame: Frame

    @property
    def nbytes(self) -> int:
        """Bytes of memory it holds."""
        return self.tensor.numel() * self.tensor.element_size()


@dataclass(frozen=True, eq=False)
class Prediction:
    """A segmented object.

    Attributes:
        mask: [H, W] bool in the image's pixels.
        score: the model's own estimate of the mask's IoU, about 0 … 1.
        low_res_logits: [1, 1, M, M] float32, for `Prompts.mask_logits` of the next click.
    """

    mask: NDArray[Any]
    score: float
    low_res_logits: Tensor


class Segmenter:
    """Segments 2-D images; stateless between calls, so that threads may share one.

    Attributes:
        name: for people: 'full precision', or like 'W4A4 (onednn)'.
        variant: the model's sizes and preprocessing.
    """

    def __init__(
        self,
        name: str,
        variant: Variant,
        embed: Callable[[Tensor], Tensor],
        prompt_encoder: nn.Module,
        mask_decoder: nn.Module,
        memory: Callable[[int], int] = lambda images: 0,
    ) -> None:
        """Makes a segmenter of its parts.

        Args:
            embed: normalised images [B, 3, S, S] float32 to embeddings [B, C, G, G] float32.
            memory: bytes that `embed` takes for so many images at once.
        """
        self.name = name
        self.variant = variant
        self._embed = embed
        self._memory = memory
        self._prompt_encoder = prompt_encoder.eval().requires_grad_(False)
        self._device = next(prompt_encoder.parameters()).device
        with torch.inference_mode():
            positions = prompt_encoder.get_dense_pe()  # type: ignore[operator]
            decoder = mask_decoder.eval().requires_grad_(False)
            self._decode = OneMaskDecoder(decoder, positions, variant.input_size)

    def embed(self, rgb: NDArray[Any]) -> Embedding:
        """The slow half: image [H, W, 3] uint8 to its embedding.

        Raises:
            ValueError: when the image is of another shape or type, or empty.
            MemoryShortage: when it would not fit in memory, or did not.
        """
        return self.embed_many([rgb])[0]

    def embed_slices(self, volume: Volume, slices: Sequence[int], window: Window | None) -> list[Embedding]:
        """Slices of a volume, as `slice_rgb` has them; the model sees them as people do, i to the right."""
        return self.embed_many([slice_rgb(volume, k, window) for k in slices], transposed=True)

    @torch.inference_mode()
    def embed_many(self, images: Sequence[NDArray[Any]], transposed: bool = False) -> list[Embedding]:
        """`embed` of several images, which may differ in size; several at a time where they are small.

        Args:
            transposed: as in `Frame`.
        """
        inputs = [to_input(self.variant, rgb, transposed) for rgb in images]
        at_once = max(1, _PIXELS_AT_ONCE // self.variant.input_size**2)
        parts: list[Tensor] = []
        for first in range(0, len(inputs), at_once):
            x = torch.cat([x for x, _ in inputs[first : first + at_once]])
            require(self._memory(len(x)), f"an embedding by '{self.variant.name}'")
            with shortage_told("an embedding"):
                embedded = self._embed(x)
            # Copied, since a view of one would keep all of them in memory.
            parts += [part.clone() for part in embedded.split(1)] if len(embedded) > 1 else [embedded]
        return [Embedding(channels_last(part), frame) for part, (_, frame) in zip(parts, inputs, strict=True)]

    @torch.inference_mode()
    def predict(self, embedding: Embedding, prompts: Prompts, multimask: bool = True) -> Prediction:
        """The fast half: one object for all prompts together.

        Args:
            embedding: from `embed` of the same model.
            prompts: at least a point or a box; `mask_logits` only refines.
            multimask: take the one with the best predicted IoU of the decoder's three candidates (outputs
                1 to 3); otherwise, and where nothing else was trained, its single answer (output 0). A
                variant that was `taught_here` takes that for points, and for a box what `OneMaskDecoder`
                says.

        Raises:
            ValueError: for prompts that are empty, misshapen or outside the image.
        """
        _check(prompts, embedding.frame)
        points, boxes, masks = self._model_prompts(prompts, embedding.frame)
        sparse, dense = self._prompt_encoder(points, boxes, masks)
        by_box = multimask and self.variant.taught_here
        box = boxes[0] + _PIXEL_CENTRE if by_box and boxes is not None else None
        multimask = multimask and (box is not None or self._candidates)
        logits, score = self._decode(embedding.tensor.to(self._device), sparse, dense, multimask, box)
        logits = logits.cpu()
        mask = to_image(logits, embedding.frame)[0, 0] > 0
        return Prediction(mask.numpy(), score, logits)

    @torch.inference_mode()
    def predict_points(self, embedding: Embedding, points: NDArray[Any]) -> tuple[Tensor, Tensor]:
        """Many objects by one point each, as `predict` with `multimask` finds them one after another.

        Args:
            embedding: from `embed` of the same model.
            points: [N, 2] float (x, y) in image pixels, 0 … W and 0 … H; N may be 0.

        Returns:
            On the CPU [N, 1, M, M] float32 logits, which `to_image` takes to the image's pixels, and [N]
            float32, the model's own estimates of the masks' IoUs, about 0 … 1.

        Raises:
            ValueError: for points that are misshapen or outside the image.
        """
        points = np.asarray(points, dtype=np.float64)
        side = self.variant.mask_side
        if len(points) == 0:
            return torch.zeros(0, 1, side, side), torch.zeros(0)
        _check(Prompts(points, np.ones(len(points), dtype=np.int64)), embedding.frame)
        xy = torch.from_numpy(embedding.frame.places(points) - _PIXEL_CENTRE).float().to(self._device)
        image = embedding.tensor.to(self._device)
        parts = []
        for some in xy.split(max(1, _BATCH_NUMBERS // image.numel())):
            labels = torch.ones(len(some), 1, dtype=torch.int64, device=self._device)
            sparse, dense = self._prompt_encoder((some[:, None], labels), None, None)
            parts.append(self._decode.each(image, sparse, dense, self._candidates))
        logits, scores = zip(*parts, strict=True)
        return torch.cat(logits).cpu(), torch.cat(scores).cpu()

    @property
    def _candidates(self) -> bool:
        """Whether a click is answered with one of three candidates."""
        return not (self.variant.one_mask or self.variant.taught_here)

    def _model_prompts(
        self, prompts: Prompts, frame: Frame
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None, Tensor | None]:
        """Prompts in model-input pixels, as segment-anything's prompt encoder takes them."""
        points = boxes = masks = None
        if len(prompts.points):
            xy = torch.from_numpy(frame.places(prompts.points) - _PIXEL_CENTRE)
            labels = torch.from_numpy(np.asarray(prompts.labels, dtype=np.int64))
            points = (xy.float()[None].to(self._device), labels[None].to(self._device))
        if prompts.box is not None:
            corners = frame.places(prompts.box) - _PIXEL_CENTRE
            boxes = torch.from_numpy(corners.reshape(1, 4)).float().to(self._device)
        if prompts.mask_logits is not None:
            masks = prompts.mask_logits.to(self._device)
            if self.variant.preprocessing is Preprocessing.SAM_MED2D:
                masks = masks.sigmoid()  # what that family was trained with, and is evaluated with
        return points, boxes, masks


def full_precision_segmenter(sam: Sam) -> Segmenter:
    """A segmenter that runs `sam` as it is, on the device it is on."""
    device = next(sam.parameters()).device
    return Segmenter(
        "full precision",
        sam.variant,
        lambda images: sam.image_encoder(images.to(device)),  # type: ignore[no-any-return]
        sam.prompt_encoder,
        sam.mask_decoder,
        (lambda images: embed_bytes(sam.variant, None, images)) if device.type == "cpu" else lambda images: 0,
    )


def load_segmenter(artifact: Artifact, engine: EngineKind | None = None) -> Segmenter:
    """A segmenter out of an artifact alone.

    Args:
        artifact: as `read_artifact` gives it.
        engine: what runs the image encoder; None takes the fastest that works here.

    Raises:
        ValueError: when the artifact's decoder does not fit its variant; the engine raises its own.
    """
    # First, since it also says what is wrong with an artifact of an unknown model.
    encoder = load_encoder(artifact, engine)
    variant = VARIANTS[artifact.header["variant"]]
    prompt_encoder, mask_decoder = load_decoder(artifact)
    name = f"{artifact.label} ({encoder.kind.value})"
    return Segmenter(
        name,
        variant,
        encoder.embed,
        prompt_encoder,
        mask_decoder,
        lambda images: embed_bytes(variant, encoder.kind, images),
    )


def load_decoder(artifact: Artifact) -> tuple[nn.Module, nn.Module]:
    """Prompt encoder and mask decoder out of an artifact of a known model, in evaluation mode.

    Raises:
        ValueError: when they do not fit the artifact's variant.
    """
    variant = VARIANTS[artifact.header["variant"]]
    prompt_encoder, mask_decoder = build_decoder(variant)
    for prefix, module in (("prompt_encoder.", prompt_encoder), ("mask_decoder.", mask_decoder)):
        state = float_tensors(artifact, prefix)
        try:
            module.load_state_dict(state, strict=True)
        except RuntimeError as error:
            lines = " ".join(line.strip() for line in str(error).splitlines()[1:4])
            raise ValueError(
                f"the artifact's {prefix[:-1]} is not that of '{variant.name}': {lines}"
            ) from None
        module.eval().requires_grad_(False)
    return prompt_encoder, mask_decoder


def _check(prompts: Prompts, frame: Frame) -> None:
    """Raises ValueError for prompts that `Segmenter.predict` cannot answer."""
    points, labels = np.asarray(prompts.points), np.asarray(prompts.labels)
    if len(points) == 0 and prompts.box is None:
        raise ValueError("there is nothing to segment: give at least one point or a box")
    if len(points) and (points.ndim != 2 or points.shape[1] != 2):
        raise ValueError(f"points must be [N, 2], (x, y) each, not {list(points.shape)}")
    if labels.shape != points.shape[:1] or not np.isin(labels, (0, 1)).all():
        raise ValueError("every point needs a label, 1 for inside the object or 0 for outside")
    width, height = frame.image_size
    limit = np.array([width, height], dtype=np.float64)
    size = f"the image of {width}×{height} pixels"
    # Written so that NaN fails too.
    if len(points) and not ((points >= 0) & (points <= limit)).all():
        raise ValueError(f"a point lies outside {size}: {points.tolist()}")
    if prompts.box is not None:
        box = np.asarray(prompts.box)
        if box.shape != (4,):
            raise ValueError(f"a box must be (x0, y0, x1, y1), not of shape {list(box.shape)}")
        low, high = box[:2], box[2:]
        if not ((low >= 0) & (low < high) & (high <= limit)).all():
            raise ValueError(f"a box must have x0 < x1 and y0 < y1 inside {size}, not {box.tolist()}")
