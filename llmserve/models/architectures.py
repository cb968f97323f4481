"""The table of supported architectures: one row each, what its config.json leaves unsaid. Knows no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmserve.errors import ModelLoadError


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How one architecture differs from Llama. A bias that is None is said by config.json's `bias_key`."""

    qkv_bias: bool | None = False
    o_bias: bool | None = False
    mlp_bias: bool | None = False
    qk_norm: bool = False
    tied_by_default: bool = False
    default_activation: str = "silu"
    # "none"; "all": every layer, `sliding_window` wide; "last": layers from max_window_layers on, if
    # use_sliding_window; "pattern": all but each n-th layer, n being sliding_window_pattern
    sliding: Literal["none", "all", "last", "pattern"] = "none"
    default_sliding_pattern: int = 0
    gemma: bool = False  # post-norms, norm weights stored minus one, scaled embeddings, its own query scale
    default_rope_theta: float = 10_000.0
    local_rope_theta: float | None = None  # sliding layers rotate by their own theta
    attention_sinks: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(qkv_bias=None, o_bias=None, mlp_bias=None),
    "MistralForCausalLM": Architecture(sliding="all"),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, sliding="last"),
    "Qwen3ForCausalLM": Architecture(qkv_bias=None, o_bias=None, qk_norm=True, sliding="last"),
    "Gemma2ForCausalLM": Architecture(
        qkv_bias=None,
        o_bias=None,
        tied_by_default=True,
        default_activation="gelu_pytorch_tanh",
        sliding="pattern",
        default_sliding_pattern=2,
        gemma=True,
    ),
    "Gemma3ForCausalLM": Architecture(
        qkv_bias=None,
        o_bias=None,
        qk_norm=True,
        tied_by_default=True,
        default_activation="gelu_pytorch_tanh",
        sliding="pattern",
        default_sliding_pattern=6,
        gemma=True,
        default_rope_theta=1_000_000.0,
        local_rope_theta=10_000.0,
    ),
    # Mixtures of experts: what their feed-forward layers are is said in moe.py.
    "MixtralForCausalLM": Architecture(sliding="all", default_rope_theta=1_000_000.0),
    "Qwen2MoeForCausalLM": Architecture(qkv_bias=True, sliding="last"),
    "Qwen3MoeForCausalLM": Architecture(qkv_bias=None, o_bias=None, qk_norm=True, sliding="all"),
    "Dots1ForCausalLM": Architecture(qkv_bias=None, o_bias=None, qk_norm=True, sliding="last"),
    "GptOssForCausalLM": Architecture(
        qkv_bias=None,
        o_bias=None,
        sliding="pattern",
        default_sliding_pattern=2,
        default_rope_theta=150_000.0,
        attention_sinks=True,
    ),
}

GGUF_ARCHITECTURES: dict[str, str] = {  # llama.cpp files Mistral and Mixtral under "llama"
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "qwen2moe": "Qwen2MoeForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}


def causal_name(name: str) -> str:
    """The architecture whose layers a class without the language model's head has: Qwen3ForCausalLM of Qwen3Model."""
    for suffix in ("Model", "ForSequenceClassification"):
        causal = f"{name.removesuffix(suffix)}ForCausalLM"
        if name.endswith(suffix) and causal in ARCHITECTURES:
            return causal
    return name


def find_architecture(name: str, where: str) -> Architecture:
    """The row of `name`; `where` is the file that asks for it. Raises ModelLoadError listing what is supported."""
    if name not in ARCHITECTURES:
        raise ModelLoadError(
            f"{where}: the architecture {name!r} is not supported. Supported: {', '.join(sorted(ARCHITECTURES))}."
        )
    return ARCHITECTURES[name]
