"""The folder of a server: whose is removed, and whose is not."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from llmserve.temporary_folder import temporary_folder

SERVER = """
import sys, tempfile
from llmserve.temporary_folder import temporary_folder
with temporary_folder():
    print(tempfile.mkdtemp(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_all_that_is_made_stands_in_one_folder_and_goes_with_it(parent: Path) -> None:
    with temporary_folder():
        (Path(tempfile.mkdtemp()) / "file").touch()
        (folder,) = parent.iterdir()
        assert [child.is_dir() for child in folder.iterdir()] == [True]
    assert list(parent.iterdir()) == []
    assert tempfile.gettempdir() == str(parent)


def test_only_what_a_killed_server_has_left_is_removed(parent: Path) -> None:
    others = [parent / "llmserve-server-file", parent / "llmserve-server-link", parent / "somebody-elses"]
    others[0].touch()
    others[2].mkdir()
    others[1].symlink_to(others[2])
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        made = Path(server.stdout.readline().strip())
        assert made.parent.parent == parent
        with temporary_folder():
            assert made.exists()
        server.kill()
        server.wait()
        assert made.exists()
        with temporary_folder():
            assert not made.parent.exists()
    assert sorted(parent.iterdir()) == sorted(others)


def test_where_no_folder_can_be_made_the_server_goes_on(
    parent: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(parent / "nowhere"))
    with temporary_folder():
        assert tempfile.gettempdir() == str(parent / "nowhere")
    assert "no temporary folder of the server's own: " in caplog.text
