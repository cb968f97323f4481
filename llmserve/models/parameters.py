"""Which tensors a decoder needs, by Hugging Face's names: counted and checked before a byte is loaded. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from llmserve.errors import ModelLoadError
from llmserve.models.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
# Matrices with one input are stacked into one: name -> the tensors it is made of, and which bias they have.
_LAYER_LINEARS = {
    "self_attn.qkv_proj": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "qkv_bias"),
    "self_attn.o_proj": (("self_attn.o_proj",), "o_bias"),
    "mlp.gate_up_proj": (("mlp.gate_proj", "mlp.up_proj"), "mlp_bias"),
    "mlp.down_proj": (("mlp.down_proj",), "mlp_bias"),
}
_NORM_BYTES = 4  # norm weights are kept in float32 whatever the model's type
_MAX_NAMES_IN_ERROR = 5

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LinearParameter:
    """A matrix the model multiplies by. The tensors `<part>.weight` are its rows, `<part>.bias` likewise."""

    name: str
    parts: tuple[str, ...]
    out_features: int
    in_features: int
    has_bias: bool


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of the model, in the order it is loaded: name -> shape."""
    tensors: dict[str, Shape] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        tensors |= {f"{layer_prefix(layer)}{name}": shape for name, shape in _layer_tensors(config).items()}
    tensors[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        tensors[LM_HEAD] = (config.vocab_size, config.hidden_size)
    return tensors


def layer_prefix(layer: int) -> str:
    """What the names of that layer's tensors begin with."""
    return f"model.layers.{layer}."


def count_parameters(config: ModelConfig) -> int:
    """Numbers in the model; tied embeddings count once."""
    return sum(math.prod(shape) for shape in expected_tensors(config).values())


def linear_parameters(config: ModelConfig) -> Iterator[LinearParameter]:
    """Every matrix the model multiplies by, the head last; tied, it is made of the embedding."""
    shapes = expected_tensors(config)
    biases = {"qkv_bias": config.qkv_bias, "o_bias": config.o_bias, "mlp_bias": config.mlp_bias}
    for layer in range(config.num_layers):
        prefix = layer_prefix(layer)
        for name, (stems, bias) in _LAYER_LINEARS.items():
            parts = tuple(f"{prefix}{stem}" for stem in stems)
            sizes = [shapes[f"{part}.weight"] for part in parts]
            rows = sum(size[0] for size in sizes)
            yield LinearParameter(f"{prefix}{name}", parts, rows, sizes[0][1], biases[bias])
    head = EMBEDDING if config.tie_word_embeddings else LM_HEAD
    name, part = (tensor.removesuffix(".weight") for tensor in (LM_HEAD, head))
    yield LinearParameter(name, (part,), config.vocab_size, config.hidden_size, has_bias=False)


def weight_bytes(config: ModelConfig, dtype_bytes: int, linear_bytes: Callable[[LinearParameter], int]) -> int:
    """Bytes of memory the loaded weights take at most; `linear_bytes` tells what a packed matrix does.

    Tied embeddings count twice: a head packed for multiplication cannot also be looked up by row. (An implementation
    that multiplies by the plain matrix shares it and takes less.)
    """
    tensors = expected_tensors(config)
    norms = sum(math.prod(shape) for name, shape in tensors.items() if _is_norm(name))
    matrices = sum(map(linear_bytes, linear_parameters(config)))
    return math.prod(tensors[EMBEDDING]) * dtype_bytes + matrices + norms * _NORM_BYTES


def check_tensors(config: ModelConfig, found: Mapping[str, Shape], where: str) -> None:
    """Raises ModelLoadError if a tensor is missing, of another shape, or one too many; `where` names the files."""
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in found]
    if missing:
        raise ModelLoadError(f"{where}: {_list_names(missing)} missing: the files are incomplete or of another model.")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ModelLoadError(
                f"{where}: the tensor {name!r} has the shape {list(found[name])}, "
                f"but a {config.architecture} of this configuration needs {list(shape)}."
            )
    # Old checkpoints carry the rotary frequencies, which follow from the configuration, and tied heads twice.
    extra = [name for name in found if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    if config.tie_word_embeddings:
        extra = [name for name in extra if name != LM_HEAD]
    if extra:
        raise ModelLoadError(
            f"{where}: {_list_names(extra)} not known to a {config.architecture} of this configuration; "
            "ignoring weights would change the model."
        )


def _layer_tensors(config: ModelConfig) -> dict[str, Shape]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = {
        "self_attn.q_proj": (q_size, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q_size, config.o_bias),
        "mlp.gate_proj": (intermediate, hidden, config.mlp_bias),
        "mlp.up_proj": (intermediate, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, intermediate, config.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.post_norms:
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    tensors: dict[str, Shape] = {f"{name}.weight": (size,) for name, size in norms.items()}
    for name, (out_features, in_features, has_bias) in matrices.items():
        tensors[f"{name}.weight"] = (out_features, in_features)
        if has_bias:
            tensors[f"{name}.bias"] = (out_features,)
    return tensors


def _is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


def _list_names(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MAX_NAMES_IN_ERROR])
    more = f" and {len(names) - _MAX_NAMES_IN_ERROR} more" if len(names) > _MAX_NAMES_IN_ERROR else ""
    return f"the tensor {shown} is" if len(names) == 1 else f"the tensors {shown}{more} are"
