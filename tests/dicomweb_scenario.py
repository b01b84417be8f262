"""A real Orthanc, a real server on it, one annotator: run in a network namespace with nothing but loopback.

`python -m tests.dicomweb_scenario FOLDER` prints one JSON object of what was seen, for the test to judge.
Orthanc listens on every interface whatever it is told, hence the namespace.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import requests
import SimpleITK as sitk
from numpy.typing import NDArray

from monailabel_dfqsam.slicer_session import ServerAnswer
from tests.dicom_series import Series
from tests.server_fixtures import (
    START_SECONDS,
    Server,
    checkpoint,
    free_port,
    new_server,
    wait,
)

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
ROWS, COLUMNS, SLICES = 48, 64, 5
Axes = tuple[tuple[float, float, float], tuple[float, float, float]]
UPRIGHT: Axes = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
CLICK = (40, 20, 1)  # (i, j, k): i along a row, j down the column
# What is saved: values and where, and what is said of them; the second value is not the second entry.
BLOCKS = {1: (1, slice(15, 25), slice(35, 45)), 3: (3, slice(30, 40), slice(5, 25))}
LABEL_INFO = [
    {"name": "liver", "idx": 1, "color": "rgb(10, 200, 30)"},
    {"name": "vessel", "idx": 2},
    {"name": "lesion", "idx": 3, "color": [200, 20, 40]},
]


def _series(number: int, axes: Axes = UPRIGHT, **tags: str) -> Series:
    """The same in the scenario and in the test that judges it."""
    return Series(
        *axes, tags={**tags}, study=f"2.25.{number}1", uid=f"2.25.{number}", frame=f"2.25.{number}2"
    )


SERIES = _series(
    1000, ((0.8, 0.6, 0.0), (-0.6, 0.8, 0.0)), PatientName="Scenario^Phantom", PatientID="scenario"
)
# The first unlabelled ones by name.
BROKEN = {"gap": _series(1001), "two orientations": _series(1002)}
PROPOSED = _series(1003)
LATE = _series(1004)  # asked for when the archive is gone


def plane() -> NDArray[np.int64]:
    """[J, I] a bright disc at the click on dim ground, Hounsfield units."""
    row, column = np.indices((ROWS, COLUMNS))
    return np.where(np.hypot(column - CLICK[0], row - CLICK[1]) < 9, 150, -20)


def write_series(folder: Path) -> None:
    """All series, one file a slice."""
    folder.mkdir()
    for k in range(SLICES):
        SERIES.write(folder / f"{k}.dcm", plane(), k)
    PROPOSED.write(folder / "proposed.dcm", plane(), 0)
    LATE.write(folder / "late.dcm", plane(), 0)
    for k in (0, 1, 3, 4):
        BROKEN["gap"].write(folder / f"gap{k}.dcm", plane(), k)
    for k in (0, 1, 2):
        BROKEN["two orientations"].write(folder / f"two{k}.dcm", plane(), k)
    BROKEN["two orientations"].write(
        folder / "other.dcm", plane(), 0, ImageOrientationPatient=[0, 1, 0, 0, 0, -1]
    )


def start_orthanc(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Orthanc with DICOMweb on `port`."""
    folder.mkdir(exist_ok=True)
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


def click_and_save(server: Server, folder: Path) -> dict[str, Any]:
    """A click on the series, and a label saved on its mask's grid; others that cannot be."""
    reply = server.session.infer(SERIES.uid, [CLICK])
    mask_path = folder / reply.file_name
    mask_path.write_bytes(reply.image)
    mask = sitk.ReadImage(str(mask_path))
    array = sitk.GetArrayFromImage(mask)
    seen = {
        "params": reply.params,
        "size": mask.GetSize(), "origin": mask.GetOrigin(), "spacing": mask.GetSpacing(),
        "direction": mask.GetDirection(), "slices": sorted({int(k) for k in np.nonzero(array)[0]}),
    }  # fmt: skip

    def save(array: NDArray[np.uint8]) -> list[Any]:
        label = sitk.GetImageFromArray(array)
        label.CopyInformation(mask) if array.shape == mask.GetSize()[::-1] else None
        sitk.WriteImage(label, str(folder / "label.nrrd"))
        return refused(server.session.save_label, SERIES.uid, folder / "label.nrrd", LABEL_INFO)

    seen["empty"] = save(np.zeros_like(array))
    seen["too_small"] = save(np.ones((2, 9, 9), np.uint8))
    seen["saved"] = save(label_array())
    return seen


def label_array() -> NDArray[np.uint8]:
    """[K, J, I] the label that is saved."""
    array = np.zeros((SLICES, ROWS, COLUMNS), np.uint8)
    for value, block in BLOCKS.items():
        array[block] = value
    return array


def ask_archive(server: Server, archive: str) -> dict[str, Any]:
    """What the server and the archive say of it all, without a click."""

    def get(path: str) -> requests.Response:
        return requests.get(server.url + path, timeout=60)

    instances = requests.get(f"{archive}/instances?expand", timeout=30).json()
    tags = [
        requests.get(f"{archive}/instances/{i['ID']}/simplified-tags", timeout=30).json() for i in instances
    ]
    return {
        "next": server.session.next_sample("first").get("id"),
        "label": get(f"/datastore/label?label={SERIES.uid}&tag=final").status_code,
        "found": len(get("/proxy/dicom/qido/studies?PatientID=scenario").json()),
        "not_found": len(get("/proxy/dicom/qido/studies?PatientID=nobody").json()),
        # `requests` would straighten a plain '..' itself.
        "above": get("/proxy/dicom/%252e%252e/instances").status_code,
        "unknown": refused(server.session.infer, "1.2.3.4", [CLICK]),
        "no_uid": refused(server.session.infer, "labels", [CLICK]),
        "broken": {name: refused(server.session.infer, s.uid, [CLICK]) for name, s in BROKEN.items()},
        "broken_twice": refused(server.session.infer, BROKEN["gap"].uid, [CLICK]),
        "broken_image": get(f"/datastore/image?image={BROKEN['gap'].uid}").status_code,
        "modalities": sorted(t["Modality"] for t in tags),
    }


def fetch_segmentation(archive: str, folder: Path) -> str:
    """The one DICOM SEG in the archive, as a file."""
    (series,) = requests.post(
        f"{archive}/tools/find",
        json={"Level": "Series", "Query": {"Modality": "SEG"}, "Expand": True},
        timeout=30,
    ).json()
    (found,) = series["Instances"]
    path = folder / "segmentation.dcm"
    path.write_bytes(requests.get(f"{archive}/instances/{found}/file", timeout=30).content)
    return str(path)


def lose_archive(
    server: Server, folder: Path, orthanc: subprocess.Popen[bytes], port: int
) -> tuple[Any, Any]:
    """Orthanc stops and starts again below a running server; answers what was seen, and the new Orthanc."""
    orthanc.terminate()
    orthanc.wait(30)
    seen = {
        "known": refused(server.session.infer, SERIES.uid, [CLICK]),
        "unknown": refused(server.session.infer, LATE.uid, [(*CLICK[:2], 0)]),
        "info": requests.get(f"{server.url}/info/", timeout=60).status_code,
        "proxy": requests.get(f"{server.url}/proxy/dicom/qido/studies", timeout=60).status_code,
    }
    orthanc = start_orthanc(folder / "orthanc", port)
    seen["again"] = refused(server.session.infer, LATE.uid, [(*CLICK[:2], 0)])
    return seen, orthanc


def start_anew(server: Server, folder: Path, start: Any) -> dict[str, Any]:
    """The server ends, forgets what it had fetched, and starts: what it then knows of the label."""
    server.stop()
    shutil.rmtree(folder / "cache")
    start()
    store = requests.get(f"{server.url}/datastore/?output=stats", timeout=60).json()
    reply = requests.get(f"{server.url}/datastore/label?label={SERIES.uid}&tag=final", timeout=60)
    path = folder / "again.nii.gz"
    path.write_bytes(reply.content)
    none = requests.get(f"{server.url}/datastore/label?label={PROPOSED.uid}&tag=final", timeout=60)
    info = requests.get(f"{server.url}/datastore/label/info?label={SERIES.uid}&tag=final", timeout=60)
    # Its own process fetches what is labelled: one series, where two are needed.
    run = server.session.ended_run(server.session.train("dfqsam_qat", max_epochs=1))
    return {
        "finetuning": [run["state"], run["error"]],
        "stats": store, "status": reply.status_code, "label": str(path), "none": none.status_code,
        "info": info.json(), "next": server.session.next_sample("first").get("id"),
    }  # fmt: skip


def play(folder: Path) -> dict[str, Any]:
    """The whole scenario."""
    write_series(folder / "dicom")
    port = free_port()
    archive = f"http://127.0.0.1:{port}"
    orthanc = start_orthanc(folder / "orthanc", port)
    server = new_server(folder)
    server.studies = f"{archive}/dicom-web"
    (folder / "temporary").mkdir()
    environment = {
        "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "cache"),
        "MONAI_LABEL_DICOMWEB_CACHE_EXPIRY": "1",
        "MONAI_LABEL_DICOMWEB_SEARCH_FILTER": "{}",  # as `dfqsam serve` sets it
        "TMPDIR": str(folder / "temporary"),
    }
    conf = {"quantize": "false", "checkpoint": checkpoint(folder)}
    try:
        store(archive, folder / "dicom")
        server.start(conf, environment)
        seen = {**click_and_save(server, folder), **ask_archive(server, archive)}
        seen["segmentation"] = fetch_segmentation(archive, folder)
        seen["lost"], orthanc = lose_archive(server, folder, orthanc, port)
        seen["anew"] = start_anew(server, folder, lambda: server.start(conf, environment))
        seen["temporary"] = sorted(path.name for path in (folder / "temporary").rglob("*") if path.is_file())
        seen["series_in_log"] = SERIES.uid in server.text()
        seen["patient_in_log"] = str(SERIES.tags["PatientName"]) in server.text()
    finally:
        server.stop()
        orthanc.kill()
    return seen


if __name__ == "__main__":
    pydicom.config.settings.writing_validation_mode = pydicom.config.RAISE
    print(json.dumps(play(Path(sys.argv[1]))))
