"""3D Slicer's MONAI Label plugin: its own client, and the requests that its panel makes of clicks."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import files
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

CLIENT = "plugins/slicer/MONAILabel/MONAILabelLib/client.py"
MODEL = "dfqsam"
DEFAULT_EXTENSION = (
    ".nii.gz"  # in which the plugin saves volumes and labels unless its settings say otherwise
)

Index = tuple[int, int, int]


def plugin_client() -> ModuleType:
    """The module `client` out of the installed monailabel; skips the test where it cannot be had."""
    if sys.version_info >= (3, 13):
        pytest.skip("the Slicer plugin's client imports cgi, which Python 3.13 no longer has")
    found = [file.locate() for file in files("monailabel") or () if str(file).endswith(CLIENT)]
    if not found:
        pytest.skip("the installed monailabel brings no Slicer plugin")
    spec = importlib.util.spec_from_file_location("slicer_plugin_client", Path(str(found[0])))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # cgi
        spec.loader.exec_module(module)
    return module


class Panel:
    """The plugin's panel without its widgets: an annotator who clicks with one model chosen.

    Every call goes through the plugin's own client. What the panel adds to it is written here after what
    MONAI Label 0.8.5's plugin sends: each entry of the model's config with every click, the points of the
    slice clicked last, `reset_state` after a label was chosen, the reply's type and ending.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.module = plugin_client()
        self.client = self.module.MONAILabelClient(url, str(folder), "user-xyz")
        self.info: dict[str, Any] = self.client.info()
        self._first = True

    def config(self, section: str, name: str) -> dict[str, Any]:
        """The config entries of a model, trainer or strategy as the options table holds them at first."""
        entries = self.info[section][name].get("config", {})
        return {key: value[0] if isinstance(value, list) else value for key, value in entries.items()}

    def click(
        self,
        image: str,
        foreground: Sequence[Index] = (),
        background: Sequence[Index] = (),
        *,
        label: str = "organ",
        session_id: str | None = None,
        **changed: Any,
    ) -> tuple[sitk.Image, dict[str, Any]]:
        """A point was placed, the last one in `foreground`, else in `background`; voxel indices (i, j, k).

        `changed` are entries of the options table. Returns the mask and the reply's params.
        """
        points = foreground or background
        k = points[-1][2]
        # Points of every slice on slice 0: there the plugin takes the number for a missing one.
        here = {
            name: [list(point) for point in group if k == 0 or point[2] == k]
            for name, group in (("foreground", foreground), ("background", background))
        }
        return self._infer(image, {"label": label, **here}, {"slice": k}, session_id, changed)

    def update_with_roi(
        self,
        image: str,
        roi: Sequence[int],
        offset: float,
        *,
        label: str = "organ",
        session_id: str | None = None,
    ) -> tuple[sitk.Image, dict[str, Any]]:
        """ "Update" was pressed with a ROI: (i0, i1, j0, j1, k0, k1) voxel indices, each pair in any order.

        `offset`: where the red view stands, in millimetres; the plugin sends that as the slice.
        """
        points: dict[str, Any] = {"label": label, "foreground": [], "background": []}
        return self._infer(image, points, {"roi": list(roi), "slice": round(abs(offset))}, session_id, {})

    def _infer(
        self,
        image: str,
        points: Mapping[str, Any],
        place: Mapping[str, Any],
        session_id: str | None,
        changed: Mapping[str, Any],
    ) -> tuple[sitk.Image, dict[str, Any]]:
        params = {**points, **self.config("models", MODEL), **changed, **place}
        if self._first:
            params["reset_state"], self._first = True, False
        params.update(result_extension=".nrrd", result_dtype="uint8")
        file, reply = self.client.infer(MODEL, image, params, session_id=session_id)
        try:
            return sitk.ReadImage(file), reply
        finally:
            Path(file).unlink()

    @contextmanager
    def session(self, volume: Path) -> Iterator[str]:
        """An own volume uploaded; its session's id."""
        session_id = self.client.create_session(str(volume))["session_id"]
        try:
            yield session_id
        finally:
            self.client.remove_session(session_id)


def voxels(image: sitk.Image) -> NDArray[Any]:
    """[I, J, K]"""
    array: NDArray[Any] = sitk.GetArrayFromImage(image)
    return array.T
