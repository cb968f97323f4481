"""The Python backend: a `model.py` written for Triton, or a plain class. Knows requests, no process and no socket."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from types import ModuleType
from typing import Any

from llmserve.backends import python_utils
from llmserve.backends.base import Backend, Batch, ModelContext, Request, Response
from llmserve.backends.model_messages import Signature
from llmserve.backends.python_class import ClassModel
from llmserve.backends.python_utils import InferenceRequest, InferenceResponse
from llmserve.errors import InferenceError, ModelLoadError, UnsupportedConfigError

_UTILS = "triton_python_backend_utils"


class PythonBackend(Backend):
    """`model.py` with a class `TritonPythonModel`, or one named `Model` (`python_class.py`)."""

    def __init__(self) -> None:
        self._module: ModuleType | None = None
        self._model: TritonModel | ClassModel | None = None

    def auto_complete(self, model: ModelContext) -> Signature | None:
        """What `auto_complete_config`, or the class's attributes, say."""
        return self._open(model).signature()

    def load(self, model: ModelContext) -> None:
        """Imports the file and calls its `initialize` or `load`."""
        self._open(model).load(model)

    def execute(self, batch: Batch) -> Sequence[Response | None] | None:
        """Runs the model's own `execute` or `predict`."""
        assert self._model is not None
        return self._model.execute(batch)

    def unload(self) -> None:
        """Calls `finalize` or `unload`."""
        if self._model is not None:
            self._model.unload()

    def _open(self, model: ModelContext) -> TritonModel | ClassModel:
        """Imports the file, once."""
        if self._model is None:
            if model.parameter("EXECUTION_ENV_PATH"):
                raise UnsupportedConfigError(model.name, "parameters.EXECUTION_ENV_PATH")
            module = _import(model)
            if (cls := getattr(module, "TritonPythonModel", None)) is not None:
                self._model = TritonModel(cls, model)
            elif (cls := getattr(module, "Model", None)) is not None:
                self._model = ClassModel(cls)
            else:
                raise ModelLoadError(f"{module.__file__} defines neither a class TritonPythonModel nor a class Model.")
        return self._model


class TritonModel:
    """One object of a `TritonPythonModel`."""

    def __init__(self, cls: type, model: ModelContext) -> None:
        self._class = cls
        self._context = model
        self._model: Any = None
        self._output_names: list[str] = []
        self._decoupled = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_async = inspect.iscoroutinefunction(getattr(cls, "execute", None))

    def signature(self) -> Signature | None:
        """What its `auto_complete_config` makes of the configuration."""
        auto_complete_config = getattr(self._class, "auto_complete_config", None)
        if auto_complete_config is None:
            return None
        completed = auto_complete_config(python_utils.ModelConfig(self._context.config))
        if not isinstance(completed, python_utils.ModelConfig):
            raise ModelLoadError(f"auto_complete_config of model {self._context.name!r} must return the config it got.")
        return completed.signature()

    def load(self, model: ModelContext) -> None:
        """Makes the object and calls `initialize`."""
        self._context = model
        self._decoupled = model.decoupled
        self._output_names = [output["name"] for output in model.config.get("output", ())]
        if not callable(getattr(self._class, "execute", None)):
            raise ModelLoadError(f"The TritonPythonModel of model {model.name!r} has no method 'execute'.")
        self._model = self._class()
        if hasattr(self._model, "initialize"):
            self._model.initialize(
                {
                    "model_config": json.dumps(model.config),
                    "model_instance_kind": "GPU"
                    if model.kind == "GPU"
                    else "MODEL"
                    if model.kind == "MODEL"
                    else "CPU",
                    "model_instance_name": model.instance_name,
                    "model_instance_device_id": str(model.device_id),
                    "model_repository": str(model.model_path),
                    "model_version": model.version,
                    "model_name": model.name,
                }
            )

    def execute(self, batch: Batch) -> Sequence[Response | None] | None:
        """Requests as the model knows them in, its responses out."""
        requests = [InferenceRequest.of(request, self._context.name, self._output_names) for request in batch.requests]
        if self._is_async:
            if self._decoupled:
                running = asyncio.run_coroutine_threadsafe(self._model.execute(requests), self._background())
                running.add_done_callback(partial(_tell_failure, batch.requests))
                return None  # the next batch need not wait for it
            returned = self._foreground().run_until_complete(self._model.execute(requests))
        else:
            returned = self._model.execute(requests)
        return self._responses(requests, returned)

    def unload(self) -> None:
        """Calls `finalize`."""
        if hasattr(self._model, "finalize"):
            self._model.finalize()

    def _responses(
        self, requests: list[InferenceRequest], returned: Sequence[InferenceResponse | None] | None
    ) -> Sequence[Response | None] | None:
        if self._decoupled:
            if returned is not None:
                raise InferenceError(
                    f"Python model '{self._context.instance_name}' is using the decoupled mode and the execute "
                    "function must return None."
                )
            return None
        if returned is None:
            if all(request.has_sender for request in requests):
                return None
            raise InferenceError("Expected a list in the execute return, found type 'NoneType' in model.py.")
        responses: list[Response | None] = []
        for request, response in zip(requests, returned, strict=False):
            if response is None and not request.has_sender:
                raise InferenceError(
                    "Expected an 'InferenceResponse' object in the execute function, found 'NoneType'."
                )
            responses.append(response.to_response() if response is not None else None)
        return responses if len(returned) == len(requests) else responses[: len(returned)]

    def _foreground(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop

    def _background(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="model-async", daemon=True).start()
        return self._loop


def _tell_failure(requests: Sequence[Request], running: Future[None]) -> None:
    """Nobody awaits a detached `execute`: what it raised is told to its requests here."""
    error = running.exception()
    if isinstance(error, Exception):
        for request in requests:
            request.fail(error)


def _import(model: ModelContext) -> ModuleType:
    """The model's file as a module; files beside it can be imported too."""
    path = model.file("model.py")
    sys.modules[_UTILS] = python_utils
    for folder in (str(model.model_path), str(model.version_path)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(f"llmserve_model_{model.name}_{model.version}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up
    spec.loader.exec_module(module)
    return module
