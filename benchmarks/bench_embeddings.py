"""Tokens a second of the embedding runner, without a server, beside sentence-transformers; and a lone short text.

    python -m benchmarks.bench_embeddings [--texts 400] [--threads N] [--repeat 3] [--model FOLDER] [--formats q8_0,...]

Texts of 5 to 250 tokens are cut from real passages and questions. The contenders take turns, both with the same number
of threads, and the best of each is told. `encode` includes sentence-transformers' tokenising; so that both do the same
work, ours is timed with tokenising as well as without. It is compared only where sentence-transformers is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks.boolq import read_boolq
from llmserve.kernels.cpu.ops import usable_cores
from llmserve.pooling_config import PoolingConfig, read_pooling_config
from llmserve.repository import embedded
from llmserve.worker.pooling_runner import PoolingRunner

FORMATS = ("float32", "bfloat16", "q8_0", "int8")
PREDICTED = {"float32": 3.0, "bfloat16": 5.5, "q8_0": 5.5, "int8": 7.0}  # times encode
LONE_TEXT = "What is the capital of France?"


def make_texts(num_texts: int, seed: int = 0) -> list[str]:
    """Pieces of real text of 3 to 180 words, a fifth of them questions."""
    questions, passages, _ = read_boolq(num_texts)
    rng = random.Random(seed)
    sources = [rng.choice(passages) if rng.random() < 0.8 else rng.choice(questions) for _ in range(num_texts)]
    return [" ".join(source.split()[: rng.randint(3, 180)]) for source in sources]


class Contender:
    """A runner with its tokenizer."""

    def __init__(self, folder: Path, config: PoolingConfig, weight_format: str, threads: int) -> None:
        self.runner = PoolingRunner.load(folder, config, weight_format, threads)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(config.max_model_len)

    def tokenize(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        return np.concatenate(ids).astype(np.int32), np.cumsum([0] + [len(each) for each in ids]).astype(np.int32)

    def run(self, ids: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        return self.runner.run(ids, None, bounds, "embed")

    def encode(self, texts: list[str]) -> np.ndarray:
        return self.run(*self.tokenize(texts))


def best_of(repeat: int, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each call's best round; they take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeat):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def lone_text(contender: Contender, calls: int = 200) -> float:
    """Median seconds of a short text by itself, already tokenised."""
    ids, bounds = contender.tokenize([LONE_TEXT])
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        contender.run(ids, bounds)
        times.append(time.perf_counter() - started)
    return sorted(times)[calls // 2]


def main() -> None:
    """Prints a row a format, predicted beside measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--formats", default=",".join(FORMATS))
    args = parser.parse_args()
    folder = args.model or embedded.fetch(embedded.DEFAULT_EMBEDDING)
    config, texts = read_pooling_config(folder), make_texts(args.texts)
    contenders = {name: Contender(folder, config, name, args.threads) for name in args.formats.split(",")}
    ids, bounds = next(iter(contenders.values())).tokenize(texts)
    lengths = np.diff(bounds)
    print(
        f"{len(texts)} texts, {len(ids)} tokens, of {lengths.min()} to {lengths.max()}, median {np.median(lengths):.0f}"
    )
    lone = {name: lone_text(contender) for name, contender in contenders.items()}  # before a peer's threads spin
    calls: dict[str, Callable[[], object]] = {}
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        peer = SentenceTransformer(str(folder), device="cpu")
        torch.set_num_threads(args.threads)  # our loader leaves torch one
        calls["encode"] = lambda: peer.encode(texts)
    for name, contender in contenders.items():
        calls[name] = lambda contender=contender: contender.run(ids, bounds)  # type: ignore[misc]
        calls[f"{name}, text"] = lambda contender=contender: contender.encode(texts)  # type: ignore[misc]
    best = best_of(args.repeat, calls)
    encode = best.get("encode", float("nan"))
    print(f"sentence-transformers' encode: {len(ids) / encode:.0f} tokens/s; in brackets what was predicted")
    print(f"{'':10}{'tokens/s':>10}{'from text':>11}{'x encode':>16}{'a lone text':>14}")
    for name in contenders:
        text_s = best[f"{name}, text"]
        print(
            f"{name:10}{len(ids) / best[name]:10.0f}{len(ids) / text_s:11.0f}{encode / text_s:9.2f} "
            f"[{PREDICTED.get(name, 0):.1f}]{lone[name] * 1e3:11.3f} ms"
        )


if __name__ == "__main__":
    main()
