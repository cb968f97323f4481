"""CPU seconds of a server's processes, read from Linux's /proc. Knows no server."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def front_and_rest(pid: int) -> tuple[float, float]:
    """CPU seconds so far: of the process that was started, and of all its descendants together."""
    tree = [pid]
    for each in tree:
        with suppress(OSError):
            for children in Path(f"/proc/{each}/task").glob("*/children"):
                tree += [int(child) for child in children.read_text().split()]
    seconds = [_seconds(each) for each in tree]
    return seconds[0], sum(seconds[1:])


def _seconds(pid: int) -> float:
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a name may hold spaces
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0
