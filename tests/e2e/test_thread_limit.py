"""A server whose user may have no more threads: what needs none goes on, the rest says so, and all is well after."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from llmserve.repository.cache import cache_dir
from llmserve.threads import engine_threads, server_threads
from tests.e2e.conftest import Server, servers_started

UID = 54_321  # somebody else's, if the tests run as root, whom no limit binds
ASK = {"messages": [{"role": "user", "content": "Count from one to forty, in words."}], "temperature": 0}
GREEDY = """
import sys, threading, time
over = threading.Event()
threading.Thread(target=lambda: sys.stdin.read() or over.set(), daemon=True).start()
while not over.is_set():
    try:
        threading.Thread(target=over.wait, daemon=True).start()
    except RuntimeError:
        print("full", flush=True)
        time.sleep(0.002)
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")


class Somebody:
    """Who may have `num_more` threads more than now. Root's tests are another user's, who may read what root may."""

    def __init__(self, num_more: int, folder: Path) -> None:
        self.environment = dict(os.environ)
        self.as_user: list[str] = []
        uid = os.getuid()
        if uid == 0:
            uid = UID
            capabilities = ("--inh-caps", "--ambient-caps", "--bounding-set")
            self.as_user = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
            self.as_user += [f"{which}=-all,+dac_read_search" for which in capabilities]
            os.chown(folder, UID, UID)
            (folder / "kernels").symlink_to(cache_dir() / "kernels")
            self.environment |= {"HOME": str(folder), "LLMSERVE_CACHE": str(folder)}
        self.limit = num_more + sum(_num_threads(process) for process in psutil.process_iter() if _uid(process) == uid)
        self.as_user = ["prlimit", f"--nproc={self.limit}", *self.as_user]

    def take_all(self) -> subprocess.Popen[str]:
        """A process that has every thread there is, and takes each that becomes free; returns once it has them."""
        command = [*self.as_user, sys.executable, "-c", GREEDY]
        greedy = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert greedy.stdout is not None
        assert greedy.stdout.readline() == "full\n"
        return greedy


def _uid(process: psutil.Process) -> int:
    try:
        return int(process.uids().real)
    except psutil.Error:  # it has just ended
        return -1


def _num_threads(process: psutil.Process) -> int:
    try:
        return int(process.num_threads())
    except psutil.Error:
        return 0


needs_tools = pytest.mark.skipif(
    shutil.which("prlimit") is None or (os.getuid() == 0 and shutil.which("setpriv") is None), reason="needs util-linux"
)


@pytest.fixture
def start_as(smollm2_path: Path) -> Iterator[Callable[[Somebody], Server]]:
    with servers_started() as start:
        yield lambda somebody: start(
            *(str(smollm2_path), "--kv-cache-memory", "64MiB", "--no-standby-engine"),
            *("--model-control-mode", "explicit", "--load-model", "*"),
            prefix=somebody.as_user,
            environment=somebody.environment,
        )


def wait_for(server: Server, text: str, after: int) -> None:
    """Until the server says so, behind the first `after` characters of its output."""
    until_s = time.monotonic() + 60
    while text not in server.output[after:]:
        assert time.monotonic() < until_s, server.output
        time.sleep(0.02)


@needs_tools
def test_without_another_thread_the_server_goes_on(start_as: Callable[[Somebody], Server], tmp_path: Path) -> None:
    somebody = Somebody(server_threads() + 2 * engine_threads(None) + 8, tmp_path)
    server = start_as(somebody)
    assert server.url, server.output
    (name,) = [model.id for model in server.client().models.list()]
    with httpx.Client(base_url=server.url, timeout=60) as client, somebody.take_all() as greedy:
        expected = client.post("/v1/chat/completions", json=ASK | {"max_tokens": 48}).json()["choices"][0]

        def ask(number: int) -> int:
            """What is parsed, encoded or unpacked in a thread."""
            if number % 2:
                return client.post("/tokenize", json={"prompt": "word " * 5_000}).status_code
            large = {"metadata": {"filler": "x" * 200_000}, "max_tokens": 2}
            return client.post("/v1/chat/completions", json=ASK | large).status_code

        with ThreadPoolExecutor(2 * somebody.limit) as clients:
            assert set(clients.map(ask, range(2 * somebody.limit))) == {200}

        refused = client.post(f"/v2/repository/models/{name}/load")  # it would take a second engine
        assert refused.status_code == 400
        assert "An engine needs about" in refused.json()["error"]
        assert client.get("/ready").status_code == 200

        stream = server.client().chat.completions.create(model=name, stream=True, max_tokens=48, **ASK)  # type: ignore[call-overload]
        chunks = iter(stream)
        text = next(chunks).choices[0].delta.content or ""
        num_said = len(server.output)
        server.engines()[0].kill()
        wait_for(server, "the engine could not be started", num_said)
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        greedy.kill()  # the limit is lifted
        text += "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == expected["message"]["content"]
        assert client.get("/ready").status_code == 200
    assert "Traceback" not in server.output
    assert server.stop() == 0


@needs_tools
@pytest.mark.parametrize("num_threads", [3, 16])
def test_with_too_few_threads_it_does_not_begin(
    start_as: Callable[[Somebody], Server], tmp_path: Path, num_threads: int
) -> None:
    server = start_as(Somebody(num_threads, tmp_path))
    server.join()
    assert server.process.wait(10) == 1
    (line,) = server.output.splitlines()
    assert line.startswith("llmserve: The server needs about ")
    assert "ulimit -u" in line


@needs_tools
def test_kernels_compute_on_the_threads_there_are(tmp_path: Path) -> None:
    """Fewer threads, the same bits, and a line in the log."""
    code = """
import logging, os, resource, sys
import torch
from llmserve.kernels.cpu.library import Library
from llmserve.kernels.cpu.ops import CPUOps, create_cpu_ops
logging.basicConfig(format="%(message)s", stream=sys.stdout)
torch.set_num_threads(1)
alone = create_cpu_ops(1)
x, w = torch.randn(64, 256), torch.randn(512, 256)
expected = alone.linear(x, alone.pack_linear(w))
num_threads = len(os.listdir("/proc/self/task"))
if os.getuid() == 0:
    os.setresuid(54322, 54322, 54322)
resource.setrlimit(resource.RLIMIT_NPROC, (num_threads + 1, num_threads + 1))
library = Library(alone._library.path, alone._library.isa, 8)
ops = CPUOps(library)
print(library.num_threads, torch.equal(ops.linear(x, ops.pack_linear(w)), expected))
"""
    told = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    warning, result = told.stdout.splitlines()
    assert warning.startswith("The kernels run on ")
    num_threads, is_equal = result.split()
    assert int(num_threads) < 8
    assert is_equal == "True"
