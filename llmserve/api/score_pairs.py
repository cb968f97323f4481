"""How well documents answer a query, by whatever the model can do: judge the pair, compare vectors, or write the query.

* A cross-encoder, or a decoder that judges by a word, reads both texts together.
* An embedding model compares their vectors, as its files say (cosine), as vLLM does where there is no cross-encoder.
* A chat model says how likely the query is after the document (query likelihood, Ponte & Croft 1998).
Knows no route.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmserve.api.pooling_call import document_prompt, query_prompt, with_prompt
from llmserve.backends.pooling_job import Pooled
from llmserve.backends.pooling_model import PoolingModel
from llmserve.backends.pooling_tokenizer import PoolingInput, TextPair, Truncation
from llmserve.backends.vectors import activate, similarities
from llmserve.errors import InvalidRequestError

Method = Literal["cross-encoder", "cosine", "dot", "euclidean", "manhattan", "query-likelihood"]


@dataclass(frozen=True, slots=True)
class PairScores:
    """One score for each pair, larger is better; how they came about, and what it cost."""

    scores: list[float]
    method: Method
    num_tokens: int
    pooled: Pooled | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOptions:
    """How pairs are read and scored."""

    truncation: Truncation
    raw_scores: bool = False  # logits
    max_tokens_per_doc: int | None = None
    instruction: str | None = None
    documents_param: str = "documents"


async def score_pairs(
    queries: Sequence[str], documents: Sequence[str], options: PairOptions, model: PoolingModel
) -> PairScores:
    """Pair i is query i and document i; one query goes with every document. Raises InvalidRequestError, and what
    `PoolingModel.pool` raises."""
    if model.pooling.kind == "embed":
        return await _compare(queries, documents, options, model)
    if model.pooling.kind == "classify":
        num_labels = len(model.pooling.labels)
        raise InvalidRequestError(
            f"The model {model.name!r} has {num_labels} labels, and gives no single score. Use /classify.", "model"
        )
    if options.instruction is not None and model.pooling.pair_prompt is None:
        raise InvalidRequestError(f"The model {model.name!r} takes no 'instruction'.", "instruction")
    queries = list(queries) * (len(documents) if len(queries) == 1 else 1)
    pairs: list[PoolingInput] = [
        TextPair(query, document, options.instruction, options.max_tokens_per_doc)
        for query, document in zip(queries, documents, strict=True)
    ]
    pooled = await model.pool(pairs, "classify", options.truncation, options.documents_param)
    activation = "identity" if options.raw_scores else model.pooling.activation
    scores = [float(activate(row, activation)[0]) for row in pooled.rows]
    return PairScores(scores, "cross-encoder", sum(pooled.num_tokens), pooled)


async def _compare(
    queries: Sequence[str], documents: Sequence[str], options: PairOptions, model: PoolingModel
) -> PairScores:
    if options.instruction is not None:
        raise InvalidRequestError(f"The model {model.name!r} takes no 'instruction'.", "instruction")
    config = model.pooling
    truncation = options.truncation
    if options.max_tokens_per_doc is not None:
        truncation = Truncation(min(options.max_tokens_per_doc, config.max_model_len), True, truncation.side)
    asked = with_prompt(query_prompt(config), queries, config)
    offered = with_prompt(document_prompt(config), documents, config)
    places = [*_numbered("query", len(asked)), *_numbered(options.documents_param, len(offered))]
    pooled = await model.pool([*asked, *offered], "embed", truncation, places)
    rows = np.stack(pooled.rows)
    of_queries, of_documents = rows[: len(queries)], rows[len(queries) :]
    if len(queries) == 1:
        scores = similarities(of_queries[0], of_documents, config.similarity).tolist()
    else:
        pairs = zip(of_queries, of_documents, strict=True)
        scores = [float(similarities(query, row[None], config.similarity)[0]) for query, row in pairs]
    return PairScores(scores, config.similarity, sum(pooled.num_tokens), pooled)


def _numbered(param: str, count: int) -> list[str]:
    return [param] if count == 1 else [f"{param}.{position}" for position in range(count)]
