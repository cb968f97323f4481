"""A client that reads slowly holds its model's stream back: nothing piles up, nothing is lost, others are answered."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from llmserve.backends import response_window
from llmserve.backends.general import GeneralModel
from llmserve.backends.model_messages import UnloadModel
from llmserve.backends.model_process import ServerLink
from llmserve.backends.response_window import WINDOW_UNITS
from llmserve.backends.transport import FrameLink
from llmserve.repository.settings import RepositorySettings
from tests.general.general_models import PYTHON, arrays, fp32, request, running, until, write_model
from tests.v2.v2_server import V2Server, serve_v2

# sends as many responses as its input says, each of 2,000 numbers that begin with its own; `sent` says how far it is
SOURCE = """
import os
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.sent = os.open(os.path.join(args["model_repository"], "sent"), os.O_RDWR | os.O_CREAT)

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for number in range(int(pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()[0])):
                if request.is_cancelled():
                    break
                values = np.full(2000, number, np.float32)
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", values)]))
                os.pwrite(self.sent, b"%8d" % (number + 1), 0)
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
DECOUPLED = PYTHON + "model_transaction_policy { decoupled: true }"
MANY = 3000


def sent(folder: Path) -> int:
    return int((folder / "m" / "sent").read_bytes() or 0)


async def until_it_stands_still(folder: Path) -> int:
    """How far the model has come when it has come no further for a while."""
    before = -1
    while (now := sent(folder)) != before or not now:
        before = now
        await asyncio.sleep(0.3)
    return now


def test_a_model_waits_for_its_client(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, {"model.py": SOURCE}, DECOUPLED) as model:
            stream = model.infer(request({"INPUT0": fp32(MANY)}))
            first = await anext(stream)
            assert await until_it_stands_still(tmp_path) == WINDOW_UNITS
            numbers = [arrays(first)["OUTPUT0"][0]]
            numbers += [arrays(r)["OUTPUT0"][0] async for r in stream if r.outputs]
            assert numbers == list(range(MANY))

    asyncio.run(main())


def test_a_client_that_goes_frees_the_model_that_waits_for_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, {"model.py": SOURCE}, DECOUPLED) as model:
            async with aclosing(model.infer(request({"INPUT0": fp32(MANY)}))) as stream:
                await anext(stream)
                await until_it_stands_still(tmp_path)
            answers = [r async for r in model.infer(request({"INPUT0": fp32(2)})) if r.outputs]
            assert len(answers) == 2
            await until(lambda: sent(tmp_path) == 2)

    asyncio.run(main())


def test_a_client_that_never_reads_loses_its_request(tmp_path: Path) -> None:
    impatient = f"from llmserve.backends import backend_runner\nbackend_runner.STALL_S = 0.2\n{SOURCE}"
    assert response_window.STALL_S > 1

    async def main() -> None:
        async with running(tmp_path, {"model.py": impatient}, DECOUPLED) as model:
            slow = model.infer(request({"INPUT0": fp32(MANY)}))
            await anext(slow)
            answers = [r async for r in model.infer(request({"INPUT0": fp32(2)})) if r.outputs]  # it waits behind
            assert len(answers) == 2
            with pytest.raises(Exception, match=r"has not taken a response for 0\.2 s"):
                async for _ in slow:
                    pass

    asyncio.run(main())


def test_large_responses_count_for_more(tmp_path: Path) -> None:
    large = SOURCE.replace("np.full(2000", "np.full(500_000")  # 2 MB

    async def main() -> None:
        async with running(tmp_path, {"model.py": large}, DECOUPLED) as model:
            stream = model.infer(request({"INPUT0": fp32(50)}))
            await anext(stream)
            assert await until_it_stands_still(tmp_path) < 8
            assert len([r async for r in stream if r.outputs]) == 49

    asyncio.run(main())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[V2Server]:
    write_model(tmp_path, {"model.py": SOURCE})
    (tmp_path / "m" / "config.pbtxt").write_text(DECOUPLED)
    with serve_v2(RepositorySettings(model_repository=(str(tmp_path),)), GeneralModel) as running_server:
        yield running_server


def test_over_http(tmp_path: Path, server: V2Server) -> None:
    body = json.dumps({"INPUT0": [MANY]}).encode()
    with socket.create_connection(("127.0.0.1", server.http_port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        head = f"POST /v2/models/m/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        assert asyncio.run(until_it_stands_still(tmp_path)) < MANY - WINDOW_UNITS
        events, end = 0, b""
        while not end.endswith(b"0\r\n\r\n"):
            data = client.recv(1 << 20)
            events += (end[-5:] + data).count(b"data: ") - end[-5:].count(b"data: ")
            end = (end + data)[-16:]
        assert events == MANY


def test_over_grpc(tmp_path: Path, server: V2Server) -> None:
    message = service_pb2.ModelInferRequest(model_name="m")
    message.inputs.add(name="INPUT0", datatype="FP32", shape=[1])
    message.raw_input_contents.append(fp32(MANY).tobytes())
    with grpc.insecure_channel(server.grpc) as channel:
        answers = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([message]))
        assert asyncio.run(until_it_stands_still(tmp_path)) < MANY - WINDOW_UNITS
        numbers = [np.frombuffer(a.infer_response.raw_output_contents[0], np.float32)[0] for a in answers]
    assert numbers == list(range(MANY))


def test_what_one_thread_reads_another_gets() -> None:
    """A thread that waits for its client may read the main thread's next message."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = ServerLink(theirs)
        released = threading.Event()
        reader = threading.Thread(target=lambda: link.wait_until(released.is_set, 20))
        reader.start()
        received: list[object] = []
        main = threading.Thread(target=lambda: received.append(link.receive()))
        main.start()
        frame, _ = FrameLink(ours).encode(UnloadModel(), None)
        ours.sendall(frame)
        main.join(10)
        released.set()
        frame, _ = FrameLink(ours).encode(UnloadModel(), None)
        ours.sendall(frame)
        reader.join(10)
        assert [type(message[0]) for message in received if isinstance(message, tuple)] == [UnloadModel]
        assert not reader.is_alive()
