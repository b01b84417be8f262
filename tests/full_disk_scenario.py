"""Disks that are full while the server writes to them: run in a mount namespace, where they can be made.

`python -m tests.full_disk_scenario FOLDER` prints one JSON object of what was seen, for the test to judge.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from monailabel_dfqsam.slicer_session import ServerAnswer
from tests.server_fixtures import OBJECT, QUICK, WORK_SECONDS, Server, checkpoint, new_server, quantize, wait

MIB = 1 << 20
_FIRST, _SECOND = [{"name": "organ", "idx": 1}], [{"name": "lesion", "idx": 1}]


def mount(folder: Path, megabytes: int) -> None:
    """An empty disk of that size in place of a folder's content, which is copied onto it."""
    content = folder.with_name(folder.name + "-content")
    folder.mkdir(exist_ok=True)
    shutil.copytree(folder, content)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)], check=True)
    shutil.copytree(content, folder, dirs_exist_ok=True)


def fill(folder: Path) -> Path:
    """Takes all that is left of a disk; the file to remove."""
    path = folder / ".filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass
    return path


def save(server: Server, label: Path, info: list[dict[str, Any]]) -> list[Any]:
    """[status, sentence] of saving a label."""
    try:
        server.session.save_label("phantom0", label, info)
    except ServerAnswer as answer:
        return [answer.status, answer.detail]
    return [200, ""]


def attempt(server: Server) -> dict[str, str]:
    """Quantizes, and how that ended."""
    run = quantize(server, seed=3)
    return {"state": str(run["state"]), "error": str(run["error"])}


def labels(server: Server, folder: Path) -> dict[str, Any]:
    """A label given, then another one that finds no room, then again with room."""
    studies = Path(server.studies)
    first, second = folder / "first.nrrd", folder / "second.nrrd"
    first.write_bytes(server.session.infer("phantom0", [OBJECT]).image)
    # Larger than what a full disk may have left in a file's last block.
    reply = server.session.infer("phantom0", [OBJECT], window="full range", result_compress=False)
    second.write_bytes(reply.image)
    saved, seen = studies / "labels" / "final" / "phantom0.nrrd", {"first": save(server, first, _FIRST)}
    filler = fill(studies)
    seen["full"] = save(server, second, _SECOND)
    seen["kept"] = saved.read_bytes() == first.read_bytes()
    record = json.loads((studies / "datastore_v2.json").read_text())
    seen["record"] = record["objects"]["phantom0"]["labels"]["final"]["info"]["label_info"]
    seen["click"] = len(server.session.infer("phantom0", [OBJECT]).image)
    filler.unlink()
    seen["room"] = save(server, second, _SECOND)
    seen["replaced"] = saved.read_bytes() == second.read_bytes()
    seen["left"] = [path.name for path in studies.rglob("*.partial")]
    return seen


def play(folder: Path) -> dict[str, Any]:
    """The whole scenario."""
    server = new_server(folder)
    model = server.app / "model"
    mount(model, 1)
    mount(Path(server.studies), 2)
    try:
        server.start({**QUICK, "quantize": "false", "checkpoint": checkpoint(folder)})
        seen: dict[str, Any] = {"labels": labels(server, folder), "small": attempt(server)}
        seen["after_small"] = server.session.infer("phantom0", [OBJECT]).params["model"]
        seen["left"] = sorted(path.name for path in model.iterdir())
        subprocess.run(["mount", "-o", "remount,size=64m", str(model)], check=True)
        seen["large"] = attempt(server)
        wait(lambda: server.serving().startswith("W4A4"), WORK_SECONDS)
    finally:
        server.stop()
    return seen


if __name__ == "__main__":
    print(json.dumps(play(Path(sys.argv[1]))))
