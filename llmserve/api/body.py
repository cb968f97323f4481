"""Reads a request's body as a JSON object within a size limit. Knows nothing of what the object means."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request

from llmserve.api.http_protocol import MAX_LENGTH_DIGITS
from llmserve.errors import InvalidRequestError, RequestTooLargeError


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body is not declared as JSON."""

    code = "unsupported_media_type"


async def read_json_body(request: Request, max_body_bytes: int) -> bytes:
    """The body, not looked at yet. Raises UnsupportedMediaTypeError, RequestTooLargeError."""
    if not _has_body(request):
        return b""
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise UnsupportedMediaTypeError(
            f"The body must be sent with the header 'Content-Type: application/json', not {content_type!r}."
        )
    return await _read(request, max_body_bytes)


def decode_object(body: bytes) -> dict[str, Any]:
    """A JSON object as a dict.

    msgspec's decoder is strict where Python's is lenient: no NaN, no Infinity, no lone surrogates, UTF-8 only, and a
    bounded depth. Raises InvalidRequestError.
    """
    if not body.strip():
        raise InvalidRequestError("The request has no body. Send a JSON object; /docs shows what it holds.")
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise InvalidRequestError("The body is nested too deeply.") from None
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"The body is not valid UTF-8: {error.reason}.") from None
    except msgspec.MsgspecError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"The body must be a JSON object, not {_json_type(value)}.")
    return value


def _has_body(request: Request) -> bool:
    """Whether one is announced: of what is not there, no type can be asked."""
    return request.headers.get("content-length", "0").strip("0") != "" or "transfer-encoding" in request.headers


async def _read(request: Request, max_body_bytes: int) -> bytes:
    """Stops at the limit, whatever Content-Length says."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and len(declared) <= MAX_LENGTH_DIGITS and int(declared) > max_body_bytes:
        raise _too_large(max_body_bytes)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_body_bytes:
            raise _too_large(max_body_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(max_body_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"The body is larger than the limit of {max_body_bytes} bytes.")


def _json_type(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
