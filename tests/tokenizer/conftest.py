"""Tokenizers to test with: the real SmolLM2's, and tiny ones built here, kept in GGUF and in Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from llmserve.gguf_tokenizer import TokenType
from llmserve.tokenizer import Tokenizer

_WORDS = (
    *("▁the", "▁quick", "▁brown", "▁fox", "▁jumps", "▁over", "▁lazy", "▁dog", "ing", "▁▁▁▁", "▁hello", "▁world"),
    *("hello", "é", "你好", "aaaa", "123", "▁1", "ab", "abc", "bc", "bcd"),
)


def tiny_sentencepiece_vocabulary() -> tuple[list[str], list[float], list[TokenType]]:
    """<unk>, two control tokens, a user-defined one, 256 bytes, then all beginnings of some words, best first."""
    tokens = ["<unk>", "<s>", "</s>", "<tool>"]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.USER_DEFINED]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [TokenType.BYTE] * 256
    pieces = dict.fromkeys(word[:end] for word in _WORDS for end in range(2, len(word) + 1))
    pieces |= dict.fromkeys(character for word in _WORDS for character in word)
    tokens += list(pieces)
    types += [TokenType.NORMAL] * len(pieces)
    return tokens, [-float(index) for index in range(len(tokens))], types


@pytest.fixture(scope="session")
def write_sentencepiece_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """Writes a GGUF with a tiny SentencePiece vocabulary; the argument is its `add_space_prefix`."""

    def write(add_space_prefix: bool) -> Path:
        path = tmp_path_factory.mktemp("spm") / "spm.gguf"
        tokens, scores, types = tiny_sentencepiece_vocabulary()
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(64)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(True)
        writer.add_add_space_prefix(add_space_prefix)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_path(smollm2_path)


@pytest.fixture(scope="session", params=[True, False], ids=["space-prefix", "no-space-prefix"])
def sentencepiece(request: pytest.FixtureRequest, write_sentencepiece_gguf: Callable[[bool], Path]) -> Tokenizer:
    return Tokenizer.from_path(write_sentencepiece_gguf(request.param))
