"""A server that has run out of threads or descriptors: what needs one fails and says so, the rest goes on."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from llmserve.api import context
from llmserve.api.settings import ApiSettings
from tests.door.conftest import ASK, ServeGuarded


@pytest.mark.parametrize(
    "path", ["/tokenize", "/detokenize", "/v1/embeddings", "/rerank", "/classify", "/v1/completions"]
)
def test_large_bodies_of_every_route_are_read_beside_the_loop(
    serve_guarded: ServeGuarded, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Or the streams would stand still meanwhile."""
    served = serve_guarded(settings=ApiSettings(inline_parse_bytes=4096))
    threads: list[str] = []
    decode = context.decode_object

    def decode_object(body: bytes) -> Any:
        threads.append(threading.current_thread().name)
        return decode(body)

    monkeypatch.setattr(context, "decode_object", decode_object)
    with served.client() as client:
        for size in (10, 8192):
            client.post(path, json={"prompt": "x" * size})
    assert len(threads) == 2
    assert threads[0] != threads[1]


def test_without_another_thread_large_requests_are_read_by_those_there_are(
    serve_guarded: ServeGuarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve_guarded(settings=ApiSettings(inline_parse_bytes=4096))  # what is larger is parsed in a thread
    large = ASK | {"metadata": {"filler": "x" * 8192}}

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with served.client() as client:
        for body in (large, ASK, large):
            assert client.post("/v1/chat/completions", json=body).status_code == 200
