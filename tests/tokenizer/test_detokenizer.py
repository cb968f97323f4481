"""Incremental decoding must add up to decoding the whole, cut however, for every token and every byte."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from llmserve.detokenizer import ByteDetokenizer, WindowDetokenizer
from llmserve.tokenizer import Tokenizer
from llmserve.tokenizer_files import TokenizerFiles


def pushed(tokenizer: Tokenizer, pieces: Iterable[Sequence[int]], prompt: Sequence[int] = (), skip: bool = True) -> str:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip, prompt_token_ids=prompt)
    return "".join([detokenizer.push(piece) for piece in pieces]) + detokenizer.flush()


def cut(token_ids: Sequence[int], cuts: Iterable[int]) -> list[Sequence[int]]:
    edges = sorted({0, len(token_ids), *(position % (len(token_ids) + 1) for position in cuts)})
    return [token_ids[start:end] for start, end in pairwise(edges)]


@pytest.mark.parametrize("skip", [True, False])
def test_every_token_by_itself_and_after_another(smollm2: Tokenizer, skip: bool) -> None:
    """Our decoding is the library's, for every token of the real vocabulary."""
    backend = smollm2._backend
    for token_id in range(smollm2.vocab_size):
        expected = backend.decode([token_id], skip_special_tokens=skip)
        assert pushed(smollm2, [[token_id]], skip=skip) == expected == smollm2.decode([token_id], skip)


def test_every_token_in_one_stream(smollm2: Tokenizer) -> None:
    token_ids = list(range(smollm2.vocab_size))
    random.Random(0).shuffle(token_ids)
    whole = smollm2._backend.decode(token_ids, skip_special_tokens=False)
    assert pushed(smollm2, ([token_id] for token_id in token_ids), skip=False) == whole


@given(st.lists(st.integers(0, 49_300), max_size=40), st.lists(st.integers(0, 40), max_size=8), st.booleans())
@settings(max_examples=300, deadline=None)
def test_random_tokens_cut_anywhere(smollm2: Tokenizer, token_ids: list[int], cuts: list[int], skip: bool) -> None:
    whole = smollm2._backend.decode(token_ids, skip_special_tokens=skip)
    assert smollm2.decode(token_ids, skip) == whole
    assert pushed(smollm2, cut(token_ids, cuts), skip=skip) == whole


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=20))
@settings(max_examples=500, deadline=None)
def test_random_bytes_cut_anywhere(data: bytes, cuts: list[int]) -> None:
    """Whole characters come as soon as they are whole, the rest becomes U+FFFD as in one go."""
    detokenizer = ByteDetokenizer([bytes([byte]) for byte in range(256)], strip_first_space=False)
    texts = [detokenizer.push(piece) for piece in cut(data, cuts)]
    assert "".join(texts) + detokenizer.flush() == data.decode("utf-8", "replace")


@given(st.text(max_size=30))
@settings(deadline=None)
def test_never_half_a_character_and_never_late(text: str) -> None:
    detokenizer = ByteDetokenizer([bytes([byte]) for byte in range(256)], strip_first_space=False)
    encoded = text.encode("utf-8", "surrogatepass")
    if encoded.decode("utf-8", "replace") != text:
        return
    shown = ""
    for count, byte in enumerate(encoded, 1):
        shown += detokenizer.push([byte])
        assert shown == encoded[:count].decode("utf-8", "ignore")
    assert detokenizer.flush() == ""


def test_emoji_over_several_tokens(smollm2: Tokenizer) -> None:
    text = "café 你好 👨‍👩‍👧‍👦🙂!"
    token_ids = smollm2.encode(text)
    detokenizer = smollm2.detokenizer()
    pieces = [detokenizer.push([token_id]) for token_id in token_ids]
    assert "" in pieces
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
    detokenizer = smollm2.detokenizer()
    detokenizer.push(smollm2.encode("🙂")[:1])
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_ids_without_a_token_say_nothing(smollm2: Tokenizer) -> None:
    first, second = smollm2.encode(" Paris"), smollm2.encode(" é")
    assert pushed(smollm2, [first, [smollm2.vocab_size + 7], second]) == " Paris é"
    assert smollm2.decode([-1, *first, 10**9]) == " Paris"


def test_special_tokens_are_shown_on_demand(smollm2: Tokenizer) -> None:
    token_ids = smollm2.encode("<|im_start|>user\nhi<|im_end|>")
    assert pushed(smollm2, [token_ids], skip=True) == "user\nhi"
    assert pushed(smollm2, [token_ids], skip=False) == "<|im_start|>user\nhi<|im_end|>"


@given(st.lists(st.integers(0, 380), max_size=25), st.lists(st.integers(0, 380), max_size=25), st.booleans())
@settings(max_examples=300, deadline=None)
def test_sentencepiece_continues_its_prompt(
    sentencepiece: Tokenizer, prompt: list[int], output: list[int], skip: bool
) -> None:
    """The first space is shown exactly if the prompt had text before it."""
    tail = sentencepiece.detokenizer(skip_special_tokens=skip)
    tail.push(prompt)
    if tail.flush():
        prompt = [*prompt, sentencepiece.encode("x", add_special_tokens=False)[-1]]  # ends within no character
    whole, before = sentencepiece.decode(prompt + output, skip), sentencepiece.decode(prompt, skip)
    assert whole.startswith(before)
    assert pushed(sentencepiece, [[token_id] for token_id in output], prompt, skip) == whole[len(before) :]
    assert pushed(sentencepiece, [output], skip=skip) == sentencepiece.decode(output, skip)


@given(st.text(alphabet="the quickbrown ▁é你🙂\n1", max_size=30))
@settings(deadline=None)
def test_sentencepiece_decodes_text_as_the_library(sentencepiece: Tokenizer, text: str) -> None:
    token_ids = sentencepiece.encode(text)
    assert sentencepiece.decode(token_ids) == sentencepiece._backend.decode(token_ids, skip_special_tokens=True)
    assert sentencepiece.decode(token_ids) == text.replace("▁", " ")


@pytest.fixture(scope="module")
def word_piece() -> Tokenizer:
    """A tokenizer of another kind, for the way that fits all."""
    words = ["[UNK]", "play", "##ing", "##s", "the", "a", "##b", "!", "'", "s"]
    backend = Backend(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return Tokenizer(TokenizerFiles(backend=backend, special_tokens={}, chat_templates={}))


@given(st.lists(st.integers(0, 9), max_size=40), st.lists(st.integers(0, 40), max_size=8))
@settings(deadline=None)
def test_other_decoders(word_piece: Tokenizer, token_ids: list[int], cuts: list[int]) -> None:
    # tokens that reach back into text already shown ("!" removes the space before it) cannot be streamed exactly
    token_ids = [token_id for token_id in token_ids if token_id < 7]
    assert isinstance(word_piece.detokenizer(), WindowDetokenizer)
    assert pushed(word_piece, cut(token_ids, cuts)) == word_piece.decode(token_ids)


def test_token_bytes(smollm2: Tokenizer, sentencepiece: Tokenizer, word_piece: Tokenizer) -> None:
    for text in ("é", "🙂", " Paris", "\n\n"):
        assert b"".join(map(smollm2.token_bytes, smollm2.encode(text))) == text.encode()
    assert smollm2.token_bytes(2) == b"<|im_end|>"
    assert smollm2.token_text(smollm2.encode("🙂")[0]) == "\ufffd" or smollm2.encode("🙂")[1:] == []
    assert smollm2.token_bytes(10**6) == b""
    assert sentencepiece.token_bytes(4 + 0xF0) == b"\xf0"
    assert sentencepiece.token_bytes(sentencepiece.token_id("▁the") or -1) == b" the"
    assert word_piece.token_bytes(1) == b"play"
