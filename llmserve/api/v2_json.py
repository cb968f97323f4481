"""JSON as Triton reads and writes it: with NaN and Infinity, and with its words for what is wrong. Knows no schema."""

from __future__ import annotations

import json
from typing import Any

from llmserve.api.v2_errors import MalformedRequestError


def encode_with_nan(value: Any) -> bytes:
    """JSON with the literals NaN, Infinity and -Infinity, as Triton writes them and its clients read them."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def parse_json_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object, NaN and Infinity allowed. Raises MalformedRequestError in Triton's words."""
    try:
        value = json.loads(body)
        if b"\\ud" in body.lower():  # escapes of half a character: Python takes them, and could never send them back
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        message = _PARSE_ERRORS.get(error.msg, "Invalid value.")
        if not body.strip():
            message = "The document is empty."
        raise MalformedRequestError(f"failed to parse the request JSON buffer: {message} at {error.pos}") from error
    except UnicodeDecodeError as error:
        raise MalformedRequestError(
            f"failed to parse the request JSON buffer: Invalid encoding in string. at {error.start}"
        ) from error
    except UnicodeEncodeError as error:
        raise MalformedRequestError(
            "failed to parse the request JSON buffer: The surrogate pair in string is invalid."
        ) from error
    except RecursionError as error:
        raise MalformedRequestError(
            "failed to parse the request JSON buffer: JSON nesting depth exceeds maximum allowed"
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise MalformedRequestError(f"failed to parse the request JSON buffer: {error}") from error
    return value if isinstance(value, dict) else {}  # a Triton that gets an array misses its members


_PARSE_ERRORS = {
    "Expecting property name enclosed in double quotes": "Missing a name for object member.",
    "Expecting ':' delimiter": "Missing a colon after a name of object member.",
    "Unterminated string starting at": "Missing a closing quotation mark in string.",
    "Expecting ',' delimiter": "Missing a comma or closing bracket after an element.",
    "Extra data": "The document root must not be followed by other values.",
}
