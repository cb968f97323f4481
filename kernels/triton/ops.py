"""The Triton kernels behind the `Ops` interface, for NVIDIA and AMD GPUs. Knows tensors and shapes, no arithmetic.

Every op but `linear` with dense weights is batch-invariant to the bit: each row goes through the same instructions
whatever comes with it. A dense product is the vendor's matrix library through torch, which may choose another algorithm
for another number of rows: there a row's last bits can depend on the batch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

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
from llmserve.kernels.reference import DenseLinearWeight
from llmserve.kernels.triton import embedding, norm, packed_attention, rotary, segment_sum, split_attention
from llmserve.kernels.triton.activation import activate, gate_and_mul
from llmserve.kernels.triton.kv_cache import TritonKVCache, bytes_per_block, check_spec
from llmserve.kernels.triton.layer_norm import layer_norm
from llmserve.kernels.triton.logprobs import token_logprobs
from llmserve.kernels.triton.products import multiply, multiply_rows
from llmserve.kernels.triton.quantize import QuantizedRows
from llmserve.kernels.triton.sampling import sample as draw
from llmserve.kernels.triton.tables import attention_tiles, gemm_tiles, has_fp8
from llmserve.kernels.triton.weights import PackedWeight, pack_byte_rows, pack_bytes, pack_group_rows, pack_mxfp4_rows
from llmserve.kernels.weight_formats import DENSE, FP8, FP8_G128, INT8, MXFP4, ORDER, W4A16_GROUPS, row_bytes

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PROGRAMS_A_PROCESSOR = 2  # of attention that run at once on a multiprocessor


class TritonOps:
    """Implements `Ops` on one kind of device. `architecture` as "sm_90"; `num_processors`: its multiprocessors."""

    name = "triton"

    def __init__(self, architecture: str, num_processors: int) -> None:
        self.architecture = architecture
        self.caches_fp8 = has_fp8(architecture)
        self.weight_formats: tuple[str, ...] = (DENSE, INT8, MXFP4, *W4A16_GROUPS)
        if self.caches_fp8:
            self.weight_formats += (FP8, FP8_G128)
        self._min_programs = _PROGRAMS_A_PROCESSOR * num_processors

    def kv_cache_bytes_per_block(self, spec: KVCacheSpec) -> int:
        check_spec(spec)
        return bytes_per_block(spec)

    def allocate_kv_cache(self, spec: KVCacheSpec, num_blocks: int, device: torch.device) -> TritonKVCache:
        """A spec these kernels do not know is a ValueError."""
        return TritonKVCache(spec, num_blocks, device)

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None, fmt: str = "dense") -> LinearWeight:
        """`fmt` "dense" keeps the type, "int8" and "fp8" make W8A8. Another is a ValueError."""
        self._check_format(fmt, (DENSE, INT8, FP8))
        return DenseLinearWeight(weight, bias) if fmt == DENSE else pack_bytes(weight, bias, fmt)

    def pack_quantized(
        self, raw: torch.Tensor, fmt: str, bias: torch.Tensor | None = None, order: torch.Tensor | None = None
    ) -> LinearWeight:
        """Rows of 4 or 8 bits with their scales. GGUF's blocks are a ValueError: dequantise them, and pack that."""
        self._check_format(fmt, (INT8, FP8, FP8_G128, MXFP4, *W4A16_GROUPS))
        if fmt == MXFP4:
            return pack_mxfp4_rows(raw, bias)
        if fmt in W4A16_GROUPS:
            return pack_group_rows(raw, bias, fmt, order)
        return pack_byte_rows(raw, bias, fmt)

    def _check_format(self, fmt: str, wanted: tuple[str, ...]) -> None:
        formats = [name for name in wanted if name in self.weight_formats]
        if fmt not in formats:
            raise ValueError(f"The Triton kernels for {self.architecture} know {', '.join(formats)} here, not {fmt!r}.")

    def linear_bytes(self, fmt: str, out_features: int, in_features: int, dtype: torch.dtype, has_bias: bool) -> int:
        assert fmt in self.weight_formats
        a_row = in_features * dtype.itemsize if fmt == DENSE else row_bytes(fmt, in_features)
        order_bytes = 4 * in_features * fmt.endswith(ORDER)
        return out_features * (a_row + has_bias * dtype.itemsize) + order_bytes

    def linear(self, x: torch.Tensor, weight: LinearWeight, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """`out_dtype` float32 keeps what was accumulated."""
        if isinstance(weight, PackedWeight):
            return self.multiply(x, weight, out_dtype)
        assert isinstance(weight, DenseLinearWeight)
        if out_dtype is None or out_dtype == x.dtype:
            return F.linear(x, weight.weight, weight.bias)
        if not x.is_cuda:
            return F.linear(x.to(out_dtype), weight.weight.to(out_dtype), _cast(weight.bias, out_dtype))
        product: torch.Tensor = torch.mm(x, weight.weight.t(), out_dtype=out_dtype)
        return product if weight.bias is None else product + weight.bias

    def multiply(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        out_dtype: torch.dtype | None = None,
        offsets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [t, in] by our own kernel; with `offsets`, those of a mixture's rows, each times its expert's matrix."""
        bits = {"dense": 16, "w4": 4, "mxfp4": 4}.get(weight.kind, 8)
        if bits != 8 and x.dtype == torch.float32:
            bits = 32  # tensor cores do not take them
        tiles = gemm_tiles(self.architecture, bits)
        return multiply(x, weight, out_dtype or x.dtype, tiles, self._min_programs, offsets)

    def multiply_quantized(self, rows: QuantizedRows, weight: PackedWeight, out_dtype: torch.dtype) -> torch.Tensor:
        """Rows that are already of the weight's `input_dtype` [t, in] -> [t, out]."""
        return multiply_rows(rows, weight, out_dtype, gemm_tiles(self.architecture, 8), self._min_programs)

    def embedding(self, token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """An id outside the table gives a row of NaN."""
        return embedding.embedding(token_ids, table)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return norm.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return norm.add_rms_norm(x, residual, weight, eps)

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
        assert isinstance(kv_cache, TritonKVCache)
        return rotary.rotary_and_cache(qkv, cos_sin, kv_cache, meta, num_heads, q_norm, k_norm, eps)

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
        assert isinstance(kv_cache, TritonKVCache)
        tiles = attention_tiles(self.architecture, kv_cache.spec.head_dim, kv_cache.spec.dtype.itemsize)
        return split_attention.paged_attention(
            q, kv_cache, meta, scale, sliding_window, soft_cap, sinks, tiles, self._min_programs
        )

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gate_and_mul(gate_up, "silu")

    def gelu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gate_and_mul(gate_up, "gelu_tanh")

    def gelu_erf_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gate_and_mul(gate_up, "gelu")

    def activate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        return activate(x, activation)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        return layer_norm(x, None, weight, bias, eps)

    def add_layer_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        return layer_norm(x, residual, weight, bias, eps)

    def post_layer_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        normed = layer_norm(x, residual, weight, bias, eps, post=True)
        return residual if x.dtype == torch.float32 else normed

    def rotary_packed(
        self, qkv: torch.Tensor, cos_sin: torch.Tensor, sequences: PackedSequences, head_dim: int
    ) -> None:
        packed_attention.rotary_packed(qkv, cos_sin, sequences, head_dim)

    def packed_attention(
        self,
        qkv: torch.Tensor,
        sequences: PackedSequences,
        head_dim: int,
        scale: float,
        window: int = 0,
        relative_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return packed_attention.packed_attention(qkv, sequences, head_dim, scale, window, relative_bias)

    def segment_sum(self, x: torch.Tensor, weights: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return segment_sum.segment_sum(x, weights, cu_seqlens)

    def fuse_layers(self, layers: Sequence[LayerParameters], final_norm: torch.Tensor) -> LayerStack | None:
        return None  # there is no such kernel: each op is launched

    def sample(self, logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
        return draw(logits, sampling)

    def token_logprobs(self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> TokenLogprobTensors:
        return token_logprobs(logits, token_ids, num_top)


def create_triton_ops(device: torch.device) -> TritonOps:
    """For a CUDA (or ROCm) device of this machine."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        architecture = properties.gcnArchName.partition(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    return TritonOps(architecture, properties.multi_processor_count)


def _cast(bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if bias is None else bias.to(dtype)
