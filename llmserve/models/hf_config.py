"""Reads the config.json of a Hugging Face folder into a `ModelConfig`. Knows no weights and no torch.

Both spellings of transformers are read: `rope_parameters` and `dtype` (5.x; nested by layer type for Gemma 3), and
`rope_theta`, `rope_scaling`, `rope_local_base_freq` and `torch_dtype` (before).
"""

from __future__ import annotations

from pathlib import Path

from llmserve.errors import ModelLoadError
from llmserve.json_fields import JsonFields, read_json
from llmserve.models.architectures import ARCHITECTURES, Architecture, causal_name, find_architecture
from llmserve.models.checkpoint_quantization import read_quantization
from llmserve.models.config import Activation, ModelConfig, RopeConfig, yarn_magnitude
from llmserve.models.moe import read_moe

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_MAX_LAYERS = 10_000  # beyond any model; a damaged number must not fill the memory
_DTYPES = ("float32", "float16", "bfloat16")
_ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def config_from_folder(folder: Path) -> ModelConfig:
    """Raises ModelLoadError for a missing or malformed config.json, and for what it asks that is not supported."""
    path = folder / "config.json"
    fields = read_json(path)
    names = fields.values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelLoadError(
            f"{path}: 'architectures' must be a list with one name. Supported: {', '.join(sorted(ARCHITECTURES))}."
        )
    architecture = causal_name(names[0])
    row = find_architecture(architecture, str(path))
    _refuse_unsupported(fields)
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    num_layers = fields.integer("num_hidden_layers", maximum=_MAX_LAYERS)
    head_dim = fields.integer("head_dim", hidden_size // num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise ModelLoadError(
            f"{path}: {num_heads} query heads cannot share {num_kv_heads} key/value heads of size {head_dim}: "
            "the first must be a multiple of the second, and the size even."
        )
    rope, rope_local = _ropes(fields, row)
    return ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        rope_local=rope_local,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", row.tied_by_default),
        qkv_bias=fields.boolean("attention_bias", False) if row.qkv_bias is None else _qkv_bias(fields, row.qkv_bias),
        o_bias=fields.boolean("attention_bias", False) if row.o_bias is None else row.o_bias,
        mlp_bias=fields.boolean("mlp_bias", False) if row.mlp_bias is None else row.mlp_bias,
        qk_norm=row.qk_norm,
        post_norms=row.gemma,
        norm_weight_offset=1.0 if row.gemma else 0.0,
        sliding_windows=_sliding_windows(fields, row, num_layers),
        attention_soft_cap=fields.number("attn_logit_softcapping", 0.0),
        logits_soft_cap=fields.number("final_logit_softcapping", 0.0),
        embedding_scale=hidden_size**0.5 if row.gemma else 1.0,
        query_scale=(fields.number("query_pre_attn_scalar", 256.0) if row.gemma else head_dim) ** -0.5,
        activation=_activation(fields, row),
        attention_sinks=row.attention_sinks,
        moe=read_moe(architecture, fields, num_layers),
        quantization=read_quantization(fields),
        dtype=_dtype(fields),
    )


def _qkv_bias(fields: JsonFields, has_bias: bool) -> bool:
    return fields.boolean("qkv_bias", has_bias)  # a key of Qwen2-MoE's alone


def _refuse_unsupported(fields: JsonFields) -> None:
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise ModelLoadError(f"{fields.where}: 'partial_rotary_factor' other than 1 is not supported.")
    if fields.boolean("use_bidirectional_attention", False):
        raise ModelLoadError(f"{fields.where}: 'use_bidirectional_attention' is not supported.")


def _activation(fields: JsonFields, row: Architecture) -> Activation:
    key = "hidden_activation" if fields.has("hidden_activation") or row.gemma else "hidden_act"
    name = fields.string(key, row.default_activation)
    if name not in _ACTIVATIONS:
        raise ModelLoadError(
            f"{fields.where}: {key} {name!r} is not supported. Supported: {', '.join(sorted(_ACTIVATIONS))}."
        )
    return _ACTIVATIONS[name]


def _dtype(fields: JsonFields) -> str:
    name = fields.string("dtype" if fields.has("dtype") else "torch_dtype", "float32")
    if name not in _DTYPES:
        raise ModelLoadError(f"{fields.where}: dtype {name!r} is not supported. Supported: {', '.join(_DTYPES)}.")
    return name


def _sliding_windows(fields: JsonFields, row: Architecture, num_layers: int) -> tuple[int, ...]:
    """The window of each layer, 0 for full attention."""
    window = fields.integer("sliding_window", 0, minimum=0)
    if row.sliding == "none" or not fields.boolean("use_sliding_window", row.sliding != "last"):
        window = 0
    if row.sliding == "all" or not window:
        return (window,) * num_layers
    kinds = fields.values.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise fields.error("layer_types", f"a list of {num_layers} names", kinds)
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown:
            raise fields.error("layer_types", "'full_attention' or 'sliding_attention' for each layer", sorted(unknown))
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if row.sliding == "last":
        first = fields.integer("max_window_layers", num_layers, minimum=0)
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    pattern = fields.integer("sliding_window_pattern", row.default_sliding_pattern)
    return tuple(window if (layer + 1) % pattern else 0 for layer in range(num_layers))


def _ropes(fields: JsonFields, row: Architecture) -> tuple[RopeConfig, RopeConfig | None]:
    """The model's rotary embedding, and that of its sliding layers where the architecture tells them apart."""
    theta = fields.number("rope_theta", row.default_rope_theta)
    # transformers lets `rope_scaling` win where both are given.
    rope = fields.child("rope_scaling" if fields.has("rope_scaling") else "rope_parameters")
    if row.local_rope_theta is None:
        return _rope(rope, theta, fields), None
    local_theta = fields.number("rope_local_base_freq", row.local_rope_theta)
    local = JsonFields(rope.where, {})
    if rope.has("full_attention") or rope.has("sliding_attention"):
        rope, local = rope.child("full_attention"), rope.child("sliding_attention")
    return _rope(rope, theta, fields), _rope(local, local_theta, fields)


def _rope(rope: JsonFields, default_theta: float, fields: JsonFields) -> RopeConfig:
    kind = rope.string("rope_type", rope.string("type", "default"))
    theta = rope.number("rope_theta", default_theta)
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise ModelLoadError(f"{rope.where}: 'partial_rotary_factor' other than 1 is not supported.")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=rope.number("factor"))
    original = rope.integer("original_max_position_embeddings", fields.integer("max_position_embeddings"))
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            kind="llama3",
            factor=rope.number("factor"),
            original_max_position_embeddings=original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    if kind == "yarn":
        factor = rope.number("factor", fields.integer("max_position_embeddings") / original)
        return RopeConfig(
            theta=theta,
            kind="yarn",
            factor=factor,
            original_max_position_embeddings=original,
            attention_factor=rope.number("attention_factor", _yarn_attention_factor(rope, factor)),
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            truncate=rope.boolean("truncate", True),
        )
    raise ModelLoadError(f"{rope.where}: rope type {kind!r} is not supported. Supported: {', '.join(_ROPE_KINDS)}.")


def _yarn_attention_factor(rope: JsonFields, factor: float) -> float:
    """0.1 ln(factor) + 1, or a quotient of two such where DeepSeek's `mscale` pair is given."""
    mscale, mscale_all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if mscale and mscale_all_dim:
        return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all_dim)
    return yarn_magnitude(factor, 1.0)
