"""The same request says the same thing, to the bit of its log-probabilities, whatever happens around it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmserve.kernels.cpu.build import find_compiler
from llmserve.messages import EngineRequest

PROMPT_LEN = 75
MAX_TOKENS = 40

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "seed": 1234},
    "filtered": {"temperature": 0.8, "seed": 99, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"temperature": 0.9, "seed": 5, "repetition_penalty": 1.2, "presence_penalty": 0.3},
}


def prompts(count: int, vocab_size: int = 320) -> list[list[int]]:
    source = random.Random(3)
    return [[source.randrange(3, vocab_size) for _ in range(source.randint(20, 120))] for _ in range(count)]


@pytest.fixture(params=list(SAMPLING))
def subject(request: pytest.FixtureRequest, make_request: Callable[..., EngineRequest]) -> Callable[[], EngineRequest]:
    """Makes the request under test, anew each time."""
    source = random.Random(11)
    prompt = [source.randrange(3, 320) for _ in range(PROMPT_LEN)]
    return lambda: make_request(prompt, MAX_TOKENS, logprobs=3, **SAMPLING[request.param])


# dtype, quantization, and the type of a GGUF file if it is one
WEIGHTS: dict[str, tuple[str, str, str]] = {
    "float32": ("float32", "none", ""),
    "bfloat16": ("bfloat16", "none", ""),
    "q8_0": ("bfloat16", "q8_0", ""),
    "int8": ("bfloat16", "int8", ""),
    "gguf-q4_1": ("bfloat16", "gguf", "Q4_1"),
    "gguf-q8_0": ("float32", "gguf", "Q8_0"),
}


@pytest.fixture(params=list(WEIGHTS))
def open_engine(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    tiny_gguf: Callable[[str], Path],
    make_engine: Callable[..., Any],
) -> Callable[..., Any]:
    """Makes engines over the tiny model, its weights in one of the formats."""
    dtype, quantization, ggml_type = WEIGHTS[request.param]
    if quantization != "none" and find_compiler() is None:
        pytest.skip("no C compiler")
    path = tiny_gguf(ggml_type) if ggml_type else tiny_llama
    return lambda **options: make_engine(path, dtype, quantization=quantization, **options)


def test_alone_among_strangers_chunked_warm_and_preempted(
    open_engine: Callable[..., Any],
    make_request: Callable[..., EngineRequest],
    subject: Callable[[], EngineRequest],
) -> None:
    def answer(engine: Any, *others: EngineRequest) -> Any:
        request = subject()
        return engine.run(*others[:15], request, *others[15:])[request.request_id]

    def strangers() -> list[EngineRequest]:
        return [make_request(p, 30, temperature=1.0, seed=i) for i, p in enumerate(prompts(31))]

    alone_engine = open_engine()
    alone = answer(alone_engine)
    assert len(alone.token_ids) == MAX_TOKENS
    warm = answer(alone_engine)
    assert warm.num_cached_tokens == PROMPT_LEN // 16 * 16
    crowded = answer(open_engine(), *strangers())
    chunked = answer(open_engine(max_chunk=7))
    mixed = answer(open_engine(max_chunk=7, budget=64), *strangers())
    tight = open_engine(num_blocks=24, max_num_seqs=16)
    preempted = answer(tight, *strangers())
    for other in (warm, crowded, chunked, mixed, preempted):
        assert other.token_ids == alone.token_ids
        assert other.logprobs == alone.logprobs
        assert other.finish_reason == alone.finish_reason


def test_a_request_that_is_preempted_twice_says_the_same(
    tiny_llama: Path,
    make_engine: Callable[..., Any],
    make_request: Callable[..., EngineRequest],
    subject: Callable[[], EngineRequest],
) -> None:
    """Two waves of requests that came earlier grow until the subject has to give up its blocks to them."""
    calm = subject()
    expected = make_engine(tiny_llama).run(calm)[calm.request_id]

    elders = [make_request(p[:40], 60, temperature=1.0, seed=i) for i, p in enumerate(prompts(4))]
    request = subject()
    engine = make_engine(tiny_llama, num_blocks=14)
    answer = engine.new_answer()
    waves = [elders[:2], elders[2:]]
    engine.core.add(request)
    while engine.core.has_work():
        for output in engine.core.step().outputs:
            if output.request_id == request.request_id:
                answer.add(output)
        if waves and engine.core.stats().num_running == 1:
            for elder in waves.pop(0):
                engine.core.add(elder)
    assert answer.num_preemptions == 2
    assert answer.token_ids == expected.token_ids
    assert answer.logprobs == expected.logprobs


def test_sequences_of_equal_prompts_share_blocks_within_one_step(
    tiny_llama: Path, make_engine: Callable[..., Any], make_request: Callable[..., EngineRequest]
) -> None:
    prompt = prompts(1)[0][:64]
    engine = make_engine(tiny_llama)
    alone = engine.run(make_request(prompt, 10, cache_salt="a"))
    together = engine.run(*(make_request(prompt, 10, cache_salt="b") for _ in range(3)))
    expected = [answer.token_ids for answer in alone.values()] * 3
    assert [answer.token_ids for answer in together.values()] == expected
    assert [answer.num_cached_tokens for answer in together.values()] == [0, 48, 48]


def test_prompt_logprobs_do_not_depend_on_chunks_or_cache(
    tiny_llama: Path, make_engine: Callable[..., Any], make_request: Callable[..., EngineRequest]
) -> None:
    prompt = prompts(1)[0]
    engine = make_engine(tiny_llama)
    whole, warm = (
        next(iter(engine.run(make_request(prompt, 2, prompt_logprobs=2)).values())).prompt_logprobs for _ in range(2)
    )
    chunked = make_engine(tiny_llama, max_chunk=7).run(make_request(prompt, 2, prompt_logprobs=2))
    assert whole == warm == next(iter(chunked.values())).prompt_logprobs
    assert [entry and entry.token_id for entry in whole] == [None, *prompt[1:]]
