"""What becomes of the sampling parameters: the spec that the model is given."""

from __future__ import annotations

import pytest

from llmserve.messages import SamplingParams

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
NUM_PROMPT_TOKENS = len("[user]Hi\n[assistant]")


def spec_of(http, served, **extra):
    response = http.post("/v1/chat/completions", json={**CHAT, **extra})
    assert response.status_code == 200, response.text
    return served.script.specs[-1]


def test_defaults_are_the_models_then_openais(http, served):
    spec = spec_of(http, served, seed=1)
    assert spec.sampling == SamplingParams(
        max_tokens=512 - NUM_PROMPT_TOKENS, seed=1, temperature=0.6, top_k=40, stop_token_ids=[257]
    )
    assert (spec.n, spec.stop, spec.skip_special_tokens, spec.ignore_eos) == (1, (), True, False)
    assert (spec.priority, spec.cache_salt, spec.include_stop_str_in_output) == (0, "", False)


def test_model_may_limit_the_default_length(http, served, monkeypatch):
    monkeypatch.setitem(served.model.sampling_defaults.values, "max_new_tokens", 9)
    assert spec_of(http, served).sampling.max_tokens == 9
    assert spec_of(http, served, max_tokens=11).sampling.max_tokens == 11


def test_everything_at_once(http, served):
    spec = spec_of(
        http,
        served,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        repetition_penalty=1.1,
        logit_bias={"65": -100, "66": 2.5},
        seed=42,
        n=2,
        stop=["a", "b"],
        stop_token_ids=[65, 257],
        include_stop_str_in_output=True,
        max_tokens=20,
        max_completion_tokens=10,
        min_tokens=3,
        ignore_eos=True,
        logprobs=True,
        top_logprobs=4,
        prompt_logprobs=2,
        bad_words=["x"],
        allowed_token_ids=[1, 2],
        skip_special_tokens=False,
        priority=-3,
        cache_salt="tenant",
    )
    assert spec.sampling == SamplingParams(
        max_tokens=10,
        seed=42,
        min_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        repetition_penalty=1.1,
        logit_bias={65: -100.0, 66: 2.5},
        allowed_token_ids=[1, 2],
        bad_words=[[120], [32, 120]],
        stop_token_ids=[65, 257],
        logprobs=4,
        prompt_logprobs=2,
    )
    assert (spec.n, spec.stop, spec.skip_special_tokens, spec.ignore_eos) == (2, ("a", "b"), False, True)
    assert (spec.priority, spec.cache_salt, spec.include_stop_str_in_output) == (-3, "tenant", True)


@pytest.mark.parametrize(
    ("given", "field", "resolved"),
    [
        ({"temperature": 0}, "temperature", 0.0),
        ({"temperature": 1e-300}, "temperature", 0.0),
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": 10**6}, "top_k", 0),
        ({"stop_token_ids": [65]}, "stop_token_ids", [257, 65]),
        ({"stop_token_ids": [65], "ignore_eos": True}, "stop_token_ids", [65]),
        ({"logprobs": True}, "logprobs", 0),
        ({"logprobs": False}, "logprobs", None),
        ({"logit_bias": {}}, "logit_bias", None),
        ({"seed": -1}, "seed", 2**63 - 1),
        ({"seed": -(2**63)}, "seed", 0),
    ],
)
def test_resolved_values(http, served, given, field, resolved):
    assert getattr(spec_of(http, served, **given).sampling, field) == resolved


def test_stop_may_be_one_string(http, served):
    assert spec_of(http, served, stop="###").stop == ("###",)


def test_seeds_are_drawn_apart(http, served):
    seeds = {spec_of(http, served).sampling.seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
