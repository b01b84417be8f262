"""3D Slicer's scene without its windows, by the package `slicer-core`: volumes, points, boxes, segmentations.

Positions are millimetres in RAS, indices are a node's (i, j, k); the scene is the only judge of how the two
belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

slicer = pytest.importorskip("slicer", reason="slicer-core, 3D Slicer's scene, is not installed")
if not hasattr(slicer, "vtkSlicerSegmentationsModuleLogic"):
    pytest.skip("the module slicer has no segmentation logic", allow_module_level=True)

import vtk  # type: ignore[import-untyped]  # noqa: E402
from vtk.util.numpy_support import vtk_to_numpy  # type: ignore[import-untyped]  # noqa: E402

Node = Any  # VTK's classes carry no types
Place = Sequence[float] | NDArray[np.float64]  # R, A, S


class Scene:
    """One MRML scene with the logic that Slicer's modules would use in it."""

    def __init__(self) -> None:
        self._scene = slicer.vtkMRMLScene()
        self._segmentations = slicer.vtkSlicerSegmentationsModuleLogic()
        self._segmentations.SetMRMLScene(self._scene)

    def load(self, path: Path, *, right_handed: bool = True) -> Node:
        """A volume node; from 5.8 on Slicer turns a left-handed grid's slices round, before it did not."""
        return self._read(path, "vtkMRMLScalarVolumeNode", right_handed)

    def load_labels(self, path: Path) -> Node:
        """A labelmap node."""
        return self._read(path, "vtkMRMLLabelMapVolumeNode", True)

    def save(self, volume: Node, path: Path) -> Path:
        """Written by the volume's storage node, as Slicer's saveNode does."""
        storage = self._new("vtkMRMLVolumeArchetypeStorageNode")
        storage.SetFileName(str(path))
        assert storage.WriteData(volume) == 1
        return path

    def points(self, *places: Place) -> Node:
        """A markups list with points at these places."""
        node = self._new("vtkMRMLMarkupsFiducialNode")
        for place in places:
            node.AddControlPoint([float(x) for x in place])
        return node

    def roi(self, centre: Place, size: Place) -> Node:
        """A ROI along the patient's axes; `size` in millimetres."""
        node = self._new("vtkMRMLMarkupsROINode")
        node.SetCenter([float(x) for x in centre])
        node.SetSize([float(x) for x in size])
        return node

    def red_offset(self, place: Place) -> float:
        """Where the red, axial view stands when it shows a place, in millimetres."""
        node = self._new("vtkMRMLSliceNode")
        slicer.vtkMRMLSliceNode.AddDefaultSliceOrientationPresets(self._scene)
        node.SetLayoutName("Red")
        node.SetOrientation("Axial")
        node.JumpSliceByOffsetting(*(float(x) for x in place))
        return float(node.GetSliceOffset())

    def segmentation(self, volume: Node) -> Node:
        """An empty one in a volume's geometry."""
        node = self._new("vtkMRMLSegmentationNode")
        node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
        return node

    def import_mask(self, mask: Path, segmentation: Node, label: str) -> None:
        """A mask from the server becomes the segment `label`, or joins it where there is one."""
        labels = self.load_labels(mask)
        logic, segments = self._segmentations, segmentation.GetSegmentation()
        before = segments.GetNumberOfSegments()
        assert logic.ImportLabelmapToSegmentationNode(labels, segmentation)
        assert segments.GetNumberOfSegments() == before + 1
        self._scene.RemoveNode(labels)
        new = segments.GetNthSegmentID(before)
        present = segments.GetSegmentIdBySegmentName(label)
        if not present:
            segments.GetSegment(new).SetName(label)
            return
        added = slicer.vtkOrientedImageData()
        assert segmentation.GetBinaryLabelmapRepresentation(new, added)
        assert logic.SetBinaryLabelmapToSegment(added, segmentation, present, logic.MODE_MERGE_MAX)
        segmentation.RemoveSegment(new)

    def export_labels(self, segmentation: Node, volume: Node) -> tuple[Node, list[dict[str, Any]]]:
        """All segments as one labelmap on the volume's grid, and the names of its values."""
        segments = segmentation.GetSegmentation()
        ids, names = vtk.vtkStringArray(), []
        for n in range(segments.GetNumberOfSegments()):
            ids.InsertNextValue(segments.GetNthSegmentID(n))
            names.append({"name": segments.GetNthSegment(n).GetName(), "idx": n + 1})
        labels = self._new("vtkMRMLLabelMapVolumeNode")
        assert self._segmentations.ExportSegmentsToLabelmapNode(segmentation, ids, labels, volume)
        return labels, names

    def _new(self, kind: str) -> Node:
        return self._scene.AddNewNodeByClass(kind)

    def _read(self, path: Path, kind: str, right_handed: bool) -> Node:
        node, storage = self._new(kind), self._new("vtkMRMLVolumeArchetypeStorageNode")
        storage.SetFileName(str(path))
        storage.SetForceRightHandedIJKCoordinateSystem(right_handed)
        assert storage.ReadData(node) == 1
        return node


def array(volume: Node) -> NDArray[Any]:
    """[I, J, K] a volume node's voxels."""
    image = volume.GetImageData()
    flat: NDArray[Any] = vtk_to_numpy(image.GetPointData().GetScalars())
    return flat.reshape(image.GetDimensions()[::-1]).T


def ijk_to_ras(volume: Node) -> NDArray[np.float64]:
    """[4, 4]"""
    matrix = vtk.vtkMatrix4x4()
    volume.GetIJKToRASMatrix(matrix)
    return np.array([[matrix.GetElement(row, column) for column in range(4)] for row in range(4)])


def point_indices(points: Node, volume: Node) -> list[tuple[int, int, int]]:
    """The voxels that a list's points lie in."""
    to_ijk = np.linalg.inv(ijk_to_ras(volume))
    places = [points.GetNthControlPointPosition(n) for n in range(points.GetNumberOfControlPoints())]
    return [_voxel(to_ijk, place) for place in places]


def roi_indices(roi: Node, volume: Node) -> list[int]:
    """(i0, i1, j0, j1, k0, k1): the voxels of its corner at the least R, A and S, and of the opposite one."""
    to_ijk = np.linalg.inv(ijk_to_ras(volume))
    centre = [0.0] * 3
    roi.GetCenter(centre)
    half = np.array(roi.GetSize()) / 2
    low, high = _voxel(to_ijk, centre - half), _voxel(to_ijk, centre + half)
    return [index for pair in zip(low, high, strict=True) for index in pair]


def _voxel(to_ijk: NDArray[np.float64], place: Place) -> tuple[int, int, int]:
    i, j, k = (round(float(x)) for x in (to_ijk @ [*place, 1])[:3])
    return i, j, k
