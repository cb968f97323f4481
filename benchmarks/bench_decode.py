"""Decode speed of each weight format: tokens a second at a batch of 1 and of 8, through the engine in this process.

    python -m benchmarks.bench_decode [--batches 1,8] [--tokens 128] [--threads N] [--rounds 3]

No HTTP, no sockets: EngineCore steps over the embedded model, prompts of 128 tokens, greedy. The formats take turns
round by round, so that a machine that slows down slows all of them; the best round counts. Predicted beside the result:
what memory allows, the bytes of weights a step reads (all but the embedding) at --memory-gbs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.bench_quality import VARIANTS, Variant
from llmserve.config import EngineConfig
from llmserve.engine.core import EngineCore
from llmserve.engine.process import build_core
from llmserve.messages import EngineRequest, SamplingParams
from llmserve.repository import embedded

NUM_PROMPT_TOKENS = 128
VOCAB_SIZE, HIDDEN_SIZE = 49_152, 576  # of the embedded model


def open_core(variant: Variant, folder: Path, num_threads: int | None) -> tuple[EngineCore, int]:
    """A core, and the bytes a decode step reads of its weights."""
    config = EngineConfig(
        model=str(next(folder.glob("*.gguf")) if variant.is_gguf else folder),
        device="cpu",
        dtype=variant.dtype,
        quantization=variant.quantization,
        max_model_len=1024,
        kv_cache_memory=2**28,
        num_threads=num_threads,
        speculation="off",
    )
    core, ready = build_core(config, lambda message: None)
    embedding_bytes = VOCAB_SIZE * HIDDEN_SIZE * (4 if variant.dtype == "float32" else 2)
    return core, ready.plan.weight_bytes - embedding_bytes


def decode_tokens_per_s(core: EngineCore, batch: int, num_tokens: int, first_id: int) -> float:
    """Steps after the prompts are computed: `batch` tokens each."""
    for index in range(batch):
        prompt = [100 + (first_id + index) % 1000 + position for position in range(NUM_PROMPT_TOKENS)]
        params = SamplingParams(max_tokens=num_tokens, seed=0, temperature=0.0)
        request = EngineRequest(
            request_id=f"{first_id + index}", prompt_token_ids=prompt, params=params, arrival_s=float(index)
        )
        core.add(request)
    answered: set[str] = set()
    while len(answered) < batch:
        answered |= {output.request_id for output in core.step().outputs}
    started, count = time.perf_counter(), 0
    while core.has_work():
        count += sum(len(output.token_ids) for output in core.step().outputs)
    return count / (time.perf_counter() - started)


def main() -> None:
    """Prints a row a format and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-gbs", type=float, default=39.0, help="what all cores together read")
    args = parser.parse_args()
    folder = embedded.fetch(embedded.DEFAULT_LLM)
    cores = {variant.name: open_core(variant, folder, args.threads) for variant in VARIANTS}
    best: dict[tuple[str, int], float] = {}
    batches = [int(batch) for batch in args.batches.split(",")]
    for round_number in range(args.rounds):
        for name, (core, _) in cores.items():
            for batch in batches:
                found = decode_tokens_per_s(core, batch, args.tokens, round_number * 1000 + batch * 10)
                best[name, batch] = max(found, best.get((name, batch), 0.0))
    print(f"{'':6}{'batch':>6}{'tokens/s':>10}{'memory allows':>15}")
    for (name, batch), found in best.items():
        limit = args.memory_gbs * 1e9 / cores[name][1] * batch
        print(f"{name:6}{batch:6}{found:10.1f}{limit:15.0f}")


if __name__ == "__main__":
    main()
