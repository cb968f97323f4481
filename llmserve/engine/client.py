"""The server's side of an engine process: starts it, talks to it, sees it die. Knows no HTTP and no text."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import msgspec
import zmq
import zmq.asyncio

from llmserve import errors
from llmserve.config import EngineConfig
from llmserve.engine.launch import FAILED_STATUS, EngineLaunch
from llmserve.errors import EngineDeadError, LLMServeError
from llmserve.messages import (
    AbortRequests,
    EngineFailed,
    EngineReady,
    EngineRequest,
    EngineStats,
    FromEngine,
    Heartbeat,
    LoadProgress,
    MemoryPlan,
    Shutdown,
    StepOutputs,
)

logger = logging.getLogger(__name__)


# -P: the current directory is its owner's, and none of its files is a module of ours
ENGINE_COMMAND = (sys.executable, "-P", "-m", "llmserve.engine.process")


class EngineState(enum.Enum):
    """The life of an engine."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class EngineClient:
    """One engine process. `on_step` gets every step's outputs, `on_idle` the gauges while there are none.

    `on_dead` is called once, if the process ends unasked.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_step: Callable[[StepOutputs], None],
        on_idle: Callable[[EngineStats], None],
        on_dead: Callable[[LLMServeError], None],
        log_level: str = "info",
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self.state = EngineState.STARTING
        self.plan: MemoryPlan | None = None
        self.last_step_s = time.monotonic()
        self.last_message_s = time.monotonic()
        self._config = config
        self._on_step = on_step
        self._on_idle = on_idle
        self._on_dead = on_dead
        self._log_level = log_level
        self._command = command
        self._context = zmq.asyncio.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._outbox = self._context.socket(zmq.PUSH)
        self._encoder = msgspec.msgpack.Encoder()
        self._failure: LLMServeError | None = None
        self._last_words = asyncio.Event()
        self._ready: asyncio.Future[EngineReady] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._directory = tempfile.TemporaryDirectory(prefix="llmserve-")

    async def start(
        self,
        on_plan: Callable[[MemoryPlan], None] | None = None,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> EngineReady:
        """Starts the process and waits until it takes requests. Raises what the engine says is wrong."""
        endpoint = f"ipc://{self._directory.name}"
        launch = EngineLaunch(self._config, f"{endpoint}/in", f"{endpoint}/out", os.getpid(), self._log_level)
        for socket in (self._inbox, self._outbox):
            socket.set_hwm(0)
            socket.linger = 0
        self._outbox.bind(launch.in_address)
        self._inbox.bind(launch.out_address)
        self._ready = asyncio.get_running_loop().create_future()
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=asyncio.subprocess.PIPE)
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(launch))
        self._process.stdin.close()
        # a fault of ours in either must not pass for an engine that is merely silent
        self._tasks = [
            asyncio.create_task(self._read(on_plan, on_progress), name="engine-read"),
            asyncio.create_task(self._watch(self._process), name="engine-watch"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._on_task_done)
        return await self._ready

    @property
    def pid(self) -> int | None:
        """The engine's process id, once started."""
        return self._process.pid if self._process else None

    def send(self, message: EngineRequest | AbortRequests | Shutdown) -> None:
        """Queues a message; never blocks. Raises EngineDeadError if nobody is there to take it."""
        if self.state is EngineState.DEAD:
            raise self._failure or EngineDeadError("The engine has ended.")
        # a PUSH socket without a high-water mark takes the message at once: the future is already done
        self._outbox.send(self._encoder.encode(message))

    async def shutdown(self, drain: bool, timeout_s: float) -> None:
        """Asks the engine to finish; past the time it is killed. Safe to call twice."""
        process = self._process
        if process is not None and process.returncode is None:
            if self.state is EngineState.READY:
                self.state = EngineState.DRAINING
                self._outbox.send(self._encoder.encode(Shutdown(drain)))
            else:
                self.state = EngineState.DRAINING
                process.kill()  # it loads, and holds nobody's request, or it is no longer ours to talk to
            try:
                await asyncio.wait_for(process.wait(), timeout_s)
            except TimeoutError:
                logger.warning("the engine did not stop within %.0f s; killing it", timeout_s)
                process.kill()
                await process.wait()
        self.state = EngineState.DEAD
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)
        self._directory.cleanup()

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", task.get_name(), exc_info=error)
            self._die(EngineDeadError(f"The connection to the engine failed: {error}"))

    async def _read(
        self, on_plan: Callable[[MemoryPlan], None] | None, on_progress: Callable[[LoadProgress], None] | None
    ) -> None:
        decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        assert self._ready is not None
        while True:
            message = decoder.decode(await self._inbox.recv())
            self.last_message_s = time.monotonic()
            match message:
                case StepOutputs():
                    self.last_step_s = self.last_message_s
                    self._on_step(message)
                case MemoryPlan():
                    self.plan = message
                    if on_plan:
                        on_plan(message)
                case LoadProgress():
                    if on_progress:
                        on_progress(message)
                case EngineReady():
                    if self.state is EngineState.STARTING:
                        self.state = EngineState.READY
                    if not self._ready.done():
                        self._ready.set_result(message)
                case EngineFailed():
                    self._failure = _error_of(message)
                    self._last_words.set()
                case Heartbeat():
                    self._on_idle(message.stats)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """The process's end, unasked, is the engine's death; its last message, if any, says why."""
        status = await process.wait()
        if self.state is EngineState.DRAINING:
            return
        if status == FAILED_STATUS:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._last_words.wait(), 1.0)
        self._die(
            self._failure or EngineDeadError(f"The engine process ended unexpectedly ({_describe_exit(status)}).")
        )

    def _die(self, error: LLMServeError) -> None:
        if self.state is EngineState.DEAD:
            return
        self.state = EngineState.DEAD
        self._failure = error
        if self._process is not None and self._process.returncode is None:
            self._process.kill()  # nobody would read what it says
        assert self._ready is not None
        if not self._ready.done():
            self._ready.set_exception(error)
        else:
            logger.error("%s", error.message)
            self._on_dead(error)


def _error_of(message: EngineFailed) -> LLMServeError:
    """The error the engine named by its code, as far as one message is all it needs."""
    for kind in (errors.ConfigError, errors.InsufficientMemoryError, errors.ModelLoadError):
        if kind.code == message.code:
            return kind(message.message)
    return EngineDeadError(f"The engine failed: {message.message}")


def _describe_exit(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
