"""A request in flight: text from tokens, stop strings, ends and errors, with an engine that is a list."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from llmserve.backends.generation import GenerationDelta, GenerationSpec
from llmserve.backends.sequence import MAX_UNREAD, LLMGeneration, SequenceState
from llmserve.errors import DeadlineExceededError, EngineDeadError, InvalidRequestError
from llmserve.messages import FinishReason, SamplingParams, SequenceOutput
from llmserve.metrics import ModelMetrics
from llmserve.tokenizer import Tokenizer

EOS = 2


class Model:
    """What a generation belongs to: notes who was finished, and whether the engine had to be told."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.metrics = ModelMetrics("m")
        self.finished: list[tuple[str, bool]] = []
        self.paused: list[str] = []

    def finish(self, sequences: list[SequenceState], abort: bool) -> None:
        self.finished += [(sequence.id, abort) for sequence in sequences]

    def pause(self, sequences: list[SequenceState]) -> None:
        self.paused = [sequence.id for sequence in sequences]

    def unpause(self, sequences: list[SequenceState]) -> None:
        assert self.paused == [sequence.id for sequence in sequences]
        self.paused = []


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_path(smollm2_path)


@pytest.fixture
def model(tokenizer: Tokenizer) -> Model:
    return Model(tokenizer)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 10))


def start(model: Model, *, min_tokens: int = 0, **spec: Any) -> LLMGeneration:
    params = SamplingParams(max_tokens=100, seed=3, min_tokens=min_tokens)
    return LLMGeneration("r", GenerationSpec(prompt_token_ids=[1], sampling=params, **spec), model, time.monotonic())


def feed(generation: LLMGeneration, token_ids: list[int], index: int = 0, **output: Any) -> None:
    sequence = generation.sequences[index]
    if not sequence.finished:  # as LLM does: news of a finished sequence is not passed on
        sequence.receive(SequenceOutput(sequence.id, token_ids, **output), time.monotonic())


async def collect(generation: LLMGeneration) -> list[GenerationDelta]:
    return [delta async for deltas in generation for delta in deltas]


def text_of(deltas: list[GenerationDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_a_deadline_ends_it_whatever_the_engine_does(model: Model) -> None:
    async def scenario() -> None:
        generation = start(model, deadline_s=time.monotonic() + 0.05)
        generation.watch_deadline()
        feed(generation, [5])
        with pytest.raises(DeadlineExceededError):
            async with generation:
                await collect(generation)
        assert model.finished == [("r", True)]

    run(scenario())


def test_what_is_answered_in_time_leaves_no_timer(model: Model) -> None:
    async def scenario() -> None:
        generation = start(model, deadline_s=time.monotonic() + 60)
        generation.watch_deadline()
        async with generation:
            feed(generation, [5], finish_reason=FinishReason.LENGTH)
            await collect(generation)
        assert not [timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]

    asyncio.run(scenario())


def test_who_does_not_read_is_held_back_and_misses_nothing(model: Model) -> None:
    async def scenario() -> None:
        generation = start(model)
        for _ in range(MAX_UNREAD - 1):
            feed(generation, [5])
        assert model.paused == []
        feed(generation, [5])
        assert model.paused == ["r"]
        answer = aiter(generation)
        assert len(await anext(answer)) == MAX_UNREAD
        assert model.paused == []
        feed(generation, [5], finish_reason=FinishReason.LENGTH)
        assert len(await anext(answer)) == 1
        with pytest.raises(StopAsyncIteration):
            await anext(answer)

    run(scenario())


def test_one_that_goes_on_all_the_same_is_asked_to_stop_again(model: Model) -> None:
    async def scenario() -> None:
        generation = start(model, n=2)
        for _ in range(MAX_UNREAD):
            feed(generation, [5], 0)
            feed(generation, [5], 1)
        assert model.paused == ["r-0", "r-1"]
        model.paused = []  # as if they had not been stopped
        feed(generation, [5], 0, finish_reason=FinishReason.LENGTH)
        for _ in range(2 * MAX_UNREAD):
            feed(generation, [5], 1)
        assert model.paused == ["r-1"]

    run(scenario())


def test_an_end_token_ends_without_showing(model: Model, tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        generation = start(model)
        feed(generation, tokenizer.encode("Hello there"))
        feed(generation, [EOS], finish_reason=FinishReason.STOP, stop_token_id=EOS)
        deltas = await collect(generation)
        assert text_of(deltas) == "Hello there"
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, None)
        assert deltas[-1].token_ids == [EOS]  # it counts as generated
        assert model.finished == [("r", False)]

    run(scenario())


@pytest.mark.parametrize(("include", "shown"), [(False, "one two"), (True, "one two three")])
def test_a_stop_token_of_the_clients_is_named(model: Model, tokenizer: Tokenizer, include: bool, shown: str) -> None:
    async def scenario() -> None:
        generation = start(model, include_stop_str_in_output=include)
        *body, last = tokenizer.encode("one two three")
        feed(generation, body)
        feed(generation, [last], finish_reason=FinishReason.STOP, stop_token_id=last)
        deltas = await collect(generation)
        assert text_of(deltas) == shown
        assert deltas[-1].stop_reason == last

    run(scenario())


@pytest.mark.parametrize("at_once", [True, False])
def test_a_stop_string_ends_and_tells_the_engine(model: Model, tokenizer: Tokenizer, at_once: bool) -> None:
    async def scenario() -> None:
        generation = start(model, stop=("lazy",))
        tokens = tokenizer.encode("over the lazy dog and on")
        for step in [tokens] if at_once else [[token] for token in tokens]:
            feed(generation, step)
        deltas = await collect(generation)
        assert text_of(deltas) == "over the "
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, "lazy")
        assert model.finished == [("r", True)]

    run(scenario())


def test_what_was_held_back_comes_out_at_the_end(model: Model, tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        generation = start(model, stop=("lazy cat",))
        tokens = tokenizer.encode("the lazy")
        feed(generation, tokens, finish_reason=FinishReason.LENGTH)
        deltas = await collect(generation)
        assert text_of(deltas) == "the lazy"
        assert deltas[-1].finish_reason is FinishReason.LENGTH

    run(scenario())


def test_half_a_character_at_the_end_becomes_one_replacement(model: Model, tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        generation = start(model)
        tokens = tokenizer.encode("🙂")
        assert len(tokens) > 1
        feed(generation, tokens[:-1])
        feed(generation, [], finish_reason=FinishReason.LENGTH)
        assert text_of(await collect(generation)) == "\ufffd"

    run(scenario())


def test_the_sequences_of_a_request_have_seeds_and_ends_of_their_own(model: Model, tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        generation = start(model, n=3)
        assert len({sequence.params.seed for sequence in generation.sequences}) == 3
        assert generation.sequences[0].params.seed == 3
        assert [sequence.id for sequence in generation.sequences] == ["r-0", "r-1", "r-2"]
        for index, word in enumerate(("red", "green", "blue")):
            feed(generation, tokenizer.encode(word), index, finish_reason=FinishReason.LENGTH)
        deltas = await collect(generation)
        assert {delta.index: delta.text for delta in deltas} == {0: "red", 1: "green", 2: "blue"}

    run(scenario())


def test_leaving_aborts_what_is_not_finished(model: Model, tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        async with start(model, n=2) as generation:
            feed(generation, tokenizer.encode("done"), 0, finish_reason=FinishReason.LENGTH)
        assert model.finished == [("r-0", False), ("r-1", True)]
        assert model.metrics.finished[FinishReason.ABORT] == 1

    run(scenario())


def test_a_dead_engine_is_raised_after_what_was_ready(model: Model, tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        generation = start(model)
        feed(generation, tokenizer.encode("before"))
        generation.fail(EngineDeadError("gone"))
        arriving = aiter(generation)
        assert text_of(await anext(arriving)) == "before"
        with pytest.raises(EngineDeadError, match="gone"):
            await anext(arriving)
        assert model.metrics.finished[FinishReason.ERROR] == 1

    run(scenario())


def test_a_request_the_engine_refuses_is_the_clients_error(model: Model) -> None:
    async def scenario() -> None:
        generation = start(model)
        feed(generation, [], finish_reason=FinishReason.ERROR, error=("invalid_request", "too long"))
        with pytest.raises(InvalidRequestError, match="too long"):
            await collect(generation)

    run(scenario())


def test_a_waiting_consumer_is_woken(model: Model, tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        generation = start(model)
        waiting = asyncio.create_task(collect(generation))
        await asyncio.sleep(0)
        feed(generation, tokenizer.encode("now"), finish_reason=FinishReason.LENGTH)
        assert text_of(await waiting) == "now"

    run(scenario())


@pytest.mark.parametrize(("text", "stop", "shown"), [("EN", "END", "EN more"), ("xEN", "END", "xEN more")])
def test_a_stop_string_may_begin_before_min_tokens(
    model: Model, tokenizer: Tokenizer, text: str, stop: str, shown: str
) -> None:
    async def scenario(ending: str) -> str:
        generation = start(model, stop=(stop,), min_tokens=len(tokenizer.encode(text)) + 1)
        for step in (text, ending, " more"):
            for token in tokenizer.encode(step):
                feed(generation, [token])
        feed(generation, [], finish_reason=FinishReason.LENGTH)
        return text_of(await collect(generation))

    assert asyncio.run(scenario("")) == shown
    assert asyncio.run(scenario("D")) == text  # what was shown cannot be taken back, but nothing is added


def test_stop_strings_count_only_after_min_tokens(model: Model, tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        tokens = tokenizer.encode("stop here and stop there")
        generation = start(model, stop=("stop",), min_tokens=2)
        for token in tokens:
            feed(generation, [token])
        assert text_of(await collect(generation)) == "stop here and "

    run(scenario())
