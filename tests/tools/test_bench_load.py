"""The load generator against the scripted server: how many at a time, when it ends, and that no failure is lost."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from llmserve.tools.bench.load import ClosedLoop, Load, LoadGenerator, OpenLoop
from llmserve.tools.bench.record import RequestRecord
from llmserve.tools.bench.workload import PlannedRequest
from llmserve.tools.openai_client import OpenAIClient, encode_request


def requests(count: int | None = None, max_tokens: int = 3) -> Iterator[PlannedRequest]:
    body = encode_request("chat", "m", "a b c d", max_tokens=max_tokens)
    return itertools.repeat(PlannedRequest(body, 4, max_tokens), *([] if count is None else [count]))


def generate(
    url: str,
    load: Load,
    planned: Iterator[PlannedRequest],
    *,
    timeout_s: float = 30.0,
    duration_s: float | None = None,
    arrivals: Iterator[float] | None = None,
) -> tuple[LoadGenerator, list[RequestRecord]]:
    done: list[RequestRecord] = []

    async def main() -> LoadGenerator:
        client = OpenAIClient(url)
        generator = LoadGenerator(client, "chat", timeout_s, done.append)
        await generator.run(load, planned, arrivals or itertools.repeat(0.0), duration_s)
        client.close()
        return generator

    return asyncio.run(main()), done


def test_a_closed_loop_keeps_to_its_concurrency_and_reuses_its_connections(fake_server: Any) -> None:
    generator, done = generate(fake_server.url, ClosedLoop(4), requests(40))
    assert len(generator.records) == len(done) == len(fake_server.completions) == 40
    assert fake_server.max_active == 4
    assert fake_server.num_connections == 4
    for record in generator.records:
        assert record.succeeded
        assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (4, 3, 2)
        assert len(record.token_times_s) == 3
        assert record.ttft_s is not None
        assert record.e2e_s is not None
        assert 0 < record.ttft_s <= record.e2e_s <= generator.duration_s
    assert generator.cpu_s > 0


def test_an_open_loop_does_not_wait_for_answers(fake_server: Any) -> None:
    for _ in range(20):
        fake_server.push_events(fake_server.chat_events(["a"])[:2], then="hang", end=False)
    generator, _ = generate(fake_server.url, OpenLoop(1.0, 1.0), requests(20), timeout_s=0.5)
    assert fake_server.max_active == 20
    assert [record.error_kind for record in generator.records] == ["timeout"] * 20
    assert all(record.start_s >= record.scheduled_s for record in generator.records)


def test_an_open_loop_sends_at_the_times_it_was_given_and_none_after_the_end(fake_server: Any) -> None:
    arrivals = [0.0, 0.01, 0.02, 0.9, 0.95]
    generator, _ = generate(fake_server.url, OpenLoop(1.0, 1.0), requests(), arrivals=iter(arrivals), duration_s=0.5)
    scheduled = [record.scheduled_s - generator.records[0].scheduled_s for record in generator.records]
    assert scheduled == pytest.approx(arrivals[:3])


def test_a_duration_ends_a_closed_loop_and_lets_the_last_requests_finish(fake_server: Any) -> None:
    generator, _ = generate(fake_server.url, ClosedLoop(2), requests(), duration_s=0.2)
    assert generator.records
    assert all(record.succeeded for record in generator.records)
    first_s = generator.records[0].start_s
    assert all(record.start_s < first_s + 0.2 for record in generator.records)


def test_every_failure_is_kept_and_named(fake_server: Any) -> None:
    whole = fake_server.chat_events(["a", "b"])
    fake_server.push(fake_server.http(503, b'{"error": {"message": "loading"}}'))
    fake_server.push(fake_server.http(429, b"slow down"))
    fake_server.push_events(whole[:2], then="close", end=False)
    fake_server.push_events(whole[:2], then="reset", end=False)
    fake_server.push_events([*whole[:2], fake_server.sse({"error": {"message": "boom"}})], then="close")
    fake_server.push(b"SSH-2.0\r\n\r\n", then="close")
    fake_server.push_events([*whole[:2], fake_server.sse(b"[DONE]")])
    fake_server.push_events(whole)
    generator, done = generate(fake_server.url, ClosedLoop(1), requests(8))
    kinds = Counter(record.error_kind for record in generator.records)
    assert kinds == {
        "http_503": 1,
        "http_429": 1,
        "disconnected": 2,
        "stream_error": 1,
        "protocol": 1,
        "unfinished": 1,
        None: 1,
    }
    assert "loading" in generator.records[0].error_message
    assert len(done) == 8


def test_no_server_is_a_failure_of_each_request() -> None:
    generator, _ = generate("http://127.0.0.1:9", ClosedLoop(2), requests(4))
    assert [record.error_kind for record in generator.records] == ["connect"] * 4


def test_a_run_that_is_stopped_keeps_what_there_is_and_leaves_the_server(fake_server: Any) -> None:
    events = fake_server.chat_events(["a", "b"])
    fake_server.push_events(events)
    fake_server.push_events(events[:3], then="hang", end=False)

    async def main() -> LoadGenerator:
        client = OpenAIClient(fake_server.url)
        generator = LoadGenerator(client, "chat", 30.0)
        task = asyncio.create_task(generator.run(ClosedLoop(1), requests(), iter(())))
        assert await asyncio.to_thread(fake_server.hanging.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return generator

    generator = asyncio.run(main())
    assert [record.error_kind for record in generator.records] == [None, "cancelled"]
    assert generator.duration_s > 0
    assert fake_server.client_left.wait(10)
