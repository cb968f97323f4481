"""What the server says of itself, and the token routes."""

from __future__ import annotations

import re

import httpx
import openai
import pytest


def test_models(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none") as client:
        (model,) = client.models.list().data
        assert (model.id, model.object, model.created) == ("scripted", "model", 1700000000)
        assert model.model_extra["max_model_len"] == 512
        assert client.models.retrieve("scripted") == model
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("nobody")
        assert caught.value.code == "model_not_found"


def test_names_with_slashes(two_served):
    with httpx.Client(base_url=two_served.url) as client:
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["org/first", "second"]
        assert client.get("/v1/models/org/first").json()["id"] == "org/first"
        assert client.get("/v1/models/org%2Ffirst").json()["id"] == "org/first"


def test_health_and_ready(http, served):
    assert http.get("/health").json() == {"status": "ok", "live": {"scripted": True}}
    assert http.get("/ready").status_code == 200
    served.script.ready = False
    assert http.get("/ready").status_code == 503
    assert http.get("/ready").json() == {
        "status": "not ready",
        "ready": {"scripted": False},
        "reasons": {"scripted": "loading"},
    }
    assert http.get("/health").status_code == 200
    served.script.live = False
    assert http.get("/health").status_code == 503


def test_index_version_and_docs(http):
    index = http.get("/").json()
    assert index["models"] == ["scripted"]
    assert "/v1/chat/completions" in index["routes"]
    assert http.get("/version").json()["version"] == index["version"]
    page = http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page.text)  # nothing from another host


def test_openapi_describes_the_bodies(http):
    spec = http.get("/openapi.json").json()

    def resolve(reference: str) -> object:
        node: object = spec
        for key in reference.removeprefix("#/").split("/"):
            key = key.replace("~1", "/").replace("~0", "~")
            node = node[int(key)] if isinstance(node, list) else node[key]  # type: ignore[index]
        return node

    references = re.findall(r'"\$ref":\s*"([^"]+)"', http.get("/openapi.json").text)
    assert references
    assert all(isinstance(resolve(reference), dict) for reference in references)
    body = spec["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert {"messages", "temperature", "stop", "cache_salt"} <= body["content"]["application/json"]["schema"][
        "properties"
    ].keys()


def test_tokenize_text(http):
    answer = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert answer == {
        "count": 4,
        "max_model_len": 512,
        "tokens": [256, 104, 0xC3, 0xA9],
        "token_strs": ["<s>", "h", "�", "�"],
    }
    answer = http.post("/tokenize", json={"prompt": "h", "add_special_tokens": False, "model": "scripted"}).json()
    assert (answer["tokens"], answer["token_strs"]) == ([104], None)


def test_tokenize_chat(http):
    messages = [{"role": "user", "content": "Hi"}]
    answer = http.post("/tokenize", json={"messages": messages}).json()
    assert bytes(answer["tokens"]).decode() == "[user]Hi\n[assistant]"
    answer = http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert bytes(answer["tokens"]).decode() == "[user]Hi\n"


def test_detokenize(http):
    assert http.post("/detokenize", json={"tokens": [256, 104, 0xC3, 0xA9]}).json() == {"prompt": "<s>hé"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "add_specials": True}, "add_specials"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_bad_token_requests(http, path, body, param):
    response = http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_http_metrics_know_routes_not_paths(http):
    http.get("/v1/models/nobody")
    http.get("/no/such/path")
    http.post("/v1/chat/completions", json={})
    http.post("/v1/completions", json={"prompt": "Hi", "stream": True})
    streamed = 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"}'
    for _ in range(100):  # the client has the last byte of a stream before the server has counted it
        text = http.get("/metrics").text
        if streamed in text:
            break
    assert streamed in text
    assert 'http_requests_total{handler="/v1/models/{model_id:path}",method="GET",status="4xx"}' in text
    assert 'http_requests_total{handler="none",method="GET",status="4xx"}' in text
    assert 'http_request_duration_seconds_count{handler="/v1/chat/completions",method="POST"}' in text
    assert "/no/such/path" not in text
