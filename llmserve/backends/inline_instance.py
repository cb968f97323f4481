"""An instance that runs in the server's process, on its own thread: for writing and debugging a model.

`breakpoint()` works in it. Everything else waits meanwhile, and a model that exits takes the server with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from llmserve.backends.instance import InstanceSettings
from llmserve.backends.instance_pool import Complete, InstanceEvents, InstanceState
from llmserve.backends.model_messages import (
    ExecuteBatch,
    FromModel,
    LoadFailed,
    LoadModel,
    ModelLaunch,
    Results,
    Signature,
)
from llmserve.backends.transport import Payload
from llmserve.errors import ModelLoadError


class InlineInstance:
    """Messages and tensors are what they are between processes; only the socket is missing."""

    def __init__(self, launch: ModelLaunch, settings: InstanceSettings, events: InstanceEvents) -> None:
        from llmserve.backends.backend_runner import BackendRunner  # numpy, which the server can do without

        self.name = launch.instance_name
        self.state = InstanceState.STARTING
        self.reason = "it is loading"
        self.open_requests = 0
        self._launch = launch
        self._events = events
        self._loading: list[FromModel] = []
        self._loop = asyncio.get_running_loop()
        self._runner = BackendRunner(launch, self._send, _NoInbox())

    @property
    def pid(self) -> int | None:
        """None: it has no process of its own."""
        return None

    async def start(self, complete: Complete | None) -> None:
        """Loads the model. Raises ModelLoadError."""
        self._launch.auto_complete = complete is not None
        self._check(self._runner.launch())
        if complete is not None and isinstance(signature := self._loading[-1], Signature):
            self._check(self._runner.load(LoadModel(complete(signature))))
        self.state, self.reason = InstanceState.READY, ""

    def is_ready(self) -> bool:
        """Loaded."""
        return self.state is InstanceState.READY

    def execute(self, message: ExecuteBatch, payload: Payload) -> None:
        """Runs a batch as soon as the caller has returned to the event loop."""
        self._loop.call_soon(self._runner.execute, message, memoryview(bytearray().join(payload.buffers)))

    def rest(self) -> None:
        """Nothing to watch."""

    def cancel(self, request_id: int) -> None:
        """The model sees it when it asks."""
        self._runner.cancel([request_id])

    def acknowledge(self, request_id: int, units: int) -> None:
        """There is nobody who could wait for it: the model runs where its client is served."""

    async def stop(self) -> None:
        """Unloads the model."""
        if self.state is InstanceState.READY:
            self._runner.unload()
        self.state, self.reason = InstanceState.STOPPED, "it is stopped"

    def _check(self, succeeded: bool) -> None:
        if not succeeded:
            failure = self._loading[-1]
            assert isinstance(failure, LoadFailed)
            self.state, self.reason = InstanceState.STOPPED, failure.message
            raise ModelLoadError(failure.message)

    def _send(self, message: FromModel, payload: Payload | None) -> None:
        """What the model says; from any thread."""
        if not isinstance(message, Results):
            self._loading.append(message)
            return
        # a copy, as a socket makes one: the model's samples go on changing
        message = msgspec.convert(msgspec.to_builtins(message), Results) if message.metrics else message
        data = memoryview(bytearray().join(payload.buffers if payload else ()))
        self._loop.call_soon_threadsafe(self._events.on_results, self, message, data)


class _NoInbox:
    """Cancellations come straight to the runner, and its thread is the one that serves the client: it cannot wait."""

    def poll(self) -> None:
        """Nothing."""

    def wait_until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """At once."""
        return True
