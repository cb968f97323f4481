"""The table of supported encoders, and what config.json says of one: `EncoderConfig`. Knows no tensors and no torch.

A row of the table holds what transformers' modelling code fixes for the architecture: where its tensors stand, which
keys its configuration has, and what its classification head looks like.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmserve.errors import ModelLoadError
from llmserve.json_fields import JsonFields, read_json
from llmserve.kernels.ops import Activation
from llmserve.models.config import RopeConfig
from llmserve.pooling_config import encoder_stem

HeadPooling = Literal["cls", "mean"]

_MAX_LAYERS = 10_000  # beyond any model; a damaged number must not fill the memory
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderNames:
    """Names of tensors, without the `prefix` that a checkpoint with a head puts before those of its base model."""

    prefix: str
    words: str = "embeddings.word_embeddings.weight"
    positions: str = "embeddings.position_embeddings.weight"  # "": rotary
    token_types: str = ""
    embedding_norm: str = "embeddings.LayerNorm"
    layer: str = "encoder.layer.{}."
    qkv: tuple[str, ...]
    attention_out: str
    attention_norm: str
    up: str
    down: str
    mlp_norm: str
    final_norm: str = ""
    relative_bias: str = ""
    head_dense: str  # of ForSequenceClassification; these names are whole
    head_norm: str = ""
    head_out: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderArchitecture:
    """A row of the table. Configuration keys are those of BERT unless said otherwise."""

    names: EncoderNames
    pre_norm: bool = False  # norms before attention and MLP, and a last one; BERT's stand behind
    gated_mlp: bool = False
    counts_from_padding: bool = False  # the first position is pad_token_id + 1
    head_activation: Activation = "tanh"
    keys: tuple[str, ...] = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    activation_key: str = "hidden_act"
    default_norm_eps: float = 1e-12


_BERT = EncoderNames(
    prefix="bert.",
    token_types="embeddings.token_type_embeddings.weight",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    attention_out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    mlp_norm="output.LayerNorm",
    head_dense="pooler.dense",
    head_out="classifier",
)
_ROBERTA = EncoderNames(
    prefix="roberta.",
    token_types="embeddings.token_type_embeddings.weight",
    qkv=_BERT.qkv,
    attention_out=_BERT.attention_out,
    attention_norm=_BERT.attention_norm,
    up=_BERT.up,
    down=_BERT.down,
    mlp_norm=_BERT.mlp_norm,
    head_dense="classifier.dense",
    head_out="classifier.out_proj",
)
ENCODERS: dict[str, EncoderArchitecture] = {
    "Bert": EncoderArchitecture(names=_BERT),
    "Roberta": EncoderArchitecture(names=_ROBERTA, counts_from_padding=True),
    "XLMRoberta": EncoderArchitecture(names=_ROBERTA, counts_from_padding=True),
    "DistilBert": EncoderArchitecture(
        names=EncoderNames(
            prefix="distilbert.",
            layer="transformer.layer.{}.",
            qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            attention_out="attention.out_lin",
            attention_norm="sa_layer_norm",
            up="ffn.lin1",
            down="ffn.lin2",
            mlp_norm="output_layer_norm",
            head_dense="pre_classifier",
            head_out="classifier",
        ),
        head_activation="relu",
        keys=("dim", "n_layers", "n_heads", "hidden_dim"),
        activation_key="activation",
    ),
    "MPNet": EncoderArchitecture(
        names=EncoderNames(
            prefix="mpnet.",
            qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
            attention_out="attention.attn.o",
            attention_norm="attention.LayerNorm",
            up="intermediate.dense",
            down="output.dense",
            mlp_norm="output.LayerNorm",
            relative_bias="encoder.relative_attention_bias.weight",
            head_dense="classifier.dense",
            head_out="classifier.out_proj",
        ),
        counts_from_padding=True,
    ),
    "ModernBert": EncoderArchitecture(
        names=EncoderNames(
            prefix="model.",
            words="embeddings.tok_embeddings.weight",
            positions="",
            embedding_norm="embeddings.norm",
            layer="layers.{}.",
            qkv=("attn.Wqkv",),
            attention_out="attn.Wo",
            attention_norm="attn_norm",
            up="mlp.Wi",
            down="mlp.Wo",
            mlp_norm="mlp_norm",
            final_norm="final_norm",
            head_dense="head.dense",
            head_norm="head.norm",
            head_out="classifier",
        ),
        pre_norm=True,
        gated_mlp=True,
        head_activation="gelu",
        activation_key="hidden_activation",
        default_norm_eps=1e-5,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """An encoder in numbers."""

    architecture: EncoderArchitecture
    where: str  # the file, for messages
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    first_position: int  # row of the table of positions that a sequence's first token takes
    num_positions: int  # a sequence's at most
    num_token_types: int  # 0: none
    norm_eps: float
    activation: Activation
    attention_bias: bool
    mlp_bias: bool
    norm_bias: bool
    ropes: tuple[RopeConfig, ...]  # of each layer; () without
    windows: tuple[int, ...]  # of each layer: how far a token sees to either side; 0 is without limit
    head_pooling: HeadPooling
    head_activation: Activation
    head_bias: bool

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.hidden_size // self.num_heads


def read_encoder_config(folder: Path) -> EncoderConfig:
    """Raises ModelLoadError, naming file and key, for what is missing, malformed or not supported."""
    fields = read_json(folder / "config.json")
    names = fields.values.get("architectures")
    stem = encoder_stem(names[0]) if isinstance(names, list) and names and isinstance(names[0], str) else None
    if stem is None:
        known = ", ".join(f"{name}Model" for name in ENCODERS)
        raise fields.error("architectures", f"a list with one encoder ({known}, ...)", names)
    row = ENCODERS[stem]
    _refuse_unsupported(fields)
    hidden_key, layers_key, heads_key, intermediate_key = row.keys
    num_layers = fields.integer(layers_key, maximum=_MAX_LAYERS)
    hidden_size, num_heads = fields.integer(hidden_key), fields.integer(heads_key)
    if hidden_size % num_heads or hidden_size // num_heads % 2:
        raise fields.error(heads_key, f"a number that divides {hidden_size} into heads of even size", num_heads)
    first = fields.integer("pad_token_id", 1, minimum=0) + 1 if row.counts_from_padding else 0
    ropes, windows = _modernbert_layers(fields, num_layers) if row.pre_norm else ((), (0,) * num_layers)
    return EncoderConfig(
        architecture=row,
        where=fields.where,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        intermediate_size=fields.integer(intermediate_key),
        vocab_size=fields.integer("vocab_size"),
        first_position=first,
        num_positions=fields.integer("max_position_embeddings", 512, minimum=first + 1) - first,
        num_token_types=fields.integer("type_vocab_size", 2) if row.names.token_types else 0,
        norm_eps=fields.number("norm_eps" if row.pre_norm else "layer_norm_eps", row.default_norm_eps),
        activation=_activation(fields, row.activation_key, "gelu"),
        attention_bias=fields.boolean("attention_bias", False) if row.pre_norm else True,
        mlp_bias=fields.boolean("mlp_bias", False) if row.pre_norm else True,
        norm_bias=fields.boolean("norm_bias", False) if row.pre_norm else True,
        ropes=ropes,
        windows=windows,
        head_pooling=_head_pooling(fields),
        head_activation=_activation(fields, "classifier_activation", row.head_activation),
        head_bias=fields.boolean("classifier_bias", False) if row.pre_norm else True,
    )


def _refuse_unsupported(fields: JsonFields) -> None:
    if (kind := fields.string("position_embedding_type", "absolute")) != "absolute":
        raise ModelLoadError(f"{fields.where}: position_embedding_type {kind!r} is not supported, only 'absolute'.")
    for key in ("is_decoder", "add_cross_attention"):
        if fields.boolean(key, False):
            raise ModelLoadError(f"{fields.where}: {key!r} is not supported: this must be an encoder.")
    if fields.has("quantization_config"):
        raise ModelLoadError(f"{fields.where}: quantised weights are not supported. Use the unquantised model.")


def _activation(fields: JsonFields, key: str, default: Activation) -> Activation:
    if not fields.has(key):
        return default
    name = fields.string(key, "")
    if name not in _ACTIVATIONS:
        raise fields.error(key, f"of {', '.join(_ACTIVATIONS)}", name)
    return _ACTIVATIONS[name]


def _head_pooling(fields: JsonFields) -> HeadPooling:
    name = fields.string("classifier_pooling", "cls")
    if name not in ("cls", "mean"):
        raise fields.error("classifier_pooling", "'cls' or 'mean'", name)
    return "cls" if name == "cls" else "mean"


def _modernbert_layers(fields: JsonFields, num_layers: int) -> tuple[tuple[RopeConfig, ...], tuple[int, ...]]:
    """Each layer's rotary embedding and window: every n-th layer attends globally, the others locally."""
    kinds = fields.values.get("layer_types")
    if kinds is None:
        every = fields.integer("global_attn_every_n_layers", 3)
        kinds = ["sliding_attention" if layer % every else "full_attention" for layer in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise fields.error("layer_types", f"{num_layers} of 'full_attention' and 'sliding_attention'", kinds)
    ropes = {
        "full_attention": _rope(fields, "full_attention", fields.number("global_rope_theta", 160_000.0)),
        "sliding_attention": _rope(fields, "sliding_attention", fields.number("local_rope_theta", 10_000.0)),
    }
    reach = fields.integer("local_attention", 128, minimum=2) // 2
    windows = tuple(reach if kind == "sliding_attention" else 0 for kind in kinds)
    return tuple(ropes[kind] for kind in kinds), windows


def _rope(fields: JsonFields, kind: str, default_theta: float) -> RopeConfig:
    rope = fields.child("rope_parameters").child(kind)
    if fields.has("rope_scaling") or rope.string("rope_type", "default") != "default":
        raise ModelLoadError(f"{fields.where}: scaled rotary embeddings are not supported in an encoder.")
    return RopeConfig(theta=rope.number("rope_theta", default_theta))
