"""The server's side of one engine process: starts it, talks to it, sees it die; never starts it again.

Knows no HTTP and no text, and not what the engine was asked for: that is the supervisor's.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import tempfile
import time
from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio

from llmserve import errors
from llmserve.config import EngineConfig
from llmserve.engine.flight_recorder import FlightRecorder
from llmserve.engine.launch import FAILED_STATUS, OUT_OF_MEMORY_STATUS, EngineLaunch
from llmserve.engine.processes import EngineProcesses
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
        processes: EngineProcesses | None = None,
    ) -> None:
        self.state = EngineState.STARTING
        self.last_message_s = time.monotonic()
        self.exit_status: int | None = None  # below 0: the signal that ended it
        self.executing: list[str] = []  # once it is dead: the requests of the step it died in; none between two steps
        self._config = config
        self._on_step = on_step
        self._on_idle = on_idle
        self._on_dead = on_dead
        self._log_level = log_level
        self._processes = processes or EngineProcesses()
        self._inbox: zmq.asyncio.Socket | None = None
        self._outbox: zmq.asyncio.Socket | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._failure: LLMServeError | None = None
        self._last_words = asyncio.Event()
        self._ready: asyncio.Future[EngineReady] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._directory = ""
        self._recorder: FlightRecorder | None = None

    async def start(
        self,
        on_plan: Callable[[MemoryPlan], None] | None = None,
        on_progress: Callable[[LoadProgress], None] | None = None,
    ) -> EngineReady:
        """Starts the process and waits until it takes requests. Raises what the engine says is wrong, and
        EngineDeadError if there is no process, thread, descriptor or disk to be had. `shutdown` cleans up after both.
        """
        self._ready = asyncio.get_running_loop().create_future()
        try:
            process, inbox = await self._start_process()
        except OSError as error:  # zmq's errors are none, but those of its sockets say the same
            raise EngineDeadError(f"The engine's process cannot be started: {error}") from error
        except zmq.ZMQError as error:
            raise EngineDeadError(f"The engine's sockets cannot be opened: {error}") from error
        # a fault of ours in either must not pass for an engine that is merely silent
        self._tasks = [
            asyncio.create_task(self._read(inbox, on_plan, on_progress), name="engine-read"),
            asyncio.create_task(self._watch(process), name="engine-watch"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._on_task_done)
        return await self._ready

    async def _start_process(self) -> tuple[asyncio.subprocess.Process, zmq.asyncio.Socket]:
        self._directory = tempfile.mkdtemp(prefix="llmserve-")  # its owner's alone, as sockets there must be
        endpoint = f"ipc://{self._directory}"
        context = zmq.asyncio.Context.instance()  # one for all engines: each has a thread
        self._inbox = inbox = context.socket(zmq.PULL)
        self._outbox = outbox = context.socket(zmq.PUSH)
        for socket in (inbox, outbox):
            socket.set_hwm(0)
            socket.linger = 0
        outbox.bind(f"{endpoint}/in")
        inbox.bind(f"{endpoint}/out")
        engine = await self._processes.take(self._config.num_threads, self._config.device)
        self._process, self._recorder = engine.process, engine.recorder
        launch = EngineLaunch(
            self._config, f"{endpoint}/in", f"{endpoint}/out", os.getpid(), engine.recorder_fd, self._log_level
        )
        engine.tell(msgspec.json.encode(launch))
        return engine.process, inbox

    @property
    def pid(self) -> int | None:
        """The engine's process id, once started."""
        return self._process.pid if self._process else None

    def is_stopped_by_signal(self) -> bool:
        """Whether somebody has sent it SIGSTOP: alive, and deaf."""
        if self.pid is None:
            return False
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
        return False

    def kill(self, error: LLMServeError) -> None:
        """Ends it at once; `error` is what its death is then called."""
        self._die(error)

    def send(self, message: EngineRequest | AbortRequests | Shutdown) -> None:
        """Queues a message; never blocks. Raises EngineDeadError if nobody is there to take it."""
        if self.state is EngineState.DEAD:
            raise self._failure or EngineDeadError("The engine has ended.")
        assert self._outbox is not None
        # a PUSH socket without a high-water mark takes the message at once: the future is already done
        self._outbox.send(self._encoder.encode(message))

    async def shutdown(self, drain: bool, timeout_s: float) -> None:
        """Asks the engine to finish; past the time it is killed. Nothing of it is left then. Safe to call twice."""
        process = self._process
        if process is not None and process.returncode is None:
            if self.state is EngineState.READY and self._outbox is not None:
                self.state = EngineState.DRAINING
                self._outbox.send(self._encoder.encode(Shutdown(drain)))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), timeout_s)
                if process.returncode is None:
                    logger.warning("the engine did not stop within %.0f s; killing it", timeout_s)
            self.state = EngineState.DRAINING
            _kill(process)  # it loads, and holds nobody's request, or is late, or no longer ours to talk to
            await process.wait()
        if process is not None:
            self.exit_status = process.returncode
        self.state = EngineState.DEAD
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks, self._ready = [], None  # either may hold an error, and that its way through here
        for socket in (self._inbox, self._outbox):
            if socket is not None:
                socket.close(linger=0)
        if self._recorder is not None:
            self.executing = self._recorder.executing()
            self._recorder.close()
            self._recorder = None
        self._remove_directory()

    def _remove_directory(self) -> None:
        """By name: to list it would take a descriptor, and there may be none."""
        directory, self._directory = self._directory, ""
        if not directory:
            return
        for name in ("in", "out"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{directory}/{name}")
        try:
            os.rmdir(directory)
        except OSError as error:
            logger.warning("the folder of an engine's sockets could not be removed: %s", error)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", task.get_name(), exc_info=error)
            self._die(EngineDeadError(f"The connection to the engine failed: {error}"))

    async def _read(
        self,
        inbox: zmq.asyncio.Socket,
        on_plan: Callable[[MemoryPlan], None] | None,
        on_progress: Callable[[LoadProgress], None] | None,
    ) -> None:
        decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        assert self._ready is not None
        while True:
            message = decoder.decode(await inbox.recv())
            self.last_message_s = time.monotonic()
            match message:
                case StepOutputs():
                    self._on_step(message)
                case MemoryPlan():
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
        if status in (FAILED_STATUS, OUT_OF_MEMORY_STATUS):
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
        if self._process is not None:
            _kill(self._process)  # nobody would read what it says
        assert self._ready is not None
        if not self._ready.done():
            self._ready.set_exception(error)
        else:
            self._on_dead(error)


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        process.kill()


def _error_of(message: EngineFailed) -> LLMServeError:
    """The error the engine named by its code, as far as one message is all it needs."""
    for kind in (errors.ConfigError, errors.InsufficientMemoryError, errors.ModelLoadError):
        if kind.code == message.code:
            return kind(message.message)
    return EngineDeadError(f"The engine failed: {message.message}")


def _describe_exit(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
