"""From a model folder to a text model and its head: chooses format and ops, loads weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from llmserve.errors import ConfigError
from llmserve.kernels.cpu.ops import usable_cores
from llmserve.kernels.ops import Ops, PackedSequences
from llmserve.kernels.select import select_ops
from llmserve.kernels.weight_formats import DENSE, INT8, Q8_0
from llmserve.models.encoder_config import EncoderConfig, read_encoder_config
from llmserve.models.encoder_loader import ParameterReader, load_encoder, open_encoder_weights
from llmserve.models.loader import load_model
from llmserve.models.packed_decoder import PackedDecoder, open_decoder
from llmserve.models.pooling import DenseLayer, Head, Pooler
from llmserve.models.quantization import choose_formats
from llmserve.models.safetensors_weights import SafetensorsWeights
from llmserve.pooling_config import PoolingConfig, encoder_stem
from llmserve.pooling_modules import DenseConfig
from llmserve.worker.loader import cpu_computes_bf16

WEIGHT_FORMATS = ("float32", "bfloat16", "float16", Q8_0, INT8)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TextModel(Protocol):
    """An encoder, or a decoder that reads as one."""

    def forward(
        self, token_ids: torch.Tensor, token_types: torch.Tensor | None, sequences: PackedSequences
    ) -> torch.Tensor:
        """int64 [t] each -> hidden states [t, hidden]."""
        ...


class Scorer(Protocol):
    """Makes one row of hidden states for each sequence: an embedding or logits."""

    def forward(self, hidden: torch.Tensor, sequences: PackedSequences) -> torch.Tensor:
        """hidden [t, hidden] -> float32 [n, out]."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Everything `PoolingRunner` runs. A model with labels, or one that judges, has `classify`."""

    model: TextModel
    embed: Scorer
    classify: Scorer | None
    ops: Ops
    device: torch.device
    weight_format: str  # what "auto" became


class WordJudge:
    """The score of a decoder that answers in a word: the logit of yes, less that of no if there is one."""

    def __init__(self, decoder: PackedDecoder) -> None:
        """The decoder's head has a row for each word, yes first."""
        self._decoder = decoder.model

    def forward(self, hidden: torch.Tensor, sequences: PackedSequences) -> torch.Tensor:
        """-> float32 [n, 1]."""
        logits = self._decoder.compute_logits(hidden[sequences.cu_seqlens[1:].long() - 1])
        return logits[:, :1] if logits.shape[1] == 1 else logits[:, :1] - logits[:, 1:]


def load_pooling_model(
    folder: Path,
    config: PoolingConfig,
    weight_format: str,
    num_threads: int | None,
    device: torch.device,
    max_tokens: int,
    max_seqs: int,
) -> LoadedModel:
    """Reads the weights. The limits are of one forward pass. Raises ModelLoadError, ConfigError."""
    is_encoder = encoder_stem(config.architecture) is not None
    encoder_config = read_encoder_config(folder) if is_encoder else None
    head_dim = encoder_config.head_dim if encoder_config else open_decoder(folder, with_head=False)[0].head_dim
    ops, dtype, fmt, resolved = _choose_format(weight_format, device, head_dim, num_threads)
    if device.type == "cpu":
        torch.set_num_threads(num_threads or usable_cores())
    dense = [_dense_layer(folder, layer, ops, device) for layer in config.dense]
    embed = Head(Pooler(ops, config.pooling), dense)
    if encoder_config is not None:
        source = open_encoder_weights(folder, encoder_config)
        reader = ParameterReader(source, ops, dtype, device, fmt)
        encoder = load_encoder(reader, encoder_config, ops, device, config.max_model_len)
        heads = ParameterReader(source, ops, torch.float32, device)
        classify = _encoder_head(heads, encoder_config, ops, len(config.labels)) if config.labels else None
        return LoadedModel(encoder, embed, classify, ops, device, resolved)
    decoder = _load_decoder(folder, config, ops, dtype, device, fmt, max_tokens, max_seqs)
    judge: Scorer | None = WordJudge(decoder) if config.judging_token_ids else None
    if config.labels:
        reader = ParameterReader(SafetensorsWeights(folder), ops, torch.float32, device)
        score = reader.linear(("score",), len(config.labels), config.hidden_size, bias=False)
        judge = Head(Pooler(ops, ("last",)), [DenseLayer(ops=ops, linear=score)])
    return LoadedModel(decoder, embed, judge, ops, device, resolved)


def _choose_format(
    asked: str, device: torch.device, head_dim: int, num_threads: int | None
) -> tuple[Ops, torch.dtype, str, str]:
    """The ops, the type of activations, the format of matrices, and what to call both."""
    if asked not in ("auto", *WEIGHT_FORMATS):
        raise ConfigError(f"The weight format {asked!r} is not known. Choose one of auto, {', '.join(WEIGHT_FORMATS)}.")
    compute = torch.bfloat16 if device.type != "cpu" or cpu_computes_bf16() else torch.float32
    dtype = _DTYPES.get(asked, compute)
    ops = select_ops(device, dtype, head_dim, num_threads)
    if asked == "auto":
        asked = _best_format(device, dtype, ops)
        dtype = _DTYPES.get(asked, dtype)
    fmt = DENSE if asked in _DTYPES else asked
    if fmt not in ops.weight_formats:
        known = ", ".join(_DTYPES)
        raise ConfigError(f"The weight format {asked!r} is not computed by the {ops.name} kernels: choose of {known}.")
    return ops, dtype, fmt, asked


def _best_format(device: torch.device, dtype: torch.dtype, ops: Ops) -> str:
    """bfloat16 where it is computed: it moves a vector by 1e-5, q8_0 by 3e-4 and int8 by 2e-3 in cosine, and q8_0 is
    not faster (benchmarks/bench_embedding_quality.py, bench_embeddings.py). Without the C kernels, a CPU's is
    float32."""
    if device.type == "cpu" and Q8_0 not in ops.weight_formats:
        return "float32"
    return "bfloat16" if dtype == torch.bfloat16 else Q8_0


def _load_decoder(
    folder: Path,
    config: PoolingConfig,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    fmt: str,
    max_tokens: int,
    max_seqs: int,
) -> PackedDecoder:
    model_config, source = open_decoder(folder, with_head=bool(config.judging_token_ids))
    formats = choose_formats(model_config, source.types, "none" if fmt == DENSE else fmt, ops.weight_formats)
    model = load_model(
        source,
        model_config,
        dtype,
        device,
        ops,
        formats,
        max_model_len=config.max_model_len,
        head_token_ids=config.judging_token_ids,
    )
    return PackedDecoder(model, ops, max_tokens, max_seqs)


def _dense_layer(folder: Path, layer: DenseConfig, ops: Ops, device: torch.device) -> DenseLayer:
    reader = ParameterReader(SafetensorsWeights(folder / layer.folder), ops, torch.float32, device)
    linear = reader.linear(("linear",), layer.out_features, layer.in_features, layer.bias)
    activation = None if layer.activation == "identity" else layer.activation
    return DenseLayer(ops=ops, linear=linear, activation=activation)


def _encoder_head(reader: ParameterReader, config: EncoderConfig, ops: Ops, num_labels: int) -> Head:
    """The architecture's own classification head."""
    names, hidden = config.architecture.names, config.hidden_size
    norm = reader.norm(names.head_norm, hidden, config.norm_eps, config.norm_bias) if names.head_norm else None
    dense = reader.linear((names.head_dense,), hidden, hidden, config.head_bias)
    out = reader.linear((names.head_out,), num_labels, hidden, bias=True)
    layers = [
        DenseLayer(ops=ops, linear=dense, activation=config.head_activation, norm=norm),
        DenseLayer(ops=ops, linear=out),
    ]
    return Head(Pooler(ops, (config.head_pooling,)), layers)
