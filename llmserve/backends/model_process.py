"""A general model's process: a loop between one socket and one backend. Knows no HTTP, no batcher, no other model.

Started as `python -m llmserve.backends.model_process <fd>`: the descriptor is one end of a socket pair, the other is
the server's. Nothing else is shared, so nothing is left behind, whichever side dies.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec

from llmserve.backends.backend_runner import BackendRunner
from llmserve.backends.model_messages import (
    AcknowledgeResponses,
    CancelRequests,
    ExecuteBatch,
    FromModel,
    LoadModel,
    ModelLaunch,
    ToModel,
    UnloadModel,
)
from llmserve.backends.transport import Frame, FrameLink, Payload, send_frame

FAILED_STATUS = 1  # exit status of a process that has said why: its last message is a LoadFailed
_PR_SET_PDEATHSIG = 1
_FRESH_S = 0.001  # so long what was read is taken to be all there is: looking again costs as much as a small model


class ServerLink:
    """The socket to the server. One thread at a time reads it, for all; the others wait for what that one reads.

    Messages come out in order. Cancellations and acknowledgements do not come out: whoever reads one hands it to the
    runner at once, as threads may wait for it while the main thread is busy in the model.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.runner: BackendRunner | None = None
        self._connection = connection
        self._link = FrameLink(connection)
        self._decoder: msgspec.msgpack.Decoder[ToModel] = msgspec.msgpack.Decoder(ToModel)
        self._inbox: deque[tuple[ToModel, memoryview]] = deque()
        self._changed = threading.Condition()
        self._is_read = False  # by some thread, now
        self._read_s = 0.0  # when it was read last
        self._ended = False
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)

    def receive(self) -> tuple[ToModel, memoryview] | None:
        """Waits for the next message; None when the server has gone."""
        with self._changed:
            if self._inbox and not self._ended and time.monotonic() - self._read_s > _FRESH_S:
                self._read(0.0)  # it has waited here: it may have been cancelled meanwhile
            while not self._inbox and not self._ended:
                self._read(None)
            return self._inbox.popleft() if self._inbox else None

    def poll(self) -> None:
        """Reads what is there, without waiting; from any thread."""
        with self._changed:
            if not self._is_read and not self._ended:  # else who reads sees to it
                self._read(0.0)

    def wait_until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Reads until `done`; False if the time is up or the server has gone. From any thread."""
        until_s = time.monotonic() + timeout_s
        with self._changed:
            while not done():
                left_s = until_s - time.monotonic()
                if left_s <= 0 or self._ended:
                    return False
                self._read(left_s)
        return True

    def _read(self, timeout_s: float | None) -> None:
        """Reads once, or waits until another thread has. `_changed` is held, but not while waiting."""
        if self._is_read:
            self._changed.wait(timeout_s)
            return
        self._is_read = True
        self._changed.release()
        frames: list[Frame] | None = []
        try:
            # by poll, as who waits in a receive is woken too each time the server has read an answer
            if self._readable.poll(None if timeout_s is None else timeout_s * 1e3):
                frames = self._link.read()
        finally:
            self._changed.acquire()
            self._is_read = False
            self._read_s = time.monotonic()
            self._changed.notify_all()
        if frames is None:
            self._ended = True
            return
        for frame in frames:
            message = self._decoder.decode(frame.message)
            if isinstance(message, CancelRequests | AcknowledgeResponses):
                self._obey(message)
            else:
                self._inbox.append((message, frame.payload))

    def _obey(self, message: CancelRequests | AcknowledgeResponses) -> None:
        if self.runner is None:
            return
        if isinstance(message, CancelRequests):
            self.runner.cancel(message.ids)
        else:
            self.runner.acknowledge(message.id, message.units)

    def send(self, message: FromModel, payload: Payload | None) -> None:
        """Sends a message; waits while the server is behind. The caller sees to it that one thread sends at a time."""
        frame, fd = self._link.encode(message, payload)
        send_frame(self._connection, frame, fd)


def serve(link: ServerLink, runner: BackendRunner) -> int:
    """Takes messages until told to unload, or the server has gone. Returns the exit status."""
    if not runner.launch():
        return FAILED_STATUS
    _settle()
    while (received := link.receive()) is not None:
        message, payload = received
        del received  # the tensors live as long as the batch, not until the next message
        match message:
            case ExecuteBatch():
                runner.execute(message, payload)
            case LoadModel():
                if not runner.load(message):
                    return FAILED_STATUS
                _settle()
            case UnloadModel():
                break
        del message, payload
    runner.unload()
    return 0


def _settle() -> None:
    """What a model is made of need not be looked at by the garbage collector again."""
    gc.collect()
    gc.freeze()


def main() -> int:
    """Exit status 0 after an UnloadModel or the server's end, FAILED_STATUS after a LoadFailed."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle; it says when to stop
    link = ServerLink(socket.socket(fileno=int(sys.argv[1])))
    received = link.receive()
    if received is None:
        return 0
    launch = received[0]
    assert isinstance(launch, ModelLaunch)
    logging.basicConfig(
        level=launch.log_level.upper(), format=f"%(asctime)s %(levelname)s [{launch.instance_name}] %(message)s"
    )
    try:
        runner = link.runner = BackendRunner(launch, link.send, link)
        status = serve(link, runner)
    except ConnectionError:
        return 0  # the server ended while it was being answered
    # Threads a model has started, and destructors of its libraries, have no say in whether the process ends.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _die_with_parent() -> None:
    """A hung model must not outlive a killed server. Where there is no prctl, the socket's end has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
