"""A real Orthanc, a real server on it, one annotator: run in a network namespace with nothing but loopback.

`python -m tests.dicomweb_scenario FOLDER` prints one JSON object of what was seen, for the test to judge.
Orthanc listens on every interface whatever it is told, hence the namespace.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import requests
import SimpleITK as sitk
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from monailabel_dfqsam.slicer_session import ServerAnswer
from tests.server_fixtures import START_SECONDS, Server, checkpoint, free_port, new_server, wait

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
ROWS, COLUMNS, SLICES = 48, 64, 5
CLICK = (40, 20, 1)  # (i, j, k): i along a row, j down the column
ROW_AXIS, COLUMN_AXIS = (0.8, 0.6, 0.0), (-0.6, 0.8, 0.0)
PATIENT = "Scenario^Phantom"


def write_series(folder: Path) -> str:
    """A CT series of `SLICES` oblique slices; answers its SeriesInstanceUID."""
    folder.mkdir()
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    row, column = np.indices((ROWS, COLUMNS))
    for k in range(SLICES):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        d = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        d.SOPClassUID, d.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = study, series, frame
        d.PatientName, d.PatientID, d.Modality, d.StudyID = PATIENT, "scenario", "CT", "1"
        d.PatientBirthDate = d.PatientSex = d.StudyDate = d.StudyTime = d.AccessionNumber = ""
        d.SeriesNumber, d.InstanceNumber = 1, k + 1
        d.Rows, d.Columns = ROWS, COLUMNS
        d.ImageOrientationPatient = [*ROW_AXIS, *COLUMN_AXIS]
        d.ImagePositionPatient = [10.0, -20.0, 100.0 + 2.5 * k]
        d.PixelSpacing, d.SliceThickness = [0.9, 0.7], 2.5
        d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 1
        d.RescaleSlope, d.RescaleIntercept = 1, -1000
        ball = np.hypot(column - CLICK[0], row - CLICK[1]) < 9
        d.PixelData = np.where(ball, 1150, 980).astype(np.int16).tobytes()
        d.save_as(folder / f"{k}.dcm", write_like_original=False)
    return str(series)


def start_orthanc(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Orthanc with DICOMweb on `port`."""
    folder.mkdir()
    config = {
        "Name": "scenario", "StorageDirectory": str(folder), "IndexDirectory": str(folder), "HttpPort": port,
        "DicomServerEnabled": False, "RemoteAccessAllowed": False, "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }  # fmt: skip
    path = folder / "orthanc.json"
    path.write_text(json.dumps(config))
    log = (folder / "orthanc.log").open("wb")
    process = subprocess.Popen(["Orthanc", str(path)], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}/system"

    def answers() -> bool:
        try:
            return requests.get(url, timeout=5).ok
        except requests.ConnectionError:
            return False

    wait(answers, START_SECONDS)
    return process


def store(archive: str, folder: Path) -> None:
    """Every DICOM file of a folder into the Orthanc at `archive`."""
    for path in folder.iterdir():
        requests.post(f"{archive}/instances", data=path.read_bytes(), timeout=30).raise_for_status()


def refused(call: Any, *arguments: Any, **options: Any) -> list[Any]:
    """[status, sentence] of a call that must fail; [200, ''] when it does not."""
    try:
        call(*arguments, **options)
    except ServerAnswer as answer:
        return [answer.status, answer.detail]
    return [200, ""]


def click_and_save(server: Server, series: str, folder: Path) -> dict[str, Any]:
    """A click on the series, and its mask saved as the label."""
    reply = server.session.infer(series, [CLICK])
    mask_path = folder / reply.file_name
    mask_path.write_bytes(reply.image)
    mask = sitk.ReadImage(str(mask_path))
    array = sitk.GetArrayFromImage(mask)
    # Something to save, whatever the model found.
    array[CLICK[2], CLICK[1] - 5 : CLICK[1] + 5, CLICK[0] - 5 : CLICK[0] + 5] = 1
    label = sitk.GetImageFromArray(array)
    label.CopyInformation(mask)
    sitk.WriteImage(label, str(folder / "label.nrrd"))
    saved = refused(server.session.save_label, series, folder / "label.nrrd", [{"name": "organ", "idx": 1}])
    return {
        "params": reply.params,
        "size": mask.GetSize(), "origin": mask.GetOrigin(), "spacing": mask.GetSpacing(),
        "direction": mask.GetDirection(), "slices": sorted({int(k) for k in np.nonzero(array)[0]}),
        "saved": saved,
    }  # fmt: skip


def play(folder: Path) -> dict[str, Any]:
    """The whole scenario."""
    series, port = write_series(folder / "dicom"), free_port()
    orthanc = start_orthanc(folder / "orthanc", port)
    server = new_server(folder)
    server.studies = f"http://127.0.0.1:{port}/dicom-web"
    environment = {
        "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "cache"),
        "MONAI_LABEL_DICOMWEB_CACHE_EXPIRY": "1",
    }
    try:
        store(f"http://127.0.0.1:{port}", folder / "dicom")
        server.start({"quantize": "false", "checkpoint": checkpoint(folder)}, environment)
        seen = click_and_save(server, series, folder)

        def get(path: str) -> requests.Response:
            return requests.get(server.url + path, timeout=60)

        seen["next"] = server.session.next_sample("first").get("id")
        seen["label"] = get(f"/datastore/label?label={series}&tag=final").status_code
        seen["found"] = len(get("/proxy/dicom/qido/studies?PatientID=scenario").json())
        seen["not_found"] = len(get("/proxy/dicom/qido/studies?PatientID=nobody").json())
        # `requests` would straighten a plain '..' itself.
        seen["above"] = get("/proxy/dicom/%252e%252e/instances").status_code
        seen["unknown"] = refused(server.session.infer, "1.2.3.4", [CLICK])
        seen["no_uid"] = refused(server.session.infer, "labels", [CLICK])
        stored = requests.get(f"http://127.0.0.1:{port}/instances?expand", timeout=30).json()
        tags = [
            requests.get(f"http://127.0.0.1:{port}/instances/{i['ID']}/simplified-tags", timeout=30).json()
            for i in stored
        ]
        seen["modalities"] = sorted({t["Modality"] for t in tags})
        orthanc.terminate()
        orthanc.wait(30)
        seen["archive_gone"] = refused(server.session.infer, "1.2.3.5", [CLICK])
        seen["series_in_log"] = series in server.text()
        seen["patient_in_log"] = PATIENT in server.text()
    finally:
        server.stop()
        orthanc.kill()
    return seen


if __name__ == "__main__":
    pydicom.config.settings.writing_validation_mode = pydicom.config.RAISE
    print(json.dumps(play(Path(sys.argv[1]))))
