"""One loaded version of a pooling model: its tokenizer, its batcher, its instances, its texts in flight. Knows no HTTP.

The truth about every text is here, in the server process. An instance that dies gives its texts back once: they are
computed by the one that is started in its place. Equal texts in flight are computed once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from llmserve.backends.instance import InstanceSettings
from llmserve.backends.instance_pool import Instance, ProcessInstance, pids_of, states_of
from llmserve.backends.model_config import batcher_config, launches, to_dict
from llmserve.backends.model_messages import MetricSample
from llmserve.backends.pooling_job import Pooled, PoolingJob, PoolingTask
from llmserve.backends.pooling_signature import complete_pooling_config, max_batch_tokens
from llmserve.backends.pooling_texts import TextsInFlight
from llmserve.backends.pooling_tokenizer import (
    NEVER,
    EncodedText,
    PoolingInput,
    PoolingTokenizer,
    Truncation,
    num_chars,
)
from llmserve.backends.pooling_v2 import PoolingV2
from llmserve.backends.registry import find_backend
from llmserve.errors import (
    DeadlineExceededError,
    LLMServeError,
    ModelExecutionError,
    NotReadyError,
    QueueFullError,
)
from llmserve.general_metrics import FailureReason, ModelStatistics
from llmserve.inference import InferRequest
from llmserve.pooling_config import PoolingConfig, read_pooling_config
from llmserve.pooling_metrics import PoolingMetrics
from llmserve.request_context import current_request
from llmserve.scheduler.text_batcher import TextBatcher

_INLINE_CHARS = 4096  # texts of more are tokenised in a thread
_CHUNK_TEXTS = 64  # of a large request are tokenised while those before are computed


class PoolingModel:
    """Start it, send requests, stop it. All methods are for the event loop's thread."""

    def __init__(
        self,
        name: str,
        version: str,
        version_path: Path,
        model_path: Path,
        config: ModelConfig,
        settings: InstanceSettings | None = None,
    ) -> None:
        self.name = name
        self.version = version
        self.root = str(version_path)
        self.created = int(time.time())
        self.custom_metrics: Mapping[Any, MetricSample] = {}  # its own have fields: see `metrics`
        self.metrics = PoolingMetrics(name)
        self._config = ModelConfig()
        self._config.CopyFrom(config)
        self._config.name = name
        self._version_path = version_path
        self._model_path = model_path
        self._settings = settings or InstanceSettings()
        self._statistics = ModelStatistics(name, version)
        self._texts = TextsInFlight(name, self._statistics, self.metrics)
        self._instances: list[Instance] = []
        self._jobs: set[PoolingJob] = set()
        self._num_jobs = 0
        self._num_coming = 0  # texts that were let in and are being tokenised
        self._serving = False
        self._reason = "it is not loaded"

    # What the repository asks.

    @property
    def config(self) -> ModelConfig:
        """Complete once `start` has returned."""
        return self._config

    @property
    def reason(self) -> str:
        """Why it is not ready; empty when it is."""
        if self.is_ready():
            return ""
        return self._reason or states_of(self._instances)

    @property
    def pids(self) -> list[int]:
        """The processes of its instances."""
        return pids_of(self._instances)

    def is_ready(self) -> bool:
        """Whether a text would be computed now."""
        return self._serving and any(instance.is_ready() for instance in self._instances)

    async def start(self) -> None:
        """Reads what the folder says and loads every instance. Raises ModelLoadError; nothing is left running then."""
        self.pooling: PoolingConfig = await asyncio.to_thread(read_pooling_config, self._version_path)
        self.tokenizer = await asyncio.to_thread(PoolingTokenizer, self._version_path, self.pooling)
        self._config = complete_pooling_config(self._config, self.pooling)
        self._policy = batcher_config(self._config).default_policy
        self._v2 = PoolingV2(self, self._config)
        backend = find_backend(self._config.backend, self._config.platform, self.name)
        paths = (self.version, str(self._version_path), str(self._model_path), backend, self._settings.log_level)
        every = launches(self._config, *paths)
        self._device = "gpu" if every[0].kind == "GPU" else "cpu"
        self._texts.batcher = TextBatcher(max_batch_tokens(self._config, every[0].kind))
        self._instances = [ProcessInstance(launch, self._settings, self._texts) for launch in every]
        self._texts.instances = self._instances
        started = await asyncio.gather(*(instance.start(None) for instance in self._instances), return_exceptions=True)
        for failure in filter(None, started):
            await asyncio.gather(*(instance.stop() for instance in self._instances))
            self._reason = str(failure)
            raise failure
        self._texts.begin()
        self._serving, self._reason = True, ""

    async def stop(self) -> None:
        """Takes no more requests; those it has fail."""
        self._serving, self._reason = False, "it is being unloaded"
        self._texts.fail_all(NotReadyError(f"Model {self.name!r} has been unloaded."))
        await asyncio.gather(*(instance.stop() for instance in self._instances))
        self._reason = "it is unloaded"

    def infer(self, request: InferRequest) -> Any:
        """The one response to a v2 request. Raises LLMServeError while iterating."""
        return self._v2.infer(request)

    def statistics(self) -> ModelStatistics:
        """What happened to its requests, over whatever protocol, since it was made. A row is a text."""
        return self._statistics

    def label(self, index: int) -> str:
        """The name of a class."""
        return self.pooling.labels[index] if index < len(self.pooling.labels) else f"LABEL_{index}"

    def explain(self) -> dict[str, Any]:
        """What the last batches were made of, and how things stand; plain JSON values."""
        return {
            "model_name": self.name,
            "model_version": self.version,
            "max_batch_tokens": self._texts.batcher.max_batch_tokens,
            "dynamic_batching": to_dict(self._config.dynamic_batching),
            "queued_texts": len(self._texts.batcher),
            "queued_tokens": self._texts.batcher.num_tokens,
            "in_flight": len(self._jobs),
            "instances": [
                {"name": i.name, "state": i.state.value, "reason": i.reason, "executing": self._texts.is_busy(i)}
                for i in self._instances
            ],
            "batches": [asdict(record) for record in reversed(self._texts.explained)],
        }

    # What the API asks.

    async def pool(
        self,
        inputs: Sequence[PoolingInput],
        task: PoolingTask,
        truncation: Truncation = NEVER,
        param: str | Sequence[str] = "input",
        *,
        add_special_tokens: bool = True,
        timeout_s: float = 0.0,
    ) -> Pooled:
        """A row for each input (for `token_embed` a row a token), as the model makes it. Cancelling takes what has not
        begun out of the queue.

        `param` is what messages call the inputs: all of them, or each. Raises InvalidRequestError, QueueFullError,
        DeadlineExceededError, NotReadyError, ModelExecutionError.
        """
        assert inputs
        begin_ns = time.monotonic_ns()
        num_admitted = 0
        method = self.metrics.count_request(len(inputs))
        self._statistics.pending += 1
        self._num_jobs += 1
        job = PoolingJob(self._num_jobs, len(inputs), current_request().tenant)
        failure = FailureReason.CANCELED  # unless something else ends it
        try:
            self._admit(len(inputs))
            num_admitted = len(inputs)
            self._num_coming += num_admitted
            self._jobs.add(job)
            async with asyncio.timeout(self._policy.timeout_s(timeout_s) or None):
                await self._submit_all(job, inputs, task, truncation, param, add_special_tokens)
                rows = await job.wait()
        except TimeoutError:
            failure = self._count_failure(error := DeadlineExceededError("Request timeout expired"))
            raise error from None
        except LLMServeError as error:
            failure = self._count_failure(error)
            raise
        finally:
            self._num_coming -= num_admitted - len(job.num_tokens)  # those that were never queued
            self._texts.close(job)
            self._jobs.discard(job)
            self._statistics.pending -= 1
            total_ns = time.monotonic_ns() - begin_ns
            if not job.is_answered:
                self._statistics.record_failure(failure, total_ns)
        times = job.mean_times(total_ns)
        self._statistics.record_success(len(inputs), total_ns, job.queue_ns // len(inputs), job.times)
        self.metrics.observe_success(method, times)
        current_request().count_input(self.name, sum(job.num_tokens))
        return Pooled(rows, job.num_tokens, times, self._device)

    # Inside.

    def _not_ready(self, why: str) -> NotReadyError:
        return NotReadyError(f"Model {self.name!r} is not ready: {why}")

    def _admit(self, num_texts: int) -> None:
        """Raises NotReadyError, QueueFullError, RateLimitError."""
        if not self._serving or not self._texts.may_serve_soon():
            raise self._not_ready(self.reason or "it is restarting")
        current_request().tenant.require_tokens(1, time.monotonic())
        limit, num_queued = self._policy.max_queue_size, len(self._texts.batcher) + self._num_coming
        if limit and num_queued + num_texts > limit:
            raise QueueFullError(
                f"{num_queued} texts wait for {self.name!r}, and with this request's {num_texts} there "
                f"would be more than {limit}. Try again later, or send fewer texts in a request."
            )

    def _count_failure(self, error: LLMServeError) -> FailureReason:
        self.metrics.count_failure(error.code)
        if isinstance(error, QueueFullError | DeadlineExceededError):
            return FailureReason.REJECTED
        return FailureReason.BACKEND if isinstance(error, ModelExecutionError) else FailureReason.OTHER

    async def _submit_all(
        self,
        job: PoolingJob,
        inputs: Sequence[PoolingInput],
        task: PoolingTask,
        truncation: Truncation,
        param: str | Sequence[str],
        add_special_tokens: bool,
    ) -> None:
        """Tokenises in threads, and queues what is ready: the first texts are computed meanwhile."""
        for begin in range(0, len(inputs), _CHUNK_TEXTS):
            chunk = inputs[begin : begin + _CHUNK_TEXTS]
            places = _places(param, len(inputs))[begin : begin + len(chunk)]
            begin_ns = time.monotonic_ns()

            def encode(chunk: Sequence[PoolingInput] = chunk, places: Sequence[str] = places) -> list[EncodedText]:
                return self.tokenizer.encode(chunk, truncation, places, add_special_tokens=add_special_tokens)

            is_short = num_chars(chunk) <= _INLINE_CHARS
            encoded = encode() if is_short else await asyncio.to_thread(encode)
            job.tokenization_ns += time.monotonic_ns() - begin_ns
            for offset, text in enumerate(encoded):
                self._num_coming -= 1
                self._texts.submit(job, begin + offset, text, task)


def _places(param: str | Sequence[str], num_inputs: int) -> Sequence[str]:
    """What messages call each input."""
    if not isinstance(param, str):
        return param
    return [param] if num_inputs == 1 else [f"{param}.{position}" for position in range(num_inputs)]
