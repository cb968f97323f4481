"""The bounds of the v2 HTTP surface. Knows no flags."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class V2HttpSettings:
    """What one request may bring, and how malformed ones are answered."""

    max_body_bytes: int = 64 * 2**20  # Triton's --http-max-input-size; also of the body once decompressed
    max_json_depth: int = 100
    max_inputs: int = 1024  # tensors in one request, and requested outputs
    max_parameters: int = 1024
    triton_error_statuses: bool = True  # malformed JSON is 500, as Triton's clients and tests expect; False: 400
