"""A real MONAI Label server in a process of its own, and a study whose geometry hides no mistake."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import nibabel
import numpy as np
import pytest
import requests
from numpy.typing import NDArray

from monailabel_dfqsam.sam.checkpoint import NAMED
from monailabel_dfqsam.slicer_session import InferReply, SlicerSession
from tests import forked

SAMPLE_APP = Path(__file__).parents[1] / "sample-apps" / "dfqsam"
SHAPE = (72, 56, 7)  # no two axes alike
OBJECT = (44, 20, 3)  # voxel in the middle of the bright ball, far from every axis of symmetry
QUANTIZED = ("W4A4 (native)", "W4A4 (onednn)", "W4A4 (openvino)")  # whichever wins the race here
START_SECONDS = 240.0  # a busy machine imports slowly
WORK_SECONDS = 180.0
END_SECONDS = 30.0


def checkpoint(folder: Path) -> Path:
    """A copy of the smallest weights in the package."""
    path = folder / "tiny.safetensors"
    shutil.copy(NAMED["tiny"], path)
    return path


def affine() -> NDArray[np.float64]:
    """[4, 4] RAS: an oblique, anisotropic grid with two axes against patient axes."""
    a, b = np.deg2rad(20), np.deg2rad(-15)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    matrix = np.eye(4)
    matrix[:3, :3] = about_z @ about_x @ np.diag([-0.8, -1.1, 3.0])
    matrix[:3, 3] = [31.0, -17.0, 250.0]
    return matrix


def write_volume(path: Path, seed: int = 0) -> None:
    """A NIfTI with one bright ball at `OBJECT` on dark, noisy ground."""
    i, j, k = np.indices(SHAPE)
    radius = np.sqrt((i - OBJECT[0]) ** 2 + (j - OBJECT[1]) ** 2 + (4 * (k - OBJECT[2])) ** 2)
    noise = np.random.default_rng(seed).normal(0, 8, SHAPE)
    values = np.where(radius < 10, 320, 60) + noise
    nibabel.save(nibabel.Nifti1Image(values.astype(np.int16), affine()), path)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """One server, started and stopped as a hospital would: `monailabel start_server`, then SIGTERM."""

    def __init__(self, app: Path, studies: str, log: Path) -> None:
        self.app, self.studies, self.log = app, studies, log
        # Of its own, since what is left there is looked at, and other servers run at the same time.
        self.temporary = log.parent / "temporary-files"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.session = SlicerSession(self.url)
        self._process: ForkServerProcess | None = None

    def start(
        self,
        conf: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
        path: str = "/info/",
    ) -> float:
        """Starts and waits until `path` answers; answers the seconds that took."""
        pairs = [word for key, value in (conf or {}).items() for word in ("--conf", key, str(value))]
        line = ["monailabel.main", "start_server", "--app", str(self.app)]
        line += ["--studies", self.studies, "--host", "127.0.0.1", "--port", str(self.port), *pairs]
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.temporary.mkdir(exist_ok=True)
        variables = {**os.environ, "PATH": programs, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)}
        variables.update(environment or {})
        begin = time.monotonic()
        self._process = process = forked.start(line, variables, self.log)
        wait(lambda: self._answers(path) or not process.is_alive(), START_SECONDS)
        if not process.is_alive():
            raise RuntimeError(f"the server ended:\n{self.text()[-3000:]}")
        return time.monotonic() - begin

    @property
    def pid(self) -> int:
        """The server's process."""
        assert self._process is not None
        assert self._process.pid is not None
        return self._process.pid

    def stop(self) -> None:
        """SIGTERM, and waits for the end."""
        if self._process is not None:
            self._process.terminate()
            self._process.join(END_SECONDS)
            assert not self._process.is_alive(), "the server does not end"
            self._process = None

    def serving(self) -> str:
        """The name of the model that answers."""
        return str(self.session.info()["models"]["dfqsam"]["serving"]["model"])

    def text(self) -> str:
        """All that the server wrote."""
        return self.log.read_text(errors="replace")

    def _answers(self, path: str) -> bool:
        try:
            return requests.get(self.url + path, timeout=5).status_code == 200
        except requests.ConnectionError:
            return False


def wait(condition: Callable[[], bool], seconds: float, every: float = 0.2) -> None:
    """Until `condition()` is true; fails when that takes longer."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(every)


def process_exists(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def slow_processes(folder: Path, seconds: float, then: str = "") -> str:
    """A PYTHONPATH by which trainings' processes sleep before they import anything, and then run `then`."""
    (folder / "sitecustomize.py").write_text(
        "import sys, time\n"
        "if any('runs.process' in word or 'utils.app' in word for word in sys.orig_argv):\n"
        f"    time.sleep({seconds})\n    {then or 'pass'}\n"
    )
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def quantize(server: Server, **options: object) -> dict[str, object]:
    """Has a server quantize, and waits; the run's record then."""
    run = server.session.ended_run(server.session.train(**options))
    server.session.settled()
    return run


def first_run(server: Server) -> dict[str, object]:
    """Waits for what a server quantizes of its own accord, and until that answers; the run's record then."""
    run = server.session.ended_run(server.session.settled()["runs"][0]["id"])
    server.session.settled()
    return run


def new_server(folder: Path, volumes: int = 1) -> Server:
    """An app folder as shipped and a study folder with phantoms, nothing started."""
    app, studies = folder / "app", folder / "studies"
    app.mkdir()
    studies.mkdir()
    shutil.copy(SAMPLE_APP / "main.py", app)
    for n in range(volumes):
        write_volume(studies / f"phantom{n}.nii.gz", seed=n)
    return Server(app, str(studies), folder / "server.log")


# The shortest quantization, which random weights pass too.
QUICK = {"preset": "static", "iterations": 2, "min_fidelity": 0}


@dataclass(frozen=True)
class Running:
    """A server that began in full precision and then quantized by itself.

    Attributes:
        conf: what it was started with.
        first: its answer to a click before it was quantized.
        weights: its checkpoint.
    """

    server: Server
    conf: dict[str, object]
    first: InferReply
    weights: Path


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for all tests that leave it as it is; quantized when they begin."""
    folder = tmp_path_factory.mktemp("server")
    weights = checkpoint(folder)
    server = new_server(folder, volumes=2)
    conf: dict[str, object] = {**QUICK, "checkpoint": weights}
    try:
        server.start(conf)
        first = server.session.infer("phantom0", [OBJECT])
        first_run(server)
        yield Running(server, conf, first, weights)
    finally:
        server.stop()
