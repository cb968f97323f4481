"""Reads a config.json's `quantization_config`: by which published layout the weights are packed. Knows no tensors.

What a layout may vary is here refused by name where it is not read; `packed_weights.py` holds the layouts themselves.
Sources: AutoGPTQ and GPTQModel (gptq), AutoAWQ (awq), vllm-project/compressed-tensors, DeepSeek-V3's inference code
(fp8 in blocks), OpenAI's gpt-oss (mxfp4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmserve.errors import ModelLoadError
from llmserve.json_fields import JsonFields

Layout = Literal["gptq", "awq", "packed", "int", "float", "mxfp4"]
METHODS = ("awq", "compressed-tensors", "fp8", "gptq", "mxfp4")
_CT_FORMATS: dict[str, Layout] = {"pack-quantized": "packed", "int-quantized": "int", "float-quantized": "float"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointQuantization:
    """How the matrices of a folder are packed. Which of them are is seen by their tensors."""

    method: str  # as config.json calls it
    layout: Layout
    bits: int
    group_size: int = 0  # inputs that share a scale; 0: all of an output's
    is_symmetric: bool = True  # no zero points, or all in the middle
    zero_offset: int = 0  # gptq: zero points are stored one less (before "gptq_v2")
    block_size: tuple[int, int] | None = None  # float: outputs and inputs that share a scale, where it is a tile

    @property
    def block_type(self) -> str | None:
        """The format of ours whose blocks or rows say the same, where groups lie in order and are whole blocks."""
        if self.layout == "int":
            return "INT8" if self.is_symmetric else None
        if self.layout == "float" or (self.bits == 8 and not self.is_symmetric):
            return None
        if self.bits == 8 or self.layout == "mxfp4":
            return "Q8_0"  # mxfp4's numbers are small whole ones times a power of two
        return "Q4_0" if self.is_symmetric else "Q4_1"

    def __str__(self) -> str:
        groups = f", groups of {self.group_size}" if self.group_size else ""
        groups = groups if self.block_size is None else f", tiles of {self.block_size[0]} x {self.block_size[1]}"
        return f"{self.method} ({self.bits} bits{groups}{'' if self.is_symmetric else ', asymmetric'})"


def read_quantization(fields: JsonFields) -> CheckpointQuantization | None:
    """None where config.json has none. Raises ModelLoadError naming what is not supported."""
    if not fields.has("quantization_config"):
        return None
    config = fields.child("quantization_config")
    method = config.string("quant_method", "unknown")
    if method == "gptq":
        return _gptq(config)
    if method == "awq":
        return _awq(config)
    if method == "fp8":
        return _fp8(config)
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    if method == "mxfp4":
        return CheckpointQuantization(method=method, layout="mxfp4", bits=4, group_size=32)
    raise ModelLoadError(
        f"{fields.where}: weights quantised by {method!r} are not supported. Supported: {', '.join(METHODS)}; "
        "or use the unquantised model or a GGUF."
    )


def _require(config: JsonFields, key: str, value: object, supported: tuple[object, ...]) -> None:
    if value not in supported:
        choices = ", ".join(repr(choice) for choice in supported)
        raise ModelLoadError(f"{config.where}: {key!r} {value!r} is not supported. Supported: {choices}.")


def _group_size(config: JsonFields) -> int:
    """-1, by which all formats mean the whole row, as 0."""
    size = config.integer("group_size", -1, minimum=-1)
    return 0 if size == -1 else size


def _gptq(config: JsonFields) -> CheckpointQuantization:
    bits, version = config.integer("bits"), config.string("checkpoint_format", "gptq")
    _require(config, "bits", bits, (4, 8))
    _require(config, "checkpoint_format", version, ("gptq", "gptq_v2"))
    if config.boolean("is_marlin_format", False):
        raise ModelLoadError(f"{config.where}: 'is_marlin_format' is not supported; use the plain GPTQ checkpoint.")
    if config.has("dynamic") and config.child("dynamic").values:
        raise ModelLoadError(f"{config.where}: 'dynamic', settings that differ by module, is not supported.")
    return CheckpointQuantization(
        method="gptq",
        layout="gptq",
        bits=bits,
        group_size=_group_size(config),
        is_symmetric=config.boolean("sym", True),
        zero_offset=1 if version == "gptq" else 0,
    )


def _awq(config: JsonFields) -> CheckpointQuantization:
    bits = config.integer("bits" if config.has("bits") else "w_bit")
    _require(config, "bits", bits, (4,))
    _require(config, "version", config.string("version", "gemm").lower(), ("gemm",))
    if not config.boolean("zero_point", True):
        raise ModelLoadError(f"{config.where}: AWQ without 'zero_point' is not supported.")
    size = _group_size(config) if config.has("group_size") else config.integer("q_group_size", 128)
    return CheckpointQuantization(method="awq", layout="awq", bits=bits, group_size=size, is_symmetric=False)


def _fp8(config: JsonFields) -> CheckpointQuantization:
    _require(config, "fmt", config.string("fmt", "e4m3"), ("e4m3", "float8_e4m3fn"))
    return CheckpointQuantization(method="fp8", layout="float", bits=8, block_size=_tile(config, "weight_block_size"))


def _tile(config: JsonFields, key: str) -> tuple[int, int] | None:
    sizes = config.values.get(key)
    if sizes is None:
        return None
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise config.error(key, "two positive integers", sizes)
    return sizes[0], sizes[1]


def _compressed_tensors(config: JsonFields) -> CheckpointQuantization:
    """One scheme for all matrices that are packed. How activations are rounded is left to our own kernels."""
    groups = config.child("config_groups")
    if len(groups.values) != 1:
        raise ModelLoadError(
            f"{config.where}: one entry in 'config_groups' is supported, not {len(groups.values)} "
            f"({', '.join(map(repr, groups.values))})."
        )
    if config.has("sparsity_config") and config.child("sparsity_config").string("format", "dense") != "dense":
        raise ModelLoadError(f"{config.where}: 'sparsity_config' other than dense is not supported.")
    if config.has("transform_config") and config.child("transform_config").values:
        raise ModelLoadError(f"{config.where}: 'transform_config' is not supported.")
    group = groups.child(next(iter(groups.values)))
    weights = group.child("weights")
    name = config.string("format", group.string("format", "pack-quantized"))
    _require(config, "format", name, tuple(_CT_FORMATS))
    layout = _CT_FORMATS[name]
    bits, strategy = weights.integer("num_bits"), weights.string("strategy", "tensor")
    _require(weights, "num_bits", bits, (4, 8) if layout == "packed" else (8,))
    _require(weights, "type", weights.string("type", "int"), ("float",) if layout == "float" else ("int",))
    grouped: dict[Layout, tuple[object, ...]] = {"packed": ("group",), "int": (), "float": ("block",)}
    _require(weights, "strategy", strategy, ("tensor", "channel", *grouped[layout]))
    return CheckpointQuantization(
        method="compressed-tensors",
        layout=layout,
        bits=bits,
        group_size=_group_size(weights) if strategy == "group" else 0,
        is_symmetric=weights.boolean("symmetric", True),
        block_size=_tile(weights, "block_structure") if strategy == "block" else None,
    )
