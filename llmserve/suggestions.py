"""What somebody who misspelt a name may have meant. Knows no room."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence


def did_you_mean(name: str, known: Sequence[str], say: Callable[[str], str] = repr) -> str:
    """A sentence, behind a space, with the nearest of the known names as `say` writes it; empty if none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {say(near[0])}?" if near else ""
