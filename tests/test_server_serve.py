"""What `dfqsam serve` starts."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from monailabel_dfqsam.server.serve import ServeError, command, default_app_dir, is_exposed, prepare_app


def test_an_app_folder_is_made_once_for_its_owner(tmp_path: Path) -> None:
    app = prepare_app(tmp_path / "data" / "app")
    assert stat.S_IMODE(app.stat().st_mode) == 0o700
    main = app / "main.py"
    assert "DFQSamApp" in main.read_text()
    main.write_text("# mine\n")
    assert prepare_app(app).joinpath("main.py").read_text() == "# mine\n"


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ServeError, match=r"main\.py"):
        prepare_app(tmp_path)


def test_the_command_is_upstreams_with_our_defaults(tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    weights.touch()
    extra = ["--verbose", "DEBUG"]
    line, environment = command("/studies", checkpoint=weights, app_dir=tmp_path / "app", extra=extra)
    assert line[:4] == [sys.executable, "-m", "monailabel.main", "start_server"]
    options = dict(zip(line[4::2], line[5::2], strict=False))
    assert options["--host"] == "127.0.0.1"
    assert options["--verbose"] == "DEBUG"
    assert options["--app"] == str(tmp_path / "app")
    assert line[-3:] == ["--conf", "checkpoint", str(weights)]
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))


def test_a_missing_checkpoint_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="no checkpoint"):
        command("/studies", checkpoint=tmp_path / "none.pth", app_dir=tmp_path / "app")


def test_the_data_folder_follows_the_desktop_standard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_app_dir() == tmp_path / "dfqsam" / "app"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "pacs.example"])
def test_open_to_others_without_a_login_is_noticed(host: str) -> None:
    assert is_exposed(host, {})
    assert not is_exposed(host, {"MONAI_LABEL_AUTH_ENABLE": "true"})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_login(host: str) -> None:
    assert not is_exposed(host, {})
