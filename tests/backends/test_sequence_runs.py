"""What a client is told does not depend on how many tokens a step brought: one, or a run of accepted drafts."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llmserve.backends.generation import GenerationSpec
from llmserve.backends.sequence import LLMGeneration, SequenceState
from llmserve.errors import DeadlineExceededError
from llmserve.messages import FinishReason, SamplingParams, SequenceOutput, TokenLogprobs
from llmserve.metrics import ModelMetrics
from llmserve.tokenizer import Tokenizer

TEXT = "One fish, two fish, red fish. STOP Blue fish."


@dataclass
class Owner:
    """What a generation belongs to."""

    tokenizer: Tokenizer
    metrics: ModelMetrics = field(default_factory=lambda: ModelMetrics("m"))
    num_finished: int = 0

    def finish(self, sequences: list[SequenceState], abort: bool) -> None:
        self.num_finished += len(sequences)

    def pause(self, sequences: list[SequenceState]) -> None:
        raise AssertionError("it is read at once")

    def unpause(self, sequences: list[SequenceState]) -> None:
        raise AssertionError("it was never paused")


@pytest.mark.parametrize("num_steps", [1, 2])
def test_an_answer_that_is_complete_is_read_however_late(smollm2_path: Path, num_steps: int) -> None:
    async def read() -> list[FinishReason | None]:
        owner = Owner(Tokenizer.from_path(smollm2_path))
        params = SamplingParams(max_tokens=2, seed=0)
        deadline_s = time.monotonic() + 0.01
        spec = GenerationSpec(prompt_token_ids=[1], sampling=params, deadline_s=deadline_s)
        generation = LLMGeneration("r", spec, owner, 0.0)
        generation.watch_deadline()
        for step in range(num_steps):
            generation.sequences[0].receive(SequenceOutput("r", [5], FinishReason.LENGTH if step else None), 0.1)
        await asyncio.sleep(max(deadline_s - time.monotonic(), 0) + 0.02)
        async with generation:
            return [delta.finish_reason async for ready in generation for delta in ready]

    if num_steps == 2:
        assert asyncio.run(read()) == [None, FinishReason.LENGTH]
    else:
        with pytest.raises(DeadlineExceededError):
            asyncio.run(read())


async def told(tokenizer: Tokenizer, step: int, **spec: Any) -> tuple[Any, ...]:
    """Everything a client gets to see of TEXT, `step` tokens at once, 0.1 s a token."""
    token_ids = tokenizer.encode(TEXT, False)
    params = SamplingParams(max_tokens=len(token_ids), seed=0)
    owner = Owner(tokenizer)
    generation = LLMGeneration("r", GenerationSpec(prompt_token_ids=[1], sampling=params, **spec), owner, 0.0)
    sequence = generation.sequences[0]
    for start in range(0, len(token_ids), step):
        if sequence.finished:
            break
        end = min(start + step, len(token_ids))
        some = token_ids[start:end]
        logprobs = [TokenLogprobs(token_id, -1.0, 1, []) for token_id in some]
        reason = FinishReason.LENGTH if end == len(token_ids) else None
        sequence.receive(SequenceOutput("r", some, reason, logprobs=logprobs, prompt_logprobs=[None]), 0.1 * end)
    deltas = [delta async for ready in generation for delta in ready]
    text = "".join(delta.text for delta in deltas)
    said = [token_id for delta in deltas for token_id in delta.token_ids]
    assert [entry.token_id for delta in deltas for entry in delta.logprobs or []] == said
    timing = sequence.timing
    assert owner.metrics.inter_token_latency_s.total == pytest.approx(timing.last_token_s - timing.first_token_s)
    return text, said, deltas[-1].finish_reason, deltas[-1].stop_reason, sequence.num_tokens, owner.num_finished


@pytest.mark.parametrize("step", [2, 3, 5, 30])
@pytest.mark.parametrize(
    "spec",
    [{}, {"stop": ("STOP",)}, {"stop": ("fish, r", "red"), "include_stop_str_in_output": True}, {"stop": ("absent",)}],
)
def test_a_run_of_tokens_reads_like_single_ones(smollm2_path: Path, step: int, spec: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_path(smollm2_path)
    one_by_one = asyncio.run(told(tokenizer, 1, **spec))
    assert asyncio.run(told(tokenizer, step, **spec)) == one_by_one
    if spec.get("stop") == ("STOP",):
        assert one_by_one[0] == TEXT.partition("STOP")[0]
        assert one_by_one[2:4] == (FinishReason.STOP, "STOP")
