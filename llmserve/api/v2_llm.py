"""An LLM as a v2 model: `text_input` in, `text_output` out, whole or as a stream. Knows no route and no engine.

Its inputs are those of Triton's vLLM backend. Every other parameter of `/v1/completions` (temperature, stop, seed, ...)
is a parameter of the request, checked the same way and with the same default (16 tokens, as the vLLM backend has it
too); one that is unknown is an error.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from tritonclient.grpc import model_config_pb2
from tritonclient.grpc.model_config_pb2 import ModelConfig

from llmserve.api.generations import raise_if_failed
from llmserve.api.prompts import tokenize_text
from llmserve.api.protocol import CompletionRequest
from llmserve.api.sampling import COMPLETION_MAX_TOKENS, Wanted, build_spec, check_request, tokenize_bad_words
from llmserve.api.settings import ApiSettings
from llmserve.api.v2_tensors import decode_values, encode_values
from llmserve.api.validation import parse_request
from llmserve.backends.generation import GenerationSpec, TextGenerator
from llmserve.backends.validation import RequestValidator
from llmserve.errors import InvalidRequestError, LLMServeError
from llmserve.general_metrics import ExecutionTimes, FailureReason, ModelStatistics
from llmserve.inference import InferRequest, InferResponse, Tensor
from llmserve.messages import FinishReason
from llmserve.repository.served_models import ServedModels

_NOT_SEQUENCES = ("id", "n", "echo", "logprobs", "prompt_logprobs", "stream_options")
_NO_TIMES = ExecutionTimes(0, 0, 0)


class LanguageModel:
    """One name under which an LLM is served. `stream` asks for its answer piece by piece; otherwise it comes whole."""

    backend = "llmserve"

    def __init__(self, name: str, generator: TextGenerator, settings: ApiSettings, version: int = 1) -> None:
        self.name = name
        self.version = version
        self.labels: Mapping[str, list[str]] = {}
        self.config = _config(name, self.backend)
        self._generator = generator
        self._settings = settings
        self._validator = RequestValidator(self.config)
        self._statistics = ModelStatistics(name, str(self.version))
        self._num_requests = 0

    @property
    def ready(self) -> bool:
        """Loaded, and running requests."""
        return self._generator.is_ready()

    @property
    def reason(self) -> str:
        """Why it is not ready; empty when it is."""
        return self._generator.reason

    def statistics(self) -> ModelStatistics:
        """Its requests over this protocol; the LLM's own metrics say far more."""
        return self._statistics

    def explain(self) -> dict[str, Any]:
        """An LLM has no batches of requests: they join and leave the running batch with every token."""
        return {"model_name": self.name, "model_version": str(self.version), "batching": "in-flight", "batches": []}

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        """One response, or with `stream` one for each piece of text, the last with its `finish_reason`."""
        begin_ns = time.monotonic_ns()
        answered = False
        reason = FailureReason.CANCELED  # unless something else ends it
        try:
            stream, spec = await self._read(request)
            self._num_requests += 1
            pieces: list[str] = []
            async with self._generator.generate(f"v2-{self.name}-{self._num_requests}", spec) as generation:
                async for deltas in generation:
                    for delta in deltas:
                        raise_if_failed(delta)
                        pieces.append(delta.text)
                        if delta.finish_reason is None and stream and delta.text:
                            yield self._response(request, delta.text, None)
                        elif delta.finish_reason is not None:
                            text = delta.text if stream else "".join(pieces)
                            self._statistics.record_success(1, time.monotonic_ns() - begin_ns, 0, _NO_TIMES)
                            answered = True
                            yield self._response(request, text, delta.finish_reason)
        except LLMServeError:
            reason = FailureReason.BACKEND
            raise
        finally:
            if not answered:
                self._statistics.record_failure(reason, time.monotonic_ns() - begin_ns)

    def _response(self, request: InferRequest, text: str, finish_reason: FinishReason | None) -> InferResponse:
        output = Tensor("text_output", "BYTES", (1,), encode_values([text], "text_output", "BYTES"))
        response = InferResponse(self.name, str(self.version), [output], request.id, final=finish_reason is not None)
        if finish_reason is not None:
            response.parameters["finish_reason"] = finish_reason.value
        return response

    async def _read(self, request: InferRequest) -> tuple[bool, GenerationSpec]:
        """Whether to stream, and what to generate. Raises InvalidRequestError."""
        begin_s = time.monotonic()
        try:
            self._validator.check(request)
        except InvalidRequestError as error:
            raise InvalidRequestError(
                f"{error.message.rstrip()} {self.name!r} is a language model: its input is 'text_input' "
                f"(POST /v2/models/{self.name}/generate), and it answers POST /v1/chat/completions.",
                error.param,
            ) from error
        inputs = {tensor.name: decode_values(tensor)[0] for tensor in request.inputs}
        values: dict[str, Any] = {key: value for key, value in request.parameters.items() if key != "id"}
        values.update(_sampling_parameters(inputs.get("sampling_parameters", "")))
        if "max_tokens" in inputs:
            values["max_tokens"] = inputs["max_tokens"]
        stream = inputs.get("stream", values.pop("stream", False))
        if not isinstance(stream, bool):
            raise InvalidRequestError("'stream' must be true or false.", "stream")
        if refused := [key for key in _NOT_SEQUENCES if key in values]:
            raise InvalidRequestError(f"'{refused[0]}' is not available here: use /v1/completions.", refused[0])
        prompt: str = inputs["text_input"]
        completion = parse_request(CompletionRequest, {**values, "prompt": prompt, "model": self.name})
        wanted = Wanted(
            max_tokens=completion.max_tokens,
            max_tokens_param="max_tokens",
            default_max_tokens=COMPLETION_MAX_TOKENS,
        )
        check_request(completion, wanted, self._generator, self._settings)
        token_ids = await tokenize_text(
            prompt, completion.add_special_tokens is not False, self._generator, self._settings
        )
        bad_words = await tokenize_bad_words(completion, self._generator)
        spec = build_spec(completion, token_ids, bad_words, wanted, self._generator, "text_input")
        if request.timeout_us:
            spec = dataclasses.replace(spec, deadline_s=begin_s + request.timeout_us * 1e-6)
        return stream, spec


class ServedLanguageModels:
    """The LLMs that are served now as v2 models, each made once for each version."""

    def __init__(self, llms: ServedModels, settings: ApiSettings) -> None:
        self._llms = llms
        self._settings = settings
        self._models: dict[str, LanguageModel] = {}
        llms.watch(self._update)
        self._update()

    def __call__(self) -> Sequence[LanguageModel]:
        return list(self._models.values())

    def _update(self) -> None:
        before, self._models = self._models, {}
        for name in self._llms.names:
            llm, model = self._llms.get(name), before.get(name)
            if model is None or model.version != llm.version:
                model = LanguageModel(name, llm, self._settings, llm.version)
            self._models[name] = model


def _config(name: str, backend: str) -> ModelConfig:
    config = ModelConfig(name=name, platform=backend, backend=backend)
    config.input.add(name="text_input", data_type=model_config_pb2.TYPE_STRING, dims=[1])
    config.input.add(name="stream", data_type=model_config_pb2.TYPE_BOOL, dims=[1], optional=True)
    config.input.add(name="sampling_parameters", data_type=model_config_pb2.TYPE_STRING, dims=[1], optional=True)
    config.input.add(name="max_tokens", data_type=model_config_pb2.TYPE_INT32, dims=[1], optional=True)
    config.output.add(name="text_output", data_type=model_config_pb2.TYPE_STRING, dims=[1])
    config.model_transaction_policy.decoupled = True
    config.version_policy.latest.num_versions = 1
    return config


def _sampling_parameters(text: str) -> dict[str, Any]:
    """The input `sampling_parameters`: a JSON object, its numbers maybe as strings, as the vLLM backend takes them."""
    if not text:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"'sampling_parameters' is not valid JSON: {error}", "sampling_parameters") from error
    if not isinstance(values, dict):
        raise InvalidRequestError("'sampling_parameters' must be a JSON object.", "sampling_parameters")
    return {key: _number(value) if isinstance(value, str) else value for key, value in values.items()}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
