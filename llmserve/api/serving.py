"""Runs a generation for a client, whole or as a stream; aborts it when the client goes. Knows no shape of answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llmserve.api.chunks import ChoiceShape, ChunkEncoder, Usage
from llmserve.api.context import ApiContext
from llmserve.api.disconnect import ClientDisconnectedError, run_until_disconnect
from llmserve.api.generations import collect
from llmserve.api.protocol import StreamOptions
from llmserve.api.resume import AsItStands, event_ids
from llmserve.api.stream import EventStreamResponse
from llmserve.backends.generation import Generation, GenerationDelta
from llmserve.errors import StreamGoneError


async def run_whole(
    http_request: Request,
    start: Callable[[], Generation],
    num_choices: int,
    usage: Usage,
    model_name: str,
    context: ApiContext,
) -> list[GenerationDelta]:
    """Every sequence as one delta, counted in `usage`. Raises ClientDisconnectedError, or what a generation raises."""
    try:
        whole = await run_until_disconnect(http_request.receive, collect(start, num_choices))
    except ClientDisconnectedError:
        context.metrics.model(model_name).client_disconnected()
        raise
    for delta in whole:
        usage.add(delta)
    return whole


def run_stream(
    http_request: Request,
    start: Callable[[], Generation],
    shape: ChoiceShape,
    num_choices: int,
    usage: Usage,
    envelope: dict[str, Any],
    options: StreamOptions | None,
    model_name: str,
    context: ApiContext,
    fingerprint: bytes,
) -> Response:
    """The generation as chunks of `shape`. `envelope` holds id, created and model.

    Where streams may be continued and the request has an `Idempotency-Key`, it is started here, or found: if it runs
    already, neither `start` nor `shape` is used. Raises LLMServeError.
    """
    streams = context.streams
    encoder = ChunkEncoder(
        envelope,
        shape,
        usage,
        num_choices,
        include_usage=options is not None and bool(options.include_usage),
        continuous_usage=options is not None and bool(options.continuous_usage_stats),
        ids=event_ids(bool(streams.window_s)),
    )
    key = http_request.headers.get("idempotency-key")
    respond = partial(
        EventStreamResponse,
        keep_alive_s=context.settings.keep_alive_s,
        on_disconnect=context.metrics.model(model_name).client_disconnected,
        headers={"X-Request-Id": envelope["id"]},
    )
    last_event_id = http_request.headers.get("last-event-id")
    if key and last_event_id not in (None, "", "0") and not streams.window_s:
        raise StreamGoneError("This server keeps no streams to continue. Start it with --resume-window-s 30.")
    if not key or not streams.window_s:
        return respond(start, encoder)
    fingerprint = http_request.url.path.encode() + b"\n" + fingerprint
    reader = streams.open(key, last_event_id, fingerprint, start, encoder)
    return respond(lambda: reader, AsItStands())
