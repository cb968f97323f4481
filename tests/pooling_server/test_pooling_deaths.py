"""Instances that die of some texts: those fail, nobody else does, and every death is bounded. No process is started."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.backends.instance_pool import InstanceState
from llmserve.backends.model_messages import OutputTensor, ResponseEntry, Results
from llmserve.backends.pooling_job import PoolingJob
from llmserve.backends.pooling_texts import TextsInFlight
from llmserve.backends.pooling_tokenizer import EncodedText
from llmserve.backends.transport import PayloadReader
from llmserve.errors import ModelExecutionError, NotReadyError
from llmserve.general_metrics import ModelStatistics
from llmserve.pooling_metrics import PoolingMetrics
from llmserve.scheduler.text_batcher import TextBatcher


@dataclass(eq=False)
class FakeInstance:
    """Answers each text with its first token, in its turn; dies of a batch with a poisonous one."""

    poisons: set[int]
    name: str = "fake"
    state: InstanceState = InstanceState.READY
    reason: str = ""
    open_requests: int = 0
    num_deaths: int = 0
    batch: tuple[int, list[int]] | None = None
    sizes: list[int] = field(default_factory=list)

    def execute(self, message: Any, payload: Any) -> None:
        reader = PayloadReader(memoryview(b"".join(payload.buffers)))
        token_ids = np.frombuffer(reader.take(message.inputs[0].num_bytes), np.int32)  # a text is a token
        self.batch = (message.batch_id, token_ids.tolist())
        self.sizes.append(len(token_ids))

    def rest(self) -> None:
        pass

    def turn(self, texts: TextsInFlight) -> None:
        """Finishes what it has, or dies of it and comes back."""
        assert self.batch is not None
        (batch_id, tokens), self.batch = self.batch, None
        if self.poisons.isdisjoint(tokens):
            rows = np.array(tokens, np.float32).reshape(-1, 1)
            output = OutputTensor("pooled", "FP32", list(rows.shape), rows.nbytes)
            results = Results([ResponseEntry(batch_id, [output])], batch_id)
            texts.on_results(self, results, memoryview(rows.tobytes()))  # type: ignore[arg-type]
            return
        self.num_deaths += 1
        self.state = InstanceState.BACKING_OFF if self.num_deaths > 1 else InstanceState.STARTING
        texts.on_lost(self, ModelExecutionError("it died"))  # type: ignore[arg-type]
        self.state = InstanceState.READY
        texts.on_ready(self)  # type: ignore[arg-type]


def make(instances: list[FakeInstance], budget: int = 100) -> TextsInFlight:
    texts = TextsInFlight("m", ModelStatistics("m", "1"), PoolingMetrics("m"))
    texts.instances = list(instances)  # type: ignore[arg-type]
    texts.batcher = TextBatcher(budget)
    texts.begin()
    return texts


async def outcomes(texts: TextsInFlight, instances: list[FakeInstance], requests: list[list[int]]) -> list[Any]:
    """The rows of each request, or what it failed with."""
    jobs = []
    for number, tokens in enumerate(requests):
        job = PoolingJob(number, len(tokens))
        jobs.append(job)
        for position, token in enumerate(tokens):
            texts.submit(job, position, EncodedText(np.array([token], np.int32)), "embed")
    for _ in range(200):
        await asyncio.sleep(0)
        for instance in instances:
            if instance.batch is not None:
                instance.turn(texts)
    async with asyncio.timeout(5):
        return await asyncio.gather(*(job.wait() for job in jobs), return_exceptions=True)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8), max_size=8), st.sets(st.integers(0, 30)))
def test_only_requests_with_a_poisonous_text_fail(requests: list[list[int]], poisons: set[int]) -> None:
    async def scenario() -> None:
        instances = [FakeInstance(poisons), FakeInstance(poisons)]
        answers = await outcomes(make(instances), instances, requests)
        for tokens, answer in zip(requests, answers, strict=True):
            if poisons.isdisjoint(tokens):
                assert [int(row[0]) for row in answer] == tokens
            else:
                assert isinstance(answer, ModelExecutionError)
        num_tried = len(poisons & {token for tokens in requests for token in tokens})
        assert sum(instance.num_deaths for instance in instances) <= 2 * num_tried

    asyncio.run(scenario())


def test_after_a_death_each_text_is_computed_alone() -> None:
    async def scenario() -> None:
        instance = FakeInstance({3})
        answers = await outcomes(make([instance]), [instance], [[1], [2], [3], [4]])
        assert isinstance(answers.pop(2), ModelExecutionError)
        assert [int(answer[0][0]) for answer in answers] == [1, 2, 4]
        assert instance.sizes == [4, 1, 1, 1, 1]
        assert instance.num_deaths == 2

    asyncio.run(scenario())


def test_nobody_waits_for_an_instance_that_cannot_be_started() -> None:
    async def scenario() -> None:
        instance = FakeInstance(set())
        texts = make([instance])
        job = PoolingJob(1, 1)
        texts.submit(job, 0, EncodedText(np.array([5], np.int32)), "embed")
        await asyncio.sleep(0)
        instance.state = InstanceState.BACKING_OFF
        texts.on_lost(instance, ModelExecutionError("it died"))  # type: ignore[arg-type]
        assert len(texts.batcher) == 1
        texts.on_lost(instance, NotReadyError("it does not load"))  # type: ignore[arg-type]
        answers = await asyncio.gather(job.wait(), return_exceptions=True)
        assert isinstance(answers[0], NotReadyError)

    asyncio.run(scenario())
