"""A server over a scripted model: real HTTP, real sockets, no engine. The tokenizer is one token a byte."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx
import pytest
import uvicorn

from llmserve.api.app import create_app
from llmserve.api.settings import ApiSettings
from llmserve.backends.generation import GenerationDelta, GenerationSpec, SamplingDefaults
from llmserve.errors import InvalidRequestError, ModelNotFoundError
from llmserve.messages import FinishReason, TokenLogprobs
from llmserve.metrics import Metrics

BOS, EOS, VOCAB_SIZE = 256, 257, 258


class ByteTokenizer:
    """Every byte a token: a character beyond ASCII is several tokens, as with real vocabularies."""

    vocab_size = VOCAB_SIZE
    eos_token_ids = (EOS,)
    special_token_ids = frozenset({BOS, EOS})
    chat_template: str | None = "scripted"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        shown = [t for t in token_ids if not skip_special_tokens or t < 256]
        return b"".join(self.token_bytes(token) for token in shown).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return {BOS: b"<s>", EOS: b"</s>"}.get(token_id) or bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Any = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> str:
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError("they exclude each other", "continue_final_message")
        text = "".join(f"[{m['role']}]{m['content']}\n" for m in messages)
        text += "".join(f"({key}={value})" for key, value in (chat_template_kwargs or {}).items())
        return text.rstrip("\n") if continue_final_message else text + "[assistant]" * add_generation_prompt


@dataclass
class Script:
    """What the model does with the next requests, and what it was asked."""

    answer: str = "Hello, wörld! 👋"
    refuse: Exception | None = None  # raised by generate()
    fail_after: int | None = None  # tokens, then `error`
    error: Exception | None = None
    hold_after: int | None = None  # tokens, then nothing until `release` or the client goes
    cached_tokens: int = 0
    finish_reason: FinishReason = FinishReason.STOP
    stop_reason: int | str | None = None
    ready: bool = True
    live: bool = True
    specs: list[GenerationSpec] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    held: queue.Queue[Scripted] = field(default_factory=queue.Queue)
    aborted: queue.Queue[str] = field(default_factory=queue.Queue)


class Scripted:
    """Says the script's answer, one token a turn, the sequences in step."""

    def __init__(self, request_id: str, spec: GenerationSpec, script: Script, tokenizer: ByteTokenizer) -> None:
        self.request_id = request_id
        self._spec = spec
        self._script = script
        self._tokenizer = tokenizer
        self._finished = False
        self._loop = asyncio.get_running_loop()
        self._released = asyncio.Event()

    def release(self) -> None:
        self._loop.call_soon_threadsafe(self._released.set)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if not self._finished:
            self._script.aborted.put(self.request_id)

    async def __aiter__(self) -> AsyncIterator[list[GenerationDelta]]:
        script, sampling = self._script, self._spec.sampling
        token_ids = [*script.answer.encode(), EOS]
        cut = len(token_ids) > sampling.max_tokens
        token_ids = token_ids[: sampling.max_tokens]
        shown = ""
        for position in range(len(token_ids)):
            if position == script.fail_after:
                assert script.error is not None
                raise script.error
            if position == script.hold_after:
                script.held.put(self)
                await self._released.wait()
            await asyncio.sleep(0)
            whole = self._whole_characters(token_ids[: position + 1])
            text, shown = whole[len(shown) :], whole
            last = position == len(token_ids) - 1
            yield [self._delta(index, position, token_ids[position], text, last, cut) for index in range(self._spec.n)]
        self._finished = True

    def _whole_characters(self, token_ids: list[int]) -> str:
        return bytes(token for token in token_ids if token < 256).decode("utf-8", "ignore")

    def _delta(self, index: int, position: int, token: int, text: str, last: bool, cut: bool) -> GenerationDelta:
        sampling, prompt = self._spec.sampling, self._spec.prompt_token_ids
        wants_prompt = sampling.prompt_logprobs is not None and position == 0
        reason = FinishReason.LENGTH if cut else self._script.finish_reason
        return GenerationDelta(
            index=index,
            text=text,
            token_ids=[token],
            logprobs=None if sampling.logprobs is None else [_logprobs(token, sampling.logprobs)],
            prompt_logprobs=[None, *(_logprobs(t, sampling.prompt_logprobs or 0) for t in prompt[1:])]
            if wants_prompt
            else None,
            finish_reason=reason if last else None,
            stop_reason=self._script.stop_reason if last else None,
            num_cached_tokens=self._script.cached_tokens,
        )


def _logprobs(token: int, num_top: int) -> TokenLogprobs:
    """The token chosen is the second likeliest; the third can never be."""
    top = [(token - 1, -0.25), (token, -1.5), (token - 2, float("-inf"))]
    return TokenLogprobs(token, -1.5, 2, top[:num_top])


class ScriptedModel:
    """Implements TextGenerator."""

    root = "/models/scripted"
    created = 1700000000
    max_model_len = 512
    max_logprobs = 5
    honours_priority = True
    vocab_size = VOCAB_SIZE

    def __init__(self, name: str, script: Script) -> None:
        self.name = name
        self.script = script
        self.tokenizer = ByteTokenizer()
        self.sampling_defaults = SamplingDefaults({"temperature": 0.6, "top_k": 40})

    def is_ready(self) -> bool:
        return self.script.ready

    def is_live(self) -> bool:
        return self.script.live

    def takes_requests(self) -> bool:
        return self.script.ready

    @property
    def reason(self) -> str:
        return "" if self.script.ready else "loading"

    def generate(self, request_id: str, spec: GenerationSpec) -> Scripted:
        if self.script.refuse is not None:
            raise self.script.refuse
        self.script.specs.append(spec)
        self.script.request_ids.append(request_id)
        return Scripted(request_id, spec, self.script, self.tokenizer)


class Directory:
    """Implements ModelDirectory."""

    def __init__(self, models: list[ScriptedModel]) -> None:
        self._models = {model.name: model for model in models}

    @property
    def names(self) -> list[str]:
        return list(self._models)

    @property
    def default(self) -> str | None:
        return next(iter(self._models)) if len(self._models) == 1 else None

    def get(self, name: str) -> ScriptedModel:
        if name not in self._models:
            raise ModelNotFoundError(name, self.names)
        return self._models[name]


@dataclass
class Served:
    """A running server and what is behind it."""

    url: str
    port: int
    model: ScriptedModel
    directory: Directory
    metrics: Metrics

    @property
    def script(self) -> Script:
        return self.model.script


def _run(model_names: list[str], settings: ApiSettings) -> Iterator[Served]:
    models = [ScriptedModel(name, Script()) for name in model_names]
    directory, metrics = Directory(models), Metrics()
    config = uvicorn.Config(
        create_app(directory, settings, metrics), loop="uvloop", http="httptools", log_level="critical", lifespan="off"
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield Served(f"http://127.0.0.1:{port}", port, models[0], directory, metrics)
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def _one_model_server() -> Iterator[Served]:
    yield from _run(["scripted"], ApiSettings(max_body_bytes=1 << 20, keep_alive_s=0.05))


@pytest.fixture(scope="session")
def _two_model_server() -> Iterator[Served]:
    yield from _run(["org/first", "second"], ApiSettings())


@pytest.fixture
def served(_one_model_server: Served) -> Served:
    """One model, with a fresh script."""
    _one_model_server.model.script = Script()
    return _one_model_server


@pytest.fixture
def two_served(_two_model_server: Served) -> Served:
    """Two models, so that there is no default one."""
    return _two_model_server


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    """A plain HTTP client of the server."""
    with httpx.Client(base_url=served.url, timeout=10) as client:
        yield client
