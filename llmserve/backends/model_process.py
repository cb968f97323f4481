"""A general model's process: a loop between one socket and one backend. Knows no HTTP, no batcher, no other model.

Started as `python -m llmserve.backends.model_process <fd>`: the descriptor is one end of a socket pair, the other is
the server's. Nothing else is shared, so nothing is left behind, whichever side dies.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections import deque

import msgspec

from llmserve.backends.backend_runner import BackendRunner
from llmserve.backends.model_messages import (
    CancelRequests,
    ExecuteBatch,
    FromModel,
    LoadModel,
    ModelLaunch,
    ToModel,
    UnloadModel,
)
from llmserve.backends.transport import Frame, FrameLink, Payload, send_frame

logger = logging.getLogger(__name__)

FAILED_STATUS = 1  # exit status of a process that has said why: its last message is a LoadFailed
_PR_SET_PDEATHSIG = 1


class ServerLink:
    """The socket to the server. Messages come out in order, but for cancellations, which `poll` brings forward."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._link = FrameLink(connection)
        self._decoder: msgspec.msgpack.Decoder[ToModel] = msgspec.msgpack.Decoder(ToModel)
        self._inbox: deque[tuple[ToModel, memoryview]] = deque()
        self._reading = threading.Lock()

    def receive(self) -> tuple[ToModel, memoryview] | None:
        """Waits for the next message; None when the server has gone."""
        while not self._inbox:
            with self._reading:
                frames = self._link.read()
            if frames is None:
                return None
            self._inbox.extend(map(self._decode, frames))
        return self._inbox.popleft()

    def poll(self) -> list[int]:
        """The requests that have been cancelled by now. Does not wait, and may be called from any thread.

        While the main thread waits in `receive` the cancellations come to it: then there is nothing to do here.
        """
        if not self._reading.acquire(blocking=False):
            return []
        try:
            messages = [self._decode(frame) for frame in self._link.read(socket.MSG_DONTWAIT) or ()]
        except BlockingIOError:
            return []
        finally:
            self._reading.release()
        self._inbox.extend(message for message in messages if not isinstance(message[0], CancelRequests))
        return [id_ for message, _ in messages if isinstance(message, CancelRequests) for id_ in message.ids]

    def send(self, message: FromModel, payload: Payload | None) -> None:
        """Sends a message; waits while the server is behind. The caller sees to it that one thread sends at a time."""
        frame, fd = self._link.encode(message, payload)
        send_frame(self._connection, frame, fd)

    def _decode(self, frame: Frame) -> tuple[ToModel, memoryview]:
        return self._decoder.decode(frame.message), frame.payload


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
            case CancelRequests():
                runner.cancel(message.ids)
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
        status = serve(link, BackendRunner(launch, link.send, link.poll))
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
