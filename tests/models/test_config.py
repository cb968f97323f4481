"""Reading configurations: both spellings of transformers, what each architecture leaves unsaid, and every refusal."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from llmserve.errors import ModelLoadError
from llmserve.models.config import RopeConfig, read_model_config
from llmserve.models.parameters import expected_tensors, linear_parameters

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


@pytest.fixture
def read(tmp_path):
    """Writes LLAMA with changes (None removes a key) as config.json, and reads it."""

    def read_changed(**changes):
        values = {key: value for key, value in (LLAMA | changes).items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(values))
        return read_model_config(tmp_path)

    return read_changed


def test_old_and_new_spelling_are_one(read):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = read(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling}, torch_dtype="bfloat16")
    new = read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling}, dtype="bfloat16")
    assert old == new
    assert old.dtype == "bfloat16"
    assert (old.rope.kind, old.rope.theta, old.rope.factor) == ("llama3", 5e5, 8.0)


def test_gemma3_old_and_new_spelling_are_one(read):
    gemma = {"architectures": ["Gemma3ForCausalLM"], "hidden_act": None, "head_dim": 32, "sliding_window": 16}
    gemma |= {"num_hidden_layers": 7, "query_pre_attn_scalar": 25}
    old = read(
        **gemma,
        rope_theta=2e6,
        rope_local_base_freq=3e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=3,
    )
    new = read(
        **gemma,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
        },
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    )
    assert old == new
    assert old.sliding_windows == (16, 16, 0, 16, 16, 0, 16)
    assert old.rope_of_layer(0) == RopeConfig(theta=3e4)
    assert old.rope_of_layer(2) == RopeConfig(theta=2e6, kind="linear", factor=8.0)
    assert (old.query_scale, old.embedding_scale, old.norm_weight_offset) == (0.2, 8.0, 1.0)
    assert old.tie_word_embeddings
    assert old.activation == "gelu_tanh"


def test_defaults_of_architectures(read):
    assert read(architectures=["Qwen2ForCausalLM"]).qkv_bias
    assert not read(architectures=["Qwen2ForCausalLM"]).o_bias
    assert read(architectures=["Qwen3ForCausalLM"], head_dim=32).qk_norm
    assert read(architectures=["MistralForCausalLM"], sliding_window=33).sliding_windows == (33, 33)
    assert read(architectures=["MistralForCausalLM"]).sliding_windows == (0, 0)
    assert read(sliding_window=33).sliding_windows == (0, 0)  # Llama does not slide, whatever its file says
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 5, "max_window_layers": 1}
    assert read(**qwen).sliding_windows == (0, 0)
    assert read(**qwen, use_sliding_window=True).sliding_windows == (0, 5)
    gemma2 = read(architectures=["Gemma2ForCausalLM"], head_dim=32, sliding_window=5)
    assert gemma2.sliding_windows == (5, 0)
    assert gemma2.tie_word_embeddings
    plain = read(num_key_value_heads=None)
    assert (plain.num_kv_heads, plain.head_dim, plain.dtype, plain.rope) == (4, 16, "float32", RopeConfig(theta=1e4))


def test_yarn_attention_factor(read):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert read(rope_parameters=yarn).rope.attention_factor == pytest.approx(1.1386294)
    assert read(rope_parameters=yarn | {"attention_factor": 1.5}).rope.attention_factor == 1.5
    assert read(rope_parameters=yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}).rope.attention_factor == 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ["MambaForCausalLM", "LlamaForCausalLM", "Gemma3ForCausalLM"]),
        ({"architectures": None}, ["architectures"]),
        ({"architectures": []}, ["architectures"]),
        ({"hidden_act": "relu"}, ["relu", "silu"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["longrope", "yarn", "llama3"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling", "factor", "missing"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_hidden_layers": 10**12}, ["num_hidden_layers"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers"]),
        ({"num_key_value_heads": 3}, ["4 query heads", "3 key/value heads"]),
        ({"head_dim": 15}, ["15"]),
        ({"dtype": "int8"}, ["int8", "bfloat16"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings"]),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ["bitsandbytes"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_scaling": [1]}, ["rope_scaling"]),
    ],
)
def test_refusals_name_the_file_and_the_key(read, changes, words):
    with pytest.raises(ModelLoadError) as caught:
        read(**changes)
    for word in ["config.json", *words]:
        assert word in caught.value.message


def test_no_config(tmp_path):
    with pytest.raises(ModelLoadError, match=r"config\.json is missing"):
        read_model_config(tmp_path)
    with pytest.raises(ModelLoadError, match="neither"):
        read_model_config(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json cannot be read"):
        read_model_config(tmp_path)


def test_counts_equal_transformers(tiny):
    _, theirs, folder = tiny
    config = read_model_config(folder)
    corrections = sum(b.numel() for name, b in theirs.named_buffers() if "correction_bias" in name)
    assert sum(map(math.prod, expected_tensors(config).values())) == theirs.num_parameters() + corrections
    norms = sum(p.numel() for name, p in theirs.named_parameters() if "norm" in name or "sinks" in name)
    tied = theirs.model.embed_tokens.weight.numel() if config.tie_word_embeddings else 0
    assert sum(
        matrix.out_features * (matrix.in_features + matrix.has_bias) for matrix in linear_parameters(config)
    ) == (theirs.num_parameters() - norms + tied - theirs.model.embed_tokens.weight.numel())


def test_the_server_process_reads_configurations_without_torch(tiny):
    _, _, folder = tiny
    code = (
        "import sys; from llmserve.models.config import read_model_config;"
        "from llmserve.models.quantization import choose_formats;"
        f"assert choose_formats(read_model_config({str(folder)!r}), {{}}, 'int8', ('int8',));"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
