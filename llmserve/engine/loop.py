"""The loop of an engine process between its two sockets and an EngineCore. Knows no model, no HTTP, no text.

One message a step goes out. While there is nothing to do it waits on its socket; the heartbeat comes from the loop's
own thread, so a hung loop sends none.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from llmserve.engine.core import EngineCore
from llmserve.engine.flight_recorder import FlightRecorder
from llmserve.engine.launch import FAILED_STATUS, HEARTBEAT_S, OUT_OF_MEMORY_STATUS, PROCESS_NAME, EngineLaunch
from llmserve.errors import LLMServeError
from llmserve.messages import (
    AbortRequests,
    EngineFailed,
    EngineReady,
    EngineRequest,
    FinishReason,
    FromEngine,
    Heartbeat,
    SequenceOutput,
    Shutdown,
    StepOutputs,
    ToEngine,
)

logger = logging.getLogger(__name__)

_MESSAGES_A_STEP = 64
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "can't start new thread", "CUDA out of memory")
Send = Callable[[FromEngine], None]
# (what it was told at start, how it talks to the server, where it notes its steps) -> the core, loaded
BuildCore = Callable[[EngineLaunch, Send, FlightRecorder], tuple[EngineCore, EngineReady]]


class EngineLoop:
    """Feeds requests to a core and sends what it answers, until told to stop and, if draining, nothing is left."""

    def __init__(self, core: EngineCore, inbox: zmq.Socket[bytes], send: Send, server_pid: int) -> None:
        self._core = core
        self._inbox = inbox
        self._send = send
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        self._stopping: Shutdown | None = None
        self._server_pid = server_pid

    def run(self) -> None:
        """Returns after a Shutdown has been carried out, or when the server process is gone."""
        while self._stopping is None or (self._stopping.drain and self._core.has_work()):
            self._receive()
            if self._core.has_work():
                self._send(self._core.step())
            if os.getppid() != self._server_pid:
                self.stop(drain=False)  # nobody is left to read the answers

    def stop(self, drain: bool) -> None:
        """As if a Shutdown message had come."""
        self._stopping = Shutdown(drain)

    def _receive(self) -> None:
        """Takes every message that is there; waits, one heartbeat long, only while there is no work."""
        if not self._core.has_work() and not self._inbox.poll(int(HEARTBEAT_S * 1000)):
            self._send_heartbeat()
            return
        for _ in range(_MESSAGES_A_STEP):  # a flood of requests must not hold up the tokens of those that run
            if not self._inbox.poll(0):
                break
            self._handle(self._decoder.decode(self._inbox.recv()))

    def _send_heartbeat(self) -> None:
        self._send(Heartbeat(self._core.stats()))

    def _handle(self, message: ToEngine) -> None:
        match message:
            case EngineRequest():
                self._add(message)
            case AbortRequests():
                self._core.abort(message.request_ids)
                if not self._core.has_work():
                    self._send_heartbeat()  # no step will say that the blocks are free
            case Shutdown():
                self._stopping = message

    def _add(self, request: EngineRequest) -> None:
        try:
            self._core.add(request)
        except LLMServeError as error:
            refused = SequenceOutput(request.request_id, [], FinishReason.ERROR, error=(error.code, error.message))
            self._send(StepOutputs(self._core.num_steps, time.monotonic(), [refused], self._core.stats()))


def run_engine(build: BuildCore) -> int:
    """The life of an engine process, told by an EngineLaunch as JSON on standard input what to do.

    Exit status 0 after a Shutdown, or if the server is gone and has told it nothing; FAILED_STATUS, or
    OUT_OF_MEMORY_STATUS, after an EngineFailed.
    """
    told = sys.stdin.buffer.read()
    if not told:
        return 0
    launch = msgspec.json.decode(told, type=EngineLaunch)
    _name_process()
    logging.basicConfig(level=launch.log_level.upper(), format="%(asctime)s %(levelname)s [engine] %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever sends it to all: the server says when to stop
    context = zmq.Context()
    inbox: zmq.Socket[bytes] = context.socket(zmq.PULL)
    outbox: zmq.Socket[bytes] = context.socket(zmq.PUSH)
    for socket in (inbox, outbox):
        socket.set_hwm(0)  # what is queued is bounded by the requests admitted
    inbox.connect(launch.in_address)
    outbox.connect(launch.out_address)
    encoder = msgspec.msgpack.Encoder()

    def send(message: FromEngine) -> None:
        outbox.send(encoder.encode(message))

    try:
        core, ready = build(launch, send, FlightRecorder(launch.recorder_fd))
        loop = EngineLoop(core, inbox, send, launch.server_pid)
        signal.signal(signal.SIGTERM, lambda *_: loop.stop(drain=True))
        gc.freeze()  # of what loading has left a collection would take a tenth of a second, in the middle of a step
        send(ready)
        loop.run()
    except LLMServeError as error:
        send(EngineFailed(error.code, error.message))
        return FAILED_STATUS
    except Exception as error:
        if is_out_of_memory(error):
            logger.error("the engine is out of memory: %s", error)
            send(EngineFailed("engine_dead", f"It is out of memory: {error}"))
            return OUT_OF_MEMORY_STATUS
        logger.exception("the engine failed")
        send(EngineFailed("engine_dead", f"{type(error).__name__}: {error}"))
        return FAILED_STATUS
    finally:
        context.destroy(linger=2000)  # the last words are read, if anyone is left to read them
    return 0


def is_out_of_memory(error: Exception) -> bool:
    """Python's own error, and torch's: one class on a GPU, on a CPU one among many that only its text tells apart."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, OSError | RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def _name_process() -> None:
    """What tools like `ps` and `top` call it: one that was a standby was started under another name."""
    with contextlib.suppress(OSError):  # not on Linux
        Path("/proc/self/comm").write_text(PROCESS_NAME)
