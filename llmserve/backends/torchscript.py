"""The PyTorch backend: TorchScript (`model.pt`) and `torch.export` programs (`model.pt2`). Knows no process."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llmserve.backends.base import Backend, Batch, ModelContext, Response
from llmserve.backends.model_messages import Signature
from llmserve.backends.signatures import batched_signature
from llmserve.backends.tensors import Array
from llmserve.backends.torch_device import torch_device
from llmserve.backends.torch_program import ExportedModel, Program, ScriptModel
from llmserve.errors import InferenceError, ModelLoadError


class TorchBackend(Backend):
    """Inputs are matched by Triton's rules: `<name>__<index>`, or the names of `forward`'s arguments, or in order.

    `parameters` may set Triton's INTRA_OP_THREAD_COUNT and INTER_OP_THREAD_COUNT, and METHOD_NAME: which method of a
    TorchScript module to call in place of `forward`.
    """

    def __init__(self) -> None:
        self._program: Program | None = None
        self._device = torch.device("cpu")
        self._inputs: list[str] = []  # in the order of the arguments
        self._outputs: list[str] = []  # in the order of the results

    def auto_complete(self, model: ModelContext) -> Signature | None:
        """What the file records of its inputs and outputs; an exported program records all."""
        if model.config.get("input") and model.config.get("output"):
            return None
        inputs, outputs = self._open(model).signature()
        signature = batched_signature(model, inputs, outputs)
        if model.config.get("input"):
            return Signature(outputs=signature.outputs)
        return signature if not model.config.get("output") else Signature(inputs=signature.inputs)

    def load(self, model: ModelContext) -> None:
        """Reads the program, puts it on its device and matches its arguments with the configuration's names."""
        program = self._open(model)
        names = [entry["name"] for entry in model.config["input"]]
        made = [name for entry in model.config.get("batch_input", ()) for name in entry["target_name"]]
        self._inputs = _in_order(names + made, program.argument_names, model.name)
        self._outputs = _by_index([entry["name"] for entry in model.config["output"]], model.name)
        for entry in (*model.config["input"], *model.config["output"]):
            if entry["data_type"] == "TYPE_STRING":
                raise ModelLoadError(f"Model {model.name!r}: torch has no string tensors; {entry['name']!r} is one.")

    def execute(self, batch: Batch) -> Sequence[Response]:
        """One call for the whole batch, without gradients."""
        assert self._program is not None
        arrays = batch.stacked()
        arguments = [_tensor(arrays[name], self._device) for name in self._inputs if name in arrays]
        with torch.inference_mode():
            returned = self._program(arguments)
        return batch.split(self._named(returned))

    def unload(self) -> None:
        """Lets go of the program."""
        self._program = None

    def _named(self, returned: Any) -> dict[str, Array]:
        """What the program returned, by the configuration's names."""
        if isinstance(returned, Mapping):
            missing = [name for name in self._outputs if name not in returned]
            if missing:
                raise InferenceError(f"the model returned no {missing[0]!r}; it has {', '.join(map(str, returned))}")
            return {name: _array(returned[name]) for name in self._outputs}
        results = [returned] if isinstance(returned, torch.Tensor) else list(returned)
        if len(results) < len(self._outputs):
            raise InferenceError(f"the model returned {len(results)} tensors, the configuration names {self._outputs}")
        return {name: _array(result) for name, result in zip(self._outputs, results, strict=False)}

    def _open(self, model: ModelContext) -> Program:
        if self._program is None:
            torch.set_num_threads(int(model.parameter("INTRA_OP_THREAD_COUNT", "0")) or model.num_threads)
            if inter_op := int(model.parameter("INTER_OP_THREAD_COUNT", "0")):
                torch.set_num_interop_threads(inter_op)
            self._device = torch_device(model)
            self.device = str(self._device)
            path = model.file("model.pt", "model.pt2")
            try:
                if path.suffix == ".pt2":
                    self._program = ExportedModel(path, self._device)
                else:
                    self._program = ScriptModel(path, self._device, model.parameter("METHOD_NAME", "forward"))
            except (RuntimeError, ValueError, OSError, AttributeError, KeyError, zipfile.BadZipFile) as error:
                raise ModelLoadError(f"{path} cannot be loaded: {error}") from error
        return self._program


def _index_of(name: str) -> int | None:
    """INPUT__2 -> 2."""
    _, separator, index = name.rpartition("__")
    return int(index) if separator and index.isdigit() else None


def _by_index(names: list[str], model: str) -> list[str]:
    """Names that all end in `__<index>` in that order; others as they are. Raises ModelLoadError for gaps."""
    indices = [_index_of(name) for name in names]
    if any(index is None for index in indices):
        return names
    if sorted(index for index in indices if index is not None) != list(range(len(names))):
        raise ModelLoadError(f"Model {model!r}: the indices of {', '.join(names)} must be 0 to {len(names) - 1}.")
    return [name for _, name in sorted(zip(indices, names, strict=True), key=lambda pair: pair[0] or 0)]


def _in_order(names: list[str], arguments: list[str], model: str) -> list[str]:
    """The configuration's inputs in the order of the arguments. Raises ModelLoadError if there are too many."""
    if len(names) > len(arguments):
        raise ModelLoadError(
            f"Model {model!r}: the configuration has {len(names)} inputs, forward takes {len(arguments)} "
            f"({', '.join(arguments)})."
        )
    if set(names) <= set(arguments):
        return [argument for argument in arguments if argument in names]
    return _by_index(names, model)


def _tensor(array: Array, device: torch.device) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("uint16")).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def _array(tensor: Any) -> Array:
    if not isinstance(tensor, torch.Tensor):
        raise InferenceError(f"the model returned a {type(tensor).__name__} where a tensor is expected")
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        bits: Array = tensor.contiguous().view(torch.uint16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: Array = tensor.numpy()
    return array
