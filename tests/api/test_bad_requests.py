"""Every way to ask wrongly is answered with a status, OpenAI's error shape and the name of the field."""

from __future__ import annotations

import json
import socket

import httpx
import openai
import pytest

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"prompt": "Hi"}


def assert_error(response: httpx.Response, status: int, param: str | None, code: str = "invalid_request") -> str:
    """Returns the message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    return error["message"]


def message(**fields: object) -> dict[str, object]:
    return {"messages": [fields]}


# (what is added to a valid chat request, the param named, a word of the message)
SHARED = [
    ({"temperature": "1"}, "temperature", "number"),
    ({"temperature": True}, "temperature", "number"),
    ({"temperature": -0.1}, "temperature", "greater"),
    ({"top_p": 0}, "top_p", "greater"),
    ({"top_p": 1.01}, "top_p", "less"),
    ({"top_k": -2}, "top_k", "greater"),
    ({"top_k": 1.5}, "top_k", "integer"),
    ({"min_p": 1.5}, "min_p", "less"),
    ({"presence_penalty": 2.1}, "presence_penalty", "less"),
    ({"frequency_penalty": -2.1}, "frequency_penalty", "greater"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater"),
    ({"seed": 1.0}, "seed", "integer"),
    ({"seed": 2**63}, "seed", "less"),
    ({"seed": 10**400}, "seed", "64 bits"),
    ({"n": 0}, "n", "greater"),
    ({"n": True}, "n", "integer"),
    ({"n": 129}, "n", "128"),
    ({"max_tokens": -1}, "max_tokens", "greater"),
    ({"max_tokens": "5"}, "max_tokens", "integer"),
    ({"max_tokens": 512}, "max_tokens", "512"),
    ({"min_tokens": -1}, "min_tokens", "greater"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", "5"),
    ({"stop": ""}, "stop", "character"),
    ({"stop": ["a", ""]}, "stop.1", "character"),
    ({"stop": ["a", 1]}, "stop.1", "string"),
    ({"stop": 1}, "stop", "string"),
    ({"stop": ["x"] * 17}, "stop", "16"),
    ({"stop": "x" * 1025}, "stop", "1024"),
    ({"stop_token_ids": [258]}, "stop_token_ids", "257"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0", "greater"),
    ({"stop_token_ids": 5}, "stop_token_ids", "list"),
    ({"bad_words": [""]}, "bad_words.0", "character"),
    ({"bad_words": "x"}, "bad_words", "list"),
    ({"bad_words": ["x"] * 257}, "bad_words", "256"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
    ({"allowed_token_ids": [999]}, "allowed_token_ids", "257"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "less"),
    ({"logit_bias": {"5": "1"}}, "logit_bias.5", "number"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
    ({"logit_bias": {"-5": 1}}, "logit_bias", "'-5'"),
    ({"logit_bias": {"258": 1}}, "logit_bias", "257"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1024"),
    ({"logit_bias": [1]}, "logit_bias", "object"),
    ({"stop_token_ids": list(range(257))}, "stop_token_ids", "256"),
    ({"prompt_logprobs": 6}, "prompt_logprobs", "5"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "boolean"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "False"),
    ({"stream": True, "stream_options": {"include_usge": True}}, "stream_options.include_usge", "include_usage"),
    ({"priority": "high"}, "priority", "integer"),
    ({"cache_salt": ""}, "cache_salt", "character"),
    ({"cache_salt": "a/b"}, "cache_salt", "pattern"),
    ({"ignore_eos": 0}, "ignore_eos", "boolean"),
    ({"model": 5}, "model", "string"),
    # known and not supported
    ({"use_beam_search": True}, "use_beam_search", "not supported"),
    ({"length_penalty": 1.2}, "length_penalty", "not supported"),
    ({"structured_outputs": {"json": {}}}, "structured_outputs", "not supported"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "not supported"),
    ({"store": True}, "store", "not supported"),
    # unknown
    ({"temprature": 1}, "temprature", "Did you mean 'temperature'?"),
    ({"zzz": None}, "zzz", "unknown"),
]
CHAT_ONLY = [
    ({"messages": []}, "messages", "should have at least 1 item; it is []."),
    ({"messages": "Hi"}, "messages", "list"),
    ({"messages": ["Hi"]}, "messages.0", "dictionary"),
    (message(role="user"), "messages.0.content", "required"),
    (message(content="Hi"), "messages.0.role", "required"),
    (message(role="wizard", content="Hi"), "messages.0.role", "'assistant'"),
    (message(role="tool", content="Hi"), "messages.0.role", "'assistant'"),
    (message(role="user", content=None), "messages.0.content", "string"),
    (message(role="user", content=[{"type": "text"}]), "messages.0.content", "text"),
    (message(role="user", content=[{"type": "image_url", "image_url": {}}]), "messages.0.content", "'image_url'"),
    (message(role="user", content="Hi", nmae="x"), "messages.0.nmae", "messages.0.name"),
    (message(role="assistant", content="", tool_calls=[{}]), "messages.0.tool_calls", "at most 0"),
    (message(role="user", content="x" * 600), "messages", "512"),
    ({"max_tokens": 0}, "max_tokens", "greater"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "greater"),
    ({"max_completion_tokens": 500, "max_tokens": 5}, "max_completion_tokens", "512"),
    ({"logprobs": 1}, "logprobs", "boolean"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"logprobs": False, "top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"logprobs": True, "top_logprobs": 6}, "top_logprobs", "5"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "greater"),
    ({"continue_final_message": True}, "continue_final_message", "assistant"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "server"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs", "dictionary"),
    ({"chat_template": "{{ x }}"}, "chat_template", "not supported"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"tool_choice": "required"}, "tool_choice", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
    ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
    ({"service_tier": "flex"}, "service_tier", "not supported"),
    ({"prompt": "Hi"}, "prompt", "unknown"),
]
TEXT_ONLY = [
    ({"prompt": 5}, "prompt", "string"),
    ({"prompt": []}, "prompt", "string"),
    ({"prompt": ""}, None, ""),  # one token, the beginning: fine
    ({"prompt": [[]]}, "prompt", "no tokens"),
    ({"prompt": ["a", 1]}, "prompt", "at 1"),
    ({"prompt": [1, True]}, "prompt", "at 0"),
    ({"prompt": [[1, -1]]}, "prompt", "at 0"),
    ({"prompt": [258]}, "prompt", "257"),
    ({"prompt": [65] * 512}, "prompt", "512"),
    ({"prompt": ["a"] * 1025}, "prompt", "1024"),
    ({"max_tokens": 0}, "max_tokens", "echo"),
    ({"logprobs": True}, "logprobs", "integer"),
    ({"logprobs": 6}, "logprobs", "5"),
    ({"best_of": 2}, "best_of", "not supported"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"messages": []}, "messages", "unknown"),
]


@pytest.mark.parametrize(("extra", "param", "word"), SHARED + CHAT_ONLY)
def test_chat(http, served, extra, param, word):
    text = assert_error(http.post("/v1/chat/completions", json={**CHAT, **extra}), 400, param)
    assert word in text
    assert served.script.specs == []


@pytest.mark.parametrize(("extra", "param", "word"), SHARED + TEXT_ONLY)
def test_completions(http, served, extra, param, word):
    response = http.post("/v1/completions", json={**TEXT, **extra})
    if param is None:
        assert response.status_code == 200
        return
    text = assert_error(response, 400, param)
    assert word in text
    assert served.script.specs == []


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "u1", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"service_tier": "default", "response_format": {"type": "text"}, "modalities": ["text"]},
        {"tool_choice": "none", "tools": [], "functions": [], "function_call": "none"},
        {
            "tools": None,
            "reasoning_effort": None,
            "audio": None,
            "structured_outputs": None,
            "parallel_tool_calls": True,
        },
        {"logprobs": False, "top_logprobs": None, "use_beam_search": False, "length_penalty": 1.0, "n": None},
        {"stream_options": None, "seed": None, "stop": None, "temperature": None, "logit_bias": {}, "bad_words": []},
        {"prompt_cache_key": "k", "safety_identifier": "s", "spaces_between_special_tokens": True},
        {"temperature": 0, "top_p": 1, "top_k": -1, "repetition_penalty": 1, "presence_penalty": 0},
        {"top_logprobs": 0},
    ],
)
def test_values_that_change_nothing_are_accepted(http, extra):
    response = http.post("/v1/chat/completions", json={**CHAT, **extra})
    assert response.status_code == 200, response.text


def test_prompt_that_is_too_long_says_both_lengths(http):
    text = assert_error(http.post("/v1/completions", json={"prompt": [65] * 600}), 400, "prompt")
    assert "600" in text
    assert "512" in text


def test_official_client_types_the_error(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none") as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="scripted", messages=[], stream=True)
        assert caught.value.param == "messages"
        assert caught.value.code == "invalid_request"
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="scripted", prompt="x", extra_body={"top_q": 1})
        assert caught.value.param == "top_q"


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/embeddings", "/rerank"])
@pytest.mark.parametrize("content", [None, b"", b" \n"], ids=["none", "empty", "blank"])
@pytest.mark.parametrize("headers", [{}, JSON], ids=["of no type", "of JSON"])
def test_a_request_without_a_body_is_told_so(http, path, content, headers):
    response = http.post(path, content=content, headers=headers | (JSON if content else {}))
    assert "The request has no body. Send a JSON object" in assert_error(response, 400, None)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b'{"messages": [}', "JSON"),
        (b"[]", "array"),
        (b'"hi"', "string"),
        (b"null", "null"),
        (b"1", "number"),
        (b'{"temperature": NaN}', "JSON"),
        (b'{"temperature": Infinity}', "JSON"),
        (b'{"temperature": 1e999}', "JSON"),
        (b'{"model": "\xff\xfe"}', "UTF-8"),
        (b'{"model": "\\ud800"}', "JSON"),
        (b"[" * 200_000, "deep"),
        (b'{"":' * 200_000 + b"1" + b"}" * 200_000, "deep"),
        (b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "deep"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_bodies_that_are_no_json_object(http, path, body, word):
    assert word in assert_error(http.post(path, content=body, headers=JSON), 400, None)


def test_nesting_that_json_allows_but_a_template_might_not(http):
    kwargs: object = 1
    for _ in range(500):
        kwargs = {"a": kwargs}
    response = http.post("/v1/chat/completions", json={**CHAT, "chat_template_kwargs": {"x": kwargs}})
    assert response.status_code in (200, 400)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_content_type_must_be_json(http, content_type):
    headers = {"content-type": content_type} if content_type else {}
    response = http.post("/v1/chat/completions", content=json.dumps(CHAT).encode(), headers=headers)
    assert "Content-Type: application/json" in assert_error(response, 415, None, "unsupported_media_type")


def test_content_type_may_have_parameters(http):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert http.post("/v1/chat/completions", content=json.dumps(CHAT).encode(), headers=headers).is_success


def test_body_over_the_limit_by_its_declared_length(http):
    response = http.post("/v1/chat/completions", content=b" " * ((1 << 20) + 1), headers=JSON)
    assert str(1 << 20) in assert_error(response, 413, None, "request_too_large")


def test_body_over_the_limit_without_a_length_is_stopped_on_the_way(served):
    """The client never ends its body; the answer comes all the same."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        block = b"%x\r\n%s\r\n" % (1 << 16, b" " * (1 << 16))
        for _ in range(17):
            connection.sendall(block)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_unknown_route_and_wrong_method(http):
    assert "/v1/nothing" in assert_error(http.get("/v1/nothing"), 404, None, "not_found")
    assert "Did you mean /v1/chat/completions?" in assert_error(http.post("/chat/completions"), 404, None, "not_found")
    for path in ("/v1/chat/completions/", "/chat/completions/"):  # not a redirect, which many clients do not follow
        assert "Did you mean /v1/chat/completions?" in assert_error(http.post(path), 404, None, "not_found")
    response = http.get("/v1/chat/completions")
    assert "GET" in assert_error(response, 405, None, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(("model", "status"), [({}, 400), ({"model": "scripted"}, 400), ({"model": "minilm"}, 404)])
def test_a_server_without_an_embedding_model_says_how_to_get_one(
    http: httpx.Client, model: dict[str, str], status: int
) -> None:
    answer = http.post("/v1/embeddings", json={"input": "x"} | model)
    assert answer.status_code == status
    assert "Start the server with --embedding-model all-minilm-l6-v2, or a folder" in answer.json()["error"]["message"]
