"""The contract of a backend: one class with four methods, run in the model's process. Knows no process and no socket.

A backend of your own derives from `Backend` and is found by an entry point of the group `llmserve.backends` whose name
is what `backend:` says in the model's configuration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llmserve.backends.model_messages import BatchTensor, RequestHeader, Signature
from llmserve.backends.ragged import batch_inputs, offsets_of, pad
from llmserve.backends.tensors import Array
from llmserve.errors import InferenceError, LLMServeError, ModelLoadError
from llmserve.inference import Parameter


@dataclass(frozen=True, slots=True)
class ModelContext:
    """One version of a model, as its backend is to load it."""

    name: str
    version: str
    version_path: Path  # <repository>/<model>/<version>
    model_path: Path  # <repository>/<model>
    config: Mapping[str, Any]  # ModelConfig as Triton writes it in JSON
    instance_name: str
    kind: str  # CPU, GPU, AUTO or MODEL
    device_id: int = 0
    num_threads: int = 1  # this instance's share of the machine

    @property
    def decoupled(self) -> bool:
        """A request may have any number of responses."""
        return bool(self.config.get("model_transaction_policy", {}).get("decoupled"))

    def parameter(self, name: str, default: str = "") -> str:
        """A value of the configuration's `parameters`."""
        return str(self.config.get("parameters", {}).get(name, {}).get("string_value", default))

    def file(self, *default_names: str) -> Path:
        """The model's file: what `default_model_filename` says, or the first of the defaults that exists.

        Raises ModelLoadError if there is none.
        """
        said = self.config.get("default_model_filename")
        names = (str(said),) if said else default_names
        for name in names:
            if (path := self.version_path / name).exists():
                return path
        raise ModelLoadError(f"{self.version_path} holds no {' or '.join(names)}.")


@dataclass(slots=True)
class Response:
    """One response to one request: named arrays, or an error in their place."""

    outputs: Mapping[str, Array] = field(default_factory=dict)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    error: LLMServeError | None = None


class Replies(Protocol):
    """Where a request's answers go."""

    def respond(self, request: Request, response: Response | None, final: bool) -> None:
        """Sends a response."""
        ...

    def fail(self, request: Request, error: Exception) -> None:
        """Sends what the model raised."""
        ...

    def poll(self) -> None:
        """Marks the requests that have been cancelled by now."""
        ...


class Request:
    """One request, seen from the model. `inputs` are views of the batch; what the client left out is not there."""

    __slots__ = ("_batch", "_index", "_replies", "cancelled", "header", "unread")

    def __init__(self, header: RequestHeader, batch: Batch, index: int, replies: Replies) -> None:
        self.header = header
        self.cancelled = False
        self.unread = 0  # units of responses that the client has not taken yet
        self._batch = batch
        self._index = index
        self._replies = replies

    @property
    def inputs(self) -> dict[str, Array]:
        """The request's own tensors."""
        return {name: self._batch.input(name, self._index) for name in self._batch.arrays}

    def input(self, name: str) -> Array | None:
        """One of them; None if the client has not sent it."""
        return self._batch.input(name, self._index) if name in self._batch.arrays else None

    def fail(self, error: Exception) -> None:
        """What `execute` would have raised, from where it runs on; nothing if the request has been answered."""
        self._replies.fail(self, error)

    def send(self, response: Response | None, final: bool) -> None:
        """Answers now, from any thread, in place of `execute`'s return value. None with `final`: that was all.

        Waits while the client is far behind; what is sent to one that has gone is dropped.
        Raises InferenceError after the final response.
        """
        self._replies.respond(self, response, final)

    def is_cancelled(self) -> bool:
        """True once nobody waits for an answer: the model may stop."""
        if not self.cancelled:
            self._replies.poll()
        return self.cancelled


class Batch:
    """Requests to run together. Each sees its own tensors; `stacked` are those of all, one row after the other."""

    __slots__ = ("_offsets", "_padded", "_ragged", "arrays", "config", "requests")

    def __init__(
        self,
        headers: Sequence[RequestHeader],
        tensors: Sequence[BatchTensor],
        arrays: dict[str, Array],
        config: Mapping[str, Any],
        replies: Replies,
    ) -> None:
        self.config = config
        self.arrays = arrays
        self.requests = [Request(header, self, i, replies) for i, header in enumerate(headers)]
        self._offsets = offsets_of([header.rows for header in headers])
        self._ragged = {tensor.name: tensor.ragged for tensor in tensors if tensor.ragged is not None}
        self._padded = {tensor.name: tensor for tensor in tensors if tensor.pad_to}

    def input(self, name: str, index: int) -> Array:
        """The tensor of one request: a view."""
        array = self.arrays[name]
        if (shapes := self._ragged.get(name)) is not None:
            offsets = offsets_of([_count(shape) for shape in shapes])
            return array[offsets[index] : offsets[index + 1]].reshape(shapes[index])
        if len(self.requests) == 1:
            return array
        return array[self._offsets[index] : self._offsets[index + 1]]

    def stacked(self) -> dict[str, Array]:
        """The inputs of the whole batch, uncopied, and what the configuration's `batch_input` asks for beside them.

        A ragged input is flat: the elements of all requests, one after the other. Padded ones are copied.
        """
        arrays = self.arrays
        for name, tensor in self._padded.items():
            arrays = {**arrays, name: pad(arrays[name], self._ragged[name], tensor.pad_axis, tensor.pad_to)}
        if not self.config.get("batch_input"):
            return arrays
        rows = [request.header.rows for request in self.requests]
        return {**arrays, **batch_inputs(self.config["batch_input"], self._ragged, arrays, rows)}

    def split(self, outputs: Mapping[str, Array]) -> list[Response]:
        """One response for each request out of the outputs of the whole batch. Raises InferenceError."""
        if not self.config.get("max_batch_size"):
            return [Response(outputs)]
        scattered = {
            name: source
            for entry in self.config.get("batch_output", [])
            for name in entry["target_name"]
            for source in entry["source_input"]
        }
        parts = [self._split_one(name, array, scattered.get(name)) for name, array in outputs.items()]
        return [
            Response({name: part[i] for name, part in zip(outputs, parts, strict=True)})
            for i in range(len(self.requests))
        ]

    def _split_one(self, name: str, array: Array, source: str | None) -> list[Array]:
        if source is not None and (shapes := self._ragged.get(source)) is not None:
            offsets = offsets_of([_count(shape) for shape in shapes])
            flat = array.reshape(-1)
            if len(flat) != offsets[-1]:
                raise InferenceError(f"output {name!r} has {len(flat)} elements, its source {source!r} {offsets[-1]}")
            return [flat[offsets[i] : offsets[i + 1]].reshape(shape) for i, shape in enumerate(shapes)]
        offsets = self._offsets
        if not array.ndim or array.shape[0] != offsets[-1]:
            raise InferenceError(f"output {name!r} has shape {list(array.shape)} for a batch of {offsets[-1]} rows")
        parts = [array[offsets[i] : offsets[i + 1]] for i in range(len(self.requests))]
        return self._cut(name, parts) if self._padded else parts

    def _cut(self, name: str, parts: list[Array]) -> list[Array]:
        """Takes the padding off an output: of one whose only varying dimension came out as long as the padded input."""
        source = next(iter(self._padded.values()))
        dims: list[int] = next((entry["dims"] for entry in self.config.get("output", ()) if entry["name"] == name), [])
        axis = dims.index(-1) + 1 if dims.count(-1) == 1 else 0
        if not axis or parts[0].ndim <= axis or parts[0].shape[axis] != source.pad_to:
            return parts
        lengths = [shape[source.pad_axis] for shape in self._ragged[source.name]]
        before = (slice(None),) * axis
        return [part[(*before, slice(length))] for part, length in zip(parts, lengths, strict=True)]


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


class Backend(ABC):
    """What runs models of one kind. One object is made for each instance, in its process, on its main thread."""

    device = "cpu"  # where the model has been loaded, for people to read

    def auto_complete(self, model: ModelContext) -> Signature | None:
        """What the model itself says of its inputs and outputs, read before `load`; None: nothing.

        Raises ModelLoadError if it contradicts what the configuration says.
        """
        return None

    @abstractmethod
    def load(self, model: ModelContext) -> None:
        """Makes the model ready. Raises ModelLoadError, or anything: its text is what the user reads."""

    @abstractmethod
    def execute(self, batch: Batch) -> Sequence[Response | None] | None:
        """One response for each request, in their order; None for one that is, or will be, answered by its `send`.

        Raises anything: the requests not answered yet get it as their error.
        """

    def unload(self) -> None:
        """The last call: give back what the process's end would not."""
        return
