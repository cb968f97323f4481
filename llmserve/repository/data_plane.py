"""The one object both v2 skins call: what the protocol can ask of the server, in plain values. Knows no wire format."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from llmserve.backends.model_messages import MetricSample
from llmserve.backends.validation import datatype_name
from llmserve.errors import InferenceError
from llmserve.general_metrics import ModelStatistics
from llmserve.inference import InferRequest, InferResponse
from llmserve.repository.classification import classify
from llmserve.repository.language_models import LanguageModels
from llmserve.repository.lifecycle import IndexEntry
from llmserve.repository.model_repository import ModelRepository
from llmserve.repository.model_version import LanguageModelEntry, ResponseStream, Servable
from llmserve.repository.served_version import VersionState
from llmserve.repository.server_settings import LogSettings, TraceSettings

# In Triton's order; what is not served yet is not listed.
EXTENSIONS = (
    "classification",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)


_MAX_VERSION_DIGITS = 20


@dataclass(frozen=True, slots=True)
class ServerMetadata:
    """Who answers, and which extensions of the protocol it speaks."""

    name: str
    version: str
    extensions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """An input or output as a client must send or will get it; -1 stands for any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """A model's signature. `versions` are those that serve."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


def parse_version(text: str) -> int | None:
    """The version a request names; None for "" and -1, which let the server choose. Raises InferenceError."""
    if not text or text == "-1":
        return None
    if text.isascii() and text.isdigit() and len(text) < _MAX_VERSION_DIGITS:
        return int(text)  # 0 is a number that no version has
    raise InferenceError(
        f"failed to get model version from specified version string '{text[:64]}' (details: stol), "
        "version should be an integral value > 0",
        InferenceError.INVALID_ARG,
    )


def is_decoupled(served: Servable) -> bool:
    """Whether a request may have any number of responses."""
    decoupled: bool = served.config.model_transaction_policy.decoupled
    return decoupled


class DataPlane:
    """Every method raises only LLMServeError. `llms` is called whenever the index is asked for."""

    def __init__(
        self,
        repository: ModelRepository,
        *,
        version: str,
        llms: Callable[[], Sequence[LanguageModelEntry]] = tuple,
        language_models: LanguageModels | None = None,
    ) -> None:
        self._repository = repository
        self._metadata = ServerMetadata("llmserve", version, EXTENSIONS)
        self._llms = llms
        self._language_models = language_models
        self.log_settings = LogSettings()
        self._trace = TraceSettings()
        self._draining = False

    # The server.

    def begin_drain(self) -> None:
        """From here on requests are refused, and the server is not ready; those in flight go on."""
        self._draining = True

    def server_live(self) -> bool:
        """It answers, so it lives."""
        return True

    def server_ready(self) -> bool:
        """Whether the models that should serve do, as `strict_readiness` says."""
        strict = self._repository.settings.strict_readiness
        models_ready = self._repository.ready and not (strict and any(not llm.ready for llm in self._llms()))
        return models_ready and not self._draining

    def unready_reasons(self) -> dict[str, str]:
        """Why the models that should serve do not, by name; `server`: why none does."""
        reasons = {"server": "draining"} if self._draining else {}
        reasons.update((llm.name, llm.reason) for llm in self._llms() if not llm.ready)
        for model in self._repository.models:
            reasons.update((model.name, served.reason) for served in model.serving if not served.ready)
        reasons.update(self._repository.missing)
        return reasons

    def server_metadata(self) -> ServerMetadata:
        """Name, version, extensions."""
        return self._metadata

    # A model. Versions are the text of the request; "" lets the policy choose.

    def model_ready(self, name: str, version: str = "") -> bool:
        """False for a model that is not there. Raises InferenceError for a version that is no number."""
        number = parse_version(version)
        try:
            return self._find(name, number).ready and not self._draining
        except InferenceError:
            return False

    def model_unready_reason(self, name: str, version: str = "") -> str:
        """Why `model_ready` is false. Raises InferenceError for a version that is no number."""
        number = parse_version(version)
        try:
            return self._find(name, number).reason or ("draining" if self._draining else "")
        except InferenceError as error:
            return error.message

    def model_metadata(self, name: str, version: str = "") -> ModelMetadata:
        """The signature; shapes lead with -1 where the model batches. Raises InferenceError."""
        config = self._find(name, parse_version(version)).config
        batch = (-1,) if config.max_batch_size > 0 else ()

        def signature(tensors: Iterable[Any]) -> tuple[TensorMetadata, ...]:
            return tuple(
                TensorMetadata(tensor.name, datatype_name(tensor.data_type), (*batch, *tensor.dims))
                for tensor in tensors
            )

        versions = tuple(str(served.version) for served in self._serving(name))
        platform = config.platform or config.backend
        return ModelMetadata(name, versions, platform, signature(config.input), signature(config.output))

    def model_config(self, name: str, version: str = "") -> ModelConfig:
        """The complete configuration. Raises InferenceError."""
        return self._find(name, parse_version(version)).config

    def statistics(self, name: str = "", version: str = "") -> list[ModelStatistics]:
        """Those of a version, of all versions of a model, or of everything served. Raises InferenceError."""
        number = parse_version(version)
        if not name:
            return [served.statistics() for model in self._repository.models for served in model.serving]
        try:
            serving = self._serving(name)
        except InferenceError:
            serving = []
        if not serving:
            raise InferenceError(f"requested model '{name}' is not available", InferenceError.INVALID_ARG)
        chosen = [served for served in serving if number is None or served.version == number]
        if not chosen:
            raise InferenceError(
                f"requested model version is not available for model '{name}'", InferenceError.INVALID_ARG
            )
        return [served.statistics() for served in chosen]

    def metric_tags(self, name: str) -> Mapping[str, str]:
        """The `metric_tags` of a served model's configuration: further labels of its series."""
        serving = self._repository.find(name).serving
        return dict(serving[-1].config.metric_tags) if serving else {}

    def custom_metrics(self) -> list[MetricSample]:
        """The series that the general models keep themselves."""
        return [
            sample
            for model in self._repository.models
            for served in model.serving
            for sample in served.model.custom_metrics.values()
        ]

    def explain(self, name: str, version: str = "") -> dict[str, Any]:
        """Why the last batches had the size they had. Raises InferenceError."""
        return self._find(name, parse_version(version)).explain()

    def is_decoupled(self, name: str, version: str = "") -> bool:
        """Whether a request may have any number of responses. Raises InferenceError."""
        return is_decoupled(self.servable(name, version))

    def servable(self, name: str, version: str = "") -> Servable:
        """What `infer` would ask now. Raises InferenceError."""
        return self._find(name, parse_version(version))

    def infer(self, request: InferRequest, served: Servable | None = None) -> ResponseStream:
        """The responses to a request: iterate at once, close to cancel. Raises InferenceError at the call and while
        iterating. `served`: what `servable` has just said, not to be looked up again."""
        if self._draining:
            raise InferenceError("the server is draining: send the request elsewhere", InferenceError.UNAVAILABLE)
        served = served or self.servable(request.model_name, request.model_version)
        for output in request.outputs:
            if output.classification:
                return _classified(served, request)
        return served.infer(request)

    # The repository.

    async def repository_index(self, *, ready: bool = False) -> list[IndexEntry]:
        """Every model and version; `ready` leaves out those that do not serve."""
        entries = await self._repository.index()
        named = {entry.name for entry in entries}
        for llm in self._llms():
            if llm.name not in named:
                state = VersionState.READY if llm.ready else VersionState.UNAVAILABLE
                entries.append(IndexEntry(llm.name, str(llm.version), state, llm.reason))
        return [entry for entry in entries if not ready or entry.state == VersionState.READY]

    async def load(self, name: str, config_json: str | None = None, files: Mapping[str, bytes] | None = None) -> None:
        """Loads or reloads a model, of either kind. Raises InferenceError, InvalidRequestError."""
        if self._language_models is None or not self._language_models.has(name):
            await self._repository.load(name, config_json, files)
            return
        self._repository.require_explicit()
        if config_json is not None or files:
            raise InferenceError(
                f"failed to load '{name}', it is a language model: its files and settings are those it was started "
                "with, and a load request cannot bring others",
                InferenceError.INVALID_ARG,
            )
        await self._language_models.load(name)

    async def unload(self, name: str, unload_dependents: bool = False) -> None:
        """Takes a model of either kind out of service. Raises InferenceError."""
        if self._language_models is not None and self._language_models.has(name):
            self._repository.require_explicit()
            await self._language_models.unload(name)
        else:
            await self._repository.unload(name, unload_dependents)
        self._trace.forget(name)

    # Settings.

    def trace_settings(
        self, model: str = "", changes: Mapping[str, str | list[str] | None] | None = None
    ) -> dict[str, str | list[str]]:
        """Those of a model, or the global ones; changed first if `changes` are given. Raises InferenceError."""
        if model:
            try:
                self._find(model, None)
            except InferenceError:
                raise InferenceError(f"Request for unknown model : {model}", InferenceError.INVALID_ARG) from None
        return self._trace.update(changes, model) if changes else self._trace.get(model)

    def has_general_model(self, name: str) -> bool:
        """Whether the repository has a model of that name, served or not."""
        return self._repository.has(name)

    def is_language_model(self, name: str) -> bool:
        """Whether an LLM answers to that name."""
        return not self._repository.has(name) and any(llm.name == name for llm in self._llms())

    def _find(self, name: str, version: int | None) -> Servable:
        model = self._repository.get(name)
        if model is None:
            for llm in self._llms():
                if llm.name == name and version in (None, llm.version):
                    return llm
            model = self._repository.find(name)
        return model.find(version)

    def _serving(self, name: str) -> Sequence[Servable]:
        if not self._repository.has(name):
            llms = [llm for llm in self._llms() if llm.name == name]
            if llms:
                return llms
        return self._repository.find(name).serving


async def _classified(served: Servable, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
    """Every response of `served`, the outputs that asked for it turned into their highest classes."""
    wanted = {output.name: output.classification for output in request.outputs if output.classification}
    batched = served.config.max_batch_size > 0
    async with aclosing(served.infer(request)) as responses:
        async for response in responses:
            response.outputs = [
                classify(tensor, wanted[tensor.name], served.labels.get(tensor.name, ()), batched=batched)
                if tensor.name in wanted
                else tensor
                for tensor in response.outputs
            ]
            yield response
