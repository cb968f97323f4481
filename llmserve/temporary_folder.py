"""The folder of a server's sockets and its copies of models, and the removal of those that killed servers have left.

The folder is locked while its server lives: the kernel drops the lock however that ends, and a number of a process may
come back, or mean another one in a container. Knows no room.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_PREFIX = "llmserve-server-"


@contextlib.contextmanager
def temporary_folder() -> Iterator[None]:
    """While it is entered `tempfile` makes everything of this process in a folder of its own, which ends with it.

    Folders of servers that are gone are removed first. Where there can be no folder, nothing changes.
    """
    before = tempfile.tempdir
    try:
        parent = Path(tempfile.gettempdir())
        _remove_abandoned(parent)
        path, lock = _make_locked(parent)
    except OSError as error:
        logger.warning("There is no temporary folder of the server's own: %s", error)
        yield
        return
    tempfile.tempdir = str(path)
    try:
        yield
    finally:
        tempfile.tempdir = before
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _make_locked(parent: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor that holds its lock. Raises OSError."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        with contextlib.suppress(FileNotFoundError):  # another server has just taken it for abandoned
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                path.stat()
            except BaseException:
                os.close(lock)
                raise
            return path, lock


def _remove_abandoned(parent: Path) -> None:
    """Removes the folders of this user that nobody holds the lock of."""
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it is another user's, is no folder, is in use, or has just been removed
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
            finally:
                os.close(lock)
