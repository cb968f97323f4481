"""Tokenizers out of Hugging Face folders: what the files say is what is done, and transformers agrees."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from llmserve.errors import InvalidRequestError, ModelLoadError
from llmserve.tokenizer import Tokenizer

VECTORS = json.loads((Path(__file__).parent / "data" / "smollm2_llama_cpp.json").read_text())
SPECIAL = ["<s>", "</s>", "<|im_end|>", "<|end|>", "<|call|>", "<|return|>", "<tool>"]
BOS, EOS, IM_END, END, CALL, RETURN, TOOL = range(256, 263)

WriteFolder = Callable[..., Path]


@pytest.fixture
def write_folder(tmp_path: Path) -> WriteFolder:
    """Writes a folder: 256 byte tokens and SPECIAL, of which `special` are marked so; keyword: file name -> JSON."""

    def write(special: tuple[str, ...] = (), post_processor: Any = None, **files: Any) -> Path:
        tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
        backend = Backend(models.BPE(vocab={text: index for index, text in enumerate(tokens)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(text, special=True) for text in special])
        if post_processor is not None:
            backend.post_processor = post_processor
        backend.enable_truncation(3)
        backend.enable_padding(length=7)
        backend.save(str(tmp_path / "tokenizer.json"))
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return tmp_path

    return write


def test_importing_needs_neither_torch_nor_transformers(smollm2_path: Path) -> None:
    """The server process's whole use of a tokenizer, with the import of both made impossible."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from llmserve.tokenizer import Tokenizer\n"
        f"t = Tokenizer.from_path({str(smollm2_path)!r})\n"
        "p = t.apply_chat_template([{'role': 'user', 'content': 'hi'}])\n"
        "assert t.detokenizer().push(t.encode(p)).endswith('assistant\\n')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_folder_encodes_as_llama_cpp_and_transformers(smollm2: Tokenizer, smollm2_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2_path)
    texts = [text for text, _ in VECTORS]
    assert smollm2.encode_batch(texts) == [ids for _, ids in VECTORS] == theirs(texts)["input_ids"]
    for _, ids in VECTORS:
        assert smollm2.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert smollm2.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    messages = [{"role": "user", "content": "1. a\n\n2. b"}]
    assert smollm2.apply_chat_template(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_smollm2_facts(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert smollm2.eos_token_ids == (2, 0)
    assert {0, 1, 2} <= smollm2.special_token_ids
    assert smollm2.encode("") == []


def test_truncation_and_padding_of_the_file_are_off(write_folder: WriteFolder) -> None:
    assert len(Tokenizer.from_path(write_folder()).encode("abcdefghij")) == 10
    assert len(Tokenizer.from_path(write_folder()).encode("a")) == 1


def test_every_end_token_is_found(write_folder: WriteFolder) -> None:
    """The tokenizer's own first, then the configured, then the well-known that are special tokens here."""
    folder = write_folder(
        special=("</s>", "<|im_end|>"),
        tokenizer_config={"eos_token": {"content": "</s>"}},
        generation_config={"eos_token_id": [TOOL, EOS]},
        config={"eos_token_id": 65},
    )
    assert Tokenizer.from_path(folder).eos_token_ids == (EOS, TOOL, 65, IM_END)


def test_an_end_that_is_no_token_id_is_refused(write_folder: WriteFolder) -> None:
    folder = write_folder(special=("</s>",), config={"eos_token_id": "</s>"})
    with pytest.raises(ModelLoadError, match=r"config\.json: eos_token_id must be a token id .*, not '</s>'"):
        Tokenizer.from_path(folder)


def test_text_that_looks_like_an_end_is_none(write_folder: WriteFolder) -> None:
    """A well-known end token that is ordinary text in this vocabulary does not end."""
    assert Tokenizer.from_path(write_folder(special=("<s>",))).eos_token_ids == ()


def test_end_in_the_middle_of_a_harmony_answer(write_folder: WriteFolder) -> None:
    folder = write_folder(special=("<|end|>", "<|call|>", "<|return|>"))
    assert Tokenizer.from_path(folder).eos_token_ids == (CALL, RETURN)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [BOS, 65]),
        ({"add_bos_token": True}, [BOS, 65]),
        ({"add_bos_token": False}, [65]),
        ({"add_eos_token": True}, [BOS, 65, EOS]),
        ({"add_bos_token": False, "add_eos_token": True}, [65, EOS]),
    ],
)
def test_beginning_and_end_tokens_are_added_as_configured(
    write_folder: WriteFolder, config: dict[str, bool], expected: list[int]
) -> None:
    processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer.from_path(write_folder(("<s>", "</s>"), processor, tokenizer_config=named | config))
    letter = tokenizer.token_id("A")
    assert tokenizer.encode("A") == [letter if token_id == 65 else token_id for token_id in expected]
    assert tokenizer.encode("A", add_special_tokens=False) == [letter]


def test_tokens_only_the_configuration_calls_special(write_folder: WriteFolder) -> None:
    folder = write_folder(
        tokenizer_config={
            "bos_token": "<s>",
            "pad_token": "<not in the vocabulary>",
            "added_tokens_decoder": {str(TOOL): {"content": "<tool>", "special": True}},
        },
        special_tokens_map={"eos_token": {"content": "</s>"}, "additional_special_tokens": ["<|im_end|>"]},
    )
    tokenizer = Tokenizer.from_path(folder)
    assert tokenizer.special_token_ids == {BOS, EOS, IM_END, TOOL}
    assert tokenizer.vocab_size == 263
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.decode(tokenizer.encode("<s>a<tool>")) == "a"


def test_chat_templates_by_name(write_folder: WriteFolder) -> None:
    named = [{"name": "default", "template": "default"}, {"name": "tool_use", "template": "tools"}]
    folder = write_folder(tokenizer_config={"chat_template": named})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    tokenizer = Tokenizer.from_path(folder)
    assert tokenizer.chat_template == "default"
    assert tokenizer.apply_chat_template([]) == "default"
    assert tokenizer.apply_chat_template([], tools=[{}]) == "tools"
    assert tokenizer.apply_chat_template([], chat_template="rag") == "rag"
    (folder / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_path(folder).chat_template == "from the file"


def test_no_chat_template(write_folder: WriteFolder) -> None:
    tokenizer = Tokenizer.from_path(write_folder())
    assert tokenizer.chat_template is None
    with pytest.raises(InvalidRequestError, match="no default chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_text_that_is_not_unicode_is_the_requests_error(smollm2: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="surrogates"):
        smollm2.encode("a\ud800")
    with pytest.raises(InvalidRequestError, match="surrogates"):
        smollm2.encode_batch(["a", "b\udfff"])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'{"model": 1}'])
def test_a_damaged_file_is_named(write_folder: WriteFolder, name: str, content: bytes) -> None:
    folder = write_folder()
    (folder / name).write_bytes(content)
    if name != "tokenizer.json" and content.startswith(b'{"'):
        return  # a valid object with a key of no meaning
    with pytest.raises(ModelLoadError, match=name):
        Tokenizer.from_path(folder)


def test_a_chat_template_that_does_not_parse_is_the_models_error(write_folder: WriteFolder) -> None:
    with pytest.raises(ModelLoadError, match="chat template does not parse"):
        Tokenizer.from_path(write_folder(tokenizer_config={"chat_template": "{% for %}"}))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such file"):
        Tokenizer.from_path(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match="holds no tokenizer"):
        Tokenizer.from_path(tmp_path)


def test_a_folder_without_tokenizer_json_is_converted(tmp_path: Path, smollm2: Tokenizer) -> None:
    """An old GPT-2 folder (vocab.json and merges.txt): transformers converts it, the ids are those of its files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*alphabet, "he", "ll", "hell", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    )
    tokenizer = Tokenizer.from_path(tmp_path)
    assert tokenizer.encode("hell") == [vocabulary["hell"]]
    assert tokenizer.eos_token_ids == (vocabulary["<|endoftext|>"],)
    assert tokenizer.detokenizer().push(tokenizer.encode("shell é")) == "shell é"
