"""The table of mixtures of experts: how each routes, what its config.json and tensors are called. Knows no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from llmserve.errors import ModelLoadError
from llmserve.json_fields import JsonFields
from llmserve.models.config import ExpertNames, MoEConfig

_QWEN_NAMES = ExpertNames(
    router="mlp.gate", expert="mlp.experts.{}", gate="gate_proj", up="up_proj", down="down_proj", fused="mlp.experts"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEArchitecture:
    """How one architecture's mixture differs. Keys are those of config.json, the first that is there."""

    names: ExpertNames
    num_experts_keys: tuple[str, ...] = ("num_local_experts", "num_experts")
    intermediate_key: str = "moe_intermediate_size"
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool | None = None  # None: config.json's norm_topk_prob, false if it is silent
    has_correction_bias: bool = False
    biases: bool = False  # of the router and of every expert
    shared: Literal["none", "size", "count"] = "none"  # shared_expert_intermediate_size, or n_shared_experts of them
    shared_gate: bool = False
    dense_layers: Literal["none", "step", "first"] = "none"  # decoder_sparse_step and mlp_only_layers, or the first k
    clamped_swiglu: bool = False


MOE_ARCHITECTURES: dict[str, MoEArchitecture] = {
    "MixtralForCausalLM": MoEArchitecture(
        names=ExpertNames(
            router="block_sparse_moe.gate",
            expert="block_sparse_moe.experts.{}",
            gate="w1",
            up="w3",
            down="w2",
            fused="mlp.experts",
        ),
        intermediate_key="intermediate_size",
        renormalize=True,
    ),
    "Qwen2MoeForCausalLM": MoEArchitecture(
        names=_QWEN_NAMES, shared="size", shared_gate=True, dense_layers="step", num_experts_keys=("num_experts",)
    ),
    "Qwen3MoeForCausalLM": MoEArchitecture(names=_QWEN_NAMES, dense_layers="step"),
    "Dots1ForCausalLM": MoEArchitecture(
        names=_QWEN_NAMES,
        num_experts_keys=("n_routed_experts",),
        scoring="sigmoid",
        has_correction_bias=True,
        shared="count",
        dense_layers="first",
    ),
    "GptOssForCausalLM": MoEArchitecture(
        names=ExpertNames(
            router="mlp.router",
            expert="mlp.experts.{}",
            gate="gate_proj",
            up="up_proj",
            down="down_proj",
            fused="mlp.experts",
            fused_is_transposed=True,
        ),
        intermediate_key="intermediate_size",
        renormalize=True,
        biases=True,
        clamped_swiglu=True,
    ),
}


def read_moe(architecture: str, fields: JsonFields, num_layers: int) -> MoEConfig | None:
    """The mixture a config.json describes; None for an architecture that has none. Raises ModelLoadError."""
    row = MOE_ARCHITECTURES.get(architecture)
    if row is None:
        return None
    _refuse_groups(fields)
    key = next((key for key in row.num_experts_keys if fields.has(key)), row.num_experts_keys[0])
    num_experts = fields.integer(key, maximum=4096)
    intermediate_size = fields.integer(row.intermediate_key)
    shared_size = 0
    if row.shared == "size":
        shared_size = fields.integer("shared_expert_intermediate_size")
    elif row.shared == "count":
        shared_size = fields.integer("n_shared_experts") * intermediate_size
    return MoEConfig(
        names=row.names,
        num_experts=num_experts,
        num_experts_per_token=fields.integer("num_experts_per_tok", maximum=num_experts),
        intermediate_size=intermediate_size,
        shared_intermediate_size=shared_size,
        shared_name="mlp.shared_experts" if row.shared == "count" else "mlp.shared_expert",
        has_shared_gate=row.shared_gate,
        scoring=row.scoring,
        renormalize=fields.boolean("norm_topk_prob", False) if row.renormalize is None else row.renormalize,
        scale=fields.number("routed_scaling_factor", 1.0),
        has_correction_bias=row.has_correction_bias,
        has_biases=row.biases,
        dense_layers=_dense_layers(fields, row, num_layers),
        swiglu_limit=fields.number("swiglu_limit", 7.0) if row.clamped_swiglu else 0.0,
        swiglu_alpha=fields.number("swiglu_alpha", 1.702),
    )


def _refuse_groups(fields: JsonFields) -> None:
    if fields.integer("n_group", 1) != fields.integer("topk_group", 1):
        raise ModelLoadError(
            f"{fields.where}: experts chosen group by group ('topk_group' < 'n_group') are unsupported."
        )


def _dense_layers(fields: JsonFields, row: MoEArchitecture, num_layers: int) -> frozenset[int]:
    """The layers that have one plain MLP and no experts."""
    if row.dense_layers == "none":
        return frozenset()
    if row.dense_layers == "first":
        return frozenset(range(fields.integer("first_k_dense_replace", 0, minimum=0)))
    only = fields.values.get("mlp_only_layers") or []
    if not isinstance(only, list) or not all(isinstance(layer, int) for layer in only):
        raise fields.error("mlp_only_layers", "a list of layers", only)
    step = fields.integer("decoder_sparse_step", 1)
    return frozenset(only) | {layer for layer in range(num_layers) if (layer + 1) % step}


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """A matrix or bias within a larger tensor: `tensor[index]`, with out and in exchanged if `transposed`."""

    name: str
    index: tuple[int | slice, ...]
    transposed: bool = False


def split_fused(name: str, shape: tuple[int, ...], moe: MoEConfig) -> list[TensorPiece]:
    """The experts' own tensors that a fused one holds, under the names they have apart; [] if it is not fused.

    transformers 5 keeps `experts.gate_up_proj` [e, 2n, hidden] (gate's rows, then up's) and `experts.down_proj`
    [e, hidden, n]; gpt-oss has them [e, hidden, 2n], gate's and up's columns alternating, and [e, n, hidden]; in mxfp4,
    as it is published, `_blocks` [e, 2n, hidden / 32, 16] and `_scales` [e, 2n, hidden / 32].
    """
    pattern = rf"(.*\.){re.escape(moe.names.fused)}\.(gate_up_proj|down_proj)(_bias|_blocks|_scales|)"
    match = re.fullmatch(pattern, name)
    dims = {"": 3, "_bias": 2, "_blocks": 4, "_scales": 3}
    if match is None or len(shape) != dims[match[3]] or shape[0] != moe.num_experts:
        return []
    kind = {"": "weight", "_bias": "bias", "_blocks": "weight_blocks", "_scales": "weight_scales"}[match[3]]
    is_transposed = moe.names.fused_is_transposed and kind == "weight"
    outputs = shape[2] if is_transposed else shape[1]
    rows = {moe.names.down: slice(0, outputs)}
    if match[2] == "gate_up_proj" and moe.names.fused_is_transposed:
        rows = {moe.names.gate: slice(0, outputs, 2), moe.names.up: slice(1, outputs, 2)}
    elif match[2] == "gate_up_proj":
        rows = {moe.names.gate: slice(0, outputs // 2), moe.names.up: slice(outputs // 2, outputs)}
    prefix = match[1] + moe.names.expert
    return [
        TensorPiece(
            f"{prefix.format(expert)}.{part}.{kind}",
            (expert, slice(None), chosen) if is_transposed else (expert, chosen),
            is_transposed,
        )
        for expert in range(shape[0])
        for part, chosen in rows.items()
    ]
