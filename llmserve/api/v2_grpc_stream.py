"""ModelStreamInfer: any number of requests in flight on one stream, their responses as they come. Knows no server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from tritonclient.grpc import service_pb2

from llmserve.api.v2_errors import error_text
from llmserve.api.v2_grpc_codec import FINAL, read_request, write_response
from llmserve.errors import LLMServeError
from llmserve.inference import InferRequest, InferResponse
from llmserve.repository.data_plane import DataPlane

_MAX_IN_FLIGHT = 1024  # requests of one stream; further ones are read when these are answered
_MAX_UNSENT = 256  # responses; a client that does not read holds its own models back, nobody else's


class InferenceStream:
    """One stream. An error ends its request, never the stream; only a bug of ours does that.

    Requests to models with one response are answered in the order they came, as Triton does; those to decoupled models
    whenever they have something to say.
    """

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._responses: asyncio.Queue[service_pb2.ModelStreamInferResponse | None] = asyncio.Queue(_MAX_UNSENT)
        self._slots = asyncio.Semaphore(_MAX_IN_FLIGHT)
        self._last_ordered: asyncio.Task[None] | None = None

    async def run(
        self, requests: AsyncIterator[service_pb2.ModelInferRequest]
    ) -> AsyncGenerator[service_pb2.ModelStreamInferResponse, None]:
        """The responses to send. Ends when the client has sent its last request and has all its answers."""
        answering = asyncio.create_task(self._answer_all(requests), name="inference stream")
        answering.add_done_callback(self._wake)
        try:
            while not answering.done() or not self._responses.empty():
                response = await self._responses.get()
                if response is not None:
                    yield response
            await answering
        finally:
            answering.cancel()
            await asyncio.wait((answering,))

    def _wake(self, answering: asyncio.Task[None]) -> None:
        """Nothing more will come: whoever waits for it should know."""
        if self._responses.empty():
            self._responses.put_nowait(None)

    async def _answer_all(self, requests: AsyncIterator[service_pb2.ModelInferRequest]) -> None:
        async with asyncio.TaskGroup() as group:
            async for message in requests:
                await self._slots.acquire()
                ordered = not self._is_decoupled(message)
                task = group.create_task(self._answer(message, self._last_ordered if ordered else None))
                task.add_done_callback(lambda _: self._slots.release())
                if ordered:
                    self._last_ordered = task

    def _is_decoupled(self, message: service_pb2.ModelInferRequest) -> bool:
        try:
            return self._plane.is_decoupled(message.model_name, message.model_version)
        except LLMServeError:
            return False

    async def _answer(self, message: service_pb2.ModelInferRequest, previous: asyncio.Task[None] | None) -> None:
        try:
            request, wants_final = read_request(message)
            responses = self._plane.infer(request)
        except LLMServeError as error:
            refusal = service_pb2.ModelStreamInferResponse(error_message=error_text(error))
            refusal.infer_response.id = message.id
            await self._put(refusal, previous)
            return
        try:
            async with aclosing(responses):
                async for response in responses:
                    if response.outputs or not response.final or wants_final:
                        await self._put(_write(response), previous)
        except LLMServeError as error:
            await self._put(_write_error(request, error), previous)

    async def _put(self, response: service_pb2.ModelStreamInferResponse, previous: asyncio.Task[None] | None) -> None:
        if previous is not None and not previous.done():
            await asyncio.wait((previous,))
        await self._responses.put(response)


def _write(response: InferResponse) -> service_pb2.ModelStreamInferResponse:
    message = service_pb2.ModelStreamInferResponse(infer_response=write_response(response))
    message.infer_response.parameters[FINAL].bool_param = response.final
    return message


def _write_error(request: InferRequest, error: LLMServeError) -> service_pb2.ModelStreamInferResponse:
    message = service_pb2.ModelStreamInferResponse(error_message=error_text(error))
    message.infer_response.model_name = request.model_name
    message.infer_response.id = request.id
    message.infer_response.parameters[FINAL].bool_param = True
    return message
