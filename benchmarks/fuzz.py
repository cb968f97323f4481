"""Damaged and absurd requests to every route of a real server: how many were tried, and what was found.

    python -m benchmarks.fuzz [--seconds 60] [--examples 40] [--seed 0]

Two ways. A byte mutator changes, drops, doubles and moves bytes of good requests: of all of it as it goes over the
wire, or of the body alone, so that it gets past the parser of HTTP. And schemathesis makes up requests from the
server's own OpenAPI document. A finding is an answer of the server's own failure, one that is no answer, an error that
does not say what is wrong, or no answer in time; and afterwards a server that does not answer as before, or that has
logged a fault of its own. Exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from benchmarks.needs import psutil

CHAT, EMBEDDER = "smollm2-135m-instruct", "all-minilm-l6-v2"
ANSWER_S = 20.0  # a request may take so long, on a machine that does other things too
REQUEST_TIMEOUT_S = 2.0  # an answer may be long where the length was mutated: then it ends with a 504
MESSAGES = [{"role": "user", "content": "Hi"}]
ASK: dict[str, Any] = {"max_tokens": 3, "temperature": 0}
SEEDS: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/v1/chat/completions", {"model": CHAT, "messages": MESSAGES, **ASK}),
    ("POST", "/v1/chat/completions", {"messages": MESSAGES, "stream": True, "stop": ["a"], "logprobs": True, **ASK}),
    ("POST", "/v1/completions", {"prompt": ["a", "b"], "n": 2, "logit_bias": {"5": 1}, "seed": 3, **ASK}),
    ("POST", "/v1/completions", {"prompt": [1, 2, 3], "stream": True, "echo": True, "logprobs": 1, **ASK}),
    ("POST", "/tokenize", {"messages": MESSAGES, "return_token_strs": True}),
    ("POST", "/detokenize", {"tokens": [1, 2, 3]}),
    ("POST", "/v1/embeddings", {"model": EMBEDDER, "input": ["a", "b"], "encoding_format": "base64"}),
    ("POST", "/rerank", {"query": "a", "documents": ["b", {"text": "c"}], "top_n": 1}),
    ("POST", "/score", {"text_1": "a", "text_2": ["b", "c"]}),
    ("POST", "/v2/embed", {"model": EMBEDDER, "texts": ["a"], "input_type": "search_query"}),
    ("POST", f"/v2/models/{CHAT}/generate_stream", {"text_input": "Hi", "parameters": {"max_tokens": 3}}),
    (
        "POST",
        f"/v2/models/{CHAT}/infer",
        {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Hi"]}]},
    ),
    ("GET", f"/v2/models/{EMBEDDER}/config", None),
    ("POST", "/v2/repository/index", {"ready": True}),
    ("POST", "/v2/logging", {"log_verbose_level": 0}),
    ("POST", "/v2/trace/setting", {"trace_level": ["OFF"]}),
)
PIECES = (b"1e999", b"-1", b"null", b"\\ud800", b"[[[[", b"\xff", b"9" * 400)
# Triton answers what it cannot read with 500, and so do the routes of /v2: in its words, which say what is wrong.
TRITONS_500 = (b"failed to parse the request JSON", b"attempt to access JSON", b"Unable to parse", b"failed to load")


@dataclass
class Report:
    """What was tried, and what came of it."""

    mutated: int = 0
    made_up: int = 0
    routes: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)  # of the server process: before, halfway and at the end

    def look_at(self, sent: object, status: int, body: bytes) -> None:
        """One answer; status 0 is none that was understood, which is right where the request was none."""
        self.statuses[str(status)] = self.statuses.get(str(status), 0) + 1
        problem = ""
        is_tritons = status == 500 and any(words in body for words in TRITONS_500)
        if status >= 500 and status not in (501, 503, 504) and not is_tritons:
            problem = "the server's own failure"
        elif 400 <= status < 500 and b'"error"' not in body and b'"message"' not in body:
            problem = "an error that says nothing"
        if problem:
            self.findings.append(f"{problem}: {status} {body[:300]!r} to {sent!r:.1500}")


class Target:
    """A server of its own."""

    def __init__(self) -> None:
        flags = ("--port", "0", "--no-grpc", "--embedding-model", EMBEDDER, "--model-control-mode", "explicit")
        limits = ("--request-timeout-s", str(REQUEST_TIMEOUT_S), "--header-timeout-s", "1", "--body-timeout-s", "1")
        command = [sys.executable, "-m", "llmserve.cli", "serve", CHAT, *flags, *limits]
        environment = os.environ | {"COLUMNS": "200", "LLMSERVE_LOG_LEVEL": "error"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if match := re.search(r"Ready in .*: (http://\S+)/v1", line):
                self.url = match[1]
                break
        else:
            raise RuntimeError("the server did not start")
        self.port = int(self.url.rpartition(":")[2])
        self.info = psutil.Process(self.process.pid)
        self._drain = ThreadPoolExecutor(1)
        self.log = self._drain.submit(self.process.stderr.read)

    def answer(self) -> Any:
        """What an undisturbed client gets."""
        asked = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{self.url}/v1/completions", json=asked, timeout=60)
        answer.raise_for_status()
        return answer.json()["choices"]

    def memory_mib(self) -> float:
        """Of the server process."""
        return self.info.memory_info().rss / 2**20

    def end(self) -> str:
        """Stops it; what it has logged."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self.process.kill()
        self._drain.shutdown()
        return self.log.result()


def request(method: str, path: str, body: bytes, port: int) -> bytes:
    """As it goes over the wire."""
    return (
        f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    ).encode() + body


def mutate(whole: bytes, random_: random.Random) -> bytes:
    """Some of its bytes are others, are missing, are there twice, or are elsewhere."""
    mutated = bytearray(whole)
    for _ in range(random_.randint(1, 4)):
        begin = random_.randrange(len(mutated) or 1)
        piece = mutated[begin : begin + random_.randint(1, 12)]
        match random_.randrange(5):
            case 0 if mutated:
                mutated[begin] = random_.randrange(256)
            case 1:
                del mutated[begin : begin + len(piece)]
            case 2:
                mutated[begin:begin] = piece * random_.randint(1, 5)
            case 3:
                mutated[begin:begin] = random_.choice(PIECES)
            case _:
                place = random_.randrange(len(mutated) + 1)
                mutated[place:place] = piece
    return bytes(mutated)


def exchange(port: int, sent: bytes) -> bytes | None:
    """All that comes back before the server closes the connection; None if it does not."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S) as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while data := connection.recv(65536):
                received += data
        except TimeoutError:
            return None
        except OSError:
            pass  # closed on us
    return received


def mutations(target: Target, report: Report, seconds: float, seed: int) -> None:
    """The byte mutator, for so long."""
    random_ = random.Random(seed)
    end_s = time.monotonic() + seconds

    def one(seed: tuple[str, str, Any]) -> tuple[bytes, bytes | None]:
        method, path, values = seed
        body = b"" if values is None else json.dumps(values).encode()
        if body and random_.random() < 0.6:
            sent = request(method, path, mutate(body, random_), target.port)
        else:
            sent = mutate(request(method, path, body, target.port), random_)
        return sent, exchange(target.port, sent)

    with ThreadPoolExecutor(8) as pool:
        while time.monotonic() < end_s:
            for sent, answer in pool.map(one, SEEDS * 4):
                report.mutated += 1
                if answer is None:
                    report.findings.append(f"no answer within {ANSWER_S:g} s to {sent!r}")
                    continue
                status = answer[9:12]
                report.look_at(sent, int(status) if status.isdigit() else 0, answer.partition(b"\r\n\r\n")[2])


def inventions(target: Target, report: Report, num_examples: int) -> None:
    """What schemathesis makes of the document: so many requests to each operation."""
    schema = schemathesis.openapi.from_dict(httpx.get(f"{target.url}/openapi.json").json())
    with httpx.Client(base_url=target.url, timeout=ANSWER_S) as client:
        for found in schema.get_all_operations():
            operation = found.ok()
            report.routes += 1

            @settings(
                max_examples=num_examples,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy())
            def ask(case: Any) -> None:
                report.made_up += 1
                body = case.body if isinstance(case.body, dict | list) else None
                path = case.formatted_path
                if path.endswith("/unload") and CHAT in path:
                    return
                try:
                    answer = client.request(case.method, path, json=body, params=case.query)
                except httpx.TimeoutException:
                    report.findings.append(f"no answer within {ANSWER_S:g} s to {case.method} {path} {body!r:.1500}")
                except (httpx.HTTPError, httpx.InvalidURL, ValueError):
                    pass  # it could not be sent
                else:
                    sent = f"{case.method} {path} {body!r}"
                    report.look_at(sent, answer.status_code, answer.content)

            ask()


def run(seconds: float, num_examples: int, seed: int) -> Report:
    """Both, and a look at the server afterwards."""
    warnings.simplefilter("ignore")
    target, report = Target(), Report()
    try:
        expected = target.answer()
        mutations(target, report, min(seconds / 4, 10.0), seed + 1)  # warms every allocator up
        report.rss_mib.append(round(target.memory_mib(), 1))
        inventions(target, report, num_examples)
        report.rss_mib.append(round(target.memory_mib(), 1))
        mutations(target, report, seconds, seed)
        report.rss_mib.append(round(target.memory_mib(), 1))
        if target.answer() != expected:
            report.findings.append("afterwards it answers something else")
        if not httpx.get(f"{target.url}/ready").is_success:
            report.findings.append("afterwards it is not ready")
    finally:
        log = target.end()
    report.findings += [f"logged: {line}" for line in log.splitlines() if "Traceback" in line][:3]
    report.statuses = dict(Counter(report.statuses).most_common())
    return report


def main() -> int:
    """0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of mutations")
    parser.add_argument("--examples", type=int, default=40, help="made up for each operation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report = run(options.seconds, options.examples, options.seed)
    print(json.dumps(asdict(report), indent=2))
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
