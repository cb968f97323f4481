"""Builds a `tokenizers.Tokenizer` from the metadata of a GGUF file. Knows the formats, not how tokens are used.

The meaning is that of llama.cpp (`src/llama-vocab.cpp`), which wrote these files' rules down: `tokenizer.ggml.model` is
the algorithm, `tokenizer.ggml.pre` names the regular expressions that split a text before byte-pair merging.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from llmserve.errors import ModelLoadError
from llmserve.gguf_file import GGUFFile

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_ANY_CASE_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _ANY_CASE_CONTRACTIONS + _WORDS + r"\p{N}" + _REST
_LLAMA3 = _ANY_CASE_CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST


class TokenType(enum.IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class PreTokenizerRule:
    """One kind of `tokenizer.ggml.pre`: the splits, in order, and what else the name implies."""

    splits: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is taken whole
    add_bos: bool = False  # where `tokenizer.ggml.add_bos_token` is silent


_RULES: dict[PreTokenizerRule, tuple[str, ...]] = {
    PreTokenizerRule((_GPT2,)): ("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling"),
    PreTokenizerRule((r"\p{N}", _GPT2)): ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"),
    PreTokenizerRule((_QWEN2,)): ("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"),
    PreTokenizerRule((_LLAMA3,), ignore_merges=True, add_bos=True): (
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
        "pixtral",
        "lfm2",
    ),
    PreTokenizerRule((_LLAMA3,)): ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"),
    PreTokenizerRule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")): ("default",),
}
PRE_TOKENIZERS = {name: rule for rule, names in _RULES.items() for name in names}


@dataclass(frozen=True, slots=True)
class GGUFTokenizer:
    """What a Hugging Face folder says in `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`."""

    backend: Backend
    config: dict[str, Any]
    eos_token_ids: tuple[int, ...]


def build_gguf_tokenizer(file: GGUFFile) -> GGUFTokenizer:
    """Raises ModelLoadError, naming the metadata key, if the tokenizer is damaged or of an unsupported kind."""
    vocabulary = _Vocabulary(file)
    kind = file.require("tokenizer.ggml.model", str)
    if kind == "gpt2":
        rule = _pre_tokenizer_rule(file)
        backend = _byte_level_bpe(file, vocabulary, rule)
        add_bos = rule.add_bos
    elif kind == "llama":
        backend = _sentencepiece_bpe(file, vocabulary)
        add_bos = True
    else:
        raise ModelLoadError(
            f"{file.path}: tokenizer.ggml.model {kind!r} is not supported (supported: 'gpt2', 'llama'). "
            "Serve the model from its Hugging Face folder instead."
        )
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in vocabulary.control()])
    backend.add_tokens([AddedToken(text, normalized=False) for text in vocabulary.of_type(TokenType.USER_DEFINED)])
    config = _tokenizer_config(file, vocabulary, add_bos)
    backend.post_processor = template_processor(
        _wrapped(vocabulary, config, "bos"), _wrapped(vocabulary, config, "eos")
    )
    ends = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return GGUFTokenizer(backend, config, tuple(dict.fromkeys(end for end in ends if end is not None)))


def template_processor(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> processors.TemplateProcessing:
    """A post-processor that puts (text, id) of `bos` before a text and `eos` after it; None leaves it out."""
    single = [*([bos[0]] if bos else []), "$A", *([eos[0]] if eos else [])]
    pair = [f"{piece}:0" for piece in single] + [f"{'$B' if piece == '$A' else piece}:1" for piece in single]
    special = list(dict.fromkeys(token for token in (bos, eos) if token is not None))
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)


class _Vocabulary:
    """The tokens with their types. An empty text gets a name of its own: it stands for an unused id."""

    def __init__(self, file: GGUFFile) -> None:
        texts = file.require("tokenizer.ggml.tokens", list)
        self.texts = [text or f"[EMPTY_{token_id}]" for token_id, text in enumerate(texts)]
        self.ids = {text: token_id for token_id, text in enumerate(self.texts)}
        has_types = "tokenizer.ggml.token_type" in file.metadata
        self.types: list[int] = (
            file.require("tokenizer.ggml.token_type", list) if has_types else [TokenType.NORMAL] * len(texts)
        )
        if len(self.ids) != len(self.texts):
            raise ModelLoadError(f"{file.path}: tokenizer.ggml.tokens names a token twice; convert the model again.")
        if len(self.types) != len(self.texts):
            raise ModelLoadError(
                f"{file.path}: tokenizer.ggml.token_type has {len(self.types)} entries for {len(self.texts)} tokens."
            )

    def of_type(self, *types: TokenType) -> list[str]:
        return [text for text, kind in zip(self.texts, self.types, strict=True) if kind in types]

    def control(self) -> list[str]:
        return self.of_type(TokenType.CONTROL, TokenType.UNKNOWN)


def _pre_tokenizer_rule(file: GGUFFile) -> PreTokenizerRule:
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ModelLoadError(
            f"{file.path}: tokenizer.ggml.pre {name!r} is not supported, and a guess would split text wrongly. "
            f"Supported: {known}. Serve the model from its Hugging Face folder instead."
        )
    return PRE_TOKENIZERS[name]


def _byte_level_bpe(file: GGUFFile, vocabulary: _Vocabulary, rule: PreTokenizerRule) -> Backend:
    """GPT-2's tokenizer: bytes written as printable characters, then merges by rank."""
    merges: list[tuple[str, str]] = []
    for line in file.require("tokenizer.ggml.merges", list):
        left, _, right = line.partition(" ")
        if left not in vocabulary.ids or right not in vocabulary.ids or left + right not in vocabulary.ids:
            raise ModelLoadError(f"{file.path}: tokenizer.ggml.merges has {line!r}, which is not of the vocabulary.")
        merges.append((left, right))
    backend = Backend(models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=rule.ignore_merges))
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in rule.splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    if missing := sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.ids.keys()):
        # A byte without a token vanishes. It must still part its neighbours, or they would merge across it.
        steps.append(pre_tokenizers.Split(Regex("[" + "".join(map(re.escape, missing)) + "]"), "removed"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(file: GGUFFile, vocabulary: _Vocabulary) -> Backend:
    """SentencePiece's BPE (Llama 2, Mistral, Gemma): spaces are U+2581, unknown characters become byte tokens."""
    scores = file.require("tokenizer.ggml.scores", list)
    if len(scores) != len(vocabulary.texts):
        raise ModelLoadError(f"{file.path}: tokenizer.ggml.scores has {len(scores)} entries, not one for each token.")
    unk_id = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(
        vocab=vocabulary.ids,
        merges=_merges_by_score(vocabulary, scores),
        unk_token=vocabulary.texts[unk_id] if unk_id < len(vocabulary.texts) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    add_space_prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    backend = Backend(model)
    prefix = [normalizers.Prepend("▁")] if add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_by_score(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best: every way to halve a token, best token first."""
    ids = vocabulary.ids
    mergeable = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    halves: list[tuple[float, int, int, str, str]] = []
    for token_id, text in enumerate(vocabulary.texts):
        if len(text) < 2 or vocabulary.types[token_id] not in mergeable:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                halves.append((-scores[token_id], ids[left], ids[right], left, right))
    halves.sort()
    return [(left, right) for *_, left, right in halves]


def _tokenizer_config(file: GGUFFile, vocabulary: _Vocabulary, add_bos: bool) -> dict[str, Any]:
    metadata = file.metadata
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    }
    names = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    for short, name in names:
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None and token_id < len(vocabulary.texts):
            config[f"{short}_token"] = vocabulary.texts[token_id]
    if (context_length := metadata.get(f"{metadata.get('general.architecture')}.context_length")) is not None:
        config["model_max_length"] = context_length
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        config["chat_template"] = template
    return config


def _wrapped(vocabulary: _Vocabulary, config: dict[str, Any], name: str) -> tuple[str, int] | None:
    text = config.get(f"{name}_token")
    return (text, vocabulary.ids[text]) if text is not None and config[f"add_{name}_token"] else None


def named_templates(file: GGUFFile) -> Iterable[tuple[str, str]]:
    """The chat templates other than the default: `tokenizer.chat_template.<name>`."""
    prefix = "tokenizer.chat_template."
    return ((key.removeprefix(prefix), value) for key, value in file.metadata.items() if key.startswith(prefix))
