"""A model's statistics as the v2 statistics extension writes them. Knows no route."""

from __future__ import annotations

from typing import Any

from llmserve.general_metrics import Duration, ModelStatistics

_NEVER = {"count": 0, "ns": 0}


def statistics_json(statistics: ModelStatistics) -> dict[str, Any]:
    """One entry of `model_stats`."""
    return {
        "name": statistics.name,
        "version": statistics.version,
        "last_inference": statistics.last_inference_ms,
        "inference_count": statistics.inference_count,
        "execution_count": statistics.execution_count,
        "inference_stats": {
            "success": _duration(statistics.success),
            "fail": _duration(statistics.fail),
            "queue": _duration(statistics.queue),
            "compute_input": _duration(statistics.compute_input),
            "compute_infer": _duration(statistics.compute_infer),
            "compute_output": _duration(statistics.compute_output),
            "cache_hit": _NEVER,
            "cache_miss": _NEVER,
        },
        "response_stats": {
            str(index): {
                "compute_infer": _duration(response.compute_infer),
                "compute_output": _duration(response.compute_output),
                "success": _duration(response.success),
                "fail": _duration(response.fail),
                "empty_response": _duration(response.empty_response),
                "cancel": _duration(response.cancel),
            }
            for index, response in sorted(statistics.responses.items())
        },
        "batch_stats": [
            {
                "batch_size": batch_size,
                "compute_input": _duration(batch.compute_input),
                "compute_infer": _duration(batch.compute_infer),
                "compute_output": _duration(batch.compute_output),
            }
            for batch_size, batch in sorted(statistics.batches.items())
        ],
        "memory_usage": [],
    }


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}
