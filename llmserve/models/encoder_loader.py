"""Builds an encoder from its safetensors: each matrix is read, packed by the ops and forgotten before the next."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from llmserve.errors import ModelLoadError
from llmserve.kernels.ops import LinearWeight, Ops
from llmserve.kernels.weight_formats import DENSE, GGUF_FORMATS, INT8
from llmserve.models.encoder import (
    BertEmbeddings,
    BertEncoder,
    EncoderAttention,
    EncoderLayer,
    GeluGatedMLP,
    LayerNorm,
    ModernBertEncoder,
    PlainMLP,
)
from llmserve.models.encoder_config import EncoderConfig
from llmserve.models.loader import allocate
from llmserve.models.parameters import Shape
from llmserve.models.renamed_weights import RenamedWeights
from llmserve.models.rope import build_cos_sin
from llmserve.models.safetensors_weights import SafetensorsWeights
from llmserve.models.weights import WeightSource

_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_IGNORED = ("embeddings.position_ids", "rotary_emb.inv_freq")  # buffers of old checkpoints, which follow from the rest
_BUCKETS, _MAX_DISTANCE = 32, 128  # of MPNet's relative positions (T5's): fixed in its code


def open_encoder_weights(folder: Path, config: EncoderConfig) -> WeightSource:
    """The folder's safetensors, by the names of the table. Reads headers only. Raises ModelLoadError."""
    prefix = config.architecture.names.prefix

    def rename(name: str) -> str:
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        return name.removeprefix(prefix)

    return RenamedWeights(SafetensorsWeights(folder), rename)


class ParameterReader:
    """Turns named tensors into parameters on a device: what is missing or misshapen is an error that names it."""

    def __init__(
        self, source: WeightSource, ops: Ops, dtype: torch.dtype, device: torch.device, fmt: str = DENSE
    ) -> None:
        """Matrices are packed in `fmt`, or dense in `dtype` where their rows are not whole blocks of it."""
        self._source = source
        self._ops = ops
        self._dtype = dtype
        self._device = device
        self._format = fmt
        self._used: set[str] = set()

    def matrix(self, names: tuple[str, ...], shape: Shape, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The named tensors stacked to `shape`, in `dtype` or the model's."""
        stacked = allocate(shape, dtype or self._dtype, self._device)
        for name, part in zip(names, torch.chunk(stacked, len(names)), strict=True):
            self._check(name, tuple(part.shape))
            self._source.read(name, part)
        return stacked

    def vector(self, name: str, size: int) -> torch.Tensor:
        """float32 [size]."""
        return self.matrix((name,), (size,), torch.float32)

    def linear(self, names: tuple[str, ...], out_features: int, in_features: int, bias: bool) -> LinearWeight:
        """The packed product of the named layers, stacked."""
        weight = self.matrix(tuple(f"{name}.weight" for name in names), (out_features, in_features))
        biases = tuple(f"{name}.bias" for name in names)
        offset = self.matrix(biases, (out_features,), torch.float32) if bias else None
        block = 1 if self._format in (DENSE, INT8) else GGUF_FORMATS[self._format][0]
        return self._ops.pack_linear(weight, offset, DENSE if in_features % block else self._format)

    def norm(self, name: str, size: int, eps: float, bias: bool) -> LayerNorm:
        """A LayerNorm in float32."""
        offset = self.vector(f"{name}.bias", size) if bias else None
        return LayerNorm(self.vector(f"{name}.weight", size), offset, eps)

    def refuse_unread(self, roots: set[str]) -> None:
        """Raises ModelLoadError if a tensor below one of these first names was not asked for."""
        unread = self._source.shapes.keys() - self._used
        for name in sorted(unread):
            if name.partition(".")[0] in roots and not name.endswith(_IGNORED):
                raise ModelLoadError(
                    f"{self._source.where}: the tensor {name!r} is not known to this architecture; ignoring weights "
                    "would change the model."
                )

    def _check(self, name: str, shape: Shape) -> None:
        found = self._source.shapes.get(name)
        if found is None:
            raise ModelLoadError(f"{self._source.where}: the tensor {name!r} is missing.")
        if found != shape:
            raise ModelLoadError(
                f"{self._source.where}: the tensor {name!r} has the shape {list(found)}, but this configuration needs "
                f"{list(shape)}."
            )
        self._used.add(name)


def load_encoder(
    reader: ParameterReader, config: EncoderConfig, ops: Ops, device: torch.device, max_model_len: int
) -> BertEncoder | ModernBertEncoder:
    """Raises ModelLoadError for a tensor that is missing, misshapen or one too many."""
    names, hidden, eps = config.architecture.names, config.hidden_size, config.norm_eps
    num_positions = min(max_model_len, config.num_positions)
    words = reader.matrix((names.words,), (config.vocab_size, hidden))
    norm = reader.norm(names.embedding_norm, hidden, eps, config.norm_bias)
    tables = {rope: build_cos_sin(rope, config.head_dim, num_positions, device) for rope in set(config.ropes)}
    bias = _relative_bias(reader, config, num_positions, device) if names.relative_bias else None
    layers = []
    for layer in range(config.num_layers):
        cos_sin = tables[config.ropes[layer]] if config.ropes else None
        layers.append(_load_layer(reader, config, ops, layer, cos_sin, bias))
    encoder: BertEncoder | ModernBertEncoder
    if config.architecture.pre_norm:
        final_norm = reader.norm(names.final_norm, hidden, eps, config.norm_bias)
        encoder = ModernBertEncoder(ops, words, norm, layers, final_norm)
    else:
        places = _places(reader, config, num_positions)
        embeddings = BertEmbeddings(ops=ops, words=words, places=places, num_positions=num_positions, norm=norm)
        encoder = BertEncoder(ops, embeddings, layers)
    reader.refuse_unread({name.partition(".")[0] for name in (names.words, names.layer, names.final_norm) if name})
    return encoder


def _load_layer(
    reader: ParameterReader,
    config: EncoderConfig,
    ops: Ops,
    layer: int,
    cos_sin: torch.Tensor | None,
    relative_bias: torch.Tensor | None,
) -> EncoderLayer:
    names, hidden, intermediate = config.architecture.names, config.hidden_size, config.intermediate_size
    prefix, gated = names.layer.format(layer), config.architecture.gated_mlp
    qkv = tuple(f"{prefix}{name}" for name in names.qkv)
    attention = EncoderAttention(
        ops=ops,
        head_dim=config.head_dim,
        qkv=reader.linear(qkv, 3 * hidden, hidden, config.attention_bias),
        out=reader.linear((f"{prefix}{names.attention_out}",), hidden, hidden, config.attention_bias),
        window=config.windows[layer],
        cos_sin=cos_sin,
        relative_bias=relative_bias,
    )
    up = reader.linear((f"{prefix}{names.up}",), intermediate * (2 if gated else 1), hidden, config.mlp_bias)
    down = reader.linear((f"{prefix}{names.down}",), hidden, intermediate, config.mlp_bias)
    mlp: PlainMLP | GeluGatedMLP = PlainMLP(ops=ops, up=up, down=down, activation=config.activation)
    if gated:
        if config.activation != "gelu":
            raise ModelLoadError(f"{config.where}: the gate's activation must be 'gelu'; it is {config.activation!r}.")
        mlp = GeluGatedMLP(ops=ops, up=up, down=down)
    has_attention_norm = layer > 0 or not config.architecture.pre_norm
    attention_norm = f"{prefix}{names.attention_norm}"
    return EncoderLayer(
        attention=attention,
        mlp=mlp,
        attention_norm=(
            reader.norm(attention_norm, hidden, config.norm_eps, config.norm_bias) if has_attention_norm else None
        ),
        mlp_norm=reader.norm(f"{prefix}{names.mlp_norm}", hidden, config.norm_eps, config.norm_bias),
    )


def _places(reader: ParameterReader, config: EncoderConfig, num_positions: int) -> torch.Tensor:
    """float32 [token types * num_positions, hidden]."""
    names, hidden, first = config.architecture.names, config.hidden_size, config.first_position
    positions = reader.matrix((names.positions,), (first + config.num_positions, hidden), torch.float32)
    positions = positions[first : first + num_positions]
    if not names.token_types:
        return positions.clone()
    types = reader.matrix((names.token_types,), (config.num_token_types, hidden), torch.float32)
    return (types[:, None] + positions).flatten(0, 1)


def _relative_bias(
    reader: ParameterReader, config: EncoderConfig, num_positions: int, device: torch.device
) -> torch.Tensor:
    """MPNet's bias for every distance, key minus query: float32 [heads, 2 * num_positions - 1].

    T5's buckets (Raffel et al. 2020): a half for each direction; of a half, one part exact, the rest logarithmic.
    """
    name = config.architecture.names.relative_bias
    by_bucket = reader.matrix((name,), (_BUCKETS, config.num_heads), torch.float32)
    half, exact = _BUCKETS // 2, _BUCKETS // 4
    relative = torch.arange(1 - num_positions, num_positions, device=device)
    distance = relative.abs()
    logarithm = torch.log(distance.clamp(min=1).float() / exact) / math.log(_MAX_DISTANCE / exact)
    far = (exact + (logarithm * (half - exact)).long()).clamp(max=half - 1)
    bucket = torch.where(distance < exact, distance, far) + half * (relative > 0)
    return by_bucket[bucket].T.contiguous()
