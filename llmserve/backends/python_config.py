"""The configuration that a model's `auto_complete_config` fills in. Rules and texts are Triton's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from llmserve.backends.model_messages import Signature, TensorSpec

_SCHEDULERS = ("dynamic_batching", "sequence_batching", "ensemble_scheduling")
_INPUT_FIELDS = ("name", "data_type", "dims", "optional", "is_shape_tensor")
_OUTPUT_FIELDS = ("name", "data_type", "dims", "is_shape_tensor")


class ModelConfig:
    """What the file says, and what the model adds. A contradiction raises ValueError."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config: dict[str, Any] = copy.deepcopy(dict(config))

    def as_dict(self) -> dict[str, Any]:
        """The configuration now."""
        return copy.deepcopy(self._config)

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """The model takes batches of so many rows."""
        said = self._config.get("max_batch_size", 0)
        if said > max_batch_size:
            raise ValueError(
                f"configuration specified max_batch_size {said}, but in auto_complete_config function for model "
                f"'{self._config.get('name')}' specifies max_batch_size {max_batch_size}"
            )
        self._config["max_batch_size"] = max_batch_size

    def set_dynamic_batching(self) -> None:
        """Requests may be batched, unless another scheduler is configured."""
        if not any(scheduler in self._config for scheduler in _SCHEDULERS):
            self._config["dynamic_batching"] = {}

    def set_model_transaction_policy(self, transaction_policy_dict: Mapping[str, Any]) -> None:
        """`{"decoupled": True}`: any number of responses to a request."""
        if unknown := [key for key in transaction_policy_dict if key != "decoupled"]:
            raise ValueError(f"model transaction policy has the unknown property '{unknown[0]}'")
        said = self._config.get("model_transaction_policy", {}).get("decoupled")
        decoupled = bool(transaction_policy_dict.get("decoupled", False))
        if said and said != decoupled:
            raise ValueError("trying to change decoupled property in auto_complete_config, which is already set")
        self._config["model_transaction_policy"] = {"decoupled": decoupled}

    def add_input(self, input: Mapping[str, Any]) -> None:
        """`{"name", "data_type", "dims", "optional"}`."""
        self._add("input", input, _INPUT_FIELDS)

    def add_output(self, output: Mapping[str, Any]) -> None:
        """`{"name", "data_type", "dims"}`."""
        self._add("output", output, _OUTPUT_FIELDS)

    def signature(self) -> Signature:
        """What is to be merged into the server's configuration."""
        return Signature(
            inputs=[_spec(entry) for entry in self._config.get("input", ())],
            outputs=[_spec(entry) for entry in self._config.get("output", ())],
            max_batch_size=self._config.get("max_batch_size", 0),
            decoupled=self._config.get("model_transaction_policy", {}).get("decoupled"),
            dynamic_batching=self._config.get("dynamic_batching"),
        )

    def _add(self, kind: str, tensor: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
        model = self._config.get("name")
        for field in tensor:
            if field not in allowed:
                raise ValueError(f"{kind} '{tensor.get('name')}' in auto_complete_config has the unknown '{field}'")
        for field in ("name", "data_type", "dims"):
            if field not in tensor:
                raise ValueError(f"{kind} '{tensor.get('name', '')}' in auto_complete_config is missing '{field}'")
        entries = self._config.setdefault(kind, [])
        for entry in entries:
            if entry["name"] != tensor["name"]:
                continue
            for field in ("data_type", "dims"):
                if entry[field] != tensor[field]:
                    raise ValueError(
                        f"unable to load model '{model}', configuration expects {field} {entry[field]} for {kind} "
                        f"'{tensor['name']}', model provides {tensor[field]}"
                    )
            return
        entries.append(dict(tensor))


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    datatype = str(entry["data_type"]).removeprefix("TYPE_")
    return TensorSpec(
        entry["name"],
        "BYTES" if datatype == "STRING" else datatype,
        [int(size) for size in entry["dims"]],
        bool(entry.get("optional", False)),
    )
