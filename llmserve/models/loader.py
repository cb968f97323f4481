"""Builds a model from its files: each fused parameter is filled, packed by the ops and forgotten before the next."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping
from functools import partial

import torch

from llmserve.errors import ModelLoadError
from llmserve.kernels.fused_linear import Gate
from llmserve.kernels.moe_ops import ExpertWeights, MoEOps, Routing
from llmserve.kernels.ops import LinearWeight, Ops
from llmserve.kernels.select import select_fused_linear, select_moe
from llmserve.kernels.weight_formats import DENSE, row_bytes
from llmserve.models.config import ModelConfig, MoEConfig, RopeConfig
from llmserve.models.layers import MLP, Attention, DecoderLayer, MoE
from llmserve.models.llama import LlamaModel
from llmserve.models.parameters import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    LinearParameter,
    correction_bias_name,
    expected_tensors,
    expert_prefix,
    layer_prefix,
    linear_parameters,
)
from llmserve.models.rope import build_cos_sin
from llmserve.models.weights import WeightSource

Progress = Callable[[int, int], None]  # bytes of the files read so far, bytes in all


def load_model(
    source: WeightSource,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    formats: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    max_model_len: int | None = None,
    head_token_ids: tuple[int, ...] | None = None,
) -> LlamaModel:
    """Loads the weights of an opened source whose configuration is `config`.

    Memory never holds more than the model, its largest fused parameter, and a slice being quantised or dequantised.
    `formats` is that of each `LinearParameter` by name, "dense" if None; one of GGUF's must be the type of all its
    parts, but "q8_0" can be made of any. Embeddings and norms stay dense, norms in float32. `max_model_len` bounds
    the positions; the model's own maximum if None. Where `head_token_ids` are given, only these rows of the output head
    are kept, dense. Raises ModelLoadError, naming file and tensor, for a type that cannot be dequantised.
    """
    reader = _ParameterReader(source, config, dtype, device, ops, formats or {}, progress)
    tables = _cos_sin_tables(config, max_model_len or config.max_position_embeddings, device)
    embedding = reader.matrix([EMBEDDING])
    layers = [_load_layer(reader, config, ops, layer, tables) for layer in range(config.num_layers)]
    final_norm = reader.norm(FINAL_NORM)
    dense_head = embedding if config.tie_word_embeddings else None
    if head_token_ids is None:
        lm_head: LinearWeight | None = reader.linear(LM_HEAD.removesuffix(".weight"), dense_head)
    else:
        lm_head = _partial_head(reader, ops, head_token_ids, dense_head)
    return LlamaModel(config, ops, embedding, layers, final_norm, lm_head)


def _partial_head(
    reader: _ParameterReader, ops: Ops, token_ids: tuple[int, ...], dense: torch.Tensor | None
) -> LinearWeight | None:
    """These rows of the output head; None if there are none."""
    if not token_ids:
        return None
    head = dense if dense is not None else reader.matrix([LM_HEAD])
    if max(token_ids) >= len(head):
        raise ModelLoadError(f"The token id {max(token_ids)} is outside the vocabulary of {len(head)}.")
    return ops.pack_linear(head[list(token_ids)].clone())


class _ParameterReader:
    """Turns tensors of a source into parameters on a device, and counts the bytes."""

    def __init__(
        self,
        source: WeightSource,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        formats: Mapping[str, str],
        progress: Progress | None,
    ) -> None:
        self.where = source.where
        self._source = source
        self._norm_offset = config.norm_weight_offset
        self._dtype = dtype
        self._device = device
        self._ops = ops
        self._linears = {matrix.name: matrix for matrix in linear_parameters(config)}
        self._formats = formats
        self._progress = progress
        self._pending = set(expected_tensors(config))
        self._done_bytes = 0
        self._total_bytes = sum(source.nbytes(name) for name in expected_tensors(config))

    def linear(self, name: str, dense: torch.Tensor | None = None) -> LinearWeight:
        """The packed matrix of that name, from its parts; `dense` is its dense form if that has been read already."""
        linear = self._linears[name]
        fmt = self._formats.get(name, DENSE)
        types = {self._source.types[f"{part}.weight"].lower() for part in linear.parts}
        bias = self.matrix([f"{part}.bias" for part in linear.parts]) if linear.has_bias else None
        if fmt != DENSE and types == {fmt}:
            return self._ops.pack_quantized(self._blocks(linear, fmt), fmt, bias, self._input_order(linear))
        weight = dense if dense is not None else self.matrix([f"{part}.weight" for part in linear.parts])
        return self._ops.pack_linear(weight, bias, fmt)

    def _blocks(self, linear: LinearParameter, fmt: str) -> torch.Tensor:
        """Rows of blocks as in the file, uint8 [out, bytes of a row]."""
        names = [f"{part}.weight" for part in linear.parts]
        stacked = allocate((linear.out_features, row_bytes(fmt, linear.in_features)), torch.uint8, self._device)
        for name, part in zip(names, torch.split(stacked, [self._source.shapes[n][0] for n in names]), strict=True):
            self._source.read_raw(name, part)
            self._report(name)
        return stacked

    def _input_order(self, linear: LinearParameter) -> torch.Tensor | None:
        """That of all parts. Raises ModelLoadError if they differ: their product is one, of one row of inputs."""
        first, *others = (self._source.input_order(f"{part}.weight") for part in linear.parts)
        if first is not None and not all(other is not None and torch.equal(first, other) for other in others):
            raise ModelLoadError(
                f"{self.where}: the parts of {linear.name!r} have their inputs in different orders ('g_idx'), which is "
                "not supported. Choose the quantization 'none', which unpacks them."
            )
        return first

    def matrix(self, names: list[str]) -> torch.Tensor:
        """The named tensors stacked along their first dimension."""
        shapes = [self._source.shapes[name] for name in names]
        stacked = allocate((sum(shape[0] for shape in shapes), *shapes[0][1:]), self._dtype, self._device)
        for name, part in zip(names, torch.split(stacked, [shape[0] for shape in shapes]), strict=True):
            self._read(name, part)
        return stacked

    def norm(self, name: str) -> torch.Tensor:
        """A norm's weight, float32: exact also where the file stores it minus one."""
        return self.vector(name) + self._norm_offset

    def vector(self, name: str) -> torch.Tensor:
        """A tensor in float32."""
        vector = torch.empty(self._source.shapes[name], dtype=torch.float32, device=self._device)
        self._read(name, vector)
        return vector

    def _read(self, name: str, out: torch.Tensor) -> None:
        self._source.read(name, out)
        self._report(name)

    def _report(self, name: str) -> None:
        if name not in self._pending:
            return  # a tied embedding's blocks are read once more, for the head
        self._pending.remove(name)
        self._done_bytes += self._source.nbytes(name)
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor. On a CPU it lies in a mapping of its own, which goes back to the system the moment the packed
    form has replaced it; malloc would keep the holes, a third of a small model."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    private = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, access=mmap.ACCESS_COPY)
    return torch.frombuffer(private, dtype=dtype).view(shape)


def _cos_sin_tables(config: ModelConfig, num_positions: int, device: torch.device) -> dict[RopeConfig, torch.Tensor]:
    ropes = {config.rope_of_layer(layer) for layer in range(config.num_layers)}
    return {rope: build_cos_sin(rope, config.head_dim, num_positions, device) for rope in ropes}


def _load_layer(
    reader: _ParameterReader, config: ModelConfig, ops: Ops, layer: int, tables: dict[RopeConfig, torch.Tensor]
) -> DecoderLayer:
    prefix = layer_prefix(layer)
    attention = Attention(
        ops=ops,
        num_heads=config.num_heads,
        qkv=reader.linear(f"{prefix}self_attn.qkv_proj"),
        o=reader.linear(f"{prefix}self_attn.o_proj"),
        q_norm=reader.norm(f"{prefix}self_attn.q_norm.weight") if config.qk_norm else None,
        k_norm=reader.norm(f"{prefix}self_attn.k_norm.weight") if config.qk_norm else None,
        eps=config.rms_norm_eps,
        cos_sin=tables[config.rope_of_layer(layer)],
        scale=config.query_scale,
        sliding_window=config.sliding_windows[layer],
        soft_cap=config.attention_soft_cap,
        sinks=reader.vector(f"{prefix}self_attn.sinks") if config.attention_sinks else None,
    )
    gate: Gate = "silu" if config.activation == "silu" else "gelu_tanh"
    moe = config.moe_of_layer(layer)
    # Hugging Face's "post_attention_layernorm" stands before the MLP, except where there are post-norms.
    mlp_norm = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    return DecoderLayer(
        ops=ops,
        fused=select_fused_linear(ops),
        attention=attention,
        mlp=_load_mlp(reader, ops, f"{prefix}mlp", gate) if moe is None else _load_moe(reader, ops, layer, moe, gate),
        attention_norm=reader.norm(f"{prefix}input_layernorm.weight"),
        mlp_norm=reader.norm(f"{prefix}{mlp_norm}.weight"),
        post_attention_norm=reader.norm(f"{prefix}post_attention_layernorm.weight") if config.post_norms else None,
        post_mlp_norm=reader.norm(f"{prefix}post_feedforward_layernorm.weight") if config.post_norms else None,
        eps=config.rms_norm_eps,
    )


def _load_mlp(reader: _ParameterReader, ops: Ops, name: str, gate: Gate) -> MLP:
    gate_up, down = reader.linear(f"{name}.gate_up_proj"), reader.linear(f"{name}.down_proj")
    return MLP(ops=ops, fused=select_fused_linear(ops), gate_up=gate_up, down=down, gate=gate)


def _load_moe(reader: _ParameterReader, ops: Ops, layer: int, moe: MoEConfig, gate: Gate) -> MoE:
    experts = [expert_prefix(layer, moe, expert) for expert in range(moe.num_experts)]
    shared = f"{layer_prefix(layer)}{moe.shared_name}"
    moe_ops, activation_and_mul = select_moe(ops), ops.silu_and_mul if gate == "silu" else ops.gelu_and_mul
    if moe.swiglu_limit:
        activation_and_mul = partial(moe_ops.clamped_swiglu, alpha=moe.swiglu_alpha, limit=moe.swiglu_limit)
    return MoE(
        ops=ops,
        moe_ops=moe_ops,
        router=reader.linear(f"{layer_prefix(layer)}{moe.names.router}"),
        routing=Routing(moe.num_experts_per_token, moe.scoring, moe.renormalize, moe.scale),
        correction_bias=reader.vector(correction_bias_name(layer, moe)) if moe.has_correction_bias else None,
        gate_up=_pack_experts(reader, moe_ops, [f"{expert}gate_up_proj" for expert in experts]),
        down=_pack_experts(reader, moe_ops, [f"{expert}down_proj" for expert in experts]),
        activation_and_mul=activation_and_mul,
        shared=_load_mlp(reader, ops, shared, gate) if moe.shared_intermediate_size else None,
        shared_gate=reader.linear(f"{shared}_gate") if moe.has_shared_gate else None,
    )


def _pack_experts(reader: _ParameterReader, moe_ops: MoEOps, names: list[str]) -> ExpertWeights:
    """One matrix of each expert. Raises ModelLoadError for a mixture of formats where none is computed."""
    try:
        return moe_ops.pack_experts((reader.linear(name) for name in names), len(names))
    except ValueError as error:
        raise ModelLoadError(f"{reader.where}: {names[0]!r} and those like it: {error}") from error
