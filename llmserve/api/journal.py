"""What is written down about every request: one JSON line, and a warning that says what a slow one waited for.

Never what was asked or answered: no prompt, no text, no key. Knows no route.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import IO, Any

import msgspec

from llmserve.errors import ConfigError
from llmserve.request_context import RequestContext

logger = logging.getLogger(__name__)

_PROBES = frozenset(("/health", "/ready", "/metrics", "/v2/health/live", "/v2/health/ready"))


class Journal:
    """`path` "" writes no lines, "-" writes to standard error; `slow_request_s` 0 warns of nothing."""

    def __init__(self, path: str, slow_request_s: float) -> None:
        """Raises ConfigError if the file cannot be written to."""
        self._file = _open(path)
        self._slow_request_s = slow_request_s
        self.num_lost = 0  # lines that could not be written: a full disk must not stop the server

    def record(self, context: RequestContext) -> None:
        """A request is over."""
        duration_s = time.monotonic() - context.arrival_s
        if self._file is not None and context.route not in _PROBES:
            self._write(context, duration_s)
        if self._slow_request_s and duration_s >= self._slow_request_s:
            logger.warning("slow request %s: %s", context.request_id, explain(context, duration_s))

    def _write(self, context: RequestContext, duration_s: float) -> None:
        assert self._file is not None
        try:
            self._file.write(msgspec.json.encode(line(context, duration_s)).decode() + "\n")
        except OSError as error:
            if not self.num_lost:
                logger.error("The request log cannot be written: %s. Lines are lost.", error)
            self.num_lost += 1


def line(context: RequestContext, duration_s: float) -> dict[str, Any]:
    """What one line says. Times are seconds; null is what the request never came to."""
    ttft_s = None if context.queue_s is None else context.queue_s + (context.prefill_s or 0.0)
    return {
        "time": round(time.time(), 3),
        "id": context.request_id,
        "completion": context.completion_id or None,
        "key": context.tenant.name or None,
        "trace": context.trace_id or None,
        "route": context.route,
        "status": context.status,
        "error": context.error or None,
        "model": context.model or None,
        "sequences": context.num_sequences,
        "prompt_tokens": context.prompt_tokens,
        "cached_tokens": context.cached_tokens,
        "generation_tokens": context.generation_tokens,
        "queue_s": _rounded(context.queue_s),
        "ttft_s": _rounded(ttft_s),
        "itl_s": _rounded(context.itl_s),
        "duration_s": _rounded(duration_s),
        "finish_reason": context.finish_reason or None,
        "preemptions": context.num_preemptions,
        "restarts": context.num_restarts,
    }


def explain(context: RequestContext, duration_s: float) -> str:
    """Where the time went, the longest part first."""
    parts = {
        "in the queue": context.queue_s,
        "computing its prompt": context.prefill_s,
        "generating": context.decode_s,
    }
    known = {name: seconds for name, seconds in parts.items() if seconds is not None}
    rest = duration_s - sum(known.values())
    known["before it reached the model, or sending to its client" if known else "without reaching a model"] = rest
    told = [f"{seconds:.2f} s {name}" for name, seconds in sorted(known.items(), key=lambda part: -part[1])]
    extra = f"; preempted {context.num_preemptions} times" if context.num_preemptions else ""
    return (
        f"{duration_s:.2f} s for {context.route} ({context.prompt_tokens} tokens in, {context.generation_tokens} out): "
        f"{', '.join(told)}{extra}"
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _open(path: str) -> IO[str] | None:
    if path in ("", "-"):
        return sys.stderr if path else None
    try:
        return open(path, "a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise ConfigError(f"Cannot write the request log {path}: {error.strerror}.") from error
