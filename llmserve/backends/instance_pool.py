"""The instances of one model: kept running, each restarted with a growing pause when it dies. Knows no requests."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from llmserve.backends.instance import InstanceProcess, InstanceSettings
from llmserve.backends.model_messages import (
    ExecuteBatch,
    LoadModel,
    ModelLaunch,
    ModelLoaded,
    Results,
    Signature,
)
from llmserve.backends.transport import Payload
from llmserve.errors import LLMServeError

logger = logging.getLogger(__name__)


class InstanceState(enum.StrEnum):
    """The life of an instance, over all its processes."""

    STARTING = "starting"
    READY = "ready"
    BACKING_OFF = "waiting to be restarted"
    STOPPED = "stopped"


class InstanceEvents(Protocol):
    """Who wants to know what becomes of an instance."""

    def on_results(self, instance: Instance, results: Results, payload: memoryview) -> None:
        """It has answered."""
        ...

    def on_ready(self, instance: Instance) -> None:
        """It takes batches again."""
        ...

    def on_lost(self, instance: Instance, error: LLMServeError) -> None:
        """Its process has ended, or could not be started again: what it held is lost."""
        ...


Complete = Callable[[Signature], dict[str, object]]


class Instance(Protocol):
    """What runs batches, one at a time."""

    name: str
    state: InstanceState
    reason: str  # why it is not ready
    open_requests: int  # handed over and not answered to the end; kept by who hands over

    async def start(self, complete: Complete | None) -> None:
        """Loads the model. `complete` turns what it says of itself into its configuration. Raises ModelLoadError."""
        ...

    def is_ready(self) -> bool:
        """Takes batches."""
        ...

    def execute(self, message: ExecuteBatch, payload: Payload) -> None:
        """Runs a batch; the results come as an event. Raises ModelExecutionError."""
        ...

    def rest(self) -> None:
        """All is answered."""
        ...

    def cancel(self, request_id: int) -> None:
        """Nobody waits for a request it has."""
        ...

    def acknowledge(self, request_id: int, units: int) -> None:
        """The client of a request it has, or had, has taken responses."""
        ...

    async def stop(self) -> None:
        """Unloads for good."""
        ...

    @property
    def pid(self) -> int | None:
        """Its process, if it has one of its own."""
        ...


def states_of(instances: Iterable[Instance]) -> str:
    """What each is doing and why, for people."""
    return "; ".join(f"{instance.name} is {instance.state}: {instance.reason}" for instance in instances)


def pids_of(instances: Iterable[Instance]) -> list[int]:
    """The processes that run now."""
    return [instance.pid for instance in instances if instance.pid is not None]


class ProcessInstance:
    """An instance in a process of its own."""

    def __init__(self, launch: ModelLaunch, settings: InstanceSettings, events: InstanceEvents) -> None:
        self.name = launch.instance_name
        self.state = InstanceState.STARTING
        self.reason = "it is loading"
        self.open_requests = 0
        self.num_restarts = 0
        self._launch = launch
        self._settings = settings
        self._events = events
        self._process: InstanceProcess | None = None
        self._num_failures = 0  # in a row
        self._restarting: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """The process there is now."""
        return self._process.pid if self._process else None

    async def start(self, complete: Complete | None) -> None:
        """The first start: what goes wrong is raised, not tried again."""
        try:
            await self._spawn(complete)
        except LLMServeError as error:
            self.state, self.reason = InstanceState.STOPPED, error.message
            raise
        self.state, self.reason = InstanceState.READY, ""

    def is_ready(self) -> bool:
        """Loaded, alive and not stopped by a signal."""
        return (
            self.state is InstanceState.READY and self._process is not None and not self._process.is_stopped_by_signal()
        )

    def execute(self, message: ExecuteBatch, payload: Payload) -> None:
        """Runs a batch. Raises ModelExecutionError if there is no memory to hand it over."""
        assert self._process is not None
        self._process.execute(message, payload)

    def rest(self) -> None:
        """All is answered: silence is no sign of a hang."""
        if self._process is not None:
            self._process.rest()

    def cancel(self, request_id: int) -> None:
        """Tells the model."""
        if self._process is not None and self.state is InstanceState.READY:
            self._process.cancel(request_id)

    def acknowledge(self, request_id: int, units: int) -> None:
        """Tells the model."""
        if self._process is not None and self.state is InstanceState.READY:
            self._process.acknowledge(request_id, units)

    async def stop(self) -> None:
        """Unloads, and ends the process. Safe at any time."""
        self.state, self.reason = InstanceState.STOPPED, "it is stopped"
        self._stopped.set()
        if self._restarting is not None:
            self._restarting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._restarting
        if self._process is not None:
            await self._process.stop()

    async def _spawn(self, complete: Complete | None) -> None:
        launch = self._launch
        launch.auto_complete = complete is not None
        process = self._process = InstanceProcess(launch, self._settings, self._on_results, self._on_end)
        try:
            answer = await process.start()
            if complete is not None and isinstance(answer, Signature):
                launch.config = complete(answer)
                answer = await process.load(LoadModel(launch.config))
        except BaseException:
            await process.stop()
            raise
        assert isinstance(answer, ModelLoaded)
        logger.info("%s loaded on %s in %.2f s", self.name, answer.device, answer.load_s)

    def _on_results(self, results: Results, payload: memoryview) -> None:
        self._events.on_results(self, results, payload)

    def _on_end(self, error: LLMServeError) -> None:
        """The process has ended unasked."""
        if self.state is not InstanceState.READY:
            return  # whoever starts it gets to know
        logger.error("%s; restarting it", error.message)
        assert self._process is not None
        if time.monotonic() - self._process.started_s > self._settings.healthy_s:
            self._num_failures = 0
        self.reason = error.message
        self.state = InstanceState.STARTING if not self._num_failures else InstanceState.BACKING_OFF
        self._restarting = asyncio.create_task(self._restart(), name=f"restart {self.name}")
        self._events.on_lost(self, error)

    async def _restart(self) -> None:
        """Until it runs again: at once, then after pauses that double."""
        settings = self._settings
        while not self._stopped.is_set():
            if self._num_failures:
                self.state = InstanceState.BACKING_OFF
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), settings.pause_s(self._num_failures))
            self._num_failures += 1
            self.num_restarts += 1
            self.state = InstanceState.STARTING
            try:
                await self._spawn(None)
            except LLMServeError as error:
                logger.error("%s could not be restarted: %s", self.name, error.message)
                self.state, self.reason = InstanceState.BACKING_OFF, error.message
                self._events.on_lost(self, error)
                continue
            self.state, self.reason = InstanceState.READY, ""
            self._events.on_ready(self)
            return
