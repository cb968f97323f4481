"""Reads the metadata of a GGUF file into a `ModelConfig`. Knows no weights and no torch.

What the metadata leaves unsaid, llama.cpp knows by the architecture's name; this file and the table in
`architectures.py` say the same (llama.cpp's src/llama-model.cpp is the source of the keys and of the Gemma rules).
"""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path

from llmserve.errors import ModelLoadError
from llmserve.gguf_file import GGUFFile, read_gguf
from llmserve.models.architectures import ARCHITECTURES, GGUF_ARCHITECTURES
from llmserve.models.config import ModelConfig, MoEConfig, RopeConfig, yarn_magnitude
from llmserve.models.moe import MOE_ARCHITECTURES

_FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ROPE_FACTORS = "rope_freqs.weight"
# Models whose q.k is scaled by sqrt(hidden / heads) and not sqrt(head_dim): (architecture, layers) of the 27B ones.
_GEMMA_27B = {("gemma2", 46), ("gemma3", 62)}


def config_from_gguf(path: Path) -> ModelConfig:
    """Raises ModelLoadError for a damaged file, a missing key, and for what is not supported."""
    file = read_gguf(path)
    reader = _Metadata(file)
    architecture = _architecture(reader)
    row = ARCHITECTURES[architecture]
    num_layers, hidden_size = reader.integer("block_count"), reader.integer("embedding_length")
    reader.tensor_shape(f"blk.{num_layers - 1}.attn_norm.weight")  # before anything is made for each layer
    num_heads = reader.integer("attention.head_count")
    num_kv_heads = reader.integer("attention.head_count_kv", num_heads)
    head_dim = reader.integer("attention.key_length", hidden_size // num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise ModelLoadError(f"{path}: {num_heads} query heads cannot share {num_kv_heads} heads of size {head_dim}.")
    rope = _rope(reader, row.default_rope_theta, head_dim)
    local_theta = reader.number("rope.freq_base_swa", row.local_rope_theta or 0.0)
    query_size = hidden_size // num_heads if (reader.arch, num_layers) in _GEMMA_27B else head_dim
    return ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=reader.integer("feed_forward_length"),
        vocab_size=reader.tensor_shape("token_embd.weight")[0],
        max_position_embeddings=reader.integer("context_length"),
        rms_norm_eps=reader.number("attention.layer_norm_rms_epsilon"),
        rope=rope,
        rope_local=RopeConfig(theta=local_theta) if row.local_rope_theta is not None else None,
        tie_word_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm=row.qk_norm,
        post_norms=row.gemma,
        sliding_windows=_sliding_windows(reader, row.default_sliding_pattern, num_layers),
        attention_soft_cap=reader.number("attn_logit_softcapping", 0.0),
        logits_soft_cap=reader.number("final_logit_softcapping", 0.0),
        embedding_scale=hidden_size**0.5 if row.gemma else 1.0,
        query_scale=query_size**-0.5,
        activation="gelu_tanh" if row.gemma else "silu",
        moe=_moe(reader, architecture),
        dtype=_dtype(file),
    )


class _Metadata:
    """Typed access to the keys of the file's own architecture."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.arch: str = file.require("general.architecture", str)
        if self.arch not in GGUF_ARCHITECTURES:
            raise ModelLoadError(
                f"{file.path}: the GGUF architecture {self.arch!r} is not supported. "
                f"Supported: {', '.join(sorted(GGUF_ARCHITECTURES))}."
            )

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.file.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:  # one number a layer, all the same
            value = value[0]
        if not isinstance(value, int) or value < 1:
            raise self._error(key, "a positive integer", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.file.metadata.get(f"{self.arch}.{key}", default)
        if not isinstance(value, int | float):
            raise self._error(key, "a number", value)
        return float(value)

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        if name not in self.file.tensors:
            raise ModelLoadError(f"{self.file.path}: the tensor {name!r} is missing.")
        return self.file.tensors[name].shape

    def _error(self, key: str, wanted: str, got: object) -> ModelLoadError:
        found = "it is missing" if got is None else f"it is {got!r}"
        return ModelLoadError(f"{self.file.path}: the metadata key '{self.arch}.{key}' must be {wanted}; {found}.")


def _architecture(reader: _Metadata) -> str:
    """Hugging Face's name of it: llama.cpp tells Mixtral from Llama by its experts."""
    if reader.arch == "llama" and reader.number("expert_count", 0):
        return "MixtralForCausalLM"
    return GGUF_ARCHITECTURES[reader.arch]


def _moe(reader: _Metadata, architecture: str) -> MoEConfig | None:
    """The mixture of experts, every layer one; what is not in the file is in llama.cpp's build_moe_ffn calls."""
    row = MOE_ARCHITECTURES.get(architecture)
    if row is None:
        return None
    size_key = "feed_forward_length" if architecture == "MixtralForCausalLM" else "expert_feed_forward_length"
    return MoEConfig(
        names=row.names,
        num_experts=reader.integer("expert_count"),
        num_experts_per_token=reader.integer("expert_used_count"),
        intermediate_size=reader.integer(size_key),
        shared_intermediate_size=reader.integer("expert_shared_feed_forward_length") if row.shared != "none" else 0,
        has_shared_gate=row.shared_gate,
        renormalize=architecture != "Qwen2MoeForCausalLM",
    )


def _rope(reader: _Metadata, default_theta: float, head_dim: int) -> RopeConfig:
    theta = reader.number("rope.freq_base", default_theta)
    rotated = reader.integer("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ModelLoadError(f"{reader.file.path}: rotating {rotated} of {head_dim} elements is not supported.")
    if _ROPE_FACTORS in reader.file.tensors:
        return RopeConfig(theta=theta, kind="factors", freq_factors=_rope_factors(reader.file, head_dim))
    kind = reader.file.metadata.get(f"{reader.arch}.rope.scaling.type", "none")
    factor = reader.number("rope.scaling.factor", 1.0)
    if kind == "none" or factor == 1.0:
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    if kind == "yarn":
        return RopeConfig(
            theta=theta,
            kind="yarn",
            factor=factor,
            original_max_position_embeddings=reader.integer("rope.scaling.original_context_length"),
            attention_factor=yarn_magnitude(factor, 1.0) * reader.number("rope.scaling.attn_factor", 1.0),
            beta_fast=reader.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=reader.number("rope.scaling.yarn_beta_slow", 1.0),
        )
    raise ModelLoadError(f"{reader.file.path}: rope scaling {kind!r} is not supported. Supported: none, linear, yarn.")


def _rope_factors(file: GGUFFile, head_dim: int) -> tuple[float, ...]:
    tensor = file.tensors[_ROPE_FACTORS]
    if tensor.type_name != "F32" or tensor.shape != (head_dim // 2,):
        raise ModelLoadError(
            f"{file.path}: the tensor {_ROPE_FACTORS!r} must be F32 [{head_dim // 2}]; "
            f"it is {tensor.type_name} {list(tensor.shape)}."
        )
    return struct.unpack_from(f"<{head_dim // 2}f", file.map(), tensor.offset)


def _sliding_windows(reader: _Metadata, pattern: int, num_layers: int) -> tuple[int, ...]:
    """With a pattern n all but each n-th layer slide (Gemma); without one, all or none (Mistral as "llama")."""
    window = int(reader.number("attention.sliding_window", 0.0))
    if reader.arch.startswith("qwen"):  # their files carry the number, their models do not use it
        window = 0
    return tuple(window if not pattern or (layer + 1) % pattern else 0 for layer in range(num_layers))


def _dtype(file: GGUFFile) -> str:
    """The type most matrices have; quantised ones have no torch type, bfloat16 holds what they hold."""
    types = Counter(tensor.type_name for tensor in file.tensors.values() if len(tensor.shape) == 2)
    return _FLOAT_DTYPES.get(types.most_common(1)[0][0], "bfloat16")
