"""The demo's parts by themselves; the whole of it is `make demo`."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

from monailabel_dfqsam.demo.comparison import PROMPTS, Answer, Comparison, Prompt
from monailabel_dfqsam.demo.objects import Case, find_cases
from monailabel_dfqsam.demo.overlay import TRUTH, Outline, Panel, write_overlay
from monailabel_dfqsam.demo.server import DemoServer, ServerFailed
from monailabel_dfqsam.phantom_study import click_for, write_phantom_study


def test_cases_point_into_their_objects(tmp_path: Path) -> None:
    write_phantom_study(tmp_path)
    cases = find_cases(tmp_path)
    assert {(case.name, case.label) for case in cases} >= {("phantom_ct", "organ"), ("phantom_mr", "lesion")}
    for case in cases:
        i0, i1, j0, j1 = case.click.roi[:4]
        assert case.truth[case.click.point_ij]
        assert case.truth[i0 : i1 + 1, j0 : j1 + 1].sum() == case.truth.sum() > 0
        assert case.rgb.shape[:2] == case.truth.shape


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[tuple[Path, Path, Path]]:
    (tmp_path / "studies").mkdir()
    yield tmp_path / "studies", tmp_path / "app", tmp_path / "log"
    shutil.rmtree(tmp_path / "app", ignore_errors=True)


@pytest.mark.slow
def test_the_demo_server_answers_and_is_gone_afterwards(folders: tuple[Path, Path, Path]) -> None:
    def fail(server: DemoServer) -> None:
        assert requests.get(f"{server.url}/info/", timeout=60).json()["name"] == "DFQ-SAM"
        raise RuntimeError("on purpose")

    server = DemoServer(*folders, Path("tiny"))
    with pytest.raises(RuntimeError, match="on purpose"), server:
        fail(server)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.url}/info/", timeout=60)


def test_a_server_that_does_not_start_says_why(folders: tuple[Path, Path, Path]) -> None:
    studies, app_dir, log = folders
    app_dir.mkdir()
    (app_dir / "something.txt").touch()
    with pytest.raises(ServerFailed, match="is no app folder"), DemoServer(studies, app_dir, log):
        pass


@pytest.mark.slow
def test_sigterm_ends_the_server_too(folders: tuple[Path, Path, Path]) -> None:
    code = (
        "import sys, time; from pathlib import Path; from monailabel_dfqsam.demo.server import DemoServer\n"
        "with DemoServer(*map(Path, sys.argv[1:])) as server:\n"
        "    print(server.url, flush=True); time.sleep(300)\n"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, folders), "tiny"], stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    url = program.stdout.readline().strip()
    assert requests.get(f"{url}/info/", timeout=60).ok
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 128 + signal.SIGTERM
    program.stdout.close()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/info/", timeout=60)


def test_outlines_lie_on_the_masks_edge(tmp_path: Path) -> None:
    """A white square on black, outlined: the line is near the edge and nowhere else."""
    mask = np.zeros((100, 130), dtype=bool)
    mask[20:60, 30:90] = True
    rgb = np.zeros((100, 130, 3), dtype=np.uint8)
    panel = Panel("title", rgb, [Outline(mask, TRUTH, 4)])
    write_overlay([panel], [("true mask", TRUTH)], tmp_path / "overlay.png")
    picture = np.array(Image.open(tmp_path / "overlay.png"))
    scale = 520 / 130
    # The panel begins below the title; its place is where the black image begins.
    black = (picture == 0).all(axis=2)
    top, left = np.argwhere(black).min(axis=0)
    rows, columns = np.nonzero((picture == TRUTH).all(axis=2)[top : top + 400, left : left + 520])
    y, x = (rows + 0.5) / scale, (columns + 0.5) / scale
    distance = np.minimum.reduce([np.abs(y - 20), np.abs(y - 60), np.abs(x - 30), np.abs(x - 90)])
    assert distance.max() < 4 / scale
    assert (y.min(), y.max(), x.min(), x.max()) == pytest.approx((20, 60, 30, 90), abs=4 / scale)


def test_a_comparison_counts_answers_of_the_wrong_model() -> None:
    truth = np.zeros((8, 8), dtype=bool)
    truth[2:6, 2:6] = True
    half = truth.copy()
    half[4:] = False
    case = Case(
        Path("a.nrrd"), "a", "organ", click_for(truth[:, :, None]), np.zeros((8, 8, 3), np.uint8), truth
    )

    def answers(model: str, mask: np.ndarray) -> dict[tuple[int, Prompt], Answer]:
        return {(0, prompt): Answer(mask, model, 0.1, prompt == "box", b"") for prompt in PROMPTS}

    full, quantized = answers("full precision", truth), answers("W4A4 (onednn)", half)
    good = Comparison([case], full, quantized)
    assert good.strays == 0
    assert [row["prompt"] for row in good.rows()] == ["point", "box"]
    for row in good.rows():
        assert (row["iou_full_precision"], row["iou_quantized"], row["agreement"]) == (1.0, 0.5, 0.5)
    assert Comparison([case], quantized, quantized).strays == 2
    assert Comparison([case], full, full).strays == 2
