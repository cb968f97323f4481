"""An engine's process before it is needed: imports everything, and waits to be told what to do. Touches no device.

The imports are made by a thread of a lower priority, so that the engine that serves meanwhile hardly notices them. Not
by the process as a whole: what has lowered its priority may not raise it again.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading

from llmserve.engine.loop import run_engine

_ENGINE = "llmserve.engine.process"
_NICENESS = 5  # a third of the share of others; with much less, one that is wanted early would never be done


def _import_engine() -> None:
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
    importlib.import_module(_ENGINE)


def main() -> int:
    """Exit status of the engine it becomes; 0 if it becomes none."""
    for number in (signal.SIGINT, signal.SIGTERM):  # either may reach the whole group: the server says when to stop
        signal.signal(number, signal.SIG_IGN)
    importing = threading.Thread(target=_import_engine, name="import")
    importing.start()
    importing.join()
    from llmserve.engine.process import build_for_launch  # at once now

    return run_engine(build_for_launch)


if __name__ == "__main__":
    sys.exit(main())
