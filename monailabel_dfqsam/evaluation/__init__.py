"""Segmenters against ground truth: what quantization costs, beside baselines that need no model.

A tight box says most of the answer by itself, hence the baselines; and the IoU with the truth hardly sees
damage that the agreement with the full-precision mask shows, hence both.
"""

from monailabel_dfqsam.evaluation.baselines import BASELINES, box_baseline, ellipse_baseline
from monailabel_dfqsam.evaluation.items import EvaluationError, Item, read_items
from monailabel_dfqsam.evaluation.measures import NSD_TOLERANCE, dice, iou, surface_dice
from monailabel_dfqsam.evaluation.prompts import PROMPTS
from monailabel_dfqsam.evaluation.scoring import evaluate

__all__ = [
    "BASELINES",
    "NSD_TOLERANCE",
    "PROMPTS",
    "EvaluationError",
    "Item",
    "box_baseline",
    "dice",
    "ellipse_baseline",
    "evaluate",
    "iou",
    "read_items",
    "surface_dice",
]
