"""Where the cache lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmserve.repository.cache import cache_dir, is_intact, write_manifest


def test_order_of_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSERVE_CACHE", "~/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path.home() / "mine"
    monkeypatch.delenv("LLMSERVE_CACHE")
    assert cache_dir() == Path("/xdg/llmserve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "llmserve"


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"recipe": "1"}', '{"recipe": "1", "files": {"a": 7}}'])
def test_a_damaged_manifest_is_not_intact(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "manifest.json").write_text(manifest)
    assert not is_intact(tmp_path, "1")


def test_intact(tmp_path: Path) -> None:
    assert not is_intact(tmp_path / "nowhere", "1")
    (tmp_path / "a").write_text("x")
    write_manifest(tmp_path, "1")
    assert is_intact(tmp_path, "1")
    assert not is_intact(tmp_path, "2")
    (tmp_path / "a").write_text("y")
    assert not is_intact(tmp_path, "1")
