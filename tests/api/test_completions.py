"""Text completions: several prompts, echo, and the log-probabilities that evaluation harnesses read."""

from __future__ import annotations

import json

import openai
import pytest

from llmserve.errors import EngineDeadError, QueueFullError

ANSWER = "Hello, wörld! 👋"


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def stream_choices(response) -> list[dict]:
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [choice for text in data for choice in json.loads(text)["choices"]]


def test_default_is_sixteen_tokens(client, served):
    answer = client.completions.create(model="scripted", prompt="Hi")
    assert answer.object == "text_completion"
    assert answer.choices[0].text == ANSWER.encode()[:16].decode("utf-8", "ignore")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16
    assert served.script.specs[0].prompt_token_ids == [256, *b"Hi"]


def test_default_shrinks_to_what_the_context_leaves(client):
    answer = client.completions.create(model="scripted", prompt=[65] * 507)
    assert answer.usage.completion_tokens == 5


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", [[256, 72, 105]]),
        (["a", "b"], [[256, 97], [256, 98]]),
        ([72, 105], [[72, 105]]),
        ([[72], [105, 106]], [[72], [105, 106]]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_forms_of_prompt(http, served, prompt, expected, stream):
    body = {"prompt": prompt, "stream": stream, "max_tokens": 5, "n": 2, "stream_options": None}
    response = http.post("/v1/completions", json=body)
    assert sorted(spec.prompt_token_ids for spec in served.script.specs) == expected
    assert len(set(served.script.request_ids)) == len(expected)
    texts = [""] * 2 * len(expected)
    for choice in stream_choices(response) if stream else response.json()["choices"]:
        texts[choice["index"]] += choice["text"]
    assert texts == ["Hello"] * 2 * len(expected)
    assert served.script.aborted.empty()
    if not stream:
        usage = response.json()["usage"]
        assert usage["prompt_tokens"] == sum(len(ids) for ids in expected)
        assert usage["completion_tokens"] == 10 * len(expected)


def test_cached_tokens_count_each_prompt_once(http, served):
    served.script.cached_tokens = 2
    usage = http.post("/v1/completions", json={"prompt": ["abc", "abd"], "n": 2}).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}


def test_wire_of_a_stream(http):
    choices = stream_choices(http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, "stream": True}))
    assert choices == [
        {"index": 0, "text": "H", "logprobs": None, "finish_reason": None},
        {"index": 0, "text": "e", "logprobs": None, "finish_reason": "length", "stop_reason": None},
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_fail_together(http, served, stream):
    served.script.fail_after, served.script.error = 0, EngineDeadError("It died.")
    response = http.post("/v1/completions", json={"prompt": ["a", "b", "c"], "stream": stream})
    assert response.status_code == 500
    assert sorted(served.script.aborted.get(timeout=5) for _ in range(3)) == sorted(served.script.request_ids)


def test_refusal_of_a_later_prompt_aborts_the_earlier(http, served, monkeypatch):
    started = type(served.model).generate

    def refuse_third(request_id, spec):
        if len(served.script.specs) == 2:
            raise QueueFullError("Full.")
        return started(served.model, request_id, spec)

    monkeypatch.setattr(served.model, "generate", refuse_third)
    assert http.post("/v1/completions", json={"prompt": ["a", "b", "c"]}).status_code == 429
    assert sorted(served.script.aborted.get(timeout=5) for _ in range(2)) == sorted(served.script.request_ids)


@pytest.mark.parametrize("stream", [False, True])
def test_echo(http, stream):
    response = http.post("/v1/completions", json={"prompt": "Hi ", "echo": True, "max_tokens": 5, "stream": stream})
    choices = stream_choices(response) if stream else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == "Hi Hello"


def test_echo_of_token_ids(http):
    answer = http.post("/v1/completions", json={"prompt": [256, 72, 105], "echo": True, "max_tokens": 1}).json()
    assert answer["choices"][0]["text"] == "HiH"


def test_logprobs(http):
    answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 10, "logprobs": 1}).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [*"Hello, w", "bytes:\\xc3", "bytes:\\xb6"]
    assert logprobs["token_logprobs"] == [-1.5] * 10
    assert logprobs["top_logprobs"][0] == {"G": -0.25, "H": -1.5}  # the chosen token is always there
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert answer["choices"][0]["text"] == "Hello, wö"


def test_streamed_logprobs_equal_the_whole(http):
    body = {"prompt": "ab", "max_tokens": 12, "logprobs": 2, "echo": True}
    whole = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    parts = stream_choices(http.post("/v1/completions", json={**body, "stream": True}))
    for name, values in whole.items():
        assert [value for choice in parts for value in choice["logprobs"][name]] == values


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_scoring_a_prompt_as_evaluation_harnesses_do(http, served, max_tokens, stream):
    """lm-eval: echo, logprobs=1; the continuation's tokens are those from its length on, a generated one left off."""
    context, continuation = [256, *b"The sky"], list(b" is")
    body = {"prompt": [context + continuation], "max_tokens": max_tokens, "logprobs": 1, "echo": True}
    response = http.post("/v1/completions", json={**body, "temperature": 0, "seed": 1, "stream": stream})
    if stream:
        logprobs: dict[str, list] = {}
        for choice in stream_choices(response):
            for name, values in choice["logprobs"].items():
                logprobs.setdefault(name, []).extend(values)
    else:
        (choice,) = response.json()["choices"]
        assert choice["text"] == "The sky is" + "H" * max_tokens
        assert choice["finish_reason"] == "length"
        assert response.json()["usage"]["completion_tokens"] == max_tokens
        logprobs = choice["logprobs"]
    num_tokens = len(context) + len(continuation)
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert [len(values) for values in logprobs.values()] == [num_tokens + max_tokens] * 4
    assert logprobs["tokens"][len(context) : num_tokens] == [" ", "i", "s"]
    assert sum(logprobs["token_logprobs"][len(context) : num_tokens]) == -4.5
    assert served.script.specs[0].sampling.max_tokens == 1
    assert served.script.specs[0].sampling.prompt_logprobs == 1


def test_several_prompts_are_scored_each(http):
    body = {"prompt": [[72, 105], [65, 66, 67]], "max_tokens": 0, "logprobs": 0, "echo": True}
    choices = http.post("/v1/completions", json=body).json()["choices"]
    assert [choice["logprobs"]["tokens"] for choice in choices] == [["H", "i"], ["A", "B", "C"]]


def test_token_ids_and_prompt_logprobs(http):
    body = {"prompt": "ab", "max_tokens": 2, "return_token_ids": True, "prompt_logprobs": 0}
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    assert choice["prompt_token_ids"] == [256, 97, 98]
    assert choice["token_ids"] == [72, 101]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1] == {"97": {"logprob": -1.5, "rank": 2, "decoded_token": "a"}}


def test_add_special_tokens(http, served):
    http.post("/v1/completions", json={"prompt": "a", "add_special_tokens": False})
    assert served.script.specs[0].prompt_token_ids == [97]
