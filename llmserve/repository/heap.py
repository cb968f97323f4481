"""Memory that is free and not given back: what the C library keeps between allocations that live on. Knows no model."""

from __future__ import annotations

import ctypes

_PROCESS = ctypes.CDLL(None)


def give_back() -> bool:
    """Returns free memory to the system, where the C library can (glibc; some 10 ms). False if there was none to give.

    A tokenizer is a hundred thousand small pieces, made while its predecessor is still there: without this, a server
    whose model was reloaded keeps the room for two.
    """
    trim = getattr(_PROCESS, "malloc_trim", None)
    return trim is not None and bool(trim(0))
