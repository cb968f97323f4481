"""Times the C kernels op by op against torch's and oneDNN's, and against what memory and the vector units allow.

    python benchmarks/bench_cpu_kernels.py [--threads N] [--shape smollm2|llama1b] [--ops linear,attention,...]

Each row alternates the two contenders and prints medians (and our minimum); weights rotate through more memory than
the caches hold, as in a model. `limit` is the larger of the time memory needs and the time the vector units need, from
the peaks given (--memory-gbs of all cores, --bf16-gflops and --int8-gflops of one core).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llmserve.kernels.cpu.ops import CPUOps, create_cpu_ops, usable_cores
from llmserve.kernels.ops import AttentionMetadata, KVCacheSpec
from llmserve.kernels.reference import ReferenceOps

COLD_BYTES = 128 << 20  # what the weights of a row rotate through
SETTLE_S = 0.004  # OpenMP's threads spin this long after a torch op: let them sleep before our turn


@dataclass(frozen=True)
class Shape:
    """A model: (in, out) of its matrices, and its attention."""

    matrices: tuple[tuple[int, int], ...]
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = {
    "smollm2": Shape(((576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152)), 576, 1536, 9, 3, 64),
    "llama1b": Shape(((2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048)), 2048, 8192, 32, 8, 64),
}


@dataclass(frozen=True)
class Peaks:
    """What the machine can do, all threads together."""

    bytes_per_s: float
    bf16_flops: float
    int8_flops: float


@dataclass
class Case:
    """One row: ours, theirs (None: torch has no such op), and the work of one call."""

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object] | None
    num_bytes: float
    flops: float
    peak_flops: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--ops", default="linear,rows,attention,sample")
    parser.add_argument("--isa", default=None, help="avx512_bf16, avx512_vnni, avx2_vnni, avx2 or generic")
    parser.add_argument("--rows", default="1,8,32,128,512")
    parser.add_argument("--memory-gbs", type=float, default=39.0)
    parser.add_argument("--bf16-gflops", type=float, default=500.0)
    parser.add_argument("--int8-gflops", type=float, default=1000.0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ops = create_cpu_ops(arguments.threads, arguments.isa)
    if ops is None:
        raise SystemExit("The C kernels cannot be built here.")
    threads = arguments.threads
    peaks = Peaks(
        arguments.memory_gbs * 1e9, arguments.bf16_gflops * threads * 1e9, arguments.int8_gflops * threads * 1e9
    )
    shape, rows = SHAPES[arguments.shape], [int(text) for text in arguments.rows.split(",")]
    groups = {"linear": linear_cases, "rows": row_cases, "attention": attention_cases, "sample": sample_cases}
    print(f"{ops.isa}, {threads} threads, {arguments.shape}; medians, us")
    print(
        f"{'op':34} {'ours':>9} {'(min)':>9} {'torch':>9} {'torch/ours':>10} {'GB/s':>7} {'GFLOP/s':>8} {'of limit':>8}"
    )
    for group in arguments.ops.split(","):
        for build in groups[group](ops, shape, rows, peaks):
            report(build(), peaks)


def report(case: Case, peaks: Peaks) -> None:
    """Runs one case and prints its row."""
    contenders = [case.ours] if case.theirs is None else [case.ours, case.theirs]
    times = alternate(contenders)
    ours, best = statistics.median(times[0]), min(times[0])
    limit = max(case.num_bytes / peaks.bytes_per_s, case.flops / case.peak_flops if case.peak_flops else 0.0)
    theirs = statistics.median(times[1]) if len(times) > 1 else float("nan")
    print(
        f"{case.name:34} {ours * 1e6:9.1f} {best * 1e6:9.1f} {theirs * 1e6:9.1f} {theirs / ours:10.2f} "
        f"{case.num_bytes / ours / 1e9:7.1f} {case.flops / ours / 1e9:8.0f} {limit / ours:8.0%}",
        flush=True,
    )


def alternate(contenders: list[Callable[[], object]], rounds: int = 9, round_s: float = 0.01) -> list[list[float]]:
    """Seconds a call of each contender in each round."""
    calls = []
    for contender in contenders:
        contender()
        start = time.perf_counter()
        contender()
        calls.append(max(2, min(200, int(round_s / max(time.perf_counter() - start, 1e-7)))))
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for index, contender in enumerate(contenders):
            time.sleep(SETTLE_S)
            contender()
            start = time.perf_counter()
            for _ in range(calls[index]):
                contender()
            times[index].append((time.perf_counter() - start) / calls[index])
    return times


def rotating(
    op: Callable[[torch.Tensor, object], object], x: torch.Tensor, weights: list[object]
) -> Callable[[], object]:
    """op(x, weight) with another weight at each call."""
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % len(weights)
        return op(x, weights[turn])

    return call


def linear_cases(ops: CPUOps, shape: Shape, rows: list[int], peaks: Peaks) -> list[Callable[[], Case]]:
    """bf16, int8 and Q4_0 against oneDNN's prepacked bf16."""
    reference = ReferenceOps()
    cases: list[Callable[[], Case]] = []

    def build(k: int, n: int, m: int, fmt: str) -> Case:
        count = max(1, min(64, COLD_BYTES // (k * n)))
        dense = [torch.randn(n, k).bfloat16() for _ in range(count)]
        packed = [pack(ops, weight, fmt) for weight in dense]
        theirs = [reference.pack_linear(weight) for weight in dense]
        x = torch.randn(m, k).bfloat16()
        num_bytes = packed[0].nbytes + 2 * m * (k + n)  # type: ignore[attr-defined]
        peak = peaks.bf16_flops if fmt == "dense" else peaks.int8_flops
        mine, other = rotating(ops.linear, x, packed), rotating(reference.linear, x, list(theirs))  # type: ignore[arg-type]
        return Case(f"linear {fmt} {k}x{n} m={m}", mine, other, num_bytes, 2.0 * m * k * n, peak)

    for k, n in shape.matrices:
        for m in rows:
            for fmt in ("dense", "int8", "q4_0"):
                if m * n * k < 4e9:
                    cases.append(lambda k=k, n=n, m=m, fmt=fmt: build(k, n, m, fmt))  # type: ignore[misc]
    return cases


def pack(ops: CPUOps, weight: torch.Tensor, fmt: str) -> object:
    """A bf16 matrix in `fmt`; for the block formats random bytes will do."""
    if fmt != "q4_0":
        return ops.pack_linear(weight, None, fmt)
    raw = torch.randint(0, 256, (weight.shape[0], weight.shape[1] // 32, 18), dtype=torch.uint8)
    raw[:, :, :2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    return ops.pack_quantized(raw.flatten(1), fmt)


def row_cases(ops: CPUOps, shape: Shape, rows: list[int], peaks: Peaks) -> list[Callable[[], Case]]:
    """Norms and gates against torch's own."""

    def norm(m: int) -> Case:
        x, weight = torch.randn(m, shape.hidden).bfloat16(), torch.ones(shape.hidden)
        residual, narrow = torch.zeros(m, shape.hidden), weight.bfloat16()

        def theirs() -> torch.Tensor:
            residual.add_(x)
            return F.rms_norm(residual.bfloat16(), (shape.hidden,), narrow, 1e-5)

        return Case(
            f"add_rms_norm m={m}", lambda: ops.add_rms_norm(x, residual, weight, 1e-5), theirs, 12.0 * x.numel(), 0, 0
        )

    def gate(m: int) -> Case:
        x = torch.randn(m, 2 * shape.intermediate).bfloat16()

        def theirs() -> torch.Tensor:
            left, right = x.chunk(2, dim=-1)
            return F.silu(left) * right

        return Case(f"silu_and_mul m={m}", lambda: ops.silu_and_mul(x), theirs, 3.0 * x.numel(), 0, 0)

    return [lambda m=m, make=make: make(m) for make in (norm, gate) for m in rows]  # type: ignore[misc]


def attention_cases(ops: CPUOps, shape: Shape, rows: list[int], peaks: Peaks) -> list[Callable[[], Case]]:
    """Decode and prefill in bf16, paged, against torch's dense SDPA on contiguous keys."""

    def build(seqs: int, query_len: int, context: int) -> Case:
        spec = KVCacheSpec(shape.num_kv_heads, shape.head_dim, 16, torch.bfloat16)
        blocks = -(-context // 16)
        cache = ops.allocate_kv_cache(spec, seqs * blocks, torch.device("cpu"))
        cache.data.normal_()
        meta = AttentionMetadata(
            query_start_loc=(torch.arange(seqs + 1) * query_len).int(),
            seq_lens=torch.full((seqs,), context, dtype=torch.int32),
            block_table=torch.randperm(seqs * blocks).int().view(seqs, blocks),
            slot_mapping=torch.zeros(seqs * query_len, dtype=torch.int64),
            positions=torch.arange(context - query_len, context).repeat(seqs),
            max_seq_len=context,
        )
        q = torch.randn(seqs * query_len, shape.num_heads, shape.head_dim).bfloat16()
        k = torch.randn(seqs, shape.num_kv_heads, context, shape.head_dim).bfloat16()
        dense_q = q.view(seqs, query_len, shape.num_heads, shape.head_dim).transpose(1, 2)
        causal = query_len > 1
        pairs = seqs * (query_len * (2 * context - query_len + 1) / 2)
        return Case(
            f"attention seqs={seqs} q={query_len} ctx={context}",
            lambda: ops.paged_attention(q, cache, meta, 0.125),
            lambda: F.scaled_dot_product_attention(dense_q, k, k, is_causal=causal, enable_gqa=True),
            2.0 * k.nbytes,
            4.0 * pairs * shape.num_heads * shape.head_dim,
            peaks.bf16_flops,
        )

    sizes = ((1, 1, 256), (1, 1, 8192), (8, 1, 256), (32, 1, 256), (32, 1, 1024), (1, 256, 256), (1, 1024, 1024))
    return [lambda size=size: build(*size) for size in sizes]  # type: ignore[misc]


def sample_cases(ops: CPUOps, shape: Shape, rows: list[int], peaks: Peaks) -> list[Callable[[], Case]]:
    """Greedy, plain and filtered draws against the reference sampler."""
    from llmserve.kernels.ops import SamplingTensors

    reference = ReferenceOps()

    def build(m: int, temperature: float, top_k: int, top_p: float) -> Case:
        logits = torch.randn(m, 49152) * 3
        sampling = SamplingTensors(
            temperature=torch.full((m,), temperature),
            top_k=torch.full((m,), top_k),
            top_p=torch.full((m,), top_p),
            min_p=torch.zeros(m),
            seeds=torch.arange(m),
            positions=torch.arange(m),
            all_greedy=temperature == 0,
            any_top_k=top_k > 0,
            any_top_p=top_p < 1,
            any_min_p=False,
        )
        name = f"sample m={m} t={temperature} top_k={top_k} top_p={top_p}"
        mine, theirs = (lambda: ops.sample(logits, sampling)), (lambda: reference.sample(logits, sampling))
        return Case(name, mine, theirs, logits.nbytes, 0, 0)

    settings = ((0.0, 0, 1.0), (0.8, 0, 1.0), (0.8, 40, 1.0), (0.8, 0, 0.95))
    return [lambda m=m, s=s: build(m, *s) for s in settings for m in (1, 32)]  # type: ignore[misc]


if __name__ == "__main__":
    main()
