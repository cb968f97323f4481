"""What the door adds to every answer: ids, CORS where it is wanted, security headers on the page."""

from __future__ import annotations

import base64
import hashlib
import re

from llmserve.config import DoorConfig
from tests.door.conftest import ASK, ServeGuarded

PREFLIGHT = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}


def test_cors_is_off_by_default(serve_guarded: ServeGuarded) -> None:
    with serve_guarded().client() as client:
        assert client.options("/v1/chat/completions", headers=PREFLIGHT).status_code == 405
        answer = client.get("/v1/models", headers={"Origin": "https://app.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_cors_lets_the_named_origins_in_and_no_other(serve_guarded: ServeGuarded) -> None:
    with serve_guarded(DoorConfig(cors_origin=("https://app.example",))).client() as client:
        allowed = client.options("/v1/chat/completions", headers=PREFLIGHT)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        answer = client.post("/v1/chat/completions", json=ASK, headers={"Origin": "https://app.example"})
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        other = client.options("/v1/chat/completions", headers=PREFLIGHT | {"Origin": "https://evil.example"})
        assert other.status_code == 400


def test_a_request_id_is_kept(serve_guarded: ServeGuarded) -> None:
    with serve_guarded().client() as client:
        for path in ("/v1/chat/completions", "/no/such/route"):
            answer = client.post(path, json=ASK, headers={"X-Request-Id": "mine-1"})
            assert answer.headers.get_list("x-request-id") == ["mine-1"]
        streamed = client.post("/v1/chat/completions", json=ASK | {"stream": True}, headers={"X-Request-Id": "mine-2"})
        assert streamed.headers.get_list("x-request-id") == ["mine-2"]
        for unusable in ("x" * 129, "a\tb", "\u00fc".encode("latin-1").decode("latin-1")):
            answer = client.get("/v1/models", headers={"X-Request-Id": unusable.encode("latin-1")})  # type: ignore[dict-item]
            assert answer.headers["x-request-id"].startswith("req-")
        assert client.post("/v1/chat/completions", json=ASK).headers["x-request-id"].startswith("chatcmpl-")


def test_the_page_runs_its_own_script_only(serve_guarded: ServeGuarded) -> None:
    with serve_guarded().client() as client:
        page = client.get("/docs")
    policy = page.headers["content-security-policy"]
    for tag in ("script", "style"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        assert content is not None
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["x-frame-options"] == "DENY"
