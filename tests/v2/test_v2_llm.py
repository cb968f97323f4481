"""An LLM under the v2 protocol: generate, generate_stream, the index, its parameters. The model is scripted."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from llmserve.api.settings import ApiSettings
from llmserve.api.v2_http import V2Http
from llmserve.api.v2_llm import LanguageModel
from llmserve.api.v2_settings import V2HttpSettings
from llmserve.backends.generation import GenerationDelta, GenerationSpec, SamplingDefaults
from llmserve.errors import EngineDeadError
from llmserve.messages import FinishReason
from llmserve.repository.data_plane import DataPlane
from llmserve.repository.model_repository import ModelRepository
from llmserve.repository.settings import RepositorySettings
from tests.v2.v2_fake_model import FakeModel


class Words:
    """A tokenizer of one token a character."""

    vocab_size = 256
    eos_token_ids = (0,)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


class Scripted:
    """Answers every prompt with the same three pieces."""

    max_model_len = 100
    max_logprobs = 5
    honours_priority = True
    vocab_size = 256
    tokenizer = Words()
    sampling_defaults = SamplingDefaults({"temperature": 0.5})

    def __init__(self) -> None:
        self.specs: list[GenerationSpec] = []
        self.is_dead = False
        self.num_left = 0

    def is_ready(self) -> bool:
        return not self.is_dead

    def takes_requests(self) -> bool:
        return not self.is_dead

    @property
    def reason(self) -> str:
        return "failed: killed" if self.is_dead else ""

    def generate(self, request_id: str, spec: GenerationSpec) -> Scripted:
        self.specs.append(spec)
        return self

    async def __aenter__(self) -> Scripted:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.num_left += 1

    async def __aiter__(self) -> AsyncIterator[list[GenerationDelta]]:
        if self.is_dead:
            raise EngineDeadError("the engine has died")
        for text in ("one ", "", "two "):
            yield [GenerationDelta(0, text, [1])]
        yield [GenerationDelta(0, "three", [1], finish_reason=FinishReason.LENGTH)]


class Harness:
    """The skin over one LLM."""

    def __init__(self) -> None:
        self.generator = Scripted()
        self.model = LanguageModel("llm", self.generator, ApiSettings())  # type: ignore[arg-type]

    async def _post(self, path: str, body: Any, method: str) -> tuple[int, bytes]:
        repository = ModelRepository(RepositorySettings(), FakeModel)
        await repository.start()
        plane = DataPlane(repository, version="0", llms=lambda: [self.model])
        http = V2Http(None, plane=plane, settings=V2HttpSettings())  # type: ignore[arg-type]
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await http({"type": "http", "method": method, "path": path, "headers": []}, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])

    def ask(self, path: str, body: Any = None, method: str = "POST") -> tuple[int, Any]:
        """(status, JSON or the JSON of every event)"""
        status, content = asyncio.run(self._post(f"/v2/{path}", body, method))
        if content.startswith(b"data: "):
            return status, [json.loads(event[6:]) for event in content.split(b"\n\n") if event]
        return status, json.loads(content) if content else None


@pytest.fixture
def llm() -> Harness:
    return Harness()


def test_generate_answers_whole(llm: Harness) -> None:
    status, answer = llm.ask(
        "models/llm/generate", {"text_input": "hi", "parameters": {"seed": 7, "stop": "x"}, "id": "1"}
    )
    assert (status, answer) == (
        200,
        {
            "finish_reason": "length",
            "id": "1",
            "model_name": "llm",
            "model_version": "1",
            "text_output": "one two three",
        },
    )
    (spec,) = llm.generator.specs
    assert (spec.prompt_token_ids, spec.sampling.seed, spec.stop) == ([104, 105], 7, ("x",))
    assert spec.sampling.temperature == 0.5
    assert llm.generator.num_left == 1


def test_the_timeout_of_the_protocol_is_the_generations_deadline(llm: Harness) -> None:
    before_s = time.monotonic()
    assert llm.ask("models/llm/generate", {"text_input": "hi", "timeout": 2_500_000})[0] == 200
    assert llm.ask("models/llm/generate", {"text_input": "hi"})[0] == 200
    first, second = llm.generator.specs
    assert first.deadline_s is not None
    assert before_s + 2.5 <= first.deadline_s <= time.monotonic() + 2.5
    assert second.deadline_s is None


def test_generate_stream_streams_unless_told_otherwise(llm: Harness) -> None:
    status, events = llm.ask("models/llm/generate_stream", {"text_input": "hi", "max_tokens": 9})
    assert (status, [event["text_output"] for event in events]) == (200, ["one ", "two ", "three"])
    assert [event.get("finish_reason") for event in events] == [None, None, "length"]
    assert llm.generator.specs[0].sampling.max_tokens == 9
    status, events = llm.ask("models/llm/generate_stream", {"text_input": "hi", "stream": False})
    assert [event["text_output"] for event in events] == ["one two three"]


@pytest.mark.parametrize(("prompt", "expected"), [("hi", 16), ("x" * 90, 10)])
def test_an_answer_of_no_given_length_is_as_long_as_in_completions(llm: Harness, prompt: str, expected: int) -> None:
    assert llm.ask("models/llm/generate", {"text_input": prompt})[0] == 200
    assert llm.generator.specs[0].sampling.max_tokens == expected


def test_the_vllm_backends_sampling_parameters(llm: Harness) -> None:
    parameters = json.dumps({"temperature": "0.25", "top_k": 3, "max_tokens": "4"})
    assert llm.ask("models/llm/generate", {"text_input": "hi", "sampling_parameters": parameters})[0] == 200
    sampling = llm.generator.specs[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.25, 3, 4)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"max_tokens": 5}, "missing required input(s) ['text_input']"),
        ({"text_input": "hi", "no_such": 1}, "no_such"),
        ({"text_input": "hi", "temperature": -1}, "temperature"),
        ({"text_input": "hi", "n": 2}, "'n' is not available here"),
        ({"text_input": "hi", "sampling_parameters": "{"}, "not valid JSON"),
        ({"text_input": "x" * 200}, "context is 100 tokens"),
        ({"text_input": "hi", "parameters": {"stream": "yes"}}, "non-boolean"),
    ],
)
def test_what_is_wrong_is_said(llm: Harness, body: Any, complaint: str) -> None:
    status, answer = llm.ask("models/llm/generate", body)
    assert status in (400, 500)
    assert complaint in answer["error"]
    assert not llm.generator.specs


def test_it_stands_in_the_index_and_has_a_signature(llm: Harness) -> None:
    assert llm.ask("repository/index", {}) == (200, [{"name": "llm", "version": "1", "state": "READY"}])
    assert llm.ask("models/llm/ready", method="GET")[0] == 200
    status, metadata = llm.ask("models/llm", method="GET")
    assert (status, metadata["versions"], metadata["inputs"][0]) == (
        200,
        ["1"],
        {"name": "text_input", "datatype": "BYTES", "shape": [1]},
    )
    assert llm.ask("models/llm/config", method="GET")[1]["model_transaction_policy"] == {"decoupled": True}
    assert llm.ask("models/llm/explain", method="GET")[1]["batching"] == "in-flight"
    assert llm.ask("models/llm/versions/2/config", method="GET")[0] == 404
    assert llm.ask("models/llm/infer", {"inputs": []})[0] == 501


def test_a_dead_engine(llm: Harness) -> None:
    llm.generator.is_dead = True
    assert llm.ask("health/ready", method="GET") == (
        400,
        {"ready": False, "reasons": {"llm": "failed: killed"}},
    )
    assert llm.ask("models/llm/ready", method="GET")[1]["reason"] == "failed: killed"
    assert llm.ask("repository/index", {})[1][0] == {
        "name": "llm",
        "version": "1",
        "state": "UNAVAILABLE",
        "reason": "failed: killed",
    }
    assert llm.ask("models/llm/generate", {"text_input": "hi"}) == (503, {"error": "the engine has died"})
    _, statistics = llm.ask("models/llm/stats", method="GET")
    assert statistics["model_stats"][0]["inference_stats"]["fail"]["count"] == 1
