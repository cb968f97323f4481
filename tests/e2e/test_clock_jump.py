"""A wall clock that jumps by days under a running server: streams, deadlines, keys, limits and certificates go on."""

from __future__ import annotations

import json
import os
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from tests.door.conftest import write_keys
from tests.e2e.conftest import Server

DAY_S = 86_400
ASK = {"messages": [{"role": "user", "content": "Count from one to forty, in words."}], "temperature": 0}
# Imported by every Python at its start: from then on the wall clock is what a file says it is late.
SHIFTED_CLOCK = """
import os, time
real_time, real_time_ns, offset = time.time, time.time_ns, os.open(os.environ["CLOCK_OFFSET_FILE"], os.O_RDONLY)
def offset_s():
    return int(os.pread(offset, 32, 0) or 0)
time.time = lambda: real_time() + offset_s()
time.time_ns = lambda: real_time_ns() + offset_s() * 10**9
open(f"{os.environ['CLOCK_OFFSET_FILE']}.{os.getpid()}", "w").close()
"""


class Clock:
    """The wall clock of a server and all its processes."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "offset"
        self.jump(0)
        (folder / "sitecustomize.py").write_text(SHIFTED_CLOCK)
        path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))
        self.environment = {**os.environ, "PYTHONPATH": path, "CLOCK_OFFSET_FILE": str(self._file)}

    def jump(self, offset_s: int) -> None:
        """To so many seconds from the true time."""
        self._file.write_text(f"{offset_s:+020d}")

    def is_used_by(self, pid: int) -> bool:
        return Path(f"{self._file}.{pid}").exists()


class Certificate:
    """The server's, which may be replaced by one of another authority."""

    def __init__(self, folder: Path) -> None:
        self.certificate, self.key = folder / "tls.crt", folder / "tls.key"
        self.renew()

    def renew(self) -> None:
        self.authority = trustme.CA()
        issued = self.authority.issue_cert("127.0.0.1")
        self.key.write_bytes(issued.private_key_pem.bytes())
        self.certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))

    def trust(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    folder = tmp_path / "clock"
    folder.mkdir()
    return Clock(folder)


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return Certificate(tmp_path)


@pytest.fixture
def served(
    clock: Clock, certificate: Certificate, tmp_path: Path, smollm2_path: Path
) -> Iterator[tuple[Server, Callable[..., httpx.Client]]]:
    """The server, and who makes clients of it."""
    keys = write_keys(tmp_path / "keys.toml", alice="", busy="requests_per_minute = 1")
    server = Server(
        *(str(smollm2_path), "--kv-cache-memory", "64MiB", "--no-standby-engine"),
        *("--api-keys", str(tmp_path / "keys.toml"), "--request-log", str(tmp_path / "log")),
        *("--tls-certificate", str(certificate.certificate), "--tls-key", str(certificate.key)),
        environment=clock.environment,
    )
    assert server.url, server.output

    def client(name: str = "alice", key: str = "") -> httpx.Client:
        headers = {"authorization": f"Bearer {key or keys[name]}"}
        return httpx.Client(base_url=server.url, verify=certificate.trust(), headers=headers, timeout=30)

    yield server, client
    assert server.stop() == 0


def stream(client: httpx.Client, jump: Callable[[int], object]) -> str:
    """The text of an answer; `jump` is told the number of each event."""
    text = ""
    with client.stream("POST", "/v1/chat/completions", json=ASK | {"max_tokens": 40, "stream": True}) as answer:
        for number, line in enumerate(line for line in answer.iter_lines() if line.startswith("data: {")):
            jump(number)
            choices = json.loads(line.removeprefix("data: "))["choices"]
            text += choices[0]["delta"].get("content") or ""
    return text


def test_a_day_forth_and_back(
    served: tuple[Server, Callable[..., httpx.Client]], clock: Clock, certificate: Certificate, tmp_path: Path
) -> None:
    server, make_client = served
    (engine,) = server.engines()
    assert clock.is_used_by(server.process.pid)
    assert clock.is_used_by(engine.pid)
    with make_client() as client:
        undisturbed = stream(client, lambda number: None)
        assert stream(client, lambda number: clock.jump((DAY_S, 0, -DAY_S)[number // 5 % 3])) == undisturbed
        for offset_s in (DAY_S, -DAY_S):
            clock.jump(offset_s)
            # it has jumped, and nothing hangs, ends early, or lasts longer for it
            answer = client.post("/v1/chat/completions", json=ASK | {"max_tokens": 2})
            assert answer.json()["created"] == pytest.approx(time.time() + offset_s, abs=60)
            late = client.post("/v1/completions", json=late_request(), headers={"x-request-timeout": "0.5"})
            assert late.status_code == 504
            assert client.get("/ready").status_code == 200
    with make_client("busy") as busy:
        assert busy.get("/v1/models").status_code == 200
        clock.jump(DAY_S)
        refused = busy.get("/v1/models")
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
    clock.jump(-DAY_S)
    keys = write_keys(tmp_path / "keys.toml", bob="")
    certificate.renew()
    until_s = time.monotonic() + 20
    while True:
        with make_client(key=keys["bob"]) as client:
            if client.get("/v1/models").status_code == 200:
                break
        assert time.monotonic() < until_s, "the new keys were not read"
        time.sleep(0.1)
    with make_client("alice") as client:
        assert client.get("/v1/models").status_code == 401
    assert server.engines() == [engine]
    entries = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    times = [entry["time"] for entry in entries]
    assert max(times) - min(times) > 1.9 * DAY_S
    assert all(0 <= entry["duration_s"] < 60 for entry in entries)
    assert "Traceback" not in server.output


def late_request() -> dict[str, object]:
    """More than can be said within half a second."""
    return {"prompt": [1] * 8, "max_tokens": 1000, "ignore_eos": True}
