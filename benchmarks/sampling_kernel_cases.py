"""The kernels that draw tokens and score them, as `kernel_cases` wants them: in the shape of a vocabulary."""

from __future__ import annotations

from typing import Any

from benchmarks.kernel_case import KernelCase
from llmserve.kernels.ops import MAX_COUNT, MAX_ENTRIES
from llmserve.kernels.triton import logprobs, sampling, thresholds

_FLOATS = ("logits", "temperature", "top_p", "min_p", "value", "mass", "list", "entry_values", "repetition")
_FLOATS += ("frequency", "presence", "largest", "total", "parts", "logprobs", "top_logprobs")
_LONGS = ("seeds", "positions", "top_k", "out", "slots", "entry_until", "token_ids", "ranks", "top_ids")
_INTEGERS = ("id", "count", "ids", "bitmask", "is_used", "is_masked", "entry_ids", "num_entries", "above")
_TYPES = {
    **{f"{name}_ptr": "*fp32" for name in _FLOATS},
    **{f"{name}_ptr": "*i64" for name in _LONGS},
    **{f"{name}_ptr": "*i32" for name in _INTEGERS},
    "counts_ptr": "*i16",
}


def sampling_kernel_cases(vocab: int) -> list[KernelCase]:
    """The passes of a draw, and log-probabilities."""
    return [
        _draw("greedy", vocab, True, False, False),
        _draw("noise", vocab, False, False, False),
        _draw("filtered", vocab, False, True, False),
        _draw("adjusted", vocab, False, True, True),
        *_filters(vocab),
        _pick("", vocab, False, 1),
        _pick(" filtered", vocab, True, sampling.SEARCH_WARPS),
        *_logprobs(vocab),
    ]


def _row(vocab: int) -> dict[str, Any]:
    chunks = -(-vocab // sampling.CHUNK)
    return {"VOCAB": vocab, "NUM_CHUNKS": chunks, "CHUNKS_PADDED": 1 << (chunks - 1).bit_length()}


def _draw(name: str, vocab: int, greedy: bool, filters: bool, adjusts: bool) -> KernelCase:
    return KernelCase(
        f"draw {name}",
        sampling.draw_kernel,
        _TYPES,
        {
            "VOCAB": vocab,
            "CHUNK": sampling.CHUNK,
            "NUM_CHUNKS": -(-vocab // sampling.CHUNK),
            "ALL_GREEDY": greedy,
            "FILTERS": filters,
            "ADJUSTS": adjusts,
            "MAX_ENTRIES": MAX_ENTRIES,
        },
        num_warps=8,
        max_shared_bytes=16384 if adjusts else 1024,
    )


def _filters(vocab: int) -> list[KernelCase]:
    constants = _row(vocab) | {"CHUNK": sampling.CHUNK, "PIVOTS": thresholds.PIVOTS}
    return [
        KernelCase(
            "draw weigh",
            thresholds.weigh_kernel,
            _TYPES,
            constants | {"TILE": sampling.WEIGH_TILE},
            num_warps=sampling.WEIGH_WARPS,
            max_shared_bytes=8192,
        ),
        KernelCase(
            "draw collect",
            thresholds.collect_kernel,
            _TYPES,
            constants | {"MAX_CANDIDATES": thresholds.MAX_CANDIDATES},
            num_warps=8,
            max_shared_bytes=16384,
        ),
    ]


def _pick(name: str, vocab: int, filters: bool, num_warps: int) -> KernelCase:
    constants = {
        "FILTERS": filters,
        "ADJUSTS": filters,
        "PIVOTS": thresholds.PIVOTS,
        "MAX_CANDIDATES": thresholds.MAX_CANDIDATES,
        "TILE": sampling.SEARCH_TILE,
        "WAYS": sampling.SEARCH_WAYS,
        "MAX_COUNT": MAX_COUNT,
    }
    return KernelCase(
        f"draw pick{name}",
        sampling.pick_kernel,
        _TYPES,
        _row(vocab) | constants,
        num_warps=num_warps,
        max_shared_bytes=16384,
        wide_loads=filters,  # without: one value a thread
    )


def _logprobs(vocab: int) -> list[KernelCase]:
    num_parts = -(-vocab // logprobs.CHUNK) * logprobs.CHUNK // logprobs.PART
    parts = {"NUM_PARTS": num_parts, "PARTS_PADDED": 1 << (num_parts - 1).bit_length(), "NUM_TOP": 20}
    row = _row(vocab) | {"PART": logprobs.PART}
    chunk = {"VOCAB": vocab, "NUM_CHUNKS": row["NUM_CHUNKS"], "CHUNK": logprobs.CHUNK, "PART": logprobs.PART}
    return [
        KernelCase(
            "logprobs summarize", logprobs.summarize_kernel, _TYPES, chunk, 8, max_registers=64, max_shared_bytes=1024
        ),
        KernelCase(
            "logprobs likeliest",
            logprobs.likeliest_kernel,
            _TYPES,
            row | parts,
            max_registers=64,
            max_shared_bytes=1024,
            wide_loads=False,  # a part has two values a thread
        ),
    ]
