"""DICOM series written slice by slice, so that a test can leave one out, bend one, or mix two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

INTERCEPT = -1000


@dataclass(frozen=True)
class Series:
    """What the slices of a CT series share.

    Attributes:
        rows, columns: directions of a row (along i) and of a column (along j), unit vectors, LPS.
        origin: centre of voxel (0, 0, 0), millimetres.
        spacing: between columns, rows and slices: along i, j and k.
        tags: further DICOM attributes of every slice.
    """

    row_axis: tuple[float, float, float] = (1.0, 0.0, 0.0)
    column_axis: tuple[float, float, float] = (0.0, 1.0, 0.0)
    origin: tuple[float, float, float] = (10.0, -20.0, 100.0)
    spacing: tuple[float, float, float] = (0.7, 0.9, 2.5)
    tags: dict[str, Any] = field(default_factory=dict)
    study: str = field(default_factory=generate_uid)
    uid: str = field(default_factory=generate_uid)
    frame: str = field(default_factory=generate_uid)

    @property
    def normal(self) -> NDArray[np.float64]:
        """The way in which k grows, a unit vector."""
        found: NDArray[np.float64] = np.cross(self.row_axis, self.column_axis)
        return found

    def world(self, index: Sequence[float]) -> NDArray[np.float64]:
        """[3] millimetres, LPS, of a voxel index (i, j, k)."""
        axes = np.stack([np.array(self.row_axis), np.array(self.column_axis), self.normal], axis=1)
        place: NDArray[np.float64] = axes @ (np.array(index) * np.array(self.spacing)) + self.origin
        return place

    def write(self, path: Path, values: NDArray[np.integer[Any]], k: float, **tags: Any) -> None:
        """One slice.

        Args:
            values: [J, I] Hounsfield units.
            k: its place along the normal, in slices; need not be whole.
            tags: attributes that differ from what the series says.
        """
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        d = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        d.SOPClassUID, d.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = self.study, self.uid, self.frame
        d.PatientName, d.PatientID, d.Modality, d.StudyID = "Test^Phantom", "phantom", "CT", "1"
        d.PatientBirthDate = d.PatientSex = d.AccessionNumber = ""
        d.StudyDate, d.StudyTime, d.PatientPosition = "20240102", "030405", "HFS"
        d.SeriesNumber, d.InstanceNumber, d.ImageType = 1, round(k) + 1, ["ORIGINAL", "PRIMARY", "AXIAL"]
        d.Rows, d.Columns = values.shape
        d.ImageOrientationPatient = [*self.row_axis, *self.column_axis]
        d.ImagePositionPatient = [round(float(x), 6) for x in self.world((0, 0, k))]
        d.PixelSpacing, d.SliceThickness = [self.spacing[1], self.spacing[0]], self.spacing[2]
        d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 1
        d.RescaleSlope, d.RescaleIntercept = 1, INTERCEPT
        d.PixelData = (values - INTERCEPT).astype(np.int16).tobytes()
        for name, value in {**self.tags, **tags}.items():
            setattr(d, name, value)
        d.save_as(path, write_like_original=False)


def implicit_without_preamble(path: Path) -> None:
    """Writes a file anew as old archives do: implicit VR, little-endian, no preamble and no meta header."""
    read = pydicom.dcmread(path)
    bare = Dataset()
    bare.update(read)
    bare.is_little_endian, bare.is_implicit_VR = True, True
    pydicom.dcmwrite(path, bare, write_like_original=True)
