"""A model as a plain Python class: the form to write a new one in. Knows the backend's requests, no process.

    # <repository>/scale/1/model.py
    import numpy as np

    class Model:
        inputs = {"x": "FP32[-1]", "factor": "FP32[1]?"}   # ? : the client may leave it out
        outputs = {"y": "FP32[-1]"}
        max_batch_size = 32                                # 0, the default: no batch dimension
        batched = True                                     # predict sees whole batches, not single requests

        def load(self):
            self.factor = np.float32(2)

        def predict(self, x, factor=None):
            return {"y": x * (self.factor if factor is None else factor)}

That is a whole model: no configuration file is needed. A `predict` that yields dictionaries streams them to its
client. `load(self, model)` gets the `ModelContext` if it asks for it; `unload(self)` is called at the end. BYTES are
arrays of `bytes` objects. Raise `InvalidRequestError` for what is the client's fault.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llmserve.backends.base import Batch, ModelContext, Request, Response
from llmserve.backends.model_messages import Signature, TensorSpec
from llmserve.backends.tensors import Array, dtype_of
from llmserve.errors import InferenceError, ModelLoadError

_SPEC = re.compile(r"(?P<datatype>[A-Z0-9]+)\[(?P<shape>(-?\d+(,\s*-?\d+)*)?\s*)\](?P<optional>\??)")


class ClassModel:
    """One object of the user's class, run on batches."""

    def __init__(self, cls: type) -> None:
        self._class = cls
        self._model: Any = None
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._batched = bool(getattr(cls, "batched", False))
        self._streams = inspect.isgeneratorfunction(getattr(cls, "predict", None))

    def signature(self) -> Signature:
        """From the class's attributes. Raises ModelLoadError for one that cannot be read."""
        if not callable(getattr(self._class, "predict", None)):
            raise ModelLoadError("The class Model of model.py has no method 'predict'.")
        has_inputs = hasattr(self._class, "inputs")
        max_batch_size: int = getattr(self._class, "max_batch_size", 0)
        return Signature(
            inputs=_specs(self._class, "inputs") if has_inputs else None,
            outputs=_specs(self._class, "outputs") if hasattr(self._class, "outputs") else None,
            max_batch_size=max_batch_size if has_inputs else None,
            decoupled=True if self._streams else None,
            dynamic_batching={} if self._batched and max_batch_size else None,
        )

    def load(self, model: ModelContext) -> None:
        """Makes the object and calls its `load`."""
        self._dtypes = {
            output["name"]: dtype_of(output["data_type"].removeprefix("TYPE_").replace("STRING", "BYTES"))
            for output in model.config.get("output", ())
        }
        self._model = self._class()
        if callable(load := getattr(self._model, "load", None)):
            if inspect.signature(load).parameters:
                load(model)
            else:
                load()

    def execute(self, batch: Batch) -> Sequence[Response] | None:
        """Calls `predict` for the whole batch or for each request."""
        if self._streams:
            for request in batch.requests:
                self._stream(request)
            return None
        if self._batched:
            return batch.split(self._outputs(self._model.predict(**batch.stacked())))
        return [Response(self._outputs(self._model.predict(**request.inputs))) for request in batch.requests]

    def unload(self) -> None:
        """Calls its `unload`."""
        if callable(unload := getattr(self._model, "unload", None)):
            unload()

    def _stream(self, request: Request) -> None:
        made: Iterator[Any] = self._model.predict(**request.inputs)
        for outputs in made:
            if request.is_cancelled():
                break
            request.send(Response(self._outputs(outputs)), final=False)
        request.send(None, final=True)

    def _outputs(self, returned: Any) -> Mapping[str, Array]:
        """What `predict` gave, as arrays of the configured types; a bare value is the only output."""
        if not isinstance(returned, Mapping):
            if len(self._dtypes) != 1:
                raise InferenceError(f"predict must give a dictionary of outputs, not {type(returned).__name__}")
            returned = {next(iter(self._dtypes)): returned}
        return {name: np.asarray(value, self._dtypes.get(name)) for name, value in returned.items()}


def _specs(cls: type, attribute: str) -> list[TensorSpec]:
    specs: list[TensorSpec] = []
    for name, text in getattr(cls, attribute).items():
        match = _SPEC.fullmatch(text)
        if match is None:
            raise ModelLoadError(
                f"Model.{attribute}[{name!r}] is {text!r}; write a datatype and a shape, as 'FP32[-1, 4]'."
            )
        shape = [int(size) for size in match["shape"].split(",") if size.strip()]
        specs.append(TensorSpec(name, match["datatype"], shape, bool(match["optional"])))
    return specs
