"""Tokenizers out of GGUF files must split text as llama.cpp does; the vectors in data/ were recorded from it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from llmserve.errors import ModelLoadError
from llmserve.gguf_file import GGUFFile, read_gguf
from llmserve.gguf_tokenizer import PRE_TOKENIZERS, build_gguf_tokenizer
from llmserve.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"
SMOLLM2_VECTORS = json.loads((DATA / "smollm2_llama_cpp.json").read_text())
SENTENCEPIECE_VECTORS = json.loads((DATA / "sentencepiece_llama_cpp.json").read_text())


@pytest.fixture(scope="module")
def smollm2_gguf(smollm2_path: Path) -> Path:
    return next(smollm2_path.glob("*.gguf"))


def byte_level_file(pre: str | None = "gpt-2", **metadata: object) -> GGUFFile:
    """A GGUF header with 256 byte tokens, three merges and an end token."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell", "<|im_end|>"]
    fields: dict[str, object] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
    if pre is not None:
        fields["tokenizer.ggml.pre"] = pre
    return GGUFFile(Path("tiny.gguf"), fields | metadata, {})


def test_smollm2_encodes_as_llama_cpp(smollm2_gguf: Path) -> None:
    tokenizer = Tokenizer.from_path(smollm2_gguf)
    wrong = [text for text, ids in SMOLLM2_VECTORS if tokenizer.encode(text) != ids]
    assert not wrong


def test_smollm2_decodes_what_it_encodes(smollm2_gguf: Path) -> None:
    """All but the bytes that have no token comes back."""
    tokenizer = Tokenizer.from_path(smollm2_gguf)
    dropped = str.maketrans("", "", "\x04\x06\x13\x14\x16\x1d")
    for text, _ in SMOLLM2_VECTORS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text.translate(dropped)


def test_bytes_without_a_token_vanish_and_still_part_their_neighbours(smollm2_gguf: Path) -> None:
    tokenizer = Tokenizer.from_path(smollm2_gguf)
    missing = {byte for byte in range(256) if bytes([byte]) not in tokenizer._byte_table.all}  # type: ignore[union-attr]
    assert {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D} <= missing
    assert tokenizer.encode("\x04") == []
    assert tokenizer.encode("th\x1de") == tokenizer.encode("th") + tokenizer.encode("e") != tokenizer.encode("the")


@pytest.mark.parametrize("name", SENTENCEPIECE_VECTORS)
def test_sentencepiece_encodes_as_llama_cpp(name: str, write_sentencepiece_gguf: Callable[[bool], Path]) -> None:
    tokenizer = Tokenizer.from_path(write_sentencepiece_gguf(name == "space-prefix"))
    wrong = [
        (text, tokenizer.encode(text), ids)
        for text, ids in SENTENCEPIECE_VECTORS[name]
        if tokenizer.encode(text) != ids
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "I'LL go  12345\n\n ½x", ["I", "'", "LL", " go", " ", " 12345", "\n\n", " ½", "x"]),
        ("smollm", "a  12\n\n3", ["a", "  ", "1", "2", "\n\n", "3"]),
        ("qwen2", "I'LL go  123\n\n.x", ["I", "'LL", " go", " ", " ", "1", "2", "3", "\n\n", ".x"]),
        ("llama-bpe", "I'LL go 12345!\n", ["I", "'LL", " go", " ", "123", "45", "!\n"]),
        ("default", "a+12345 b", ["a", "+", "123", "45", " b"]),
    ],
)
def test_pre_tokenizer_splits(pre: str, text: str, pieces: list[str]) -> None:
    backend = build_gguf_tokenizer(byte_level_file(pre)).backend
    split = [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert split == pieces


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_encodes_and_decodes(pre: str) -> None:
    backend = build_gguf_tokenizer(byte_level_file(pre)).backend
    text = "Hello  hell 1234\t\n é🙂'll<|im_end|>"
    assert backend.decode(backend.encode(text).ids, skip_special_tokens=False) == text


def test_unknown_pre_tokenizer_names_the_known() -> None:
    with pytest.raises(ModelLoadError, match=r"'klingon' is not supported.*llama-bpe.*qwen2.*smollm"):
        build_gguf_tokenizer(byte_level_file("klingon"))


def test_unknown_algorithm_is_an_error() -> None:
    with pytest.raises(ModelLoadError, match=r"tokenizer\.ggml\.model 'rwkv'"):
        build_gguf_tokenizer(byte_level_file(**{"tokenizer.ggml.model": "rwkv"}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.merges", ["h e", "q qq"], "'q qq'"),
        ("tokenizer.ggml.tokens", ["a", "a"], "names a token twice"),
        ("tokenizer.ggml.token_type", [1], "token_type has 1 entries"),
        ("tokenizer.ggml.merges", 7, "must be of type list, not int"),
        ("tokenizer.ggml.model", None, "lacks 'tokenizer.ggml.model'"),
    ],
)
def test_damaged_metadata_is_an_error(key: str, value: object, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        build_gguf_tokenizer(byte_level_file(**{key: value}))


def test_beginning_and_end_tokens_are_added_as_the_file_says() -> None:
    bos = {"tokenizer.ggml.bos_token_id": 258}  # "hell"
    plain = build_gguf_tokenizer(byte_level_file("gpt-2", **bos)).backend
    llama3 = build_gguf_tokenizer(byte_level_file("llama-bpe", **bos)).backend
    both = build_gguf_tokenizer(
        byte_level_file("gpt-2", **bos, **{f"tokenizer.ggml.add_{name}_token": True for name in ("bos", "eos")})
    ).backend
    assert plain.encode("ll").ids == [257]
    assert llama3.encode("ll").ids == [258, 257]
    assert both.encode("ll").ids == [258, 257, 259]
    assert both.encode("ll", add_special_tokens=False).ids == [257]


def test_every_end_token_the_file_names_ends() -> None:
    file = byte_level_file(**{"tokenizer.ggml.eot_token_id": 256, "tokenizer.ggml.eom_token_id": 257})
    assert build_gguf_tokenizer(file).eos_token_ids == (259, 256, 257)


@pytest.fixture(scope="module")
def damaged(write_sentencepiece_gguf: Callable[[bool], Path]) -> Callable[[int, bytes, int], Path]:
    """Writes a GGUF of which bytes from `at` are overwritten, cut off at `end`."""
    path = write_sentencepiece_gguf(True)
    whole = path.read_bytes()

    def write(at: int, patch: bytes, end: int) -> Path:
        scratch = path.with_name("damaged.gguf")
        scratch.write_bytes((whole[:at] + patch + whole[at + len(patch) :])[:end])
        return scratch

    return write


@given(st.integers(0, 12_000), st.binary(max_size=9), st.integers(0, 12_000))
@settings(max_examples=300, deadline=None)
def test_a_damaged_header_is_a_clear_error(
    damaged: Callable[[int, bytes, int], Path], at: int, patch: bytes, end: int
) -> None:
    """Cut short or overwritten anywhere, the file either reads or raises ModelLoadError: nothing else."""
    with contextlib.suppress(ModelLoadError):
        build_gguf_tokenizer(read_gguf(damaged(at, patch, end)))


def test_every_cut_is_noticed(damaged: Callable[[int, bytes, int], Path]) -> None:
    for end in range(0, 6_000, 97):
        with pytest.raises(ModelLoadError, match=r"damaged\.gguf"):
            read_gguf(damaged(0, b"", end))


def test_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 20)
    with pytest.raises(ModelLoadError, match="not a GGUF file"):
        Tokenizer.from_path(tmp_path / "x.gguf")
