"""Full-precision Segment Anything models: checkpoints, encoders, preprocessing."""

from monailabel_dfqsam.sam.checkpoint import Checkpoint, CheckpointError, find_checkpoint, read_checkpoint
from monailabel_dfqsam.sam.model import Sam, build
from monailabel_dfqsam.sam.variants import VARIANTS, Variant

__all__ = [
    "VARIANTS",
    "Checkpoint",
    "CheckpointError",
    "Sam",
    "Variant",
    "build",
    "find_checkpoint",
    "read_checkpoint",
]
