"""A request that goes on in another engine says what it would have said in the first, bit for bit. A real model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llmserve.messages import EngineRequest

PROMPT = [(7 * i) % 300 + 5 for i in range(41)]
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 77, "top_p": 0.95, "top_k": 60}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": SAMPLED,
    "penalties": SAMPLED | {"frequency_penalty": 0.7, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    "min_tokens": SAMPLED | {"min_tokens": 20, "stop_token_ids": list(range(5, 200))},
    "bad_words": {"bad_words": [[17], [40, 41]], "logit_bias": {50: 3.0}},
    "logprobs": SAMPLED | {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 2, "logprobs": 1},
    "stop_token": {"stop_token_ids": list(range(5, 60)), "temperature": 1.0, "seed": 3},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_before", [1, 7, 18])
def test_the_rest_is_the_same(
    case: str,
    num_before: int,
    tiny_llama: Path,
    make_engine: Callable[..., Any],
    make_request: Callable[..., EngineRequest],
) -> None:
    params = CASES[case]
    request = make_request(PROMPT, 32, **params)
    whole = make_engine(tiny_llama).run(request)[request.request_id]
    num_before = min(num_before, len(whole.token_ids) - 1)
    resumed = msgspec.structs.replace(
        request,
        output_token_ids=whole.token_ids[:num_before],
        params=msgspec.structs.replace(request.params, prompt_logprobs=None),
    )
    neighbours = [make_request([9] * length, 20, **SAMPLED) for length in (3, 50)]
    rest = make_engine(tiny_llama, max_chunk=11).run(*neighbours, resumed)[request.request_id]
    assert rest.token_ids == whole.token_ids[num_before:]
    assert rest.finish_reason == whole.finish_reason
    assert rest.logprobs == whole.logprobs[num_before:]
    assert rest.prompt_logprobs is None


def test_the_sequences_of_one_prompt_share_its_blocks_again(
    tiny_llama: Path, make_engine: Callable[..., Any], make_request: Callable[..., EngineRequest]
) -> None:
    prompt = PROMPT * 3
    requests = [make_request(prompt, 24, temperature=1.0, seed=seed) for seed in range(4)]
    whole = make_engine(tiny_llama).run(*requests)
    resumed = [
        msgspec.structs.replace(request, output_token_ids=whole[request.request_id].token_ids[: 4 + 3 * index])
        for index, request in enumerate(requests)
    ]
    engine = make_engine(tiny_llama)
    for request in resumed:
        engine.core.add(request)
    num_computed = engine.core.step().stats.num_step_tokens
    assert num_computed < len(prompt) + 4 * 30  # the prompt once, not four times
    answers = {request.request_id: engine.new_answer() for request in resumed}
    while engine.core.has_work():
        for output in engine.core.step().outputs:
            answers[output.request_id].add(output)
    for request in resumed:
        said = request.output_token_ids
        full = whole[request.request_id].token_ids
        assert full[len(said) + 1 :] == answers[request.request_id].token_ids  # the first step's token was not kept
