"""Builds a model from its files: each fused parameter is filled, packed by the ops and forgotten before the next."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from pathlib import Path

import torch

from llmserve.kernels.ops import LinearWeight, Ops
from llmserve.models.config import ModelConfig, RopeConfig
from llmserve.models.layers import MLP, Attention, DecoderLayer
from llmserve.models.llama import LlamaModel
from llmserve.models.parameters import EMBEDDING, FINAL_NORM, LM_HEAD, check_tensors, expected_tensors, layer_prefix
from llmserve.models.rope import build_cos_sin
from llmserve.models.weights import WeightSource, open_weights

Progress = Callable[[int, int], None]  # bytes of the files read so far, bytes in all


def load_model(
    path: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    weight_format: str = "dense",
    progress: Progress | None = None,
    max_model_len: int | None = None,
) -> LlamaModel:
    """Loads a Hugging Face folder or a .gguf file whose configuration is `config`.

    Memory never holds more than the model, its largest fused parameter, and a slice being dequantised.
    `weight_format` is for the layers' matrices and the head; embeddings and norms stay dense, norms in float32.
    `max_model_len` bounds the positions; the model's own maximum if None.
    Raises ModelLoadError, naming file and tensor, for what is damaged, missing, misshapen or not known to the model;
    all of it before the first weight is read.
    """
    source = open_weights(Path(path), config)
    check_tensors(config, source.shapes, source.where)
    reader = _ParameterReader(source, config, dtype, device, ops, weight_format, progress)
    tables = _cos_sin_tables(config, max_model_len or config.max_position_embeddings, device)
    embedding = reader.matrix([EMBEDDING])
    layers = [_load_layer(reader, config, ops, layer, tables) for layer in range(config.num_layers)]
    final_norm = reader.norm(FINAL_NORM)
    lm_head = (
        ops.pack_linear(embedding, None, weight_format)
        if config.tie_word_embeddings
        else reader.linear([LM_HEAD.removesuffix(".weight")], has_bias=False)
    )
    return LlamaModel(config, ops, embedding, layers, final_norm, lm_head)


class _ParameterReader:
    """Turns tensors of a source into parameters on a device, and counts the bytes."""

    def __init__(
        self,
        source: WeightSource,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        weight_format: str,
        progress: Progress | None,
    ) -> None:
        self._source = source
        self._norm_offset = config.norm_weight_offset
        self._dtype = dtype
        self._device = device
        self._ops = ops
        self._weight_format = weight_format
        self._progress = progress
        self._done_bytes = 0
        self._total_bytes = sum(source.nbytes(name) for name in expected_tensors(config))

    def linear(self, names: list[str], *, has_bias: bool) -> LinearWeight:
        """One packed matrix from the named ones, stacked by rows; so are their biases."""
        weight = self.matrix([f"{name}.weight" for name in names])
        bias = self.matrix([f"{name}.bias" for name in names]) if has_bias else None
        return self._ops.pack_linear(weight, bias, self._weight_format)

    def matrix(self, names: list[str]) -> torch.Tensor:
        """The named tensors stacked along their first dimension."""
        shapes = [self._source.shapes[name] for name in names]
        stacked = _allocate((sum(shape[0] for shape in shapes), *shapes[0][1:]), self._dtype, self._device)
        for name, part in zip(names, torch.split(stacked, [shape[0] for shape in shapes]), strict=True):
            self._read(name, part)
        return stacked

    def norm(self, name: str) -> torch.Tensor:
        """A norm's weight, float32: exact also where the file stores it minus one."""
        weight = torch.empty(self._source.shapes[name], dtype=torch.float32, device=self._device)
        self._read(name, weight)
        return weight + self._norm_offset

    def _read(self, name: str, out: torch.Tensor) -> None:
        self._source.read(name, out)
        self._done_bytes += self._source.nbytes(name)
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
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
        qkv=reader.linear([f"{prefix}self_attn.{part}_proj" for part in "qkv"], has_bias=config.qkv_bias),
        o=reader.linear([f"{prefix}self_attn.o_proj"], has_bias=config.o_bias),
        q_norm=reader.norm(f"{prefix}self_attn.q_norm.weight") if config.qk_norm else None,
        k_norm=reader.norm(f"{prefix}self_attn.k_norm.weight") if config.qk_norm else None,
        eps=config.rms_norm_eps,
        cos_sin=tables[config.rope_of_layer(layer)],
        scale=config.query_scale,
        sliding_window=config.sliding_windows[layer],
        soft_cap=config.attention_soft_cap,
    )
    mlp = MLP(
        ops=ops,
        gate_up=reader.linear([f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"], has_bias=config.mlp_bias),
        down=reader.linear([f"{prefix}mlp.down_proj"], has_bias=config.mlp_bias),
        activation_and_mul=ops.silu_and_mul if config.activation == "silu" else ops.gelu_and_mul,
    )
    # Hugging Face's "post_attention_layernorm" stands before the MLP, except where there are post-norms.
    mlp_norm = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    return DecoderLayer(
        ops=ops,
        attention=attention,
        mlp=mlp,
        attention_norm=reader.norm(f"{prefix}input_layernorm.weight"),
        mlp_norm=reader.norm(f"{prefix}{mlp_norm}.weight"),
        post_attention_norm=reader.norm(f"{prefix}post_attention_layernorm.weight") if config.post_norms else None,
        post_mlp_norm=reader.norm(f"{prefix}post_feedforward_layernorm.weight") if config.post_norms else None,
        eps=config.rms_norm_eps,
    )
