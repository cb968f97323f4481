"""What a weight format costs in quality: perplexity and top-1 agreement on real prose, against unquantised weights.

    python -m benchmarks.bench_quality [--tokens 24576] [--threads N] [--formats bf16,int8,...]

The text is the language reference that CPython carries in `pydoc_data.topics` (about 100,000 tokens): every developer
has it. It is cut into windows, and each is scored as a prompt by the real engine: scheduler, model runner, kernels.
fp32 weights are the judge. The weights are the embedded model's: those of its Q4_1 file, in bfloat16 for all but q4_1.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

from llmserve.config import EngineConfig, format_bytes
from llmserve.engine.process import build_core
from llmserve.messages import EngineRequest, SamplingParams
from llmserve.repository import embedded
from llmserve.tokenizer import Tokenizer

WINDOW = 512  # tokens of context


@dataclass(frozen=True)
class Variant:
    """Weights in a format, and what was predicted of them before measuring."""

    name: str
    dtype: str
    quantization: str
    is_gguf: bool = False
    predicted_ratio: float = 1.0  # perplexity over that of fp32
    predicted_agreement: float = 1.0


VARIANTS = (
    Variant("fp32", "float32", "none"),
    Variant("bf16", "bfloat16", "none", predicted_ratio=1.000, predicted_agreement=0.985),
    Variant("q8_0", "bfloat16", "q8_0", predicted_ratio=1.002, predicted_agreement=0.960),
    Variant("int8", "bfloat16", "int8", predicted_ratio=1.010, predicted_agreement=0.950),
    Variant("q4_1", "bfloat16", "gguf", is_gguf=True, predicted_ratio=1.003, predicted_agreement=0.970),
)


@dataclass
class Score:
    """Of each scored token: its log-probability, and the token the model held most likely in its place."""

    weight_bytes: int
    logprobs: list[float] = field(default_factory=list)
    top_ids: list[int] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        return math.exp(-sum(self.logprobs) / len(self.logprobs))

    def agreement(self, other: Score) -> float:
        """Share of positions at which both hold the same token most likely."""
        return sum(map(int.__eq__, self.top_ids, other.top_ids)) / len(self.top_ids)


def read_windows(folder: Path, num_tokens: int) -> list[list[int]]:
    """The text's first tokens, in windows."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    token_ids = Tokenizer.from_path(folder).encode(text, add_special_tokens=False)[:num_tokens]
    return [token_ids[at : at + WINDOW] for at in range(0, len(token_ids) - WINDOW + 1, WINDOW)]


def score(variant: Variant, folder: Path, windows: Sequence[list[int]], num_threads: int | None = None) -> Score:
    """Scores every token of the windows but their first."""
    config = EngineConfig(
        model=str(next(folder.glob("*.gguf")) if variant.is_gguf else folder),
        device="cpu",
        dtype=variant.dtype,
        quantization=variant.quantization,
        max_model_len=WINDOW + 16,
        kv_cache_memory=2**28,
        num_threads=num_threads,
        speculation="off",
    )
    core, ready = build_core(config, lambda message: None)
    result = Score(ready.plan.weight_bytes)
    for number, window in enumerate(windows):
        params = SamplingParams(max_tokens=1, seed=0, temperature=0.0, prompt_logprobs=1)
        core.add(EngineRequest(request_id=str(number), prompt_token_ids=window, params=params, arrival_s=number))
    scored = {}
    while core.has_work():
        scored |= {output.request_id: output.prompt_logprobs or [] for output in core.step().outputs}
    for number in range(len(windows)):
        entries = [entry for entry in scored[str(number)] if entry is not None]
        result.logprobs += [entry.logprob for entry in entries]
        result.top_ids += [entry.top[0][0] for entry in entries]
    return result


def main() -> None:
    """Prints a row a format, predicted beside measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=24_576)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--formats", default=",".join(variant.name for variant in VARIANTS))
    args = parser.parse_args()
    folder = embedded.fetch(embedded.DEFAULT_LLM)
    windows = read_windows(folder, args.tokens)
    print(f"{len(windows)} windows of {WINDOW} tokens; in brackets what was predicted")
    print(f"{'':6}{'weights':>10}{'perplexity':>12}{'over fp32':>18}{'top-1 as fp32':>20}{'as bf16':>10}{'tok/s':>8}")
    scores: dict[str, Score] = {}
    for variant in VARIANTS:
        if variant.name not in {"fp32", *args.formats.split(",")}:
            continue
        started = time.perf_counter()
        found = scores[variant.name] = score(variant, folder, windows, args.threads)
        seconds = time.perf_counter() - started
        judge = scores["fp32"]
        ratio, agreement = found.perplexity / judge.perplexity, found.agreement(judge)
        as_bf16 = f"{found.agreement(scores['bf16']):.2%}" if "bf16" in scores else ""
        print(
            f"{variant.name:6}{format_bytes(found.weight_bytes):>10}{found.perplexity:12.3f}"
            f"{ratio:10.4f} [{variant.predicted_ratio:.3f}]{agreement:12.2%} [{variant.predicted_agreement:.1%}]"
            f"{as_bf16:>10}{len(found.logprobs) / seconds:8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
