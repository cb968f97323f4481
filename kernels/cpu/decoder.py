"""All layers of a dense decoder in one call into C. Knows pointers, no arithmetic; decoder.c has the order of the ops.

A decode step of a small model computes for a few milliseconds: nine calls a layer from Python would add one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p

import torch

from llmserve.kernels.cpu.kv_cache import DTYPES, CPUKVCache
from llmserve.kernels.cpu.library import Library
from llmserve.kernels.cpu.step_meta import StepMeta
from llmserve.kernels.cpu.weights import CPULinearWeight
from llmserve.kernels.ops import AttentionMetadata, KVCache, LayerParameters


class DecoderLayerStruct(ctypes.Structure):
    """`Layer` of decoder.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "post_attention_norm", "post_mlp_norm")),
        *((name, c_void_p) for name in ("q_norm", "k_norm", "cos_sin", "kv")),
        ("num_heads", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("eps", c_float),
        ("gelu", c_int),
    )


class DecoderLayers:
    """The layers as C reads them. Keeps their tensors alive, and remembers whose caches it was last called with."""

    def __init__(
        self,
        library: Library,
        layers: Sequence[LayerParameters],
        final_norm: torch.Tensor,
        step: StepMeta,
    ) -> None:
        self._library = library
        self._layers = tuple(layers)
        self._final_norm = final_norm
        self._step = step
        self._structs = (DecoderLayerStruct * len(layers))(*map(_layer_struct, layers))
        self._kv_caches: list[KVCache] | None = None

    def forward(self, embedded: torch.Tensor, meta: AttentionMetadata, kv_caches: list[KVCache]) -> torch.Tensor:
        if kv_caches is not self._kv_caches:
            self._point_to(kv_caches)
        assert embedded.is_contiguous()
        out = torch.empty_like(embedded)
        self._library.decoder(
            self._library.pool,
            ctypes.addressof(self._structs),
            len(self._structs),
            self._final_norm.data_ptr(),
            self._step.pointer(meta),
            embedded.data_ptr(),
            out.data_ptr(),
            DTYPES[embedded.dtype],
        )
        return out

    def _point_to(self, kv_caches: list[KVCache]) -> None:
        self._kv_caches = kv_caches
        for struct, cache in zip(self._structs, kv_caches, strict=True):
            assert isinstance(cache, CPUKVCache)
            struct.kv = cache.pointer


def can_run(layer: LayerParameters) -> bool:
    """Whether the rows that `linear` would have to pad do not occur."""
    matrices = (layer.qkv, layer.o, layer.gate_up, layer.down)
    return all(
        isinstance(matrix, CPULinearWeight) and (matrix.quantizes_input or matrix.padded_in == matrix.in_features)
        for matrix in matrices
    )


def _layer_struct(layer: LayerParameters) -> DecoderLayerStruct:
    norms = (layer.attention_norm, layer.mlp_norm, layer.post_attention_norm, layer.post_mlp_norm)
    return DecoderLayerStruct(
        *(_weight(matrix) for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down)),
        *(_vector(tensor) for tensor in (*norms, layer.q_norm, layer.k_norm, layer.cos_sin)),
        None,
        layer.num_heads,
        layer.sliding_window,
        layer.scale,
        layer.soft_cap,
        layer.eps,
        layer.gelu,
    )


def _weight(weight: object) -> int:
    assert isinstance(weight, CPULinearWeight)
    return weight.pointer


def _vector(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.dtype is torch.float32
    assert tensor.is_contiguous()
    return tensor.data_ptr()
