"""The headers with which text-embeddings-inference says where a request's time went: milliseconds, and counts."""

from __future__ import annotations

from llmserve.backends.pooling_job import Pooled


def tei_headers(pooled: Pooled | None, num_characters: int) -> dict[str, str]:
    """Of an answered request; none for one that no pooling model has answered."""
    if pooled is None:
        return {}
    times = pooled.times
    seconds = {
        "x-compute-time": times.total_s,
        "x-total-time": times.total_s,
        "x-tokenization-time": times.tokenization_s,
        "x-queue-time": times.queue_s,
        "x-inference-time": times.inference_s,
    }
    return {
        "x-compute-type": pooled.device,
        "x-compute-characters": str(num_characters),
        "x-compute-tokens": str(sum(pooled.num_tokens)),
        **{name: str(round(value * 1e3)) for name, value in seconds.items()},
    }
