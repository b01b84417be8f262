"""The server on a real DICOMweb archive: Debian's Orthanc, alone with it in a network namespace."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import dicomweb_scenario as scenario

pytestmark = [
    pytest.mark.skipif(
        shutil.which("Orthanc") is None or not scenario.PLUGIN.exists(),
        reason="Orthanc and its DICOMweb plugin are not installed (Debian: orthanc orthanc-dicomweb)",
    ),
    pytest.mark.skipif(
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], check=False).returncode != 0,
        reason="network namespaces are not permitted here",
    ),
]

TINY = 1e-4  # millimetres


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("dicomweb")
    play = f"ip link set lo up && exec {sys.executable} -m tests.dicomweb_scenario {folder}"
    root = Path(__file__).parents[1]
    done = subprocess.run(
        ["unshare", "-rn", "sh", "-c", play],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_click_on_a_series_is_answered_on_its_grid(seen: dict[str, Any]) -> None:
    assert seen["params"]["slice"] == scenario.CLICK[2]
    assert seen["slices"] == [scenario.CLICK[2]]
    assert seen["size"] == [scenario.COLUMNS, scenario.ROWS, scenario.SLICES]
    np.testing.assert_allclose(seen["spacing"], [0.7, 0.9, 2.5], atol=TINY)
    np.testing.assert_allclose(seen["origin"], [10, -20, 100], atol=TINY)
    axes = np.array(seen["direction"]).reshape(3, 3).T
    np.testing.assert_allclose(axes, [scenario.ROW_AXIS, scenario.COLUMN_AXIS, (0, 0, 1)], atol=TINY)


def test_a_label_goes_to_the_archive_and_comes_back(seen: dict[str, Any]) -> None:
    assert seen["saved"] == [200, ""]
    assert seen["modalities"] == ["CT", "SEG"]
    assert seen["label"] == 200


def test_the_proxy_passes_the_query_on_and_stays_within(seen: dict[str, Any]) -> None:
    assert (seen["found"], seen["not_found"]) == (1, 0)
    assert seen["above"] == 400


def test_what_the_archive_does_not_have_is_said(seen: dict[str, Any]) -> None:
    assert seen["unknown"][0] == 400
    assert "1.2.3.4" in seen["unknown"][1]
    assert seen["no_uid"][0] == 400
    assert seen["archive_gone"][0] == 502
    assert "archive" in seen["archive_gone"][1]


def test_the_log_names_neither_series_nor_patient(seen: dict[str, Any]) -> None:
    assert not seen["series_in_log"]
    assert not seen["patient_in_log"]
