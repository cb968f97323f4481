"""What is written down about a request: one line, a warning if it was slow, a span; and nothing that was said."""

from __future__ import annotations

import gzip
import json
import logging
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llmserve.api.entrance import Entrance
from llmserve.api.journal import Journal, explain, line
from llmserve.api.tracing import Tracer, read_traceparent
from llmserve.config import DoorConfig
from llmserve.errors import ConfigError
from llmserve.request_context import RequestContext, Tenant
from tests.door.conftest import ASK, ServeGuarded, write_keys

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def finished() -> RequestContext:
    """A request as it stands when all is known."""
    context = RequestContext(request_id="req-1", route="/v1/chat/completions", tenant=Tenant(name="alice"))
    context.status, context.model, context.completion_id = 200, "m", "chatcmpl-1"
    context.num_sequences, context.prompt_tokens, context.cached_tokens, context.generation_tokens = 2, 30, 16, 22
    context.queue_s, context.prefill_s, context.decode_s = 4.0, 0.5, 2.0
    context.finish_reason, context.num_preemptions = "stop", 3
    return context


def test_a_line_says_what_became_of_a_request() -> None:
    said = line(finished(), 7.0)
    assert said.pop("time") > 0
    assert said == {
        "id": "req-1",
        "completion": "chatcmpl-1",
        "key": "alice",
        "trace": None,
        "route": "/v1/chat/completions",
        "status": 200,
        "error": None,
        "model": "m",
        "sequences": 2,
        "prompt_tokens": 30,
        "cached_tokens": 16,
        "generation_tokens": 22,
        "queue_s": 4.0,
        "ttft_s": 4.5,
        "itl_s": 0.2,
        "duration_s": 7.0,
        "finish_reason": "stop",
        "preemptions": 3,
        "restarts": 0,
    }


def test_a_slow_request_is_explained_longest_part_first() -> None:
    told = explain(finished(), 7.0)
    assert told.index("4.00 s in the queue") < told.index("2.00 s generating") < told.index("0.50 s computing")
    assert "preempted 3 times" in told
    assert "without reaching a model" in explain(RequestContext(route="/v1/x"), 3.0)


def text_of(log: Path, num_lines: int) -> str:
    """What it holds once it has so many lines: the last one is written after its answer was read."""
    until_s = time.monotonic() + 10
    while (text := log.read_text()).count("\n") < num_lines:
        assert time.monotonic() < until_s, text
        time.sleep(0.01)
    return text


def test_every_request_has_one_line_and_none_holds_what_was_said(serve_guarded: ServeGuarded, tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    key = write_keys(tmp_path / "keys.toml", alice="")["alice"]
    served = serve_guarded(DoorConfig(request_log=str(log), api_keys=str(tmp_path / "keys.toml")))
    secret = {"messages": [{"role": "user", "content": "my secret"}]}
    with served.client(key) as client:
        client.post(
            "/v1/chat/completions", json=ASK | secret, headers={"X-Request-Id": "a", "traceparent": TRACEPARENT}
        )
        client.post("/v1/chat/completions", json=ASK | secret | {"n": 0}, headers={"X-Request-Id": "b"})
        client.get("/health")
    with served.client("sk-wrong-key") as client:
        client.get("/v1/models", headers={"X-Request-Id": "c"})
    text = text_of(log, 3)
    lines = [json.loads(entry) for entry in text.splitlines()]
    assert [(entry["id"], entry["key"], entry["status"], entry["error"]) for entry in lines] == [
        ("a", "alice", 200, None),
        ("b", "alice", 400, "invalid_request"),
        ("c", None, 401, "invalid_api_key"),
    ]
    assert lines[0]["trace"] == TRACEPARENT.split("-")[1]
    for unsaid in ("secret", key, "sk-wrong-key", served.script.answer):
        assert unsaid not in text


def test_a_full_disk_loses_lines_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal("/dev/full", 0.0)
    journal.record(finished())
    journal.record(finished())
    assert journal.num_lost == 2
    assert caplog.text.count("cannot be written") == 1
    with pytest.raises(ConfigError, match="Cannot write the request log"):
        Journal("/no/such/folder/log", 0.0)


def test_a_slow_request_is_warned_of(serve_guarded: ServeGuarded, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "llmserve"),
        serve_guarded(DoorConfig(slow_request_s=1e-9)).client() as client,
    ):
        client.post("/v1/chat/completions", json=ASK, headers={"X-Request-Id": "slow-1"})
        until_s = time.monotonic() + 10
        while "slow request slow-1:" not in caplog.text:  # said once the answer has gone out
            assert time.monotonic() < until_s
            time.sleep(0.01)


@pytest.mark.parametrize(
    "value", ["", "junk", "00-" + "0" * 32 + "-00f067aa0ba902b7-01", "ff" + TRACEPARENT[2:], TRACEPARENT + "-extra"]
)
def test_what_is_no_trace_context_is_passed_over(value: str) -> None:
    assert read_traceparent(value) is None


def test_a_trace_context_is_read_and_one_goes_back(serve_guarded: ServeGuarded) -> None:
    assert read_traceparent(TRACEPARENT) == ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", 1)
    with serve_guarded().client() as client:
        answer = client.get("/v1/models", headers={"traceparent": TRACEPARENT})
        assert "traceparent" not in client.get("/v1/models").headers
    back = read_traceparent(answer.headers["traceparent"])
    assert back is not None
    assert back[0] == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert back[1] != "00f067aa0ba902b7"


def test_spans_carry_the_conventions_names_and_the_callers_trace() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    entrance = Entrance(DoorConfig(), tracer=Tracer(provider))
    context = finished()
    entrance._begin(context, TRACEPARENT)
    assert context.traceparent.startswith("00-4bf92f3577b34da6a3ce929d0e0e4736-")
    entrance._end(context)
    [span] = exporter.get_finished_spans()
    assert span.name == "chat m"
    assert span.parent is not None
    assert span.parent.span_id == 0x00F067AA0BA902B7
    assert span.attributes is not None
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": 30,
        "gen_ai.usage.output_tokens": 22,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.server.time_to_first_token": 4.5,
        "http.response.status_code": 200,
    }
    assert {name: span.attributes[name] for name in expected} == expected


class Collector(BaseHTTPRequestHandler):
    """Takes what OTLP over HTTP brings."""

    received: ClassVar[list[tuple[str, str, bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.received.append((self.path, self.headers["content-type"], body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_spans_reach_a_collector_over_otlp(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        entrance = Entrance(DoorConfig(otel=True))
        context = finished()
        entrance._begin(context, TRACEPARENT)
        entrance._end(context)
        entrance.close()  # sends what is left
        collector.shutdown()
    [(path, content_type, body)] = Collector.received
    assert (path, content_type) == ("/v1/traces", "application/x-protobuf")
    [resource] = ExportTraceServiceRequest.FromString(body).resource_spans
    assert "llmserve" in {attribute.value.string_value for attribute in resource.resource.attributes}
    [span] = resource.scope_spans[0].spans
    assert span.name == "chat m"
    assert span.trace_id.hex() == "4bf92f3577b34da6a3ce929d0e0e4736"
    values = {attribute.key: attribute.value for attribute in span.attributes}
    assert values["gen_ai.usage.output_tokens"].int_value == 22


def test_traces_without_the_extra_are_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install opentelemetry-sdk"):
        Entrance(DoorConfig(otel=True))
