"""What a weight format costs an embedding model in quality: cosine to fp32, and retrieval on real questions.

    python -m benchmarks.bench_embedding_quality [--questions 1000] [--threads N] [--model FOLDER] [--formats q8_0,...]

Each question looks for its own passage among all passages (BoolQ's development set) by cosine. fp32 is the judge of
the others; the test suite holds it equal to sentence-transformers. The model is the embedded one unless told otherwise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from benchmarks.boolq import read_boolq
from llmserve.pooling_config import read_pooling_config
from llmserve.repository import embedded
from llmserve.worker.pooling_runner import PoolingRunner

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Variant:
    """A format, and what was predicted before measuring: the mean distance 1 - cosine to fp32, and the loss of MRR."""

    name: str
    predicted_distance: float = 0.0
    predicted_loss: float = 0.0


VARIANTS = (
    Variant("float32"),
    Variant("bfloat16", predicted_distance=1e-5, predicted_loss=0.000),
    Variant("q8_0", predicted_distance=3e-4, predicted_loss=0.001),
    Variant("int8", predicted_distance=2e-3, predicted_loss=0.005),
)


@dataclass(frozen=True)
class Retrieval:
    """Where each question's own passage stands in the order by cosine, from 1 on; and the first five of that order."""

    ranks: npt.NDArray[np.int64]
    top_5: npt.NDArray[np.int64]

    @property
    def recall_at_5(self) -> float:
        return float((self.ranks <= 5).mean())

    @property
    def mean_reciprocal_rank(self) -> float:
        return float((1 / self.ranks).mean())

    def overlap(self, other: Retrieval) -> float:
        """The share of the first five that both have."""
        shared = [len(set(a) & set(b)) for a, b in zip(self.top_5.tolist(), other.top_5.tolist(), strict=True)]
        return sum(shared) / self.top_5.size


def embed(runner: PoolingRunner, tokenizer: Tokenizer, texts: Sequence[str]) -> Vectors:
    """Unit vectors [texts, dimension]."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    bounds = np.cumsum([0] + [len(each) for each in ids]).astype(np.int32)
    vectors = runner.run(np.concatenate(ids).astype(np.int32), None, bounds, "embed")
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def retrieve(questions: Vectors, passages: Vectors, answers: Sequence[int]) -> Retrieval:
    """Ties go to the passage that comes first."""
    order = np.argsort(-(questions @ passages.T), axis=1, kind="stable")
    return Retrieval(np.argmax(order == np.array(answers)[:, None], axis=1) + 1, order[:, :5])


def main() -> None:
    """Prints a row a format, predicted beside measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--formats", default=",".join(variant.name for variant in VARIANTS))
    args = parser.parse_args()
    folder = args.model or embedded.fetch(embedded.DEFAULT_EMBEDDING)
    questions, passages, answers = read_boolq(args.questions)
    config = read_pooling_config(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(config.max_model_len)
    print(f"{len(questions)} questions, {len(passages)} passages; in brackets what was predicted")
    print(
        f"{'':10}{'1 - cosine, mean':>26}{'max':>10}{'recall@5':>10}{'MRR':>8}{'lost':>18}{'top 5 as fp32':>15}{'s':>6}"
    )
    judge: tuple[Vectors, Retrieval] | None = None
    for variant in VARIANTS:
        if variant.name not in {"float32", *args.formats.split(",")}:
            continue
        runner = PoolingRunner.load(folder, config, variant.name, args.threads)
        started = time.perf_counter()
        vectors = embed(runner, tokenizer, [*questions, *passages])
        seconds = time.perf_counter() - started
        found = retrieve(vectors[: len(questions)], vectors[len(questions) :], answers)
        judge = judge or (vectors, found)
        distances = 1 - (vectors * judge[0]).sum(axis=1, dtype=np.float64)
        loss = judge[1].mean_reciprocal_rank - found.mean_reciprocal_rank
        print(
            f"{variant.name:10}{distances.mean():15.2e} [{variant.predicted_distance:.0e}]{distances.max():12.2e}"
            f"{found.recall_at_5:10.4f}{found.mean_reciprocal_rank:8.4f}{loss:10.4f} [{variant.predicted_loss:.3f}]"
            f"{found.overlap(judge[1]):15.2%}{seconds:6.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
