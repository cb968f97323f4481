"""How far a decoupled model may run ahead of the client that reads its responses. Knows no process and no stream.

Both sides count in the same units: the model's what it has sent and not had acknowledged, the server's what its client
has taken and it has not acknowledged yet. A model that has used up the window of a request waits in `send`.
"""

from __future__ import annotations

WINDOW_UNITS = 128
ACKNOWLEDGED_UNITS = WINDOW_UNITS // 2  # seldom enough to cost nothing, early enough that a reader never waits for it
STALL_S = 60.0  # a client that has taken nothing for so long loses its request: it holds others of the model up
_UNIT_BYTES = 64 * 1024


def units(num_bytes: int) -> int:
    """What a response whose tensors have so many bytes counts."""
    return 1 + num_bytes // _UNIT_BYTES
