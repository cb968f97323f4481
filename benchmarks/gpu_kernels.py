"""Each Triton kernel on this GPU, against the bandwidth measured in the same run or against torch's own. No engine.

The bytes are those that must be moved, once each way; what a kernel moves beyond them counts against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import triton.testing
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_products import product_rows
from benchmarks.gpu_timing import DEVICE, seconds, share
from benchmarks.row import Row
from llmserve.kernels.ops import AttentionMetadata, KVCacheSpec, LogitAdjustments, SamplingTensors
from llmserve.kernels.triton.block_copier import TritonBlockCopier
from llmserve.kernels.triton.ops import TritonOps, create_triton_ops
from llmserve.messages import SamplingParams
from llmserve.worker.device import CudaDevice
from llmserve.worker.logits_processors import AdjustmentTables

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, VOCAB = 32, 8, 128, 4096, 14336, 128256  # Llama-3.1-8B


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 4 GiB."""
    source = torch.empty(2**32, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def decode_batch(ops: TritonOps, num_seqs: int, context: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """One decode step's attention; blocks lie scattered, as they do in a server that has run for a while."""
    blocks = context // 16
    spec = KVCacheSpec(KV_HEADS, HEAD_DIM, 16, dtype)
    cache = ops.allocate_kv_cache(spec, num_seqs * blocks, DEVICE)
    cache.data.view(torch.uint8).random_(0, 64)
    table = torch.randperm(num_seqs * blocks, device=DEVICE).int().view(num_seqs, blocks)
    meta = AttentionMetadata(
        query_start_loc=torch.arange(num_seqs + 1, dtype=torch.int32, device=DEVICE),
        seq_lens=torch.full((num_seqs,), context, dtype=torch.int32, device=DEVICE),
        block_table=table,
        slot_mapping=torch.zeros(num_seqs, dtype=torch.int64, device=DEVICE),
        positions=torch.full((num_seqs,), context - 1, dtype=torch.int64, device=DEVICE),
        max_seq_len=context,
    )
    q = torch.randn(num_seqs, HEADS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    return lambda: ops.paged_attention(q, cache, meta, HEAD_DIM**-0.5)


def prefill_rows(ops: TritonOps, length: int) -> Row:
    """One prompt, whole, against torch's flash attention."""
    spec = KVCacheSpec(KV_HEADS, HEAD_DIM, 16, torch.bfloat16)
    cache = ops.allocate_kv_cache(spec, length // 16, DEVICE)
    cache.data.normal_()
    meta = AttentionMetadata(
        query_start_loc=torch.tensor([0, length], dtype=torch.int32, device=DEVICE),
        seq_lens=torch.tensor([length], dtype=torch.int32, device=DEVICE),
        block_table=torch.randperm(length // 16, device=DEVICE).int()[None],
        slot_mapping=torch.zeros(length, dtype=torch.int64, device=DEVICE),
        positions=torch.arange(length, device=DEVICE),
        max_seq_len=length,
    )
    q = torch.randn(length, HEADS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    mine = seconds(lambda: ops.paged_attention(q, cache, meta, HEAD_DIM**-0.5))
    dense_q = q.transpose(0, 1)[None].contiguous()
    k, v = (torch.randn(1, KV_HEADS, length, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        theirs = seconds(lambda: F.scaled_dot_product_attention(dense_q, k, v, is_causal=True, enable_gqa=True))
    flops = 2 * HEADS * HEAD_DIM * length * length
    result = f"{theirs / mine:.0%} ({flops / mine / 1e12:.0f} TFLOP/s)"
    return Row(f"prefill attention {length}", "of torch's flash SDPA", "60%", "50-65%", result)


def streaming_rows(ops: TritonOps, bandwidth: float) -> Iterator[Row]:
    """Norm, rotary and SiLU at 8k tokens."""
    tokens = 8192
    x = torch.randn(tokens, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
    residual, weight = torch.randn(tokens, HIDDEN, device=DEVICE), torch.ones(HIDDEN, device=DEVICE)
    took = seconds(lambda: ops.add_rms_norm(x, residual, weight, 1e-5))
    yield share("residual + RMSNorm, 8k tokens", 2 * (x.nbytes + residual.nbytes), took, bandwidth, "80%", "85%")
    gate_up = torch.randn(tokens, 2 * INTERMEDIATE, device=DEVICE, dtype=torch.bfloat16)
    took = seconds(lambda: ops.silu_and_mul(gate_up))
    yield share("SiLU * mul, 8k tokens", gate_up.nbytes * 3 // 2, took, bandwidth, "80%", "88%")
    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    cache = ops.allocate_kv_cache(KVCacheSpec(KV_HEADS, HEAD_DIM, 16, torch.bfloat16), tokens // 16, DEVICE)
    meta = AttentionMetadata(
        query_start_loc=torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE),
        seq_lens=torch.tensor([tokens], dtype=torch.int32, device=DEVICE),
        block_table=torch.arange(tokens // 16, device=DEVICE).int()[None],
        slot_mapping=torch.arange(tokens, device=DEVICE),
        positions=torch.arange(tokens, device=DEVICE),
        max_seq_len=tokens,
    )
    cos_sin = torch.randn(tokens, HEAD_DIM, device=DEVICE)
    took = seconds(lambda: ops.rotary_and_cache(qkv, cos_sin, cache, meta, HEADS, None, None, 1e-5))
    yield share("rotary + KV write, 8k tokens", 2 * qkv.nbytes + cos_sin.nbytes, took, bandwidth, "80%", "75%")


def host_tier_rows() -> Iterator[Row]:
    """256 scattered blocks of all 32 layers, 512 MiB, to the host's memory and back: a prompt of 4096 tokens."""
    num_blocks, num_layers = 256, 32
    words = 2 * KV_HEADS * 16 * HEAD_DIM // 2
    device = [torch.zeros((2 * num_blocks, words), dtype=torch.int32, device=DEVICE) for _ in range(num_layers)]
    size = num_blocks * words * 4
    memory = CudaDevice(DEVICE).mapped(num_layers * size)
    host = [piece.view(torch.int32).view(num_blocks, words) for piece in memory.split(size)]
    slots, blocks = torch.randperm(num_blocks), torch.randperm(2 * num_blocks)[:num_blocks]
    out = torch.stack((blocks, slots), dim=1).to(DEVICE)
    back = out.flip(1).contiguous()
    for name, copier, pairs in (
        ("offload", TritonBlockCopier(device, host, DEVICE), out),
        ("restore", TritonBlockCopier(host, device, DEVICE), back),
    ):
        took = seconds(partial(copier.copy, pairs))
        result = f"{num_layers * size / took / 1e9:.0f} GB/s ({took * 1e3:.1f} ms)"
        yield Row(f"{name} of 256 blocks, 512 MiB", "bandwidth", "40 GB/s", "45 GB/s (12 ms)", result)


def sampling_rows(ops: TritonOps) -> Iterator[Row]:
    """64 rows of Llama 3's vocabulary. Flat: logits as random as can be, tens of thousands of tokens in the nucleus;
    peaked: a few hundred, as a model's are."""
    rows = 64
    flat = torch.randn(rows, VOCAB, device=DEVICE) * 3
    peaked = flat + 12 * (torch.rand(rows, VOCAB, device=DEVICE) < 1e-3)
    adjustments = penalties(rows)
    for name, logits, temperature, top_k, top_p, adjusted, predicted in (
        ("greedy", flat, 0.0, 0, 1.0, False, "11 us"),
        ("temperature", flat, 1.0, 0, 1.0, False, "20 us"),
        ("top-k 50, top-p 0.95", peaked, 1.0, 50, 0.95, False, "45 us"),
        ("top-p 0.95", peaked, 1.0, 0, 0.95, False, "40 us"),
        ("top-p 0.95, flat", flat, 1.0, 0, 0.95, False, "80 us"),
        ("penalties, top-k 50, top-p 0.95", peaked, 1.0, 50, 0.95, True, "57 us"),
    ):
        sampling = SamplingTensors(
            temperature=torch.full((rows,), temperature, device=DEVICE),
            top_k=torch.full((rows,), top_k, device=DEVICE),
            top_p=torch.full((rows,), top_p, device=DEVICE),
            min_p=torch.zeros(rows, device=DEVICE),
            seeds=torch.arange(rows, device=DEVICE),
            positions=torch.arange(rows, device=DEVICE),
            all_greedy=temperature == 0,
            any_top_k=top_k > 0,
            any_top_p=top_p < 1,
            any_min_p=False,
            adjustments=adjustments if adjusted else None,
        )
        yield graph_row(f"sampling 64 x 128k, {name}", predicted, partial(ops.sample, logits.clone(), sampling))
    ids = torch.arange(rows, device=DEVICE)
    yield graph_row("log-probabilities 64 x 128k, 20 likeliest", "24 us", partial(ops.token_logprobs, flat, ids, 20))


def graph_row(name: str, predicted: str, run: Callable[[], object]) -> Row:
    """In a captured graph, as the runner replays it. Logits with penalties wear down from run to run: no matter."""
    run()
    took = triton.testing.do_bench_cudagraph(run, rep=50)
    return Row(name, "time", "60 us", predicted, f"{took * 1e3:.0f} us")


def penalties(rows: int) -> LogitAdjustments:
    """On every row, after 2000 tokens; and a bias of 16 tokens."""
    tables = AdjustmentTables(rows, VOCAB, DEVICE)
    params = SamplingParams(
        max_tokens=1, seed=0, repetition_penalty=1.1, frequency_penalty=0.1, logit_bias=dict.fromkeys(range(16), 1.0)
    )
    seen = np.random.default_rng(0).integers(0, VOCAB, (rows, 2000), dtype=np.int32)
    for row in range(rows):
        tables.enter(row, params, seen[row, :1000], seen[row, 1000:])
    return tables.of(torch.arange(rows, device=DEVICE))


def kernel_rows() -> Iterator[Row]:
    """All of them, one after the other; what a row allocated is freed before the next."""
    ops = create_triton_ops(DEVICE)
    bandwidth = copy_bandwidth()
    yield Row("copy of 4 GiB", "bandwidth", "", "4.3 TB/s", f"{bandwidth / 1e12:.2f} TB/s")
    for num_seqs, context, predicted in ((64, 4096, "75%"), (1, 131072, "65%"), (8, 4096, "55%")):
        run = decode_batch(ops, num_seqs, context, torch.bfloat16)
        num_bytes = num_seqs * context * 2 * KV_HEADS * HEAD_DIM * 2
        yield share(f"decode attention {num_seqs} x {context}", num_bytes, seconds(run), bandwidth, "80%", predicted)
    run = decode_batch(ops, 64, 4096, torch.float8_e4m3fn)
    num_bytes = 64 * 4096 * 2 * KV_HEADS * (HEAD_DIM + 4)
    yield share("decode attention 64 x 4096, fp8", num_bytes, seconds(run), bandwidth, "", "55%")
    for length in (4096, 16384):
        yield prefill_rows(ops, length)
    yield from streaming_rows(ops, bandwidth)
    yield from sampling_rows(ops)
    yield from host_tier_rows()
    yield from product_rows(ops, bandwidth)
