"""MONAI Label's own way of answering, for comparison: its app, its endpoint, its `Writer`, and a ready mask.

Nothing of this package's server is in it. The task has its mask in memory after the first request, so that
what a request costs is answering alone: a lower bound for any of MONAI Label's own models.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.transform.writer import Writer

from monailabel_dfqsam.segmentation.volume import Volume, load_volume

MODEL = "stock"
MASK_NAME = "mask.nrrd"
"""In the app's folder: the mask to answer with, on its image's grid."""

MAIN_PY = '''"""MONAI Label app: answers as MONAI Label does."""

from monailabel_dfqsam.benchmark.stock_app import StockApp

__all__ = ["StockApp"]
'''


class StockApp(MONAILabelApp):  # type: ignore[misc]
    """An app of one model that always answers the same mask."""

    def __init__(self, app_dir: str, studies: str, conf: Mapping[str, Any]) -> None:
        """As MONAI Label calls it."""
        self._mask = Path(app_dir) / MASK_NAME
        super().__init__(app_dir=app_dir, studies=studies, conf=dict(conf or {}), name="Stock")

    def init_infers(self) -> dict[str, InferTask]:
        """The one model."""
        return {MODEL: StockTask(self._mask)}


class StockTask(InferTask):  # type: ignore[misc]
    """Writes its mask as `BasicInferTask` writes what a network found."""

    def __init__(self, mask: Path) -> None:
        super().__init__(type=InferType.DEEPGROW, labels=["organ"], dimension=3, description="A ready mask")
        self._path = mask

    @cached_property
    def _mask(self) -> Volume:
        return load_volume(self._path)

    def is_valid(self) -> bool:
        """Always."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The mask's file by `Writer` with its defaults; `latencies` hold the seconds of writing."""
        mask = self._mask
        data = {**request, "image_path": request["image"], "pred": mask.array}
        data["pred_meta_dict"] = {"affine": mask.affine}
        begin = time.perf_counter()
        file, found = Writer(label="pred", json="result")(data)
        seconds = time.perf_counter() - begin
        return file, {
            **found,
            "label_names": self.labels,
            "latencies": {"write": seconds, "total": seconds},
        }
