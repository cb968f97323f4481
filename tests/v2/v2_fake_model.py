"""A model without a process: answers with its inputs, fails, waits or streams as its configuration says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, ClassVar

from tritonclient.grpc.model_config_pb2 import ModelConfig

from llmserve.backends.model_messages import MetricSample
from llmserve.backends.validation import RequestValidator
from llmserve.errors import ModelLoadError
from llmserve.general_metrics import ExecutionTimes, FailureReason, ModelStatistics
from llmserve.inference import InferRequest, InferResponse, Tensor


class FakeModel:
    """`fail_load`: raise it. `hold_load`: load when told to `open()`. `crash`: a bug of our own.

    `gate`: answer when told to `open()`. `stream`: that many responses. `tag`: an output parameter.
    """

    opened: ClassVar[list[FakeModel]] = []

    def __init__(self, name: str, version: str, version_path: Path, model_path: Path, config: ModelConfig) -> None:
        self.name = name
        self.version = version
        self.version_path = version_path
        self.model_path = model_path
        self.config = config
        self.reason = "it is not loaded"
        self.events: list[str] = []
        self.cancelled = 0
        self.custom_metrics: dict[Any, MetricSample] = {}
        self._ready = False
        self._gate = asyncio.Event()
        self._statistics = ModelStatistics(name, version)
        FakeModel.opened.append(self)

    def setting(self, key: str) -> str:
        return self.config.parameters[key].string_value if key in self.config.parameters else ""

    def open(self) -> None:
        """Lets waiting requests go on."""
        self._gate.set()

    def die(self) -> None:
        self._ready, self.reason = False, "its process ended"

    async def start(self) -> None:
        self.events.append("start")
        await asyncio.sleep(0)
        if self.setting("hold_load"):
            await self._gate.wait()
        if text := self.setting("fail_load"):
            raise ModelLoadError(text)
        self._ready, self.reason = True, ""

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResponse, None]:
        finished = False
        try:
            if self.setting("gate"):
                await self._gate.wait()
            RequestValidator(self.config).check(request)
            if self.setting("crash"):
                raise RuntimeError("a bug with a secret in its text")
            outputs = [
                Tensor(tensor.name.replace("INPUT", "OUTPUT"), tensor.datatype, tensor.shape, tensor.data)
                for tensor in request.inputs
            ]
            wanted = {output.name for output in request.outputs}
            outputs = [tensor for tensor in outputs if not wanted or tensor.name in wanted]
            parameters = {"tag": self.setting("tag")} if self.setting("tag") else {}
            count = int(self.setting("stream") or 1)
            for number in range(count):
                final = number == count - 1
                if final:
                    finished = True
                    self._statistics.record_execution(1, ExecutionTimes(1000, 2000, 3000))
                    self._statistics.record_success(1, 10_000, 4000, ExecutionTimes(1000, 2000, 3000))
                yield InferResponse(self.name, self.version, outputs, request.id, dict(parameters), final)
        except (GeneratorExit, asyncio.CancelledError):
            if not finished:
                self.cancelled += 1
                self._statistics.record_failure(FailureReason.CANCELED, 0)
            raise

    async def stop(self) -> None:
        self.events.append("stop")
        self._ready, self.reason = False, "unloaded"

    def is_ready(self) -> bool:
        return self._ready

    def statistics(self) -> ModelStatistics:
        return self._statistics

    def explain(self) -> dict[str, Any]:
        return {"batches": []}
