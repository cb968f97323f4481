"""The conversion: the weights are those of the GGUF, and transformers loads and understands the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file

from llmserve.errors import ModelLoadError
from llmserve.gguf_file import read_gguf
from llmserve.repository.cache import no_progress
from llmserve.repository.gguf_to_hf import convert_llama, read_tensor, to_bfloat16, unpermute

HEADS = {"attn_q": 9, "attn_k": 3}  # of SmolLM2


def permute(weights: torch.Tensor, num_heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q and k: row i and row i + head_dim/2 of a head become neighbours."""
    head_dim = weights.shape[0] // num_heads
    order = [
        head * head_dim + half * (head_dim // 2) + pair
        for head in range(num_heads)
        for pair in range(head_dim // 2)
        for half in range(2)
    ]
    return weights[order]


@pytest.fixture(scope="module")
def reader(smollm2_path: Path) -> gguf.GGUFReader:
    """The gguf library's own, slow, reading of the real file."""
    return gguf.GGUFReader(next(smollm2_path.glob("*.gguf")))


def test_header_agrees_with_the_gguf_library(smollm2_path: Path, reader: gguf.GGUFReader) -> None:
    ours = read_gguf(next(smollm2_path.glob("*.gguf")))
    assert {name: (info.shape, info.ggml_type, info.offset) for name, info in ours.tensors.items()} == {
        tensor.name: (tuple(map(int, reversed(tensor.shape))), int(tensor.tensor_type), int(tensor.data_offset))
        for tensor in reader.tensors
    }
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for key, field in fields.items():
        if len(field.data) < 100:
            assert ours.metadata[key] == field.contents()
        else:
            assert len(ours.metadata[key]) == len(field.data)
            assert ours.metadata[key][1000:1040] == field.contents(slice(1000, 1040))


def test_real_weights_are_those_of_the_gguf(smollm2_path: Path, reader: gguf.GGUFReader) -> None:
    """SmolLM2's tensors, of three layers and outside of them, as the gguf library reads them, rounded by torch."""
    converted = load_file(smollm2_path / "model.safetensors")
    names = {"token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm"}
    names |= {"ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
    names |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"}
    names |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    for tensor in reader.tensors:
        *block, part, _ = tensor.name.split(".")
        prefix = f"layers.{block[1]}." if block else ""
        ours = converted.pop(f"model.{prefix}{names[part]}.weight")
        assert ours.shape == tuple(reversed(tensor.shape))
        if block and block[1] not in ("0", "13", "29"):
            continue
        if part in HEADS:
            ours = permute(ours, HEADS[part])
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).to(torch.bfloat16)
        assert torch.equal(ours, expected), tensor.name
    assert not converted, "nothing else"


def test_transformers_understands_the_folder(smollm2_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(smollm2_path)
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (30, 3, 64)
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.tie_word_embeddings is True
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == 2


def test_licence_and_facts_of_the_real_folder(smollm2_path: Path) -> None:
    assert "Apache License" in (smollm2_path / "LICENSE").read_text()
    assert json.loads((smollm2_path / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((smollm2_path / "tokenizer_config.json").read_text())["model_max_length"] == 8192


@given(hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_bfloat16_rounds_as_torch(values: np.ndarray) -> None:
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert (to_bfloat16(values) == expected).all()


def test_bfloat16_ties_go_to_even() -> None:
    halfway = np.array([0x3F808000, 0x3F818000, 0x3F808001], np.uint32).view(np.float32)
    assert to_bfloat16(halfway).tolist() == [0x3F80, 0x3F82, 0x3F81]


def test_unpermute_undoes_permute() -> None:
    rows = torch.arange(24 * 5, dtype=torch.float32).reshape(24, 5)
    assert torch.equal(torch.from_numpy(unpermute(permute(rows, 3).numpy(), 3)), rows)


def test_tiny_model_tensor_by_tensor(tmp_path: Path, write_llama: Callable[..., None]) -> None:
    source = tmp_path / "tiny.gguf"
    write_llama(source)
    counts: list[tuple[str, int, int]] = []
    convert_llama(source, tmp_path, {"temperature": 0.5}, lambda *news: counts.append(news))
    assert counts[-1][1] == counts[-1][2] > 0
    file = read_gguf(source)
    tensors = load_file(tmp_path / "model.safetensors")
    down = torch.from_numpy(read_tensor(file, file.tensors["blk.1.ffn_down.weight"])).to(torch.bfloat16)
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight"], down)
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (32, 64)


def test_another_architecture_is_an_error(tmp_path: Path, write_llama: Callable[..., None]) -> None:
    write_llama(tmp_path / "a.gguf", architecture="qwen2")
    with pytest.raises(ModelLoadError, match="architecture is 'qwen2'"):
        convert_llama(tmp_path / "a.gguf", tmp_path, {}, no_progress)


def test_a_foreign_tensor_is_an_error(tmp_path: Path, write_llama: Callable[..., None]) -> None:
    write_llama(tmp_path / "a.gguf", extra_tensor="blk.0.ffn_gate_exps.weight")
    with pytest.raises(ModelLoadError, match=r"blk\.0\.ffn_gate_exps\.weight"):
        convert_llama(tmp_path / "a.gguf", tmp_path, {}, no_progress)
