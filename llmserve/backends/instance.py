"""The server's side of one model process: starts it, talks to it, sees it die or hang. Knows no batcher."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from llmserve.backends.model_messages import (
    AcknowledgeResponses,
    CancelRequests,
    ExecuteBatch,
    FromModel,
    LoadFailed,
    LoadModel,
    ModelLaunch,
    ModelLoaded,
    Results,
    Signature,
    ToModel,
    UnloadModel,
)
from llmserve.backends.transport import FrameLink, Payload
from llmserve.errors import LLMServeError, ModelExecutionError, ModelLoadError
from llmserve.threads import require_threads

logger = logging.getLogger(__name__)

OnResults = Callable[[Results, memoryview], None]
_JOINED_BYTES = 64 * 1024
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSettings:
    """How long a model's process may take. 0 seconds: as long as it likes."""

    load_timeout_s: float = 600.0
    execution_timeout_s: float = 300.0  # with work and without a word for so long, it is hung: killed and restarted
    unload_timeout_s: float = 10.0
    min_backoff_s: float = 0.5  # before the second restart in a row; the first is immediate
    max_backoff_s: float = 30.0
    healthy_s: float = 60.0  # a process that has run so long has recovered: the next restart is a first one
    log_level: str = "info"

    def pause_s(self, num_failures: int) -> float:
        """Before a restart after so many failures in a row: none before the first, then pauses that double."""
        if not num_failures:
            return 0.0
        return min(self.min_backoff_s * 2.0 ** (num_failures - 1), self.max_backoff_s)


class InstanceProcess:
    """One process, from its start to its end; never restarted. `on_end` is called once if it ends unasked."""

    def __init__(
        self,
        launch: ModelLaunch,
        settings: InstanceSettings,
        on_results: OnResults,
        on_end: Callable[[LLMServeError], None],
    ) -> None:
        self.name = launch.instance_name
        self.started_s = time.monotonic()
        self._launch = launch
        self._settings = settings
        self._on_results = on_results
        self._on_end = on_end
        self._decoder: msgspec.msgpack.Decoder[FromModel] = msgspec.msgpack.Decoder(FromModel)
        self._unsent: deque[tuple[memoryview, int | None]] = deque()
        self._is_writing = False
        self._answers: asyncio.Queue[FromModel] = asyncio.Queue()
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._failure: LLMServeError | None = None
        self._stopping = False
        self._closed = False
        self._last_sign_s = 0.0
        self._has_work = False
        self._hang_timer: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        """The process's id, once started."""
        return self._process.pid if self._process else None

    async def start(self) -> Signature | ModelLoaded:
        """Starts the process; it says its signature, or that it has loaded. Raises ModelLoadError."""
        self._loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(require_threads, 1 + self._launch.num_threads, "A model's process")
            self._process = await self._start_process()
        except OSError as error:
            raise ModelLoadError(f"{self.name}: its process cannot be started: {error}") from error
        self._loop.add_reader(self._socket.fileno(), self._receive)
        self._watch = asyncio.create_task(self._watch_end(self._process), name=f"watch {self.name}")
        self._send(self._launch, None)
        return await self._answer("start")

    async def _start_process(self) -> asyncio.subprocess.Process:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._link = FrameLink(self._socket)
        threads = dict.fromkeys(_THREAD_VARIABLES, str(self._launch.num_threads))
        with theirs:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # the current directory holds none of our modules
                "-m",
                "llmserve.backends.model_process",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # what it starts itself is killed with it; Ctrl-C does not reach it
                env={**threads, "PYTHONUNBUFFERED": "1", **os.environ},
            )

    async def load(self, message: LoadModel) -> ModelLoaded:
        """Loads with the complete configuration. Raises ModelLoadError."""
        self._send(message, None)
        answer = await self._answer("load")
        assert isinstance(answer, ModelLoaded)
        return answer

    def execute(self, message: ExecuteBatch, payload: Payload) -> None:
        """Hands over a batch. Raises ModelExecutionError if there is no memory for its tensors."""
        if not self._has_work:
            self._last_sign_s = self._loop.time()
            self._has_work = True
            if self._hang_timer is None and self._settings.execution_timeout_s:
                self._hang_timer = self._loop.call_later(self._settings.execution_timeout_s, self._check_hang)
        self._send(message, payload)

    def rest(self) -> None:
        """It has answered everything: until the next batch nothing is expected of it."""
        self._has_work = False

    def cancel(self, request_id: int) -> None:
        """Lets the model know that nobody waits for this request."""
        self._send(CancelRequests([request_id]), None)

    def acknowledge(self, request_id: int, units: int) -> None:
        """Lets the model know that the client has taken responses."""
        self._send(AcknowledgeResponses(request_id, units), None)

    def kill(self, error: LLMServeError) -> None:
        """Ends the process at once, and whatever it has started; `error` is then why."""
        self._failure = self._failure or error
        self._kill_group()

    def is_stopped_by_signal(self) -> bool:
        """Whether somebody has sent it SIGSTOP: alive, and deaf."""
        if self.pid is None:
            return False
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
        return False

    async def stop(self) -> None:
        """Unloads the model and ends the process; past the time it is killed. Safe at any moment of its life."""
        self._stopping = True
        if self._process is None or self._watch is None:
            return
        if self._process.returncode is None:
            self._send(UnloadModel(), None)
            try:
                await asyncio.wait_for(self._process.wait(), self._settings.unload_timeout_s or None)
            except TimeoutError:
                logger.warning(
                    "%s did not unload within %.0f s; killing it", self.name, self._settings.unload_timeout_s
                )
        self._kill_group()
        await self._watch

    async def _answer(self, what: str) -> Signature | ModelLoaded:
        """The next message of a process that is starting or loading."""
        getter = asyncio.ensure_future(self._answers.get())
        assert self._watch is not None
        timeout_s = self._settings.load_timeout_s or None
        try:
            await asyncio.wait((getter, self._watch), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not getter.done() and not self._watch.done():
                self.kill(ModelLoadError(f"{self.name} did not {what} within {timeout_s:g} s; it has been killed."))
                await self._watch
            if getter.done() and not isinstance(answer := getter.result(), LoadFailed | Results):
                return answer
        except asyncio.CancelledError:
            self._stopping = True
            self._kill_group()
            raise
        finally:
            getter.cancel()
        await self._watch
        failure = self._failure
        raise failure if isinstance(failure, ModelLoadError) else ModelLoadError(failure.message if failure else "")

    def _send(self, message: ToModel, payload: Payload | None) -> None:
        try:
            frame, fd = self._link.encode(message, payload)
        except (OSError, ValueError, TypeError, OverflowError) as error:  # no memory; a parameter that has no encoding
            raise ModelExecutionError(f"A message to {self.name} cannot be written: {error}") from error
        self._unsent.append((memoryview(frame), fd))
        if len(self._unsent) == 1:
            self._loop.call_soon(self._flush)  # with what else is sent in this round of the loop

    def _flush(self) -> None:
        """Sends what the socket takes; the rest when it takes more."""
        try:
            while self._unsent:
                self._join_unsent()
                frame, fd = self._unsent[0]
                sent = socket.send_fds(self._socket, [frame], [fd]) if fd is not None else self._socket.send(frame)
                if fd is not None:
                    os.close(fd)
                if sent < len(frame):
                    self._unsent[0] = (frame[sent:], None)
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            if not self._is_writing:
                self._is_writing = True
                self._loop.add_writer(self._socket.fileno(), self._flush)
            return
        except OSError:
            self._drop_unsent()  # it has just ended: its requests are failed when that is seen
        if self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self._socket.fileno())

    def _join_unsent(self) -> None:
        """Small frames are sent together: the process wakes up once for all of them."""
        joined: list[memoryview] = []
        num_bytes = 0
        while self._unsent and self._unsent[0][1] is None and num_bytes < _JOINED_BYTES:
            frame, _ = self._unsent.popleft()
            joined.append(frame)
            num_bytes += len(frame)
        if joined:
            self._unsent.appendleft((memoryview(b"".join(joined)) if len(joined) > 1 else joined[0], None))

    def _receive(self) -> bool:
        """Takes what the socket brings; False if nothing more can come. A process that talks nonsense is killed; so is
        one whose answer cannot be passed on, because those behind it are lost: a hang would say nothing."""
        try:
            frames = self._link.read()
            if frames is not None:
                self._last_sign_s = self._loop.time()
                for frame in frames:
                    self._take(self._decoder.decode(frame.message), frame.payload)
                return True
        except BlockingIOError:
            return True
        except (ValueError, msgspec.MsgspecError) as error:
            self.kill(ModelExecutionError(f"{self.name} sent a message that cannot be read: {error}"))
        except Exception as error:  # a fault of ours
            logger.error("what %s answered could not be passed on", self.name, exc_info=error)
            self.kill(ModelExecutionError(f"What {self.name} answered could not be passed on: {error!r}"))
        self._loop.remove_reader(self._socket.fileno())
        self._kill_group()  # it has closed its end: nobody can talk to it any more
        return False

    def _take(self, message: FromModel, payload: memoryview) -> None:
        if isinstance(message, Results):
            self._on_results(message, payload)
            return
        if isinstance(message, LoadFailed):
            self._failure = ModelLoadError(message.message)
        self._answers.put_nowait(message)

    def _check_hang(self) -> None:
        self._hang_timer = None
        if not self._has_work:
            return
        timeout_s = self._settings.execution_timeout_s
        silent_s = self._loop.time() - self._last_sign_s
        if silent_s >= timeout_s:
            text = f"{self.name} has not answered for {timeout_s:g} s: it is hung, and has been killed"
            self.kill(ModelExecutionError(text))
        else:
            self._hang_timer = self._loop.call_later(timeout_s - silent_s, self._check_hang)

    async def _watch_end(self, process: asyncio.subprocess.Process) -> None:
        """What it said last is read; then its end is told, unless it was asked for."""
        status = await process.wait()
        with contextlib.suppress(OSError):
            while self._socket.recv(1, socket.MSG_PEEK) and self._receive():
                pass
        self._close()
        if self._failure is None:
            self._failure = ModelExecutionError(f"The process of {self.name} ended ({_describe_exit(status)})")
        if not self._stopping:
            self._on_end(self._failure)

    def _close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._link.close()
        self._drop_unsent()
        if self._hang_timer is not None:
            self._hang_timer.cancel()
        self._kill_group()  # the process is gone; what it has started may not be
        self._closed = True

    def _drop_unsent(self) -> None:
        while self._unsent:
            _, fd = self._unsent.popleft()
            if fd is not None:
                os.close(fd)

    def _kill_group(self) -> None:
        """The process and what it has started: they are a session of their own."""
        if self.pid is not None and not self._closed:  # later the number may be somebody else's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


def _describe_exit(status: int) -> str:
    if status == -signal.SIGKILL:
        return "killed by signal 9, as the kernel does when memory runs out"
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
