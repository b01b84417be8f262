"""Memory: what there is, what an embedding needs, and what happens where it is not enough."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from safetensors.torch import save_file

from monailabel_dfqsam import memory
from monailabel_dfqsam.memory import MemoryShortage, group_available, require, shortage_told
from monailabel_dfqsam.sam import VARIANTS, CheckpointError, Sam, read_checkpoint
from monailabel_dfqsam.slicer_session import ServerAnswer
from tests.memory_limits import HEADROOM
from tests.server_fixtures import OBJECT, WORK_SECONDS, Server, new_server, wait

MB = 1 << 20
# An estimate may be this much above a measured peak, beside the part that comes once.
SLACK = 1.5

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="limits and peaks of memory are read from Linux's /proc",
)


def _group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text)


def test_a_container_of_version_2_leaves_what_its_tightest_group_leaves(tmp_path: Path) -> None:
    _group(
        tmp_path / "a",
        max=f"{900 * MB}\n",
        current=f"{600 * MB}\n",
        stat=f"anon 5\ninactive_file {100 * MB}\n",
    )
    _group(tmp_path / "a" / "b", max="max\n", current="5\n", stat="inactive_file 0\n")
    assert group_available("0::/a/b\n", tmp_path) == [400 * MB]
    assert group_available("0::/elsewhere\n", tmp_path) == []


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    top = tmp_path / "memory"
    _group(top, limit_in_bytes=f"{800 * MB}", usage_in_bytes=f"{500 * MB}", stat=f"total_inactive_file {MB}")
    listing = "12:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/docker/1\n"
    assert group_available(listing, tmp_path) == [301 * MB]
    _group(top, limit_in_bytes=str((1 << 63) - 4096))
    assert group_available(listing, tmp_path) == []


def test_a_group_above_the_mount_is_never_asked(tmp_path: Path) -> None:
    _group(tmp_path, max=str(MB), current="0", stat="inactive_file 0")
    assert group_available("0::/../../etc\n", tmp_path / "inside") == []


def test_what_is_free_is_no_more_than_the_machine_has() -> None:
    assert 0 < memory.available() <= psutil.virtual_memory().total
    require(1, "a byte")
    with pytest.raises(MemoryShortage, match=r"a world needs 1152921504\.61 GB of memory, .* are free"):
        require(1 << 60, "a world")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_all_ways_to_say_that_memory_ran_out_are_one(error: Exception) -> None:
    with pytest.raises(MemoryShortage, match="memory ran out for a slice"), shortage_told("a slice"):
        raise error


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"), shortage_told("a slice"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("limited")
    done = subprocess.run(
        [sys.executable, "-m", "tests.memory_limits", str(folder)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_proc
def test_a_limit_of_the_process_counts(limited: dict[str, Any]) -> None:
    assert 0 < limited["left"] <= HEADROOM


@needs_proc
@pytest.mark.parametrize(
    ("case", "kind", "sentence"),
    [
        ("embed refused", "MemoryShortage", "an embedding by 'sam_b_1024' needs 724 MB of memory, "),
        ("bomb refused", "VolumeTooLarge", "reading 'bomb.nii.gz' needs 4.29 GB of memory, "),
        ("large refused", "VolumeTooLarge", "reading 'large.nrrd' needs 629 MB of memory, "),
        ("embed ran out", "MemoryShortage", "memory ran out for an embedding"),
        ("large ran out", "VolumeTooLarge", "memory ran out for reading 'large.nrrd'"),
        ("embed after", "done", ""),
        ("large after", "done", ""),
    ],
)
def test_what_does_not_fit_is_refused_or_caught_and_work_goes_on(
    limited: dict[str, Any], case: str, kind: str, sentence: str
) -> None:
    found, text = limited[case]
    assert (found, text.startswith(sentence)) == (kind, True), text


@needs_proc
def test_an_embedding_takes_what_is_estimated(limited: dict[str, Any]) -> None:
    estimate, once = limited["estimate"], limited["once"]
    assert limited["peak"] <= estimate
    assert estimate - once <= SLACK * limited["peak"]


def test_a_checkpoint_larger_than_memory_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(psutil.virtual_memory().total)  # a hole: no disk holds it
    with pytest.raises(CheckpointError, match=r"the checkpoint 'huge.safetensors' needs .* are free"):
        read_checkpoint(path)


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="another process's limits are set on Linux alone"
)
def test_a_server_short_of_memory_answers_so_and_goes_on(tmp_path: Path) -> None:
    weights = tmp_path / "vit_b.safetensors"
    save_file(Sam(VARIANTS["sam_b_1024"]).state_dict(), weights)
    server = new_server(tmp_path)
    try:
        server.start({"checkpoint": weights, "quantize": "false"})
        wait(lambda: server.serving() != "loading", WORK_SECONDS)
        held = psutil.Process(server.pid).memory_info()
        # The one is known to the server, the other is not: then it tries.
        refused = _click_within(server, resource.RLIMIT_AS, held.vms + 1000 * MB)
        ran_out = _click_within(server, resource.RLIMIT_DATA, held.data + 700 * MB)
        assert refused.status == ran_out.status == 503
        assert "an embedding by 'sam_b_1024' needs 2.01 GB of memory" in str(refused)
        assert "memory ran out for an embedding" in str(ran_out)
        assert requests.get(f"{server.url}/info/", timeout=10).status_code == 200
        assert server.session.infer("phantom0", [OBJECT]).params["slice"] == OBJECT[2]
    finally:
        server.stop()


def _click_within(server: Server, which: int, limit: int) -> ServerAnswer:
    """The answer to a click while the server's process may take no more than `limit` bytes."""
    old = resource.prlimit(server.pid, which)
    resource.prlimit(server.pid, which, (limit, old[1]))
    try:
        with pytest.raises(ServerAnswer) as caught:
            server.session.infer("phantom0", [OBJECT])
    finally:
        resource.prlimit(server.pid, which, old)
    return caught.value
