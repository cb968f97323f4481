"""A real server whose engine is killed and stopped under streams: every client gets what it would have got anyway."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

MODEL = "smollm2-135m-instruct"
STORY = "Once upon a time there was a"

# What each client asks for. Together: greedy, seeded, penalties, several answers, log-probabilities, a scored and
# echoed prompt, and a stop string of whose beginning the answer is full.
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "extra_body": {"ignore_eos": True}},
    "seeded": {"temperature": 1.2, "seed": 11, "extra_body": {"ignore_eos": True}},
    "penalties": {
        "temperature": 0.9,
        "seed": 12,
        "frequency_penalty": 0.6,
        "presence_penalty": 0.4,
        "extra_body": {"repetition_penalty": 1.1, "min_tokens": 60, "top_k": 50},
    },
    "four": {"temperature": 1.0, "seed": 13, "n": 4, "extra_body": {"ignore_eos": True}},
    "logprobs": {"temperature": 0, "logprobs": 3, "extra_body": {"ignore_eos": True}},
    "echo": {"temperature": 0, "echo": True, "logprobs": 1, "extra_body": {"ignore_eos": True}},
    "stop": {"temperature": 1.0, "seed": 14, "stop": [" the queen of the sea"], "extra_body": {"ignore_eos": True}},
}


@pytest.fixture(scope="module")
def request_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "requests.jsonl"


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Any], smollm2_path: Path, request_log: Path) -> Any:
    flags = ("--kv-cache-memory", "128MiB", "--stall-timeout-s", "1.5", "--request-log", str(request_log))
    server = start_server(*flags)
    assert server.url, server.output
    return server


@contextmanager
def limited(process: psutil.Process, what: int, soft: int) -> Iterator[None]:
    """A resource of a process, short for a while."""
    before = process.rlimit(what)
    process.rlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.rlimit(what, before)


def until(condition: Callable[[], object]) -> None:
    """Without an event to wait for: what is looked at is another process."""
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


class Client(threading.Thread):
    """Streams one completion and keeps all it is told, choice by choice."""

    def __init__(self, server: Any, asked: dict[str, Any], max_tokens: int = 160) -> None:
        super().__init__(daemon=True)
        self.said: dict[int, list[Any]] = {}
        self.num_events = 0
        self.failure: Exception | None = None
        self.reached = threading.Event()  # it is in the middle of its answer
        self._client = server.client()
        self._asked = asked
        self._max_tokens = max_tokens
        self.start()

    def run(self) -> None:
        try:
            with self._client.completions.create(
                model=MODEL, prompt=STORY, max_tokens=self._max_tokens, stream=True, **self._asked
            ) as stream:
                for event in stream:
                    self._take(event)
        except (openai.APIError, httpx.HTTPError) as error:
            self.failure = error
        finally:
            self.reached.set()

    def _take(self, event: Any) -> None:
        for choice in event.choices:
            logprobs = choice.logprobs.model_dump() if choice.logprobs else None
            self.said.setdefault(choice.index, []).append((choice.text, logprobs, choice.finish_reason))
        self.num_events += 1
        if self.num_events >= 30:
            self.reached.set()

    def answer(self) -> dict[int, tuple[str, list[Any], list[Any]]]:
        """By choice: the text, every log-probability, every finish reason; however it was cut into events."""
        self.join(90)
        assert not self.is_alive()
        assert self.failure is None
        whole = {}
        for index, parts in self.said.items():
            scores = [
                entry
                for _, logprobs, _ in parts
                if logprobs is not None
                for entry in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
            ]
            whole[index] = ("".join(text for text, _, _ in parts), scores, [r for _, _, r in parts if r])
        return whole


@pytest.fixture(scope="module")
def undisturbed(server: Any) -> dict[str, Any]:
    clients = {name: Client(server, asked) for name, asked in REQUESTS.items()}
    return {name: client.answer() for name, client in clients.items()}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_go_on_in_another_engine(server: Any, undisturbed: dict[str, Any], how: signal.Signals) -> None:
    restarts = server.metric("llmserve:engine_restarts_total")
    clients = {name: Client(server, asked) for name, asked in REQUESTS.items()}
    for client in clients.values():
        client.reached.wait(60)
    old = server.engines()[0]
    old.send_signal(how)
    for name, client in clients.items():
        assert client.answer() == undisturbed[name], name
    assert server.metric("llmserve:engine_restarts_total") == restarts + 1
    assert server.metric("llmserve:requests_resubmitted_total") >= 7
    assert server.metric("llmserve:engine_stalls_total") == (how is signal.SIGSTOP)
    assert server.metric("llmserve:kv_cache_usage_perc") == 0
    assert not old.is_running()
    assert len(server.engines()) == 1


def test_it_is_not_ready_while_the_engine_is_replaced_but_alive_and_takes_requests(
    server: Any, undisturbed: dict[str, Any]
) -> None:
    server.engines()[0].kill()
    late = None
    for _ in range(500):
        ready = httpx.get(f"{server.url}/ready")
        if ready.status_code == 503:
            assert "signal 9" in ready.json()["reasons"][MODEL]
            assert httpx.get(f"{server.url}/health").status_code == 200
            assert httpx.get(f"{server.url}/v2/health/ready").status_code == 400
            late = Client(server, REQUESTS["seeded"])
            break
    assert late is not None
    assert late.answer() == undisturbed["seeded"]
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_a_request_without_a_seed_goes_on_too(server: Any) -> None:
    client = Client(server, {"temperature": 1.0, "extra_body": {"ignore_eos": True}})
    assert client.reached.wait(60)
    server.engines()[0].kill()
    text, _, reasons = client.answer()[0]
    assert reasons == ["length"]
    assert len(text) > 200


def test_each_event_of_it_is_one_line_in_the_log(server: Any) -> None:
    assert "killed by signal 9" in server.output
    assert "stopped by a signal: silent for" in server.output
    assert server.output.count("the engine is back after") == int(server.metric("llmserve:engine_restarts_total"))
    assert "Traceback" not in server.output


def test_whole_answers_survive_too(server: Any) -> None:
    client: openai.OpenAI = server.client()
    ask: dict[str, Any] = {"model": MODEL, "prompt": STORY, "max_tokens": 120, "temperature": 0}
    expected = client.completions.create(**ask, extra_body={"ignore_eos": True})
    answers: list[Any] = []
    asking = threading.Thread(
        target=lambda: answers.append(client.completions.create(**ask, extra_body={"ignore_eos": True}))
    )
    watcher = Client(server, REQUESTS["greedy"])
    asking.start()
    assert watcher.reached.wait(60)
    server.engines()[0].kill()
    asking.join(60)
    assert answers[0].choices[0].text == expected.choices[0].text
    assert answers[0].usage.completion_tokens == 120
    watcher.answer()


def test_an_engine_that_gets_no_more_memory_costs_no_token(server: Any, undisturbed: dict[str, Any]) -> None:
    clients = {name: Client(server, REQUESTS[name]) for name in ("seeded", "four", "logprobs")}
    for client in clients.values():
        client.reached.wait(60)
    engine = server.engines()[0]
    with limited(engine, psutil.RLIMIT_AS, engine.memory_info().vms + 2**16):
        clients["echo"] = Client(server, REQUESTS["echo"])  # its prompt is scored: a step that takes more
        for name, client in clients.items():
            assert client.answer() == undisturbed[name], name


def test_without_descriptors_it_says_so_and_goes_on_when_there_are_some(
    server: Any, undisturbed: dict[str, Any]
) -> None:
    """Connections do not get it that far (`tests/door/test_idle_connections.py`); here nothing can be opened at all."""
    process = psutil.Process(server.process.pid)
    client = Client(server, REQUESTS["seeded"])
    client.reached.wait(60)
    with limited(process, psutil.RLIMIT_NOFILE, 3):
        server.engines()[0].kill()
        until(lambda: "cannot be started" in server.output or "cannot be opened" in server.output)
    assert client.answer() == undisturbed["seeded"]
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_a_full_disk_costs_lines_of_the_log_and_nothing_else(
    server: Any, undisturbed: dict[str, Any], request_log: Path
) -> None:
    process = psutil.Process(server.process.pid)
    num_lines = len(request_log.read_text().splitlines())
    assert num_lines
    with limited(process, psutil.RLIMIT_FSIZE, request_log.stat().st_size):
        assert Client(server, REQUESTS["seeded"]).answer() == undisturbed["seeded"]
        until(lambda: "equest log" in server.output)
    assert len(request_log.read_text().splitlines()) == num_lines
    assert Client(server, REQUESTS["seeded"]).answer() == undisturbed["seeded"]
    until(lambda: len(request_log.read_text().splitlines()) > num_lines)


def test_a_reload_loses_no_request(start_server: Callable[..., Any], smollm2_path: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.symlink_to(smollm2_path)
    server = start_server(
        str(model), "--served-model-name", MODEL, "--model-control-mode", "explicit", "--kv-cache-memory", "64MiB"
    )
    load = f"{server.url}/v2/repository/models/{MODEL}/load"
    expected = Client(server, REQUESTS["seeded"]).answer()
    early = [Client(server, REQUESTS["seeded"]) for _ in range(3)]
    for client in early:
        assert client.reached.wait(60)
    assert httpx.post(load, timeout=180).status_code == 200
    late = Client(server, REQUESTS["seeded"])
    assert httpx.post(f"{server.url}/v2/repository/index").json() == [{"name": MODEL, "version": "2", "state": "READY"}]
    assert [client.answer() for client in (*early, late)] == [expected] * 4
    model.unlink()
    model.mkdir()  # the next version is damaged: the one before serves on
    refused = httpx.post(load, timeout=180)
    assert refused.status_code == 400
    assert "config.json" in refused.json()["error"]
    assert Client(server, REQUESTS["seeded"]).answer() == expected
    gone = httpx.post(f"{server.url}/v2/repository/models/{MODEL}/unload")
    assert gone.status_code == 200
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}).status_code in (400, 404)
    wait_s = time.monotonic() + 30
    while server.engines() and time.monotonic() < wait_s:
        time.sleep(0.05)
    assert server.engines() == []
    assert server.stop() == 0
