"""Which tensors a decoder needs, by Hugging Face's names: counted and checked before a byte is loaded. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from llmserve.errors import ModelLoadError
from llmserve.models.config import ModelConfig, MoEConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
_NORM_BYTES = 4  # norm weights and the like are kept in float32 whatever the model's type
_MAX_NAMES_IN_ERROR = 5

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LinearParameter:
    """A matrix the model multiplies by. The tensors `<part>.weight` are its rows, `<part>.bias` likewise."""

    name: str
    parts: tuple[str, ...]
    sizes: tuple[int, ...]  # outputs of each part
    in_features: int
    has_bias: bool
    is_small: bool = False  # it decides much and weighs little: never quantised

    @property
    def out_features(self) -> int:
        """Of all parts together."""
        return sum(self.sizes)


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of the model: name -> shape."""
    tensors: dict[str, Shape] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        for matrix in layer_linears(config, layer):
            for part, size in zip(matrix.parts, matrix.sizes, strict=True):
                tensors[f"{part}.weight"] = (size, matrix.in_features)
                if matrix.has_bias:
                    tensors[f"{part}.bias"] = (size,)
        tensors |= _layer_vectors(config, layer)
    tensors[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        tensors[LM_HEAD] = (config.vocab_size, config.hidden_size)
    return tensors


def layer_prefix(layer: int) -> str:
    """What the names of that layer's tensors begin with."""
    return f"model.layers.{layer}."


def expert_prefix(layer: int, moe: MoEConfig, expert: int) -> str:
    """What the names of that expert's tensors begin with."""
    return f"{layer_prefix(layer)}{moe.names.expert.format(expert)}."


def linear_parameters(config: ModelConfig) -> Iterator[LinearParameter]:
    """Every matrix the model multiplies by, the head last; tied, it is made of the embedding."""
    for layer in range(config.num_layers):
        yield from layer_linears(config, layer)
    head = EMBEDDING if config.tie_word_embeddings else LM_HEAD
    name, part = (tensor.removesuffix(".weight") for tensor in (LM_HEAD, head))
    yield LinearParameter(name, (part,), (config.vocab_size,), config.hidden_size, has_bias=False)


def layer_linears(config: ModelConfig, layer: int) -> Iterator[LinearParameter]:
    """Those of one layer."""
    prefix, hidden = layer_prefix(layer), config.hidden_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = tuple(f"{prefix}self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
    o = f"{prefix}self_attn.o_proj"
    yield LinearParameter(f"{prefix}self_attn.qkv_proj", qkv, (q_size, kv_size, kv_size), hidden, config.qkv_bias)
    yield LinearParameter(o, (o,), (hidden,), q_size, config.o_bias)
    moe = config.moe_of_layer(layer)
    if moe is None:
        yield from _mlp_linears(f"{prefix}mlp.", hidden, config.intermediate_size, config.mlp_bias)
    else:
        yield from _moe_linears(layer, moe, hidden)


def _mlp_linears(
    prefix: str,
    hidden: int,
    intermediate: int,
    has_bias: bool,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[LinearParameter]:
    gate, up, down = (f"{prefix}{name}" for name in names)
    yield LinearParameter(f"{prefix}gate_up_proj", (gate, up), (intermediate, intermediate), hidden, has_bias)
    yield LinearParameter(f"{prefix}down_proj", (down,), (hidden,), intermediate, has_bias)


def _moe_linears(layer: int, moe: MoEConfig, hidden: int) -> Iterator[LinearParameter]:
    router = f"{layer_prefix(layer)}{moe.names.router}"
    yield LinearParameter(router, (router,), (moe.num_experts,), hidden, moe.has_biases, is_small=True)
    names = (moe.names.gate, moe.names.up, moe.names.down)
    for expert in range(moe.num_experts):
        prefix = expert_prefix(layer, moe, expert)
        yield from _mlp_linears(prefix, hidden, moe.intermediate_size, moe.has_biases, names)
    shared = f"{layer_prefix(layer)}{moe.shared_name}"
    if moe.shared_intermediate_size:
        yield from _mlp_linears(f"{shared}.", hidden, moe.shared_intermediate_size, has_bias=False)
    if moe.has_shared_gate:
        yield LinearParameter(f"{shared}_gate", (f"{shared}_gate",), (1,), hidden, has_bias=False, is_small=True)


def _layer_vectors(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """Norms and what else is no matrix."""
    prefix, hidden = layer_prefix(layer), config.hidden_size
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.post_norms:
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    vectors: dict[str, Shape] = {f"{prefix}{name}.weight": (size,) for name, size in norms.items()}
    if config.attention_sinks:
        vectors[f"{prefix}self_attn.sinks"] = (config.num_heads,)
    moe = config.moe_of_layer(layer)
    if moe is not None and moe.has_correction_bias:
        vectors[correction_bias_name(layer, moe)] = (moe.num_experts,)
    return vectors


def correction_bias_name(layer: int, moe: MoEConfig) -> str:
    """The tensor that is added to a router's scores for the choice."""
    return f"{layer_prefix(layer)}{moe.names.router}.e_score_correction_bias"


def weight_bytes(config: ModelConfig, dtype_bytes: int, linear_bytes: Callable[[LinearParameter], int]) -> int:
    """Bytes of memory the loaded weights take at most; `linear_bytes` tells what a packed matrix does.

    Tied embeddings count twice: a head packed for multiplication cannot also be looked up by row. (An implementation
    that multiplies by the plain matrix shares it and takes less.)
    """
    layers = (_layer_vectors(config, layer) for layer in range(config.num_layers))
    vectors = config.hidden_size + sum(math.prod(shape) for layer in layers for shape in layer.values())
    matrices = sum(map(linear_bytes, linear_parameters(config)))
    return config.vocab_size * config.hidden_size * dtype_bytes + matrices + vectors * _NORM_BYTES


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


def _list_names(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MAX_NAMES_IN_ERROR])
    more = f" and {len(names) - _MAX_NAMES_IN_ERROR} more" if len(names) > _MAX_NAMES_IN_ERROR else ""
    return f"the tensor {shown} is" if len(names) == 1 else f"the tensors {shown}{more} are"
