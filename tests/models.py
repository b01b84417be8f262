"""Models by seed for tests: right shapes, lively numbers, no training."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from monailabel_dfqsam.agreement import Fidelity
from monailabel_dfqsam.artifact import Header, Sizes
from monailabel_dfqsam.sam import VARIANTS, Sam
from monailabel_dfqsam.sam.checkpoint import LITE_MEDSAM, Checkpoint, CheckpointError, find_checkpoint

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
REALDATA = Path(__file__).parents[2] / "shared" / "realdata"

needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the golden outputs of ../shared/reference are not here"
)
needs_realdata = pytest.mark.skipif(
    not REALDATA.is_dir(), reason="the real images of ../shared/realdata are not here"
)


@pytest.fixture(scope="session")
def lite_medsam() -> Path:
    """The published LiteMedSAM checkpoint's file."""
    try:
        return find_checkpoint(LITE_MEDSAM)
    except CheckpointError as error:
        pytest.skip(str(error))


FIDELITY: Fidelity = {
    "mean_iou": 0.93, "median_iou": 0.97, "n": 7, "engine": "reference",
    "grey_level": {"mean_iou": 0.95, "median_iou": 0.99}, "as_near": 0.4,
}  # fmt: skip


def golden_tensor(key: str, shape: list[int]) -> torch.Tensor:
    """A weight by its name, as the golden outputs were made."""
    g = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    n = torch.randn(shape, generator=g)
    if key.endswith("running_var"):
        return 1 + 0.1 * n.abs()
    if len(shape) == 1:
        return 1 + 0.1 * n if key.endswith("weight") else 0.1 * n
    return 0.02 * n


def golden_state(sam: Sam) -> dict[str, torch.Tensor]:
    """A whole state dict by name."""
    return {key: golden_tensor(key, list(value.shape)) for key, value in sam.state_dict().items()}


def seeded_sam(variant: str, **changes: Any) -> Sam:
    """A SAM whose weights follow their names; norms vary by channel, so that reparameterization has work.

    `changes` of the variant, such as fewer blocks, make it smaller.
    """
    sam = Sam(replace(VARIANTS[variant], **changes))
    sam.load_state_dict(golden_state(sam))
    return sam.eval().requires_grad_(False)


def seeded_checkpoint(variant: str) -> Checkpoint:
    """The checkpoint of `seeded_sam`."""
    return Checkpoint(VARIANTS[variant], seeded_sam(variant).state_dict(), "0" * 64, Path(f"{variant}.pth"))


def header(**known: Any) -> Header:
    """An artifact's header with what is `known` of it, and anything valid for the rest."""
    sizes = dict.fromkeys(Sizes.__annotations__, 1)
    rest = {
        "format_version": 1, "variant": "tiny", "source_sha256": "0" * 64, "source_name": "tiny.pth",
        "config": {"bits": 4}, "key": "0" * 16, "algorithm": 3, "seed": 0, "images_sha256": [], "layers": {},
        "attention_bits": 0, "sizes": sizes, "macs": 1, "bops": 1, "bops_float": 1, "versions": {},
        "fidelity": FIDELITY, "created": "", "seconds": 0.0,
    }  # fmt: skip
    return cast(Header, {**rest, **known})


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm())
