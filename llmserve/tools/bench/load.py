"""Puts a load on a server and keeps the records. Knows neither what the prompts say nor how the figures are shown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmserve.tools.bench.record import RequestRecord
from llmserve.tools.bench.workload import PlannedRequest
from llmserve.tools.http_client import ClientError
from llmserve.tools.openai_client import Endpoint, OpenAIClient


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """`concurrency` users, each of whom sends the next request when the last one is answered."""

    concurrency: int

    @property
    def label(self) -> str:
        return f"concurrency {self.concurrency}"

    @property
    def level(self) -> float:
        """Where this load stands on the axis of a sweep."""
        return self.concurrency


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Requests that arrive `rate` a second however slow the server is: the load that shows its queue."""

    rate: float
    burstiness: float

    @property
    def label(self) -> str:
        return f"{self.rate:g} requests/s"

    @property
    def level(self) -> float:
        """Where this load stands on the axis of a sweep."""
        return self.rate


Load = ClosedLoop | OpenLoop


class LoadGenerator:
    """Runs one load. `records` grows as requests are sent, so an interrupted run has what there was until then."""

    def __init__(
        self,
        client: OpenAIClient,
        endpoint: Endpoint,
        timeout_s: float,
        on_done: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        self._client = client
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._on_done = on_done
        self.records: list[RequestRecord] = []
        self.duration_s = 0.0
        self.cpu_s = 0.0  # what the client itself used

    async def run(
        self, load: Load, requests: Iterator[PlannedRequest], arrivals: Iterator[float], duration_s: float | None = None
    ) -> None:
        """Sends until `requests` or `duration_s` end, then lets what is in flight finish.

        `arrivals` are seconds after the start; only an open loop looks at them. When cancelled, it marks what is in
        flight as "cancelled".
        """
        start_s, start_cpu_s = self._client.clock(), time.process_time()
        end_s = None if duration_s is None else start_s + duration_s
        try:
            if isinstance(load, ClosedLoop):
                async with asyncio.TaskGroup() as users:
                    for _ in range(load.concurrency):
                        users.create_task(self._user(requests, end_s))
            else:
                await self._open_loop(requests, arrivals, start_s, end_s)
        finally:
            self.duration_s = self._client.clock() - start_s
            self.cpu_s = time.process_time() - start_cpu_s

    async def _user(self, requests: Iterator[PlannedRequest], end_s: float | None) -> None:
        for request in requests:
            now_s = self._client.clock()
            if end_s is not None and now_s >= end_s:
                return
            await self.send(request, now_s)

    async def _open_loop(
        self, requests: Iterator[PlannedRequest], arrivals: Iterator[float], start_s: float, end_s: float | None
    ) -> None:
        async with asyncio.TaskGroup() as in_flight:
            for request, arrival_s in zip(requests, arrivals, strict=False):
                scheduled_s = start_s + arrival_s
                if end_s is not None and scheduled_s >= end_s:
                    return
                # Not a poll: the wait for a point in time is what an arrival process consists of.
                await asyncio.sleep(max(scheduled_s - self._client.clock(), 0.0))
                in_flight.create_task(self.send(request, scheduled_s))

    async def send(self, request: PlannedRequest, scheduled_s: float) -> None:
        """Sends one request and reads its answer to the end. Whatever goes wrong is in its record, never raised."""
        clock = self._client.clock
        record = RequestRecord(
            start_s=clock(), prompt_len=request.prompt_len, output_len=request.output_len, scheduled_s=scheduled_s
        )
        self.records.append(record)
        try:
            async with asyncio.timeout(self._timeout_s), self._client.stream(self._endpoint, request.body) as stream:
                async for batch in stream:
                    record.take(batch)
            if record.finish_reason is None:
                record.fail("unfinished", "The stream said [DONE] but gave no finish reason.")
        except TimeoutError:
            record.fail("timeout", f"No complete answer within {self._timeout_s:g} s.")
        except ClientError as error:
            record.fail(error.kind, error.message)
        except asyncio.CancelledError:
            record.fail("cancelled", "The run was stopped while this was in flight.")
            raise
        finally:
            if self._on_done is not None:
                self._on_done(record)
