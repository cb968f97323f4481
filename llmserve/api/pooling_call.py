"""What the embedding, rerank and classification routes share: which model, which prompt, the run itself. Knows no shape
of request or answer."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.requests import Request

from llmserve.api.context import ApiContext
from llmserve.api.directory import PoolingDirectory
from llmserve.api.disconnect import run_until_disconnect
from llmserve.api.pooling_protocol import EmbeddingOptions
from llmserve.backends.pooling_model import PoolingModel
from llmserve.backends.pooling_tokenizer import PoolingInput
from llmserve.errors import InvalidRequestError, ModelNotFoundError
from llmserve.pooling_config import Kind, PoolingConfig
from llmserve.repository.embedded import DEFAULT_EMBEDDING

T = TypeVar("T")

WORDS: dict[Kind, str] = {"embed": "an embedding model", "score": "a reranker", "classify": "a classifier"}
ANY: tuple[Kind, ...] = ("embed", "score", "classify")

# The prompts of sentence-transformers' encode_query and encode_document, in the order in which it looks for them.
_QUERY, _DOCUMENT = ("query",), ("document", "passage", "corpus")
_PROMPTS_OF_TYPES = {
    **dict.fromkeys(("query", "search_query", "retrieval.query"), _QUERY),
    **dict.fromkeys(("document", "passage", "search_document", "retrieval.passage"), _DOCUMENT),
    **dict.fromkeys(("classification", "clustering", "text-matching", "separation"), ()),
}


@contextmanager
def use_model(context: ApiContext, name: str | None, kinds: Sequence[Kind]) -> Iterator[PoolingModel]:
    """The model that a request means, one of `kinds`; without a name the only one of the first kind there is.

    Raises InvalidRequestError, ModelNotFoundError, NotReadyError.
    """
    with context.pooling.use(_choose(context, name, kinds)) as model:
        yield model


def _choose(context: ApiContext, name: str | None, kinds: Sequence[Kind]) -> str:
    pooling = context.pooling
    wanted = " or ".join(WORDS[kind] for kind in kinds)
    if name is None:
        for kind in kinds:
            found = [known for known in pooling.names if pooling.kind(known) == kind]
            if len(found) == 1:
                return found[0]
            if found:
                raise InvalidRequestError(f"'model' is required where several serve: {_listed(found)}.", "model")
        raise InvalidRequestError(f"This needs {wanted}, and none is served. {_how(kinds)}", "model")
    if name in pooling.names:
        if (kind := pooling.kind(name)) not in kinds:
            raise InvalidRequestError(
                f"The model {name!r} is {WORDS[kind]}; this needs {wanted}. {_those(pooling, kinds)}", "model"
            )
        return name
    if name in context.models.names:
        raise InvalidRequestError(
            f"The model {name!r} is a chat model; this needs {wanted}. {_those(pooling, kinds)}", "model"
        )
    has_kind = any(pooling.kind(known) in kinds for known in pooling.names)
    raise ModelNotFoundError(name, [*context.models.names, *pooling.names], "" if has_kind else _how(kinds))


def _those(pooling: PoolingDirectory, kinds: Sequence[Kind]) -> str:
    found = [known for known in pooling.names if pooling.kind(known) in kinds]
    return f"Served here: {_listed(found)}." if found else _how(kinds)


def _how(kinds: Sequence[Kind]) -> str:
    names = f"{DEFAULT_EMBEDDING}, or a folder or another name" if "embed" in kinds else "<folder or name>"
    return f"Start the server with --embedding-model {names}."


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def check_count(count: int, context: ApiContext, param: str) -> None:
    """Raises InvalidRequestError for more inputs than one request may have."""
    if count > context.settings.max_inputs:
        raise InvalidRequestError(
            f"{param!r} holds {count} inputs, but at most {context.settings.max_inputs} may be sent in one request.",
            param,
        )


async def run(http_request: Request, work: Coroutine[Any, Any, T]) -> T:
    """`work`, cancelled when the client goes or the request's time is up. All that takes long belongs into it: what
    comes behind has no end. Raises ClientDisconnectedError, or what it raises."""
    return await run_until_disconnect(http_request.receive, work)


def prompt_of(options: EmbeddingOptions, config: PoolingConfig) -> str:
    """The text that goes before each input: the one the request names, else the model's default. Raises
    InvalidRequestError."""
    if options.prompt_name is not None:
        if options.prompt_name not in config.prompts:
            raise InvalidRequestError(
                f"'prompt_name' is {options.prompt_name!r}; the model has {_listed(list(config.prompts)) or 'none'}.",
                "prompt_name",
            )
        return config.prompts[options.prompt_name]
    for param, value in (("input_type", options.input_type), ("task", options.task)):
        if value is not None:
            return _prompt_of_type(value, param, config)
    return default_prompt(config)


def _prompt_of_type(value: str, param: str, config: PoolingConfig) -> str:
    """A purpose that the model has no prompt for needs none."""
    names = (value, *_PROMPTS_OF_TYPES.get(value, ()))
    if value not in config.prompts and value not in _PROMPTS_OF_TYPES:
        known = sorted({*_PROMPTS_OF_TYPES, *config.prompts})
        raise InvalidRequestError(f"{param!r} is {value!r}; it must be one of {_listed(known)}.", param)
    return next((config.prompts[name] for name in names if name in config.prompts), default_prompt(config))


def default_prompt(config: PoolingConfig) -> str:
    """What the model's files put before every text."""
    return config.prompts[config.default_prompt_name] if config.default_prompt_name else ""


def query_prompt(config: PoolingConfig) -> str:
    """Before a text that is searched with."""
    return _prompt_of_type("query", "input_type", config)


def document_prompt(config: PoolingConfig) -> str:
    """Before a text that is searched for."""
    return _prompt_of_type("document", "input_type", config)


def with_prompt(prompt: str, inputs: Sequence[str | list[int]], config: PoolingConfig) -> list[PoolingInput]:
    """Token ids are taken as they come. Raises InvalidRequestError."""
    if prompt and not config.include_prompt:
        raise InvalidRequestError(
            "The model's files leave the tokens of a prompt out of the pooling, which is not supported yet. Send the "
            "texts with 'prompt_name' of an empty prompt, or none."
        )
    return [prompt + text if isinstance(text, str) else text for text in inputs]
