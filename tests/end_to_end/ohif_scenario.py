"""OHIF on a real Orthanc and a real server: run in a network namespace with nothing but loopback.

`python -m tests.end_to_end.ohif_scenario FOLDER PICTURES [SERIES]` prints one JSON object of what was seen in
the page, for the test to judge; pictures of it go to PICTURES. SERIES is a folder of further DICOM files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import requests
import SimpleITK as sitk
from numpy.typing import NDArray

from monailabel_dfqsam.slicer_session import SlicerSession
from tests.dicom_series import Series
from tests.dicomweb_scenario import start_orthanc, store
from tests.end_to_end.ohif_page import OhifPage, ohif
from tests.server_fixtures import QUICK, START_SECONDS, WORK_SECONDS, free_port, wait

SHAPE = (96, 80, 12)  # (I, J, K), no two alike
# The normal, their cross product, points to the feet: k grows against z.
ROW_AXIS, COLUMN_AXIS = (0.8, 0.6, 0.0), (0.6, -0.8, 0.0)


Index = tuple[int, int, int]
World = tuple[float, float, float]

FIRST, SECOND = (66, 24, 3), (25, 55, 8)
RADII = {FIRST: 14, SECOND: 11}
SARCOMA = (70, 66, 24), (98, 74, 24)  # both in the tumour


@dataclass(frozen=True)
class Clicks:
    """Points of one slice and what to call them: voxels, their places (LPS, mm), a label's name."""

    indices: Sequence[Index]
    worlds: Sequence[World]
    label: str


def write_phantom(folder: Path) -> Series:
    """Two balls on a dim ellipse, far from every plane of symmetry."""
    folder.mkdir()
    series = Series(ROW_AXIS, COLUMN_AXIS, tags={"SeriesDescription": "phantom"})
    i, j, k = np.indices(SHAPE)
    values = np.where(np.hypot((i - 46) / 44, (j - 38) / 36) < 1, 20, -900)
    for centre, radius in RADII.items():
        distance = np.sqrt((i - centre[0]) ** 2 + (j - centre[1]) ** 2 + (3 * (k - centre[2])) ** 2)
        values = np.where(distance < radius, 160, values)
    values = values + np.random.default_rng(0).normal(0, 6, SHAPE).round().astype(int)
    for n in range(SHAPE[2]):
        series.write(folder / f"{n}.dcm", values[:, :, n].T, n)
    return series


def start_server(folder: Path, archive: str, port: int) -> subprocess.Popen[bytes]:
    """`dfqsam serve` as a user types it, with the smallest model and the shortest quantization."""
    line = [sys.executable, "-m", "monailabel_dfqsam", "serve", "--studies", archive, "--port", str(port)]
    line += ["--app", str(folder / "app"), "--checkpoint", "tiny", "--"]
    line += [word for key, value in QUICK.items() for word in ("--conf", key, str(value))]
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "cache"),
    }
    with (folder / "server.log").open("ab") as log:
        return subprocess.Popen(line, stdout=log, stderr=log, env=variables)


def serving(session: SlicerSession) -> dict[str, Any]:
    """Which model answers, as `/info/` says; {} while the server does not answer."""
    try:
        found: dict[str, Any] = session.info()["models"]["dfqsam"]["serving"]
    except requests.ConnectionError:
        return {}
    return found


def wait_for_another(session: SlicerSession, key: str | None) -> None:
    """Until a quantized model answers other than `key`."""
    wait(lambda: serving(session).get("key") not in (None, key), WORK_SECONDS)


def asked(session: SlicerSession, series: str, clicks: Clicks, folder: Path) -> dict[str, Any]:
    """The same clicks over HTTP: [N] places of the mask's voxels in the file's order, and the grid."""
    reply = session.infer(series, clicks.indices, label=clicks.label)
    path = folder / "asked.nrrd"
    path.write_bytes(reply.image)
    mask: NDArray[np.uint8] = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    return {"set": np.flatnonzero(mask).tolist(), "dimensions": mask.shape[::-1]}


def annotate(
    page: OhifPage, session: SlicerSession, series: str, clicks: Clicks, folder: Path
) -> dict[str, Any]:
    """Clicks and Run; what the page then holds, and what the server says to the same clicks."""
    page.choose("dfqsam", clicks.label)
    page.look_at(np.mean(clicks.worlds, axis=0))
    for world in clicks.worlds:
        page.click(world)
    return {
        "request": page.run(), "mask": page.mask(), "points": page.points(),
        "worlds": [page.world(index) for index in clicks.indices],
        "expected": {"indices": clicks.indices, "worlds": clicks.worlds, "label": clicks.label},
        "asked": asked(session, series, clicks, folder), "serving": serving(session), "series": series,
    }  # fmt: skip


def play(folder: Path, pictures: Path, real: Path | None) -> dict[str, Any]:
    """The whole scenario."""
    phantom = write_phantom(folder / "dicom")
    ports = free_port(), free_port()
    orthanc = start_orthanc(folder / "orthanc", ports[0])
    archive = f"http://127.0.0.1:{ports[0]}"
    server: subprocess.Popen[bytes] | None = None
    try:
        for source in [folder / "dicom", *([real] if real else [])]:
            store(archive, source)
        server = start_server(folder, f"{archive}/dicom-web", ports[1])
        session = SlicerSession(f"http://127.0.0.1:{ports[1]}")
        wait(lambda: bool(serving(session)), START_SECONDS)
        with ohif(session.url, pictures) as page:
            seen = play_phantom(page, session, phantom, folder, pictures)
            if real:
                seen["real"] = play_real(page, session, real, folder, pictures)
            seen["errors"] = page.errors
    finally:
        if server:
            server.terminate()
            server.wait(30)
        orthanc.kill()
    return seen


def play_phantom(
    page: OhifPage, session: SlicerSession, phantom: Series, folder: Path, pictures: Path
) -> dict[str, Any]:
    """A click, a requantization while the page is open, a click on another object."""
    first, second = (
        Clicks([index], [tuple(map(float, phantom.world(index)))], label)  # type: ignore[list-item]
        for index, label in ((FIRST, "organ"), (SECOND, "lesion"))
    )
    page.open(phantom.study)
    wait_for_another(session, None)
    seen: dict[str, Any] = {"models": page.connect()}
    seen["first"] = annotate(page, session, phantom.uid, first, folder)
    page.picture(pictures / "phantom-first.png")
    session.train(seed=1, iterations=QUICK["iterations"])
    wait_for_another(session, seen["first"]["serving"]["key"])
    seen["second"] = annotate(page, session, phantom.uid, second, folder)
    page.picture(pictures / "phantom-second.png")
    seen["archived"] = read_archived(page, session, phantom, folder)
    return seen


def read_archived(page: OhifPage, session: SlicerSession, phantom: Series, folder: Path) -> dict[str, Any]:
    """Both balls submitted as a label, and what the page finds in the archive then."""
    i, j, k = np.indices(SHAPE)
    label = np.zeros(SHAPE, np.uint8)
    for value, (centre, radius) in enumerate(RADII.items(), start=1):
        distance = np.sqrt((i - centre[0]) ** 2 + (j - centre[1]) ** 2 + (3 * (k - centre[2])) ** 2)
        label[distance < radius] = value
    # On the grid that the server itself answers on.
    grid = sitk.ReadImage(str(folder / "asked.nrrd"))
    image = sitk.GetImageFromArray(np.ascontiguousarray(label.T))
    image.CopyInformation(grid)
    sitk.WriteImage(image, str(folder / "label.nrrd"))
    names = [{"name": "liver", "idx": 1}, {"name": "tumour", "idx": 2}]
    session.save_label(phantom.uid, folder / "label.nrrd", names)
    page.open(phantom.study)
    expected = [
        {
            "position": [float(x) for x in phantom.world((0, 0, n))],
            "set": np.flatnonzero(label[:, :, n].T).tolist(),
            "value": label[:, :, n].T[label[:, :, n].T > 0].tolist(),
        }
        for n in range(SHAPE[2])
    ]
    return {"found": page.archived(), "expected": expected}


def play_real(
    page: OhifPage, session: SlicerSession, real: Path, folder: Path, pictures: Path
) -> dict[str, Any]:
    """Two clicks into the sarcoma of a real axial series."""
    slices = [pydicom.dcmread(path, stop_before_pixels=True) for path in real.iterdir()]
    slices.sort(key=lambda d: float(d.ImagePositionPatient[2]))
    d = slices[SARCOMA[0][2]]
    x, y, z = (float(v) for v in d.ImagePositionPatient)
    down, along = (float(v) for v in d.PixelSpacing)
    worlds = [(x + i * along, y + j * down, z) for i, j, _ in SARCOMA]
    page.open(d.StudyInstanceUID)
    page.connect()
    seen = annotate(page, session, d.SeriesInstanceUID, Clicks(SARCOMA, worlds, "lesion"), folder)
    page.picture(pictures / "real.png")
    return seen


if __name__ == "__main__":
    given = [Path(word) for word in sys.argv[1:]]
    print(json.dumps(play(given[0], given[1], given[2] if len(given) > 2 else None)))
