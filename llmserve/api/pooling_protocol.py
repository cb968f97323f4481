"""The request bodies of the embedding, rerank and classification routes as pydantic models. Knows no model.

Each is the union of what the servers with that route take: OpenAI, vLLM, text-embeddings-inference (TEI), infinity,
Cohere, Jina, Voyage and Mixedbread. A field that would ask for what is not done here admits only its neutral values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmserve.api.protocol import NonEmptyStr, PositiveInt, StrictModel
from llmserve.backends.pooling_tokenizer import Side, Truncation
from llmserve.errors import InvalidRequestError

_SHAPES = "a string, an array of strings, an array of token ids, or an array of those"


def _as_inputs(value: Any) -> Any:
    """str | [str] | [int] | [[int]] becomes a list of str or of list of int."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"must be {_SHAPES}")
    if not value:
        raise ValueError("must not be empty")
    if all(type(item) is int for item in value):
        value = [value]
    for position, item in enumerate(value):
        if isinstance(item, list):
            if not all(type(token) is int and 0 <= token < 2**31 for token in item):
                raise ValueError(f"has at {position} something that is not a token id; it must be {_SHAPES}")
        elif not isinstance(item, str):
            raise ValueError(f"has at {position} neither a string nor an array of token ids")
        if not item:
            raise ValueError(f"has at {position} an empty input")
    return value


def _as_texts(value: Any) -> Any:
    """str | {text} | an array of those becomes a list of str."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("must not be empty")
    texts = []
    for position, item in enumerate(values):
        text = item.get("text") if isinstance(item, dict) and item.keys() == {"text"} else item
        if not isinstance(text, str):
            raise ValueError(f"has at {position} neither a string nor an object {{'text': <string>}}")
        if not text:
            raise ValueError(f"has at {position} an empty text")
        texts.append(text)
    return texts


def _as_predictions(value: Any) -> Any:
    """TEI's: "a" becomes ["a"], a pair stays ["a", "b"]; an array of "a", ["a"] and ["a", "b"] a list of lists."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a pair of texts, or an array of arrays of one or two texts")
    is_one = all(isinstance(item, str) for item in value)
    rows = [value] if is_one else [[item] if isinstance(item, str) else item for item in value]
    for position, row in enumerate(rows):
        if not isinstance(row, list) or not 1 <= len(row) <= 2 or not all(isinstance(t, str) and t for t in row):
            raise ValueError(f"has at {position} neither one text nor a pair of two")
    return value if is_one else rows


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Inputs = Annotated[list[str | list[int]], BeforeValidator(_as_inputs)]
Texts = Annotated[list[str], BeforeValidator(_as_texts)]
Direction = Annotated[Literal["left", "right"], BeforeValidator(_lower)]  # TEI writes "Right"


class PoolingRequest(StrictModel):
    """What all routes have in common: the model, and what becomes of a text that is too long."""

    model: str | None = None
    truncate: bool | None = None  # TEI
    truncation: bool | None = None  # Voyage
    truncation_direction: Direction | None = None  # TEI
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None  # vLLM; -1: the model's limit
    truncation_side: Direction | None = None  # vLLM
    priority: Literal[0] | None = None
    use_activation: bool | None = None  # vLLM: scores and unit vectors; False: as the model makes them

    def truncated(self) -> Truncation:
        """Raises InvalidRequestError if nothing would be left."""
        limit = self.truncate_prompt_tokens
        if limit == 0:
            raise InvalidRequestError("'truncate_prompt_tokens' is 0: nothing would be left.", "truncate_prompt_tokens")
        allowed = bool(self.truncate or self.truncation or limit is not None)
        side: Side = self.truncation_side or self.truncation_direction or "right"
        return Truncation(None if limit in (None, -1) else limit, allowed, side)


class EmbeddingOptions(PoolingRequest):
    """What is made of a vector, and with which of the model's prompts."""

    dimensions: PositiveInt | None = None
    normalize: bool | None = None
    normalized: bool | None = None  # Jina
    prompt_name: str | None = None
    input_type: str | None = None  # Cohere, Voyage: search_query, search_document, query, document, ...
    task: str | None = None  # Jina: retrieval.query, ...

    @property
    def unit(self) -> bool | None:
        """Whether vectors are to have length 1; None: as the model's files say."""
        asked = [flag for flag in (self.normalize, self.normalized, self.use_activation) if flag is not None]
        return asked[0] if asked else None


class EmbeddingsRequest(EmbeddingOptions):
    """POST /v1/embeddings."""

    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    embedding_type: Literal["float", "base64", "binary", "ubinary"] | None = None  # Jina
    embed_dtype: Literal["float32"] | None = None  # vLLM
    endianness: Literal["native", "little"] | None = None  # vLLM
    late_chunking: Literal[False] | None = None  # Jina
    add_special_tokens: bool | None = None
    modality: Literal["text"] | None = None  # infinity


class PoolingTaskRequest(EmbeddingsRequest):
    """POST /pooling."""

    task: Literal["embed", "classify", "score", "token_embed"] | None = None


class RerankRequest(PoolingRequest):
    """POST /rerank. The word for the documents says whose shape the answer has."""

    query: NonEmptyStr
    documents: Texts | None = None
    texts: Texts | None = None  # TEI
    input: Texts | None = None  # Mixedbread
    top_n: Annotated[int, Field(ge=0)] | None = None  # 0: all, as in vLLM
    top_k: Annotated[int, Field(ge=1)] | None = None  # Voyage, Mixedbread
    return_documents: bool | None = None
    return_text: bool | None = None  # TEI
    return_input: bool | None = None  # Mixedbread
    raw_scores: bool | None = None  # TEI, infinity
    max_tokens_per_doc: PositiveInt | None = None  # Cohere
    rank_fields: list[Literal["text"]] | None = None
    instruction: str | None = None


class ScoreRequest(PoolingRequest):
    """POST /score, under the names of all of vLLM's versions."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None
    instruction: str | None = None


class ClassifyRequest(PoolingRequest):
    """POST /classify."""

    input: Inputs
    raw_scores: bool | None = None  # infinity
    add_special_tokens: bool | None = None


class CohereEmbedRequest(StrictModel):
    """POST /v2/embed. A text that is too long is cut at its end unless the client says otherwise, as Cohere does it."""

    model: str | None = None
    input_type: str | None = None
    texts: Texts | None = None
    inputs: list[Any] | None = None
    images: Annotated[list[Any], Field(max_length=0)] | None = None
    max_tokens: PositiveInt | None = None
    output_dimension: PositiveInt | None = None
    embedding_types: (
        Annotated[
            list[Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]], Field(min_length=1, max_length=6)
        ]
        | None
    ) = None
    truncate: Literal["NONE", "START", "END"] | None = None
    priority: Literal[0] | None = None


class TeiEmbedRequest(EmbeddingOptions):
    """TEI's POST /embed and /embed_all."""

    inputs: Inputs


class TeiPredictRequest(PoolingRequest):
    """TEI's POST /predict."""

    inputs: Annotated[list[str | list[str]], BeforeValidator(_as_predictions)]
    raw_scores: bool | None = None


class SimilarityInputs(StrictModel):
    """Of POST /similarity."""

    source_sentence: NonEmptyStr
    sentences: Texts


class SimilarityParameters(EmbeddingOptions):
    """Of POST /similarity."""


class TeiSimilarityRequest(StrictModel):
    """TEI's POST /similarity."""

    model: str | None = None
    inputs: SimilarityInputs
    parameters: SimilarityParameters | None = None
