"""Where a step's time goes, kernel by kernel: calls, time, bytes, operations, and the share of what the machine allows.

    python -m benchmarks.bench_step_profile [--quantization q8_0] [--rows 1,8,32,1024] [--context 192] [--threads N]

The embedded model (or --model FOLDER) does whole steps in this process: forward, logits of the rows to be sampled, a
greedy draw; no scheduler, no sockets. `rows` up to 64 are as many sequences with one new token each after `context`
tokens; more are one prompt. Every call into C is timed from Python, its own cost of about a microsecond included; what
the calls leave of a step is Python's and torch's. `limit` is the larger of the time memory needs (--memory-gbs: weights
and cache once) and the time the vector units need (--int8-gops and --bf16-gflops of one core).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmserve.kernels.cpu.library import FORMATS, Library, WeightStruct, load_library
from llmserve.kernels.cpu.ops import CPUOps, usable_cores
from llmserve.kernels.ops import AttentionMetadata, KVCacheSpec, LayerParameters, SamplingTensors
from llmserve.models.config import ModelConfig, read_model_config
from llmserve.models.llama import LlamaModel
from llmserve.models.loader import load_model
from llmserve.models.parameters import linear_parameters
from llmserve.models.quantization import choose_formats, resolve_quantization
from llmserve.models.weights import open_weights
from llmserve.repository import embedded

BLOCK_SIZE, MAX_SEQS, WARM_UP = 16, 64, 3
FORMAT_NAMES = {number: name for name, number in FORMATS.items()}
BYTES_A_WEIGHT = {"f32": 4.0, "bf16": 2.0, "int8": 1.0, "q8_0": 34 / 32, "q4_0": 18 / 32, "q4_1": 20 / 32}


@dataclass
class Work:
    """What one kernel did in a step."""

    seconds: float = 0.0
    calls: int = 0
    num_bytes: float = 0.0
    operations: float = 0.0
    int8: bool = False


@dataclass
class Recorder:
    """Adds up the calls of the running step by kernel."""

    step: dict[str, Work] = field(default_factory=dict)

    def add(
        self, name: str, seconds: float, num_bytes: float = 0.0, operations: float = 0.0, int8: bool = False
    ) -> None:
        work = self.step.setdefault(name, Work(int8=int8))
        work.seconds += seconds
        work.calls += 1
        work.num_bytes += num_bytes
        work.operations += operations


class TimedLibrary:
    """A library of kernels, each call of which is timed. Has what `CPUOps` looks for in a `Library`."""

    def __init__(self, library: Library, recorder: Recorder) -> None:
        self.isa, self.pool = library.isa, library.pool
        self.linear = self._timed_linear(library.linear, recorder)
        for name in ("rms_norm", "gate_and_mul", "embedding", "rotary_and_cache", "paged_attention", "sample"):
            setattr(self, name, self._timed(name, getattr(library, name), recorder))

    @staticmethod
    def _timed(name: str, function: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = function(*arguments)
            recorder.add(name, time.perf_counter() - begin)
            return result

        return call

    @staticmethod
    def _timed_linear(function: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
        def call(pool: int, pointer: int, x: int, out: int, m: int, k: int, dtype: int, out_dtype: int) -> None:
            begin = time.perf_counter()
            function(pool, pointer, x, out, m, k, dtype, out_dtype)
            seconds = time.perf_counter() - begin
            weight = WeightStruct.from_address(pointer)
            kind, weights = FORMAT_NAMES[weight.format], float(weight.n * weight.k)
            name = f"linear {kind} {weight.k}x{weight.n}"
            recorder.add(name, seconds, weights * BYTES_A_WEIGHT[kind], 2 * m * weights, kind not in ("f32", "bf16"))

        return call


class SeparateOps(CPUOps):
    """Every op a call of its own, so that it can be timed."""

    def fuse_layers(self, layers: Sequence[LayerParameters], final_norm: torch.Tensor) -> None:
        return None


class Stepper:
    """The model with a cache full of earlier tokens, ready to do one step again and again."""

    def __init__(self, model: LlamaModel, ops: CPUOps, config: ModelConfig, max_tokens: int) -> None:
        self._model, self._ops, self._config = model, ops, config
        spec = KVCacheSpec(config.num_kv_heads, config.head_dim, BLOCK_SIZE, model.dtype)
        blocks = -(-max_tokens // BLOCK_SIZE)
        self._caches = [ops.allocate_kv_cache(spec, blocks, torch.device("cpu")) for _ in range(config.num_layers)]
        for cache in self._caches:
            cache.data.normal_()  # memory that was never written is one page of zeros, and always in the cache

    def inputs(self, rows: int, context: int) -> tuple[torch.Tensor, AttentionMetadata]:
        """Token ids and metadata of a step: `rows` sequences, or one prompt of that length."""
        seqs, length = (rows, 1) if rows <= MAX_SEQS else (1, rows)
        total = context + 1 if length == 1 else length
        blocks = -(-total // BLOCK_SIZE)
        table = torch.arange(seqs * blocks, dtype=torch.int32).view(seqs, blocks)
        positions = torch.arange(total - length, total).repeat(seqs)
        slots = table[:, positions[-1] // BLOCK_SIZE].long() * BLOCK_SIZE + positions[-1] % BLOCK_SIZE
        if length > 1:
            slots = positions.clone()
        meta = AttentionMetadata(
            query_start_loc=(torch.arange(seqs + 1) * length).int(),
            seq_lens=torch.full((seqs,), total, dtype=torch.int32),
            block_table=table,
            slot_mapping=slots,
            positions=positions,
            max_seq_len=total,
        )
        return torch.randint(100, 20_000, (rows,)), meta

    @torch.inference_mode()
    def step(self, token_ids: torch.Tensor, meta: AttentionMetadata) -> None:
        """Forward, logits of each sequence's last row, a greedy draw."""
        hidden = self._model.forward(token_ids, meta, self._caches)
        logits = self._model.compute_logits(hidden[meta.query_start_loc[1:].long() - 1])
        rows = logits.shape[0]
        zeros, ids = torch.zeros(rows), torch.zeros(rows, dtype=torch.int64)
        greedy = SamplingTensors(zeros, ids, zeros + 1, zeros, ids, ids, True, False, False, False)
        self._ops.sample(logits, greedy)

    def attention_work(self, meta: AttentionMetadata) -> tuple[float, float]:
        """Bytes of the cache that a step reads, once, and its operations, in all layers."""
        config, seqs = self._config, meta.seq_lens.shape[0]
        length, total = meta.positions.shape[0] // seqs, meta.max_seq_len
        pairs = seqs * length * (2 * total - length + 1) / 2
        read = seqs * total * 2 * config.num_kv_heads * config.head_dim * self._model.dtype.itemsize
        return read * config.num_layers, 4.0 * pairs * config.num_heads * config.head_dim * config.num_layers


def load(folder: Path, quantization: str, dtype: torch.dtype, ops: CPUOps) -> tuple[LlamaModel, ModelConfig]:
    config = read_model_config(folder)
    source = open_weights(folder, config)
    types = {source.types[f"{part}.weight"] for matrix in linear_parameters(config) for part in matrix.parts}
    chosen = resolve_quantization(quantization, source.where, types, ops.weight_formats, dtype_is_auto=False)
    formats = choose_formats(config, source.types, chosen, ops.weight_formats)
    return load_model(source, config, dtype, torch.device("cpu"), ops, formats, max_model_len=2048), config


@dataclass(frozen=True)
class Profile:
    """Median seconds of a step as it is served, and with every op apart; and what the kernels did in each of these."""

    whole_s: float
    apart_s: float
    steps: list[dict[str, Work]]


def profile(whole: Stepper, apart: Stepper, recorder: Recorder, rows: int, options: argparse.Namespace) -> Profile:
    """The two take turns, for as long as the options say."""
    token_ids, meta = whole.inputs(rows, options.context)
    steps = []
    seconds: dict[Stepper, list[float]] = {whole: [], apart: []}
    deadline = time.perf_counter() + options.seconds
    while len(steps) < WARM_UP + 3 or time.perf_counter() < deadline:
        for stepper in (whole, apart):
            recorder.step = {}
            begin = time.perf_counter()
            stepper.step(token_ids, meta)
            seconds[stepper].append(time.perf_counter() - begin)
        steps.append(recorder.step)
    read, operations = whole.attention_work(meta)
    for step in steps:
        step["paged_attention"].num_bytes, step["paged_attention"].operations = read, operations
    whole_s, apart_s = (statistics.median(seconds[stepper][WARM_UP:]) for stepper in (whole, apart))
    return Profile(whole_s, apart_s, steps[WARM_UP:])


def report(rows: int, found: Profile, options: argparse.Namespace) -> None:
    """A table: a row a kernel, the rest, the sum."""
    peak_bytes = options.memory_gbs * 1e9
    steps, step_s = found.steps, found.apart_s
    print(f"\n{rows} rows: {found.whole_s * 1e3:.2f} ms a step, {rows / found.whole_s:.0f} tokens/s")
    print(f"  {'':28}{'calls':>6}{'us':>10}{'of step':>9}{'us/call':>9}{'GB/s':>7}{'GOP/s':>8}{'of limit':>9}")
    calls_s = limit_s = 0.0
    for name, first in steps[0].items():
        seconds = statistics.median(step[name].seconds for step in steps)
        peak = (options.int8_gops if first.int8 else options.bf16_gflops) * 1e9 * options.threads
        limit = max(first.num_bytes / peak_bytes, first.operations / peak)
        calls_s, limit_s = calls_s + seconds, limit_s + limit
        print(
            f"  {name:28}{first.calls:6}{seconds * 1e6:10.0f}{seconds / step_s:9.1%}{seconds / first.calls * 1e6:9.1f}"
            f"{first.num_bytes / seconds / 1e9:7.1f}{first.operations / seconds / 1e9:8.0f}{limit / seconds:9.0%}"
        )
    print(f"  {'Python between the calls':28}{'':6}{(step_s - calls_s) * 1e6:10.0f}{1 - calls_s / step_s:9.1%}")
    print(f"  {'all of it apart':28}{'':6}{step_s * 1e6:10.0f}")
    print(f"  {'as served, layers in one call':29}{'':5}{found.whole_s * 1e6:10.0f}")
    print(f"  {'limit of the step as served':28}{'':6}{limit_s * 1e6:10.0f}{limit_s / found.whole_s:9.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; the embedded model if not given")
    parser.add_argument("--quantization", default="q8_0", help="q8_0, int8 or none (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rows", default="1,2,4,8,16,32,1024")
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--isa", help="avx512_bf16, avx512_vnni, avx2_vnni, avx2 or generic")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number of rows")
    parser.add_argument("--memory-gbs", type=float, default=39.0)
    parser.add_argument("--bf16-gflops", type=float, default=500.0)
    parser.add_argument("--int8-gops", type=float, default=1000.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    library = load_library(options.threads, options.isa)
    if library is None:
        raise SystemExit("The C kernels cannot be built here.")
    recorder = Recorder()
    apart = SeparateOps(TimedLibrary(library, recorder))  # type: ignore[arg-type]
    folder = options.model or embedded.fetch(embedded.DEFAULT_LLM)
    numbers = [int(text) for text in options.rows.split(",")]
    steppers = []
    for ops in (CPUOps(library), apart):
        model, config = load(folder, options.quantization, getattr(torch, options.dtype), ops)
        steppers.append(Stepper(model, ops, config, max(*numbers, MAX_SEQS * (options.context + BLOCK_SIZE))))
    print(f"{library.isa}, {options.threads} threads, {options.quantization}, context {options.context}")
    for rows in numbers:
        report(rows, profile(steppers[0], steppers[1], recorder, rows, options), options)


if __name__ == "__main__":
    main()
