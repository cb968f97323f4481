"""What a folder says of an embedding, reranker or classifier model: `PoolingConfig`. Knows no tensors and no torch.

Read are transformers' config.json and tokenizer_config.json, and what sentence-transformers writes beside them:
modules.json, which names the modules behind the transformer and their folders; sentence_bert_config.json; and
config_sentence_transformers.json. What none of them says follows sentence-transformers' own defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmserve.json_fields import JsonFields, read_json
from llmserve.pooling_modules import MODULES_FILE, DenseConfig, PoolingMode, PoolingModules

Kind = Literal["embed", "score", "classify"]
ScoreActivation = Literal["identity", "sigmoid", "softmax"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]

_CLASSIFIER = "ForSequenceClassification"
ENCODER_STEMS = ("Bert", "Roberta", "XLMRoberta", "DistilBert", "MPNet", "ModernBert")  # BertModel, BertForMaskedLM...
_ENCODER_CLASSES = ("Model", "ForMaskedLM", _CLASSIFIER)
# These count positions from pad_token_id + 1 on, and so have fewer than max_position_embeddings.
_OFFSET_STEMS = ("Roberta", "XLMRoberta", "MPNet")
_TOKEN_TYPE_STEMS = ("Bert", "Roberta", "XLMRoberta")
_SCORE_ACTIVATIONS: dict[str, ScoreActivation] = {"Identity": "identity", "Sigmoid": "sigmoid", "Softmax": "softmax"}
_SIMILARITIES: tuple[Similarity, ...] = ("cosine", "dot", "euclidean", "manhattan")
_DEFAULT_MAX_POSITIONS = 512  # of encoders whose config.json is silent
_UNBOUNDED = 10**9  # tokenizers without a limit say 1e30
_QWEN3_RERANKER_PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)


@dataclass(frozen=True, slots=True)
class PairPrompt:
    """How a decoder that judges by a word is asked: prefix + body + suffix, tokenised apart so that a document that is
    too long is cut and the question after it is not."""

    prefix: str
    body: str  # with {instruction}, {query} and {document}
    suffix: str
    instruction: str

    def render_body(self, query: str, document: str, instruction: str | None = None) -> str:
        """The part between prefix and suffix."""
        parts = {"instruction": instruction or self.instruction, "query": query, "document": document}
        return self.body.format(**parts)


QWEN3_RERANKER_PROMPT = PairPrompt(  # as its model card gives it
    prefix=_QWEN3_RERANKER_PREFIX,
    body="<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}",
    suffix="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    instruction="Given a web search query, retrieve relevant passages that answer the query",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingConfig:
    """A model that answers once for a whole text: how it reads, pools and scores.

    kind "embed": vectors; "score": a cross-encoder with one label; "classify": several labels.
    """

    kind: Kind
    architecture: str  # transformers' class name
    hidden_size: int  # of a token's vector
    dimension: int  # of an embedding: what pooling and the dense layers make of hidden_size
    max_model_len: int  # tokens, special ones included: the least of what the files say
    num_token_types: int  # 0: the model takes no token_type_ids
    do_lower_case: bool  # the text is lower-cased before it is tokenised
    pooling: tuple[PoolingMode, ...]  # several are concatenated
    include_prompt: bool  # False: the tokens of a prompt do not enter the pooling
    normalize: bool
    dense: tuple[DenseConfig, ...] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity: Similarity = "cosine"
    labels: tuple[str, ...] = ()
    activation: ScoreActivation = "identity"  # from logits to scores
    judging_token_ids: tuple[int, ...] = ()  # score = logit of the first, minus that of the second if there are two
    pair_prompt: PairPrompt | None = None


def is_pooling_folder(folder: Path) -> bool:
    """Whether the folder holds an encoder, a classifier, a sentence-transformers model or a decoder without its
    language model's head, and not a chat model.

    Raises ModelLoadError for a config.json that cannot be read.
    """
    if not (folder / "config.json").is_file():
        return False
    fields = read_json(folder / "config.json")
    name = _architecture(fields)
    return (
        (folder / MODULES_FILE).is_file()
        or name.endswith(("Model", _CLASSIFIER))
        or encoder_stem(name) is not None
        or fields.has("classifier_from_token")
    )


def read_pooling_config(folder: Path) -> PoolingConfig:
    """Raises ModelLoadError, naming the file and the field, for what is missing, malformed or not supported."""
    fields = read_json(folder / "config.json")
    name = _architecture(fields)
    modules = PoolingModules(folder)
    hidden_size = fields.integer("dim") if fields.has("dim") else fields.integer("hidden_size")  # DistilBERT: dim
    is_decoder = encoder_stem(name) is None
    judging = modules.judging_token_ids() or _judging_token_ids(folder, fields)
    labels = _labels(fields) if name.endswith(_CLASSIFIER) else ()
    pooling, include_prompt = modules.pooling("last" if is_decoder else "mean")
    dense = modules.dense(len(pooling) * hidden_size)
    settings = _optional(folder / "config_sentence_transformers.json")
    transformer = _optional(folder / "sentence_bert_config.json")
    prompts, default_prompt_name = _prompts(settings)
    return PoolingConfig(
        kind="score" if judging or len(labels) == 1 else "classify" if labels else "embed",
        architecture=name,
        hidden_size=hidden_size,
        dimension=dense[-1].out_features if dense else len(pooling) * hidden_size,
        max_model_len=_max_model_len(folder, fields, transformer),
        num_token_types=_num_token_types(fields, name),
        do_lower_case=transformer.boolean("do_lower_case", False),
        pooling=pooling,
        include_prompt=include_prompt,
        normalize=modules.normalizes(),
        dense=dense,
        prompts=prompts,
        default_prompt_name=default_prompt_name,
        similarity=_similarity(settings),
        labels=labels,
        activation=_activation(fields, settings, len(labels), judges=bool(judging)),
        judging_token_ids=judging,
        pair_prompt=QWEN3_RERANKER_PROMPT if judging else None,
    )


def encoder_stem(architecture: str) -> str | None:
    """ "Bert" of "BertModel"; None for what is no encoder."""
    return next((s for s in ENCODER_STEMS if architecture.removeprefix(s) in _ENCODER_CLASSES), None)


def _architecture(fields: JsonFields) -> str:
    names = fields.values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise fields.error("architectures", "a list with one name", names)
    return names[0]


def _optional(path: Path) -> JsonFields:
    return read_json(path) if path.is_file() else JsonFields(str(path), {})


def _max_model_len(folder: Path, fields: JsonFields, transformer: JsonFields) -> int:
    default = _DEFAULT_MAX_POSITIONS if encoder_stem(_architecture(fields)) else None
    limits = [fields.integer("max_position_embeddings", default)]
    if encoder_stem(_architecture(fields)) in _OFFSET_STEMS:
        limits[0] -= fields.integer("pad_token_id", 1, minimum=0) + 1
    if transformer.has("max_seq_length"):
        limits.append(transformer.integer("max_seq_length"))
    tokenizer = _optional(folder / "tokenizer_config.json")
    stated = tokenizer.number("model_max_length", float(_UNBOUNDED))
    if 0 < stated < _UNBOUNDED:
        limits.append(int(stated))
    return min(limits)


def _num_token_types(fields: JsonFields, name: str) -> int:
    return fields.integer("type_vocab_size", 2) if encoder_stem(name) in _TOKEN_TYPE_STEMS else 0


def _prompts(settings: JsonFields) -> tuple[dict[str, str], str | None]:
    values = settings.child("prompts").values
    prompts = {name: text for name, text in values.items() if text is not None}
    if not all(isinstance(text, str) for text in prompts.values()):
        raise settings.error("prompts", "an object of names and texts", values)
    name = settings.values.get("default_prompt_name")
    if name is not None and name not in prompts:
        raise settings.error("default_prompt_name", f"one of the prompts {sorted(prompts)}", name)
    return prompts, name


def _similarity(settings: JsonFields) -> Similarity:
    name = settings.string("similarity_fn_name", "cosine")
    for known in _SIMILARITIES:
        if name == known:
            return known
    raise settings.error("similarity_fn_name", f"of {', '.join(_SIMILARITIES)}", name)


def _labels(fields: JsonFields) -> tuple[str, ...]:
    """By id; transformers' default is two labels without a name."""
    if not fields.has("id2label"):
        return tuple(f"LABEL_{number}" for number in range(fields.integer("num_labels", 2)))
    named = fields.child("id2label").values
    try:
        return tuple(str(named[str(number)]) for number in range(len(named)))
    except KeyError as error:
        raise fields.error("id2label", f"an object of names for 0 to {len(named) - 1}", named) from error


def _judging_token_ids(folder: Path, fields: JsonFields) -> tuple[int, ...]:
    """vLLM's key: the words for no and yes, or for yes alone."""
    words = fields.values.get("classifier_from_token")
    if words is None:
        return ()
    if not isinstance(words, list) or len(words) not in (1, 2):
        raise fields.error("classifier_from_token", "a list of one or two tokens", words)
    vocabulary = read_json(folder / "tokenizer.json").child("model").child("vocab")
    return tuple(vocabulary.integer(str(word), minimum=0) for word in reversed(words))


def _activation(fields: JsonFields, settings: JsonFields, num_labels: int, *, judges: bool) -> ScoreActivation:
    """What the files name; else a sigmoid for one label, as sentence-transformers and TEI do, and for several a softmax
    over them, or a sigmoid each where the model was trained for several at once."""
    for where, key in (
        (fields.child("sentence_transformers"), "activation_fn"),
        (fields, "sbert_ce_default_activation_function"),
        (settings, "activation_fn"),
    ):
        if where.has(key):
            name = where.string(key, "").rpartition(".")[2]
            if name not in _SCORE_ACTIVATIONS:
                raise where.error(key, f"of {', '.join(_SCORE_ACTIVATIONS)}", name)
            return _SCORE_ACTIVATIONS[name]
    if judges or num_labels == 1:
        return "sigmoid"
    if num_labels == 0:
        return "identity"
    return "sigmoid" if fields.values.get("problem_type") == "multi_label_classification" else "softmax"
