"""Reads the files a tokenizer is kept in: a Hugging Face folder or a GGUF. Knows their formats, not their use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from llmserve.errors import ModelLoadError
from llmserve.gguf_file import read_gguf
from llmserve.gguf_tokenizer import build_gguf_tokenizer, named_templates

_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """What the files say, whatever their format. None means: they do not say."""

    backend: Backend
    special_tokens: dict[str, str]  # "bos_token" -> its text, and so on: what a chat template may name
    extra_special_tokens: frozenset[str] = frozenset()
    eos_token_ids: tuple[int, ...] = ()
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    chat_templates: dict[str, str]  # name -> Jinja source; the usual one is "default"


def read_tokenizer_files(path: Path) -> TokenizerFiles:
    """Raises ModelLoadError, naming the file, if one is missing or damaged."""
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_gguf(path)
    raise ModelLoadError(f"{path}: no such file or folder.")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} if there is no such file. Raises ModelLoadError if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: not readable as JSON ({error}). Fetch the model again.") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: must hold a JSON object.")
    return value


def _read_gguf(path: Path) -> TokenizerFiles:
    file = read_gguf(path)
    tokenizer = build_gguf_tokenizer(file)
    config = tokenizer.config
    default = {"default": config["chat_template"]} if "chat_template" in config else {}
    return TokenizerFiles(
        backend=tokenizer.backend,
        special_tokens=_special_tokens(config),
        eos_token_ids=tokenizer.eos_token_ids,
        chat_templates={**default, **dict(named_templates(file))},
    )


def _read_folder(folder: Path) -> TokenizerFiles:
    config = read_json(folder / "tokenizer_config.json")
    named = {**read_json(folder / "special_tokens_map.json"), **config}
    added = config.get("added_tokens_decoder") or {}
    return TokenizerFiles(
        backend=_read_backend(folder),
        special_tokens=_special_tokens(named),
        extra_special_tokens=frozenset(token["content"] for token in added.values() if token.get("special"))
        | frozenset(_texts(named.get("additional_special_tokens") or ())),
        eos_token_ids=_configured_ends(folder),
        add_bos_token=config.get("add_bos_token"),
        add_eos_token=config.get("add_eos_token"),
        chat_templates=_chat_templates(folder, config),
    )


def _read_backend(folder: Path) -> Backend:
    path = folder / "tokenizer.json"
    if not path.exists():
        return _convert_with_transformers(folder)
    try:
        return Backend.from_buffer(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: not readable as a tokenizer ({error}). Fetch the model again.") from error


def _convert_with_transformers(folder: Path) -> Backend:
    """For the folders that hold a SentencePiece model only. Slow: imports transformers, here and nowhere else."""
    if not any((folder / name).exists() for name in _SENTENCEPIECE_FILES):
        raise ModelLoadError(
            f"{folder}: holds no tokenizer (tokenizer.json or tokenizer.model). Fetch the model again."
        )
    try:
        from transformers import AutoTokenizer

        backend: Backend = AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
    except (ImportError, OSError, ValueError, AttributeError) as error:
        raise ModelLoadError(
            f"{folder}: has no tokenizer.json, and transformers cannot convert what is there: {error}. "
            "Installing `sentencepiece` or saving the tokenizer again with transformers may help."
        ) from error
    return backend


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Every `<name>_token` that is a text, or an object with one."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    return {name: texts[0] for name, value in named.items() if (texts := list(_texts([value])))}


def _texts(values: Iterable[Any]) -> Iterable[str]:
    for value in values:
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            yield text


def _configured_ends(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json and config.json: an id or a list of them. Raises ModelLoadError."""
    ends: list[int] = []
    for name in ("generation_config.json", "config.json"):
        config = read_json(folder / name)
        value = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
        values = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(end, int) for end in values):
            raise ModelLoadError(f"{folder / name}: eos_token_id must be a token id or a list of them, not {value!r}.")
        ends += values
    return tuple(dict.fromkeys(ends))


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """From tokenizer_config.json (one, or a list of named ones); files of their own win over it."""
    templates: dict[str, str] = {}
    for source in (read_json(folder / "chat_template.json").get("chat_template"), config.get("chat_template")):
        if isinstance(source, str):
            templates["default"] = source
        elif isinstance(source, list):
            templates.update((entry["name"], entry["template"]) for entry in source)
    paths = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    for path in paths:
        if path.is_file():
            name = "default" if path.parent == folder else path.stem
            templates[name] = path.read_text(encoding="utf-8")
    return templates
