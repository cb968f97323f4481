"""Rate limits and usage of keys, as their holders and the operator see them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmserve.config import DoorConfig
from llmserve.rate_limit import RateLimits, TokenBucket
from tests.door.conftest import ASK, ServeGuarded, write_keys


def test_a_bucket_fills_steadily_and_holds_a_minute() -> None:
    bucket = TokenBucket(60)
    assert bucket.wait_s(60, 0.0) == 0
    bucket.take(60, 0.0)
    assert bucket.wait_s(1, 0.0) == pytest.approx(1.0)
    assert bucket.remaining(30.0) == pytest.approx(30)
    assert bucket.remaining(10_000.0) == 60
    bucket.take(90, 10_000.0)  # an answer was longer than expected
    assert bucket.wait_s(1, 10_000.0) == pytest.approx(31)
    assert bucket.wait_s(10**9, 10_000.0) == pytest.approx(90)  # more than it holds: a full one will do
    assert TokenBucket(0).wait_s(10**9, 0.0) == 0


@pytest.mark.parametrize(
    ("seconds", "written"), [(0.012, b"12ms"), (1.0, b"1s"), (1.5, b"1.5s"), (60.0, b"1m0s"), (359.9, b"5m59.9s")]
)
def test_durations_are_written_as_openai_writes_them(seconds: float, written: bytes) -> None:
    limits = RateLimits(requests_per_minute=60)
    limits.requests.take(seconds, 0.0)
    assert dict(limits.headers(0.0))[b"x-ratelimit-reset-requests"] == written


def test_who_asks_too_often_is_told_when_to_come_back(serve_guarded: ServeGuarded, tmp_path: Path) -> None:
    holders = {"alice": "requests_per_minute = 2", "bob": "", "prometheus": 'scopes = ["metrics"]'}
    keys = write_keys(tmp_path / "keys.toml", **holders)
    served = serve_guarded(DoorConfig(api_keys=str(tmp_path / "keys.toml")))
    with served.client(keys["alice"]) as alice:
        first = alice.post("/v1/chat/completions", json=ASK)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert 0 < float(first.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 30
        alice.post("/v1/chat/completions", json=ASK)
        refused = alice.post("/v1/chat/completions", json=ASK)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        refused_v2 = alice.get("/v2/models/m/ready")
        assert (refused_v2.status_code, set(refused_v2.json())) == (429, {"error"})
    with served.client(keys["bob"]) as bob:
        answer = bob.post("/v1/chat/completions", json=ASK)
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
    with served.client(keys["prometheus"]) as prometheus:
        text = prometheus.get("/metrics").text
    series = dict(re.findall(r'^llmserve:key_(\w+){key="alice"} (\S+)$', text, re.MULTILINE))
    assert series == {
        "requests_total": "2.0",
        "refused_total": "2.0",
        "prompt_tokens_total": "0.0",
        "generation_tokens_total": "0.0",
    }
