"""GGUF files, written here as llama.cpp's converter writes them, against the same weights in safetensors."""

from __future__ import annotations

import contextlib
import struct

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmserve.errors import ModelLoadError
from llmserve.models.config import RopeConfig, read_model_config
from llmserve.models.gguf_file import GGML_TYPES, GgufFile

Q = gguf.GGMLQuantizationType
TYPES = [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1]
FAMILIES = {
    "llama": ("Llama", {"head_dim": 32, "num_key_value_heads": 2}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {"head_dim": 32}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "tie_word_embeddings": True},
    ),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, arch: str) -> str:
    stem, _, kind = name.rpartition(".")
    names = GEMMA_NAMES if arch.startswith("gemma") else NAMES
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{names[part]}.{kind}"
    return f"{names[stem]}.{kind}"


def permute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py: rows of a head from halves to neighbouring pairs."""
    rows = values.shape[0]
    return values.reshape(num_heads, 2, rows // num_heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def write_gguf(path, model, tensors, arch: str, quantisation: Q, factors: np.ndarray | None = None) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    theta = config.rope_parameters.get("rope_theta") or config.rope_parameters["full_attention"]["rope_theta"]
    writer.add_rope_freq_base(theta)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    writer.add_token_list(["<unk>", "<s>", "</s>", "<|im_end|>"] + [f"t{i}" for i in range(97)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, tensor in tensors.items():
        values = tensor.numpy()
        if arch == "llama" and ".q_proj." in name:
            values = permute(values, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            values = permute(values, config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        kind = quantisation if values.ndim == 2 else Q.F32
        writer.add_tensor(gguf_name(name, arch), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def pair(tmp_path, build_model):
    """A folder and a GGUF of the same weights: quantised ones are dequantised into the folder."""

    def build(case: str, quantisation: Q, factors: np.ndarray | None = None):
        family, changes = FAMILIES[case]
        model = build_model(family, **changes)
        folder, path = tmp_path / "folder", tmp_path / "model.gguf"
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        write_gguf(path, model, tensors, case.split("-")[0], quantisation, factors)
        rounded = {
            name: torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(t.numpy(), quantisation), quantisation))
            if t.dim() == 2
            else t
            for name, t in tensors.items()
        }
        save_file(rounded, folder / "model.safetensors")
        return folder, path

    return build


@pytest.mark.parametrize("case", FAMILIES)
def test_same_logits_as_the_folder(case, pair, load, driver_class, prompt):
    folder, path = pair(case, Q.F32)
    expected = driver_class(load(folder)).step({0: prompt})[0]
    assert torch.equal(driver_class(load(path)).step({0: prompt})[0], expected)


@pytest.mark.parametrize("quantisation", TYPES)
def test_quantised_weights_are_those_of_the_gguf_package(quantisation, pair, load, driver_class, prompt):
    folder, path = pair("llama", quantisation)
    expected = driver_class(load(folder)).step({0: prompt})[0]
    assert torch.equal(driver_class(load(path)).step({0: prompt})[0], expected)


def test_large_tensors_are_dequantised_in_slices(pair, load, driver_class, prompt, monkeypatch):
    folder, path = pair("llama-biases", Q.Q8_0)
    expected = driver_class(load(folder)).step({0: prompt})[0]
    monkeypatch.setattr("llmserve.models.weights._DEQUANTISE_ELEMENTS", 300)  # a few rows at a time
    assert torch.equal(driver_class(load(path)).step({0: prompt})[0], expected)


def test_config_equals_the_folders(pair):
    folder, path = pair("gemma3", Q.F16)
    ours, theirs = read_model_config(path), read_model_config(folder)
    assert ours.dtype == "float16"
    assert ours.eos_token_ids == (2, 3)  # eos, and the end of turn by its spelling
    assert ours.bos_token_id == 1
    for field in (
        "num_layers",
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
    ):
        assert getattr(ours, field) == getattr(theirs, field)
    for field in ("sliding_windows", "rope_local", "rope", "query_scale", "embedding_scale", "post_norms", "qk_norm"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert ours.norm_weight_offset == 0.0  # the converter has added the one


def test_rope_factors_come_from_their_tensor(pair, load, driver_class, prompt):
    factors = np.linspace(1.0, 8.0, 16, dtype=np.float32)
    folder, path = pair("llama", Q.F32, factors)
    config = read_model_config(path)
    assert config.rope == RopeConfig(theta=1e4, kind="factors", freq_factors=tuple(factors.tolist()))
    unscaled = driver_class(load(folder)).step({0: prompt})[0]
    scaled = driver_class(load(path)).step({0: prompt})[0]
    assert torch.equal(scaled[0], unscaled[0])  # position 0 does not turn
    assert not torch.allclose(scaled[5:], unscaled[5:], atol=1e-2)


def test_block_sizes_are_ggmls():
    for type_id, (name, block_size, block_bytes) in GGML_TYPES.items():
        assert Q(type_id).name == name
        assert gguf.GGML_QUANT_SIZES[Q(type_id)] == (block_size, block_bytes)


class TestDamage:
    @pytest.fixture
    def path(self, pair):
        return pair("llama", Q.Q8_0)[1]

    def test_every_truncation_is_reported(self, path, tmp_path):
        data = path.read_bytes()
        header_end = data.index(b"blk.2.ffn_up.weight") + 60
        for length in [1, 3, 4, 7, 8, 15, 20, *range(24, header_end, 97), header_end, len(data) - 64]:
            cut = tmp_path / "cut.gguf"
            cut.write_bytes(data[:length])
            with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
                read_model_config(cut)

    def test_a_missing_tail_names_the_tensor(self, path):
        last = max(GgufFile(path).tensors.values(), key=lambda tensor: tensor.offset)
        path.write_bytes(path.read_bytes()[: last.offset + last.nbytes - 1])
        with pytest.raises(ModelLoadError, match=last.name):
            read_model_config(path)

    def test_every_flipped_header_byte_is_an_error_or_harmless(self, path, tmp_path):
        """No byte may crash the reader, send it round a huge loop, or take it out of the file."""
        data = bytearray(path.read_bytes())
        for position in range(0, 1500, 7):
            damaged = bytearray(data)
            damaged[position] ^= 0xFF
            file = tmp_path / "flipped.gguf"
            file.write_bytes(damaged)
            with contextlib.suppress(ModelLoadError):
                read_model_config(file)

    def test_not_a_gguf(self, tmp_path):
        path = tmp_path / "model.gguf"
        path.write_bytes(b"PK\x03\x04" + bytes(100))
        with pytest.raises(ModelLoadError, match="not a GGUF"):
            read_model_config(path)
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
        with pytest.raises(ModelLoadError, match="version 1"):
            read_model_config(path)
        path.write_bytes(b"")
        with pytest.raises(ModelLoadError, match="cannot be read"):
            read_model_config(path)

    def test_unknown_architecture(self, path):
        path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1))
        with pytest.raises(ModelLoadError, match=r"mamba.*qwen3"):
            read_model_config(path)
