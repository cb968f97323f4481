"""One version of a model in the repository: its state, its labels and the requests it is answering. Runs no model."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from llmserve.backends.infer_stream import InferStream
from llmserve.errors import LLMServeError, ModelLoadError
from llmserve.general_metrics import ModelStatistics
from llmserve.inference import InferRequest, InferResponse
from llmserve.repository.model_config import complete_batching
from llmserve.repository.model_folder import Fingerprint, ModelFolder, leaves_folder
from llmserve.repository.model_version import ModelVersion, OpenVersion, ResponseStream
from llmserve.repository.warmup import warmup_requests

logger = logging.getLogger(__name__)


class VersionState(enum.StrEnum):
    """The states of Triton's repository index."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


class ServedVersion:
    """Opened from `folder`, started once, retired once. Takes requests while READY."""

    def __init__(
        self, name: str, version: int, folder: ModelFolder, fingerprint: Fingerprint, opener: OpenVersion
    ) -> None:
        self.name = name
        self.version = version
        self.folder = folder
        self.fingerprint = fingerprint
        self.state = VersionState.LOADING
        self.config = folder.config
        self.labels: dict[str, list[str]] = {}  # output -> its classes, in order
        self._reason = ""
        self._num_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._opener = opener
        self._model: ModelVersion | None = None

    @property
    def model(self) -> ModelVersion:
        """What runs it; there from `start` on."""
        assert self._model is not None
        return self._model

    @property
    def serving(self) -> bool:
        """Whether requests are sent to it. It may still have to restart its process first."""
        return self.state is VersionState.READY

    @property
    def ready(self) -> bool:
        """Whether a request would be run now."""
        return self.state is VersionState.READY and self.model.is_ready()

    @property
    def reason(self) -> str:
        """Why it is not ready."""
        return self._reason or (self.model.reason if self.serving and not self.model.is_ready() else "")

    def statistics(self) -> ModelStatistics:
        """What happened to its requests."""
        return self.model.statistics()

    def explain(self) -> dict[str, Any]:
        """Why its last batches had the size they had."""
        return self.model.explain()

    async def start(self) -> None:
        """Loads it, reads its labels, warms it up; takes no requests yet. Raises what the load raised, with nothing
        left running."""
        folder = self.folder
        folder.retain()
        try:
            self._model = self._opener(
                self.name, str(self.version), folder.versions[self.version], folder.path, folder.config
            )
            await self._model.start()
            self.config = complete_batching(self.model.config)
            self.labels = read_labels(self.config, folder)
            for request in warmup_requests(self.config, folder.path):
                async for _ in self.model.infer(request):
                    pass
        except BaseException as error:
            await self._close()
            text = error.message if isinstance(error, LLMServeError) else f"{type(error).__name__}: {error}"
            self.fail(f"Internal: {text}")  # Triton's words
            raise

    def serve(self) -> None:
        """From here on requests are sent to it."""
        self.state = VersionState.READY

    def fail(self, reason: str) -> None:
        """It will not be served, and the index says why."""
        self.state, self._reason = VersionState.UNAVAILABLE, reason

    def infer(self, request: InferRequest) -> Answering:
        """Answers a request. One that has begun is answered even when a reload retires this version meanwhile."""
        return Answering(self.model.infer(request), self)

    def begin_request(self) -> None:
        """A request is being answered: it is not retired before `end_request`."""
        self._num_requests += 1
        self._idle.clear()

    def end_request(self) -> None:
        """One less."""
        self._num_requests -= 1
        if self._num_requests == 0:
            self._idle.set()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While a request is being answered by somebody else than `infer`."""
        self.begin_request()
        try:
            yield
        finally:
            self.end_request()

    async def retire(self, drain_s: float) -> None:
        """Takes no more requests, finishes those it has within `drain_s` seconds, stops."""
        self.state = VersionState.UNLOADING
        try:
            async with asyncio.timeout(drain_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("Model %s version %s still answers after %.0f s: stopped.", self.name, self.version, drain_s)
        await self._close()
        self.fail("unloaded")

    async def _close(self) -> None:
        try:
            if self._model is not None:
                await self._model.stop()
        except LLMServeError as error:
            logger.error("Model %s version %s did not stop cleanly: %s", self.name, self.version, error)
        finally:
            self.folder.release()


class Answering(AsyncIterator[InferResponse]):
    """The responses to one request, which its version counts from the first `anext` until it is closed."""

    __slots__ = ("_counted", "_responses", "_take", "_version")

    def __init__(self, responses: ResponseStream, version: ServedVersion) -> None:
        self._responses = responses
        self._version = version
        self._counted = False
        self._take: Callable[[InferResponse | LLMServeError], None] | None = None

    def __anext__(self) -> Awaitable[InferResponse]:
        if not self._counted:
            self._counted = True
            self._version.begin_request()
        return self._responses.__anext__()

    def deliver(self, take: Callable[[InferResponse | LLMServeError], None]) -> bool:
        """In place of iterating: `take` gets every response, or the error. False, and nothing has begun, if the model
        can only be iterated over. Raises LLMServeError if the request is refused. `close` cancels it."""
        if not isinstance(self._responses, InferStream):
            return False
        self._counted = True
        self._version.begin_request()
        self._take = take
        has_begun = False
        try:
            self._responses.deliver(self._pass_on)
            has_begun = True
        finally:
            if not has_begun:
                self._take = None
                self._uncount()
        return True

    async def aclose(self) -> None:
        """Cancels the request if it is not finished. To be called in any case."""
        try:
            await self._responses.aclose()
        finally:
            self._uncount()

    def close(self) -> None:
        """Cancels what `deliver` has begun, if it is not finished."""
        assert isinstance(self._responses, InferStream)
        self._take = None
        self._responses.close()
        self._uncount()

    def _pass_on(self, item: InferResponse | LLMServeError) -> None:
        assert isinstance(self._responses, InferStream)
        take = self._take
        assert take is not None
        if self._responses.done:
            self._take = None
            self._uncount()
        take(item)

    def _uncount(self) -> None:
        if self._counted:
            self._counted = False
            self._version.end_request()


def read_labels(config: ModelConfig, folder: ModelFolder) -> dict[str, list[str]]:
    """The lines of every output's `label_filename`. Raises ModelLoadError."""
    labels: dict[str, list[str]] = {}
    for output in config.output:
        if not output.label_filename:
            continue
        file = folder.path / output.label_filename
        if leaves_folder(output.label_filename):
            raise ModelLoadError(f"Model {folder.name!r}: label_filename {output.label_filename!r} leaves its folder.")
        try:
            labels[output.name] = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"Model {folder.name!r}: the labels {file} cannot be read: {error}") from error
    return labels
