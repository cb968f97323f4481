"""How well documents answer a query by a chat model: how likely it would write the query after the document.

The score is the geometric mean of the probabilities of the query's tokens: exp(mean log p(query | document)). There is
one prompt for each document, all in flight at once, so that they are prefilled together; what the template puts before
the document is the same for all and comes from the prefix cache. Knows no route.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Sequence
from functools import partial

from llmserve.api.generations import MergedGeneration, PromptOnlyGeneration, collect
from llmserve.api.score_pairs import PairOptions, PairScores
from llmserve.backends.generation import Generation, GenerationSpec, TextGenerator
from llmserve.errors import InvalidRequestError
from llmserve.messages import SamplingParams

_TASK = "Write the question that the following passage answers.\n\n{document}"
_PLAIN = "Passage: {document}\nQuestion:"  # for a model without a chat template


async def query_likelihoods(
    queries: Sequence[str], documents: Sequence[str], options: PairOptions, generator: TextGenerator
) -> PairScores:
    """Pair i is query i and document i; one query goes with every document. Raises InvalidRequestError, and what a
    generation raises."""
    if options.instruction is not None:
        raise InvalidRequestError("'instruction' is for rerankers that judge; a chat model takes none.", "instruction")
    queries = list(queries) * (len(documents) if len(queries) == 1 else 1)
    prompts, lengths = await asyncio.to_thread(_prompts, queries, documents, options, generator)
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, prompt_logprobs=0)
    request_id = f"rerank-{uuid.uuid4().hex}"
    starts = [
        partial(generator.generate, f"{request_id}-{i}", GenerationSpec(prompt_token_ids=prompt, sampling=sampling))
        for i, prompt in enumerate(prompts)
    ]

    def start() -> Generation:
        return PromptOnlyGeneration(MergedGeneration(request_id, starts, 1))

    scores = []
    for whole, length in zip(await collect(start, len(prompts)), lengths, strict=True):
        entries = (whole.prompt_logprobs or [])[-length:]
        mean = sum(entry.logprob for entry in entries if entry is not None) / length
        scores.append(mean if options.raw_scores else math.exp(mean))
    return PairScores(scores, "query-likelihood", sum(map(len, prompts)))


def _prompts(
    queries: Sequence[str], documents: Sequence[str], options: PairOptions, generator: TextGenerator
) -> tuple[list[list[int]], list[int]]:
    """The prompt of each pair, and how many tokens at its end are the query."""
    tokenizer = generator.tokenizer
    # a question begins a line of its own in a chat, and a word of its own behind a colon
    begin = "" if tokenizer.chat_template is not None else " "
    asked = tokenizer.encode_batch([begin + query for query in queries], add_special_tokens=False)
    prompts = []
    for position, (query, document) in enumerate(zip(asked, documents, strict=True)):
        if not query:
            raise InvalidRequestError("'query' has no tokens.", "query")
        prompts.append(
            [*_read(document, len(query), f"{options.documents_param}.{position}", options, generator), *query]
        )
    return prompts, [len(query) for query in asked]


def _read(
    document: str, num_query_tokens: int, place: str, options: PairOptions, generator: TextGenerator
) -> list[int]:
    """The document and what is asked about it, cut if that is allowed. Raises InvalidRequestError."""
    tokenizer = generator.tokenizer
    if options.max_tokens_per_doc is not None:
        document = _cut(document, options.max_tokens_per_doc, generator)
    limit = generator.max_model_len - 1 - num_query_tokens  # one token is generated, for want of a step without
    if options.truncation.max_tokens is not None:
        limit = min(limit, options.truncation.max_tokens - num_query_tokens)
    token_ids = _encode(document, generator)
    if len(token_ids) > limit:
        if not options.truncation.allowed:
            raise InvalidRequestError(
                f"{place!r} takes {len(token_ids)} tokens with what is asked about it, but {max(0, limit)} are left of "
                "the context. Send a shorter text, or ask for it to be cut ('truncate_prompt_tokens': -1).",
                place,
            )
        num_tokens = len(tokenizer.encode(document, add_special_tokens=False))
        spare = num_tokens - (len(token_ids) - limit) - 1  # a cut may split a token in two
        if spare < 1:
            raise InvalidRequestError(f"{place!r} cannot be cut to what is left of the context.", place)
        token_ids = _encode(_cut(document, spare, generator), generator)
    return token_ids


def _encode(document: str, generator: TextGenerator) -> list[int]:
    tokenizer = generator.tokenizer
    if tokenizer.chat_template is None:
        return tokenizer.encode(_PLAIN.format(document=document))
    message = {"role": "user", "content": _TASK.format(document=document)}
    text = tokenizer.apply_chat_template([message], add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def _cut(document: str, num_tokens: int, generator: TextGenerator) -> str:
    token_ids = generator.tokenizer.encode(document, add_special_tokens=False)
    return generator.tokenizer.decode(token_ids[:num_tokens])
