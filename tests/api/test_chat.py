"""Chat completions as the official client and as raw HTTP see them."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import httpx
import openai
import pytest

from llmserve.errors import EngineDeadError, NotReadyError, QueueFullError
from llmserve.messages import FinishReason

USER = [{"role": "user", "content": "Hi"}]
ANSWER = "Hello, wörld! 👋"


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def events(response: httpx.Response) -> list[str]:
    """The data of each event; comments are left out."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    return [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    data = events(response)
    assert data.pop() == "[DONE]"
    return [json.loads(text) for text in data]


def test_whole_answer(client, served):
    served.script.cached_tokens = 4
    answer = client.chat.completions.create(model="scripted", messages=USER)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.id == served.script.request_ids[0]
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    prompt = "[user]Hi\n[assistant]"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(ANSWER.encode()) + 1
    assert answer.usage.total_tokens == len(prompt) + len(ANSWER.encode()) + 1
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert served.script.specs[0].prompt_token_ids == list(prompt.encode())
    assert served.script.aborted.empty()


def test_stream(client):
    stream = client.chat.completions.create(
        model="scripted", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    received = list(stream)
    assert {(chunk.id, chunk.created, chunk.model) for chunk in received} == {
        (received[0].id, received[0].created, "scripted")
    }
    assert received[0].choices[0].delta.role == "assistant"
    assert received[0].choices[0].delta.content == ""
    texts = [chunk.choices[0].delta.content or "" for chunk in received[:-1]]
    assert "".join(texts) == ANSWER
    assert "ö" in texts
    assert "👋" in texts
    assert [chunk.choices[0].finish_reason for chunk in received[:-1]] == [None] * (len(received) - 2) + ["stop"]
    assert [chunk.usage for chunk in received[:-1]] == [None] * (len(received) - 1)
    assert received[-1].choices == []
    assert received[-1].usage.completion_tokens == len(ANSWER.encode()) + 1


def test_async_client(served):
    async def talk() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none") as client:
            whole = await client.chat.completions.create(model="scripted", messages=USER)
            text = ""
            async for chunk in await client.chat.completions.create(model="scripted", messages=USER, stream=True):
                text += chunk.choices[0].delta.content or ""
        return whole.choices[0].message.content, text

    assert asyncio.run(talk()) == (ANSWER, ANSWER)


def test_many_concurrent_streams(served):
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none") as client:

            async def one() -> str:
                stream = await client.chat.completions.create(model="scripted", messages=USER, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one() for _ in range(16)))

    assert asyncio.run(talk()) == [ANSWER] * 16


def test_wire_of_a_stream(http, served):
    response = http.post("/v1/chat/completions", json={"messages": USER, "stream": True})
    received = chunks(response)
    assert response.headers["x-request-id"] == received[0]["id"]
    assert response.headers["cache-control"] == "no-store"
    assert "content-length" not in response.headers
    assert all("usage" not in chunk for chunk in received)
    assert received[1]["choices"] == [{"index": 0, "delta": {"content": "H"}, "logprobs": None, "finish_reason": None}]
    assert received[-1]["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]


def test_text_that_looks_like_json_survives_both_paths(http, served):
    served.script.answer = 'a"b\\c\n\u2028\x01</script>{"error":1}\x00end'
    fast = chunks(http.post("/v1/chat/completions", json={"messages": USER, "stream": True}))
    slow = chunks(
        http.post(
            "/v1/chat/completions",
            json={"messages": USER, "stream": True, "stream_options": {"continuous_usage_stats": True}},
        )
    )
    for received in (fast, slow):
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in received) == served.script.answer


def test_continuous_usage_counts_up(http):
    options = {"include_usage": True, "continuous_usage_stats": True}
    received = chunks(
        http.post("/v1/chat/completions", json={"messages": USER, "stream": True, "stream_options": options})
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in received]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == counts[-2] == len(ANSWER.encode()) + 1


@pytest.mark.parametrize("stream", [False, True])
def test_n_sequences(http, served, stream):
    body = {"messages": USER, "n": 3, "stream": stream, "max_tokens": 5, "stream_options": None}
    response = http.post("/v1/chat/completions", json=body)
    if stream:
        texts = ["", "", ""]
        reasons: list[str | None] = [None] * 3
        roles = 0
        for chunk in chunks(response):
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["delta"].get("content", "")
            reasons[choice["index"]] = choice["finish_reason"]
            roles += "role" in choice["delta"]
        assert roles == 3
    else:
        choices = response.json()["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2]
        texts = [choice["message"]["content"] for choice in choices]
        reasons = [choice["finish_reason"] for choice in choices]
        assert response.json()["usage"]["completion_tokens"] == 15
    assert texts == ["Hello"] * 3
    assert reasons == ["length"] * 3


def test_logprobs(client):
    answer = client.chat.completions.create(
        model="scripted", messages=USER, logprobs=True, top_logprobs=3, max_tokens=9
    )
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content[:5]] == list("Hello")
    assert content[0].bytes == [72]
    assert content[0].logprob == -1.5
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [
        ("G", -0.25),
        ("H", -1.5),
        ("F", -9999.0),
    ]
    assert content[8].bytes == [0xC3]  # half of a character still says its byte


def test_streamed_logprobs_say_every_token_once(http):
    body = {"messages": USER, "stream": True, "logprobs": True}
    entries = [
        entry
        for chunk in chunks(http.post("/v1/chat/completions", json=body))
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert bytes(byte for entry in entries[:-1] for byte in entry["bytes"]).decode() == ANSWER
    assert all(entry["top_logprobs"] == [] for entry in entries)


def test_prompt_logprobs_and_token_ids(http):
    body = {"messages": USER, "prompt_logprobs": 1, "return_token_ids": True}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert bytes(answer["prompt_token_ids"]).decode() == "[user]Hi\n[assistant]"
    assert bytes(answer["choices"][0]["token_ids"][:-1]).decode() == ANSWER
    assert answer["prompt_logprobs"][0] is None
    assert answer["prompt_logprobs"][1] == {
        "117": {"logprob": -1.5, "rank": 2, "decoded_token": "u"},
        "116": {"logprob": -0.25, "rank": 1, "decoded_token": "t"},
    }


def test_stop_reason(http, served):
    served.script.stop_reason = "\n\n"
    answer = http.post("/v1/chat/completions", json={"messages": USER}).json()
    assert answer["choices"][0]["stop_reason"] == "\n\n"
    last = chunks(http.post("/v1/chat/completions", json={"messages": USER, "stream": True}))[-1]
    assert last["choices"][0]["stop_reason"] == "\n\n"


def test_conversation_as_the_client_sends_it_back(client, served):
    first = client.chat.completions.create(model="scripted", messages=USER)
    reply = first.choices[0].message.model_dump()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    client.chat.completions.create(
        model="scripted",
        messages=[{"role": "developer", "content": "Be kind."}, *USER, reply, {"role": "user", "content": parts}],
    )
    prompt = bytes(served.script.specs[1].prompt_token_ids).decode()
    assert prompt == f"[system]Be kind.\n[user]Hi\n[assistant]{ANSWER}\n[user]a\nb\n[assistant]"


@pytest.mark.parametrize(
    ("extra", "prompt"),
    [
        ({}, "[user]Hi\n[assistant]He\n[assistant]"),
        ({"add_generation_prompt": False}, "[user]Hi\n[assistant]He\n"),
        ({"continue_final_message": True}, "[user]Hi\n[assistant]He"),
        ({"chat_template_kwargs": {"think": 1}}, "[user]Hi\n[assistant]He\n(think=1)[assistant]"),
    ],
)
def test_template_options(http, served, extra, prompt):
    messages = [*USER, {"role": "assistant", "content": "He"}]
    assert http.post("/v1/chat/completions", json={"messages": messages, **extra}).status_code == 200
    assert bytes(served.script.specs[0].prompt_token_ids).decode() == prompt


def test_long_prompts_are_tokenised_too(http, served):
    served.model.max_model_len = 100_000
    try:
        text = "word " * 8000
        assert http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}]}).is_success
    finally:
        del served.model.max_model_len
    assert bytes(served.script.specs[0].prompt_token_ids).decode() == f"[user]{text}\n[assistant]"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFullError("The queue is full.", retry_after_s=3), 429, "queue_full"),
        (NotReadyError("Still loading."), 503, "not_ready"),
        (EngineDeadError("The engine died."), 500, "engine_dead"),
        (RuntimeError("secret of the server"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("when", ["refused", "before the first token"])
def test_errors_before_the_first_token_are_statuses(http, served, stream, error, status, code, when):
    if when == "refused":
        served.script.refuse = error
    else:
        served.script.fail_after, served.script.error = 0, error
    response = http.post("/v1/chat/completions", json={"messages": USER, "stream": stream})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["code"] == code
    assert "secret" not in response.text
    assert (response.headers.get("retry-after") == "3") == (status == 429)


@pytest.mark.parametrize(
    ("error", "code"), [(EngineDeadError("It died."), "engine_dead"), (KeyError("x"), "internal_error")]
)
def test_error_in_mid_stream_is_an_event_then_the_end(http, served, error, code):
    served.script.fail_after, served.script.error = 5, error
    data = events(http.post("/v1/chat/completions", json={"messages": USER, "stream": True}))
    assert [json.loads(text)["choices"][0]["delta"]["content"] for text in data[:-1]] == ["", *"Hello"]
    assert json.loads(data[-1])["error"]["code"] == code


def test_official_client_raises_errors_of_mid_stream(client, served):
    served.script.fail_after, served.script.error = 5, EngineDeadError("It died.")
    stream = client.chat.completions.create(model="scripted", messages=USER, stream=True)
    with pytest.raises(openai.APIError, match=r"It died\."):
        list(stream)


@pytest.mark.parametrize("stream", [False, True])
def test_sequence_that_ended_by_an_error_is_no_answer(http, served, stream):
    served.script.finish_reason = FinishReason.ERROR
    response = http.post("/v1/chat/completions", json={"messages": USER, "stream": stream})
    error = json.loads(events(response)[-1]) if stream else response.json()
    assert error["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_model_that_is_not_ready(http, served, path, stream):
    served.script.ready = False
    prompt = {"messages": USER} if "chat" in path else {"prompt": "Hi"}
    response = http.post(path, json={**prompt, "stream": stream})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    assert response.headers["retry-after"] == "1"


def test_silence_in_mid_stream_gets_comments(http, served):
    served.script.hold_after = 3
    with http.stream("POST", "/v1/chat/completions", json={"messages": USER, "stream": True}) as response:
        lines = response.iter_lines()
        assert next(line for line in lines if line.startswith(":")) == ": keep-alive"
        served.script.held.get(timeout=5).release()
        rest = "".join(lines)
    assert '"content":"l"' in rest
    assert rest.endswith("[DONE]")


def test_silent_streams_get_comments(http, served):
    served.script.hold_after = 0
    with http.stream("POST", "/v1/chat/completions", json={"messages": USER, "stream": True}) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines) == ": keep-alive"
        served.script.held.get(timeout=5).release()
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""]


def test_unknown_model_names_the_known(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-17", messages=USER)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "'scripted'" in caught.value.message


def test_model_is_required_only_where_there_are_several(http, two_served):
    assert http.post("/v1/chat/completions", json={"messages": USER}).status_code == 200
    with httpx.Client(base_url=two_served.url) as other:
        response = other.post("/v1/chat/completions", json={"messages": USER})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
        assert "'org/first', 'second'" in response.json()["error"]["message"]
        answer = other.post("/v1/chat/completions", json={"messages": USER, "model": "org/first"})
        assert answer.json()["model"] == "org/first"


def test_no_logprob_is_infinite(http):
    body = {"messages": USER, "logprobs": True, "top_logprobs": 3}
    for entry in http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]:
        assert all(math.isfinite(top["logprob"]) for top in entry["top_logprobs"])
