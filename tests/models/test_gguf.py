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
from llmserve.gguf_file import GGML_TYPES, read_gguf
from llmserve.kernels.cpu.ops import create_cpu_ops
from llmserve.kernels.weight_formats import GGUF_FORMATS
from llmserve.models.config import RopeConfig, read_model_config
from llmserve.models.quantization import choose_formats, describe_formats
from llmserve.models.weights import open_weights
from tests.models.gguf_writer import write_gguf

Q = gguf.GGMLQuantizationType
TYPES = [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1]
FAMILIES = {
    "llama": ("Llama", {"head_dim": 32, "num_key_value_heads": 2}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {"head_dim": 32}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama-mixtral": ("Mixtral", {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2moe": (
        "Qwen2Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 64},
    ),
    "qwen3moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
        | {"norm_topk_prob": True},
    ),
    "gemma2": (
        "Gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "Gemma3Text",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "tie_word_embeddings": True},
    ),
}


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
        last = max(read_gguf(path).tensors.values(), key=lambda tensor: tensor.offset)
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
        with pytest.raises(ModelLoadError, match="cut short"):
            read_model_config(path)

    def test_unknown_architecture(self, path):
        path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1))
        with pytest.raises(ModelLoadError, match=r"mamba.*qwen3"):
            read_model_config(path)


@pytest.mark.parametrize("quantisation", [Q.Q8_0, Q.Q4_0, Q.Q4_1])
@pytest.mark.parametrize("case", ["llama", "qwen3", "llama-mixtral", "qwen2moe"])
class TestBlocks:
    """Matrices kept as they lie in the file."""

    def test_raw_rows_are_those_that_are_dequantised(self, case, quantisation, pair):
        """llama.cpp's order of q's and k's rows is undone in blocks as it is in numbers."""
        _, path = pair(case, quantisation)
        source = open_weights(path, read_model_config(path))
        down = {"llama-mixtral": "block_sparse_moe.experts.2.w2", "qwen2moe": "mlp.experts.3.down_proj"}
        for name in ("self_attn.q_proj", "self_attn.k_proj", down.get(case, "mlp.down_proj")):
            name = f"model.layers.1.{name}.weight"
            assert source.types[name] == quantisation.name
            raw = torch.empty(source.shapes[name][0], source.nbytes(name) // source.shapes[name][0], dtype=torch.uint8)
            dense = torch.empty(source.shapes[name])
            source.read_raw(name, raw)
            source.read(name, dense)
            assert np.array_equal(gguf.quants.dequantize(raw.numpy(), quantisation), dense.numpy())

    def test_logits_are_near_those_of_the_dequantised_weights(
        self, case, quantisation, pair, load, driver_class, prompt
    ):
        """What remains is the rounding of activations to 8 bits."""
        ops = create_cpu_ops(1)
        if ops is None:
            pytest.skip("no C compiler")
        _, path = pair(case, quantisation)
        config = read_model_config(path)
        formats = choose_formats(config, open_weights(path, config).types, "gguf", ops.weight_formats)
        assert describe_formats(config, formats) == quantisation.name.lower()
        reports = []
        model = load(path, ops=ops, formats=formats, progress=lambda *counts: reports.append(counts))
        assert reports[-1][0] == reports[-1][1]
        expected = driver_class(load(path)).step({0: prompt})[0]
        found = driver_class(model, ops, block_size=16).step({0: prompt})[0]
        error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        # Swapped rows make it more than 1; so may a token's rounding that chooses another expert, but only its own.
        assert 0 < (error.max() if config.moe is None else error.median()) < 0.2


def test_parts_of_different_types_are_quantised_anew(pair, tmp_path, load, driver_class, prompt, build_model, caplog):
    ops = create_cpu_ops(1)
    if ops is None:
        pytest.skip("no C compiler")
    model = build_model("Llama", head_dim=32)
    path = tmp_path / "mixed.gguf"
    exceptions = {"v_proj": Q.Q5_0, "down_proj": Q.Q5_1, "o_proj": Q.F16, "lm_head": Q.Q8_0}
    write_gguf(path, model, model.state_dict(), "llama", Q.Q4_1, exceptions=exceptions)
    config = read_model_config(path)
    with caplog.at_level("INFO"):
        formats = choose_formats(config, open_weights(path, config).types, "gguf", ops.weight_formats)
    assert "3 of Q4_1 with Q5_0 as q8_0, 3 of Q5_1 as q8_0" in caplog.text
    layer = {name.removeprefix("model.layers.2."): fmt for name, fmt in formats.items() if "layers.2" in name}
    assert layer == {
        "self_attn.qkv_proj": "q8_0",
        "self_attn.o_proj": "dense",
        "mlp.gate_up_proj": "q4_1",
        "mlp.down_proj": "q8_0",
    }
    assert formats["lm_head"] == "q8_0"
    expected = driver_class(load(path)).step({0: prompt})[0]
    found = driver_class(load(path, ops=ops, formats=formats), ops, block_size=16).step({0: prompt})[0]
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 0.2


def test_formats_are_ggmls():
    for name, sizes in GGUF_FORMATS.items():
        assert gguf.GGML_QUANT_SIZES[Q[name.upper()]] == sizes
