"""The user's cache folder: where it is, one writer at a time, and whether what lies there is still what was written."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total), both counts in the stage's own unit. A total of 0 is not known."""

_MANIFEST = "manifest.json"


def no_progress(stage: str, done: int, total: int) -> None:
    """For those whom nobody watches."""


def cache_dir() -> Path:
    """$LLMSERVE_CACHE, else $XDG_CACHE_HOME/llmserve, else ~/.cache/llmserve. It need not exist yet."""
    if own := os.environ.get("LLMSERVE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llmserve"


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Waits until no other process holds this lock file. The system lets go of it when its holder dies."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, recipe: str) -> None:
    """Records every file of the folder, so that damage can be told later, and the recipe they were made by."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _MANIFEST)
    files = {path.relative_to(folder).as_posix(): _describe(path) for path in paths}
    _write_json(folder / _MANIFEST, {"recipe": recipe, "files": files})


def is_intact(folder: Path, recipe: str) -> bool:
    """Whether every recorded file is there unchanged and made by this recipe.

    Only files touched since they were recorded are read again.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["recipe"] != recipe:
            return False
        recorded: dict[str, dict[str, Any]] = manifest["files"]
        touched = [name for name, entry in recorded.items() if not _is_untouched(folder / name, entry)]
        for name in touched:
            if sha256_of(folder / name) != recorded[name]["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if touched:
        with contextlib.suppress(OSError):  # a cache that cannot be written to is still good to read
            write_manifest(folder, recipe)
    return True


def folder_bytes(folder: Path) -> int:
    """What the files of a folder occupy."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _describe(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256_of(path)}


def _is_untouched(path: Path, entry: dict[str, Any]) -> bool:
    status = path.stat()
    return (status.st_size, status.st_mtime_ns) == (entry["size"], entry["mtime_ns"])


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
