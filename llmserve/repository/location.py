"""One model repository, here or behind an fsspec URL (`s3://`, `gs://`, `abfs://`): its models' names and folders.

A remote model is copied to a temporary folder before it is loaded. Knows no configuration.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmserve.errors import ConfigError, ModelLoadError
from llmserve.repository.model_folder import Fingerprint, fingerprint

# Where each protocol's driver comes from, for the message when it is missing.
_DRIVERS = dict.fromkeys(("s3", "s3a"), "s3fs") | dict.fromkeys(("gs", "gcs"), "gcsfs")
_DRIVERS |= dict.fromkeys(("abfs", "abfss", "az"), "adlfs")


class LocalRepository:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise ConfigError(f"The model repository {root} is not a folder. Create it or change --model-repository.")
        self.root = root
        self.remote = False

    def __str__(self) -> str:
        return str(self.root)

    def model_names(self) -> list[str]:
        """Every folder is a model; hidden ones are not."""
        return sorted(child.name for child in self.root.iterdir() if child.is_dir() and not child.name.startswith("."))

    def fetch(self, name: str) -> Path:
        """The model's folder."""
        return self.root / name

    def fingerprint(self, name: str) -> Fingerprint:
        """Changes whenever a file of the model does."""
        return fingerprint(self.root / name)


class RemoteRepository:
    """A prefix of an object store."""

    def __init__(self, url: str) -> None:
        # here, not above: fsspec costs 30 ms and only remote repositories need it
        import fsspec

        protocol = url.partition("://")[0]
        try:
            filesystem, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            advice = f"Install its driver: pip install {_DRIVERS[protocol]}" if protocol in _DRIVERS else ""
            raise ConfigError(f"The model repository {url} cannot be opened: {error}. {advice}".rstrip()) from error
        self._filesystem: Any = filesystem
        self._path = str(path).rstrip("/")
        self._url = url
        self.remote = True

    def __str__(self) -> str:
        return self._url

    def model_names(self) -> list[str]:
        """Every folder is a model; hidden ones are not."""
        self._filesystem.invalidate_cache()
        names = {
            str(entry["name"]).rstrip("/").rpartition("/")[2]
            for entry in self._filesystem.ls(self._path, detail=True)
            if entry["type"] == "directory"
        }
        return sorted(name for name in names if not name.startswith("."))

    def fetch(self, name: str) -> Path:
        """A copy of the model in a temporary folder of its own."""
        target = Path(tempfile.mkdtemp(prefix="llmserve-model-")) / name
        try:
            self._filesystem.get(f"{self._path}/{name}/", f"{target}/", recursive=True)
        except OSError as error:
            shutil.rmtree(target.parent, ignore_errors=True)
            raise ModelLoadError(f"Model {name!r} cannot be fetched from {self._url}: {error}") from error
        return target

    def fingerprint(self, name: str) -> Fingerprint:
        """Changes whenever a file of the model does, by what the store says of it."""
        self._filesystem.invalidate_cache()
        found = self._filesystem.find(f"{self._path}/{name}", detail=True)
        marks = ("etag", "ETag", "LastModified", "mtime", "created")
        return tuple(
            (path, hash(tuple(str(info.get(mark)) for mark in marks)), int(info.get("size") or 0))
            for path, info in sorted(found.items())
        )


class NamedFolders:
    """Folders of this machine that were named one by one, each a model."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = folders
        self.remote = False

    def __str__(self) -> str:
        return "the command line"

    def model_names(self) -> list[str]:
        """As they were named."""
        return sorted(self._folders)

    def fetch(self, name: str) -> Path:
        """The model's folder."""
        return self._folders[name]

    def fingerprint(self, name: str) -> Fingerprint:
        """Changes whenever a file of the model does."""
        return fingerprint(self._folders[name])


RepositoryLocation = LocalRepository | RemoteRepository | NamedFolders


def open_repository(url: str) -> RepositoryLocation:
    """A folder's path, `file://` or any URL that fsspec has a driver for. Raises ConfigError."""
    if "://" in url and not url.startswith("file://"):
        return RemoteRepository(url)
    return LocalRepository(Path(url.removeprefix("file://")).absolute())
