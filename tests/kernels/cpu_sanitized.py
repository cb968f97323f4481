"""A program: runs every C kernel, built with address sanitizer and UBSan, over awkward shapes."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

from llmserve.kernels.cpu.build import build_library, host_isas
from llmserve.kernels.cpu.library import Library
from llmserve.kernels.cpu.ops import CPUOps
from llmserve.kernels.ops import AttentionMetadata, KVCacheSpec, PackedSequences, SamplingTensors

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=alignment", "-O1", "-g1")


def run_attention(ops: CPUOps, dtype: torch.dtype) -> None:
    spec = KVCacheSpec(2, 48, 32, dtype)
    cache = ops.allocate_kv_cache(spec, 20, torch.device("cpu"))
    total = 600
    meta = AttentionMetadata(
        query_start_loc=torch.tensor([0, total, total + 1], dtype=torch.int32),
        seq_lens=torch.tensor([total, 1], dtype=torch.int32),
        block_table=torch.stack((torch.arange(19), torch.arange(19).flip(0))).int() + 1,
        slot_mapping=torch.cat((torch.arange(32, 32 + total), torch.tensor([19 * 32]))),
        positions=torch.cat((torch.arange(total), torch.tensor([0]))),
        max_seq_len=total,
    )
    qkv = torch.randn(total + 1, (6 + 4) * 48).to(dtype)
    norm = torch.ones(48)
    q = ops.rotary_and_cache(qkv, torch.randn(total, 48), cache, meta, 6, norm, norm, 1e-6)
    for window in (0, 33):
        ops.paged_attention(q, cache, meta, 0.1, window, 5.0, torch.randn(6))
    decode = AttentionMetadata(
        query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
        seq_lens=meta.seq_lens[:1],
        block_table=meta.block_table[:1],
        slot_mapping=meta.slot_mapping[-1:],
        positions=meta.positions[-1:],
        max_seq_len=total,
    )
    ops.paged_attention(q[:1].contiguous(), cache, decode, 0.1)


def run_linear(ops: CPUOps, dtype: torch.dtype) -> None:
    weight = torch.randn(35, 96)
    packed = [ops.pack_linear(weight.to(dtype), weight[:, 0], fmt) for fmt in ("dense", "int8", "q8_0")]
    for name in ("Q8_0", "Q4_0", "Q4_1"):
        raw = quants.quantize(weight.numpy(), GGMLQuantizationType[name])
        packed.append(ops.pack_quantized(torch.from_numpy(np.ascontiguousarray(raw)), name))
    for m in (1, 5, 12, 13, 100):
        for each in packed:
            ops.linear(torch.randn(m, 96).to(dtype), each)
    for k in (1, 33):
        for fmt in ("dense", "int8"):
            ops.linear(torch.randn(3, k).to(dtype), ops.pack_linear(torch.randn(17, k).to(dtype), None, fmt))


def run_rows(ops: CPUOps, dtype: torch.dtype) -> None:
    for rows, width in ((1, 1), (3, 17), (40, 1030)):
        x, weight = torch.randn(rows, width).to(dtype), torch.randn(width)
        ops.rms_norm(x, weight, 1e-5)
        ops.add_rms_norm(x, x.float(), weight, 1e-5)
        ops.silu_and_mul(torch.randn(rows, 2 * width).to(dtype))
        ops.gelu_and_mul(torch.randn(rows, 2 * width).to(dtype))


def run_encoder(ops: CPUOps, dtype: torch.dtype) -> None:
    for rows, width in ((1, 1), (3, 17), (40, 1030)):
        x, weight = torch.randn(rows, width).to(dtype), torch.randn(width)
        ops.layer_norm(x, weight, None, 1e-5)
        ops.add_layer_norm(x, x.to(torch.float32, copy=True), weight, weight, 1e-5)
        ops.post_layer_norm(x, x.to(torch.float32, copy=True), weight, weight, 1e-5)
        ops.gelu_erf_and_mul(torch.randn(rows, 2 * width).to(dtype))
        for activation in ("gelu", "gelu_tanh", "silu", "relu", "tanh", "sigmoid"):
            ops.activate(x, activation)
        ops.segment_sum(x, torch.rand(rows), torch.tensor([0, rows], dtype=torch.int32))
    lengths = [1, 17, 130, 64, 3]
    positions = torch.cat([torch.arange(length) for length in lengths])
    sequences = PackedSequences(torch.tensor([0, *lengths]).cumsum(0).int(), positions, max(lengths))
    for window, bias in ((0, None), (9, None), (0, torch.randn(2, 2 * 130 - 1))):
        qkv = torch.randn(len(positions), 3 * 2 * 48).to(dtype)
        ops.rotary_packed(qkv, torch.randn(130, 48), sequences, 48)
        ops.packed_attention(qkv, sequences, 48, 0.1, window, bias)


def run_sampling(ops: CPUOps) -> None:
    for vocab in (1, 17, 1000):
        rows = 5
        sampling = SamplingTensors(
            torch.tensor([0.0, 1.0, 0.5, 1.0, 1.0]), torch.tensor([0, 0, 3, 0, 2]),
            torch.tensor([1.0, 1.0, 1.0, 0.5, 0.9]), torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1]),
            torch.arange(rows), torch.arange(rows), False, True, True, True,
        )  # fmt: skip
        logits = torch.randn(rows, vocab)
        ops.sample(logits, sampling)
        ops.sample(torch.full_like(logits, float("nan")), sampling)
        ops.sample(torch.full_like(logits, float("-inf")), sampling)


def main() -> None:
    torch.manual_seed(0)
    for isa in host_isas()[:1]:
        library = Library(build_library(isa, SANITIZE), isa.name, 2)
        ops = CPUOps(library)
        for dtype in (torch.float32, torch.bfloat16):
            run_rows(ops, dtype)
            run_linear(ops, dtype)
            run_attention(ops, dtype)
            run_encoder(ops, dtype)
        run_sampling(ops)
        library.close()


if __name__ == "__main__":
    main()
