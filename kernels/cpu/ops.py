"""The C kernels behind the `Ops` interface, for float32 and bfloat16. Knows pointers and shapes, no arithmetic.

Every op is bit-invariant: a row's result does not depend on the rows beside it, on how a prompt was cut into chunks,
or on the number of threads. A decode step makes hundreds of these calls, so each does little beside its call into C.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from llmserve.kernels.cpu.decoder import DecoderLayers, can_run
from llmserve.kernels.cpu.gguf_blocks import pack_q8_0, pack_raw
from llmserve.kernels.cpu.kv_cache import DTYPES, CPUKVCache
from llmserve.kernels.cpu.library import ACTIVATIONS, PLAIN, POST_NORM, PRE_NORM, Library, load_library
from llmserve.kernels.cpu.step_meta import StepMeta
from llmserve.kernels.cpu.weights import CPULinearWeight, pack_dense, pack_int8, packed_bytes
from llmserve.kernels.memory import WeightMemory
from llmserve.kernels.ops import (
    Activation,
    AttentionMetadata,
    KVCache,
    KVCacheSpec,
    LayerParameters,
    LayerStack,
    LinearWeight,
    PackedSequences,
    SamplingTensors,
    TokenLogprobTensors,
)
from llmserve.kernels.reference_adjustments import draw_adjusted
from llmserve.kernels.reference_sampling import token_logprobs
from llmserve.kernels.weight_formats import CPU_FORMATS, DENSE, INT8, Q8_0


class CPUOps:
    """Implements `Ops` by the C kernels. Tensors are on the CPU, rows contiguous, one dtype throughout."""

    name = "cpu"
    caches_fp8 = False
    weight_formats: tuple[str, ...] = CPU_FORMATS

    def __init__(self, library: Library) -> None:
        self.isa = library.isa
        self._library = library
        self._pool = library.pool
        self._weights = WeightMemory()
        self._step = StepMeta()

    def kv_cache_bytes_per_block(self, spec: KVCacheSpec) -> int:
        return 2 * spec.block_size * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize

    def allocate_kv_cache(self, spec: KVCacheSpec, num_blocks: int, device: torch.device) -> CPUKVCache:
        """A spec these kernels do not know is a ValueError."""
        assert device.type == "cpu"
        return CPUKVCache(spec, num_blocks)

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None, fmt: str = "dense") -> LinearWeight:
        """`fmt` "dense" keeps float32 or bfloat16; "int8" makes W8A8, and so does "q8_0", by blocks of 32 weights and
        activations with a scale each. Another is a ValueError."""
        if fmt == INT8:
            return pack_int8(weight, bias, self._weights)
        if fmt == Q8_0:
            return pack_q8_0(weight, bias, self._weights)
        if fmt != DENSE:
            raise ValueError(f"The CPU kernels make the weight formats 'dense', 'int8' and 'q8_0', not {fmt!r}.")
        if weight.dtype not in DTYPES:
            raise ValueError(f"The CPU kernels compute in float32 or bfloat16, not {weight.dtype}: choose --dtype.")
        return pack_dense(weight, bias, self._weights)

    def pack_quantized(
        self, raw: torch.Tensor, fmt: str, bias: torch.Tensor | None = None, order: torch.Tensor | None = None
    ) -> LinearWeight:
        """A GGUF matrix as it lies in its file, raw uint8 [out, bytes of a row], kept in its own format: "q8_0",
        "q4_0", "q4_1" or "q4_k"; or rows of "int8". Rows may be joined (qkv). Another type is a ValueError."""
        assert order is None  # there are no such formats here
        return pack_raw(raw, fmt, bias, self._weights)

    def linear_bytes(self, fmt: str, out_features: int, in_features: int, dtype: torch.dtype, has_bias: bool) -> int:
        return packed_bytes(fmt, out_features, in_features, dtype.itemsize, has_bias)

    def linear(self, x: torch.Tensor, weight: LinearWeight, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        assert isinstance(weight, CPULinearWeight)
        rows, columns = x.shape
        out = torch.empty((rows, weight.out_features), dtype=out_dtype or x.dtype)
        if columns != weight.padded_in and not weight.quantizes_input:
            x, columns = F.pad(x, (0, weight.padded_in - columns)), weight.padded_in
        self._library.linear(
            self._pool, weight.pointer, _data(x), out.data_ptr(), rows, columns, DTYPES[x.dtype], DTYPES[out.dtype]
        )
        return out

    def embedding(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """An id outside the table is an IndexError."""
        num_ids, (vocab, width) = token_ids.shape[0], table.shape
        out = torch.empty((num_ids, width), dtype=table.dtype)
        row_bytes = width * table.itemsize
        wrong = self._library.embedding(_data(token_ids), num_ids, _data(table), vocab, row_bytes, out.data_ptr())
        if wrong >= 0:
            raise IndexError(f"token id {int(token_ids[wrong])} is outside the embedding table of {vocab} rows")
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        assert weight.dtype is torch.float32
        rows, n = x.shape
        out = torch.empty_like(x)
        self._library.rms_norm(
            self._pool, _data(x), None, weight.data_ptr(), out.data_ptr(), rows, n, eps, DTYPES[x.dtype]
        )
        return out

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        assert weight.dtype is torch.float32
        assert residual.is_contiguous()
        assert residual.dtype is torch.float32
        rows, n = x.shape
        out = torch.empty_like(x)
        self._library.rms_norm(
            self._pool, _data(x), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, n, eps, DTYPES[x.dtype]
        )
        return out

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._gate_and_mul(gate_up, 0)

    def gelu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._gate_and_mul(gate_up, 1)

    def gelu_erf_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._gate_and_mul(gate_up, 2)

    def _gate_and_mul(self, gate_up: torch.Tensor, gate: int) -> torch.Tensor:
        rows, n = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, n), dtype=gate_up.dtype)
        self._library.gate_and_mul(self._pool, _data(gate_up), out.data_ptr(), rows, n, DTYPES[gate_up.dtype], gate)
        return out

    def activate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        rows, n = x.shape
        self._library.activate(self._pool, _data(x), rows, n, DTYPES[x.dtype], ACTIVATIONS[activation])
        return x

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        out = torch.empty_like(x)
        self._layer_norm(x, None, weight, bias, eps, out, PLAIN)
        return out

    def add_layer_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        out = torch.empty_like(x)
        self._layer_norm(x, residual, weight, bias, eps, out, PRE_NORM)
        return out

    def post_layer_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        out = None if x.dtype == torch.float32 else torch.empty_like(x)
        self._layer_norm(x, residual, weight, bias, eps, out, POST_NORM)
        return residual if out is None else out

    def _layer_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        out: torch.Tensor | None,
        kind: int,
    ) -> None:
        assert weight.dtype is torch.float32
        assert residual is None or residual.dtype is torch.float32
        rows, n = x.shape
        self._library.layer_norm(
            self._pool,
            _data(x),
            None if residual is None else _data(residual),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if out is None else out.data_ptr(),
            rows,
            n,
            eps,
            DTYPES[x.dtype],
            kind,
        )

    def rotary_packed(self, qkv: torch.Tensor, cos_sin: torch.Tensor, sequences: PackedSequences, d: int) -> None:
        tokens, width = qkv.shape
        self._library.rotary_packed(
            self._pool,
            _data(qkv),
            _data(cos_sin),
            _data(sequences.positions),
            tokens,
            width // (3 * d),
            d,
            DTYPES[qkv.dtype],
        )

    def packed_attention(
        self,
        qkv: torch.Tensor,
        sequences: PackedSequences,
        head_dim: int,
        scale: float,
        window: int = 0,
        relative_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tokens, width = qkv.shape
        out = torch.empty((tokens, width // 3), dtype=qkv.dtype)
        bias_span = 0 if relative_bias is None else (relative_bias.shape[1] + 1) // 2
        assert relative_bias is None or sequences.max_seq_len <= bias_span
        self._library.packed_attention(
            self._pool,
            _data(qkv),
            _data(sequences.cu_seqlens),
            sequences.cu_seqlens.shape[0] - 1,
            width // (3 * head_dim),
            head_dim,
            scale,
            window,
            None if relative_bias is None else _data(relative_bias),
            bias_span,
            DTYPES[qkv.dtype],
            out.data_ptr(),
        )
        return out

    def segment_sum(self, x: torch.Tensor, weights: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        num_seqs, n = cu_seqlens.shape[0] - 1, x.shape[1]
        out = torch.empty((num_seqs, n), dtype=torch.float32)
        self._library.segment_sum(
            self._pool, _data(x), _data(weights), _data(cu_seqlens), num_seqs, n, DTYPES[x.dtype], out.data_ptr()
        )
        return out

    def rotary_and_cache(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        kv_cache: KVCache,
        meta: AttentionMetadata,
        num_heads: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        assert isinstance(kv_cache, CPUKVCache)
        assert qkv.dtype == kv_cache.spec.dtype
        out = torch.empty((qkv.shape[0], num_heads, kv_cache.spec.head_dim), dtype=qkv.dtype)
        self._library.rotary_and_cache(
            self._pool,
            _data(qkv),
            _data(cos_sin),
            kv_cache.pointer,
            self._step.pointer(meta),
            num_heads,
            None if q_norm is None else q_norm.data_ptr(),
            None if k_norm is None else k_norm.data_ptr(),
            eps,
            out.data_ptr(),
        )
        return out

    def paged_attention(
        self,
        q: torch.Tensor,
        kv_cache: KVCache,
        meta: AttentionMetadata,
        scale: float,
        sliding_window: int = 0,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert isinstance(kv_cache, CPUKVCache)
        tokens, heads, head_dim = q.shape
        out = torch.empty((tokens, heads * head_dim), dtype=q.dtype)
        self._library.paged_attention(
            self._pool,
            _data(q),
            kv_cache.pointer,
            self._step.pointer(meta),
            heads,
            scale,
            sliding_window,
            soft_cap,
            None if sinks is None else _data(sinks),
            out.data_ptr(),
        )
        return out

    def fuse_layers(self, layers: Sequence[LayerParameters], final_norm: torch.Tensor) -> LayerStack | None:
        if not all(map(can_run, layers)):
            return None
        return DecoderLayers(self._library, layers, final_norm, self._step)

    def sample(self, logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
        return draw_adjusted(logits, sampling, self._draw)

    def _draw(self, logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
        rows, vocab = logits.shape
        out = torch.empty(rows, dtype=torch.int64)
        self._library.sample(
            self._pool,
            _data(logits),
            rows,
            vocab,
            _data(sampling.temperature),
            _data(sampling.top_k),
            _data(sampling.top_p),
            _data(sampling.min_p),
            _data(sampling.seeds),
            _data(sampling.positions),
            out.data_ptr(),
        )
        return out

    def token_logprobs(self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> TokenLogprobTensors:
        return token_logprobs(logits, token_ids, num_top)


def create_cpu_ops(num_threads: int | None = None, isa: str | None = None) -> CPUOps | None:
    """The CPU kernels on `num_threads` (default: the cores this process may use), built for `isa` (default: the best).

    None, with a line in the log that says what is lost, where they cannot be built.
    """
    library = load_library(num_threads or usable_cores(), isa)
    return None if library is None else CPUOps(library)


def usable_cores() -> int:
    """The cores of this process's affinity mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _data(tensor: torch.Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()
