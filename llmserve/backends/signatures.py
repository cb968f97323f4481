"""What a model file says of its tensors, against what the configuration says. Knows no file format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from llmserve.backends.base import ModelContext
from llmserve.backends.model_messages import Signature, TensorSpec
from llmserve.errors import ModelLoadError

DEFAULT_MAX_BATCH_SIZE = 4  # of a model that can batch and has no configuration, as Triton has it


def batched_signature(model: ModelContext, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Signature:
    """Of a model whose configuration says nothing of its tensors: it batches if the first dimension of all varies."""
    batches = all(spec.shape and spec.shape[0] == -1 for spec in (*inputs, *outputs))
    if said := model.config.get("max_batch_size"):
        if not batches:
            raise ModelLoadError(
                f"The configuration of model '{model.name}' sets max_batch_size {said}, but the first dimension of the "
                "model file's tensors does not vary. Set it to 0."
            )
        return Signature(inputs=without_batch_dimension(inputs, True), outputs=without_batch_dimension(outputs, True))
    return Signature(
        inputs=without_batch_dimension(inputs, batches),
        outputs=without_batch_dimension(outputs, batches),
        max_batch_size=DEFAULT_MAX_BATCH_SIZE if batches else 0,
        dynamic_batching={} if batches else None,
    )


def without_batch_dimension(specs: Sequence[TensorSpec], batches: bool) -> list[TensorSpec]:
    """As a configuration writes them: a batch dimension goes without saying."""
    return [msgspec.structs.replace(spec, shape=spec.shape[1:]) if batches else spec for spec in specs]


def check_against_config(model: ModelContext, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Raises ModelLoadError, naming the tensor, where configuration and file cannot both be right.

    `inputs` and `outputs` are the file's, with every dimension.
    """
    batches = bool(model.config.get("max_batch_size"))
    made = {name for entry in model.config.get("batch_input", ()) for name in entry["target_name"]}
    for kind, specs in (("input", inputs), ("output", outputs)):
        known = {spec.name: spec for spec in specs}
        entries = model.config.get(kind, ())
        for entry in entries:
            spec = known.get(entry["name"])
            if spec is None:
                raise ModelLoadError(
                    f"unexpected inference {kind} '{entry['name']}' in the configuration of model '{model.name}'; the "
                    f"model file has {', '.join(sorted(known)) or 'none'}."
                )
            _check_tensor(model, kind, entry, spec, batches)
        if kind == "input" and entries:
            missing = [spec.name for spec in specs if spec.name not in {e["name"] for e in entries} | made]
            if missing:
                raise ModelLoadError(
                    f"The configuration of model '{model.name}' lacks the input '{missing[0]}' of the model file."
                )


def _check_tensor(model: ModelContext, kind: str, entry: Mapping[str, Any], spec: TensorSpec, batches: bool) -> None:
    datatype = entry["data_type"].removeprefix("TYPE_").replace("STRING", "BYTES")
    if datatype != spec.datatype:
        raise ModelLoadError(
            f"unable to load model '{model.name}', configuration expects datatype {entry['data_type']} for {kind} "
            f"'{spec.name}', model provides TYPE_{spec.datatype}"
        )
    if entry.get("allow_ragged_batch"):
        return
    dims = list(entry["reshape"]["shape"] if "reshape" in entry else entry["dims"])
    full = [-1, *dims] if batches else dims
    same_rank = len(full) == len(spec.shape)
    if not same_rank or any(want != got and -1 not in (want, got) for want, got in zip(full, spec.shape, strict=True)):
        if not spec.shape and kind == "output":
            return  # a file need not say the shape of an output
        raise ModelLoadError(
            f"model '{model.name}', tensor '{spec.name}': the model expects {len(spec.shape)} dimensions (shape "
            f"{_listed(spec.shape)}) but the model configuration specifies {len(full)} dimensions "
            f"(shape {_listed(full)})"
            + (", the first being the batch dimension that max_batch_size adds" if batches else "")
        )


def _listed(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"
