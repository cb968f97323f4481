"""Runs an embedding, reranker or classifier model: packed token ids in, vectors or logits out. Forms no batches."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from llmserve.errors import ModelLoadError
from llmserve.json_fields import read_json
from llmserve.pooling_config import PoolingConfig

PoolingTask = Literal["embed", "token_embed", "classify"]
FloatArray = npt.NDArray[np.float32]


class PoolingRunner:
    """One model on one device. `run` may be called by one thread at a time."""

    def __init__(self, config: PoolingConfig, fields: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        self.config = config
        self._fields = fields
        self._weights = weights

    @classmethod
    def load(
        cls, folder: Path, config: PoolingConfig, weight_format: str = "auto", num_threads: int | None = None
    ) -> PoolingRunner:
        """`weight_format` is "auto", "float32", "bfloat16", "q8_0" or "int8". Raises ModelLoadError, ConfigError."""
        if config.architecture != "BertModel":
            raise ModelLoadError(
                f"{folder / 'config.json'}: the architecture {config.architecture!r} is not supported."
            )
        weights = {k.removeprefix("bert."): v for k, v in load_file(folder / "model.safetensors").items()}
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        return cls(config, read_json(folder / "config.json").values, weights)

    @torch.inference_mode()
    def run(
        self,
        token_ids: npt.NDArray[np.int32],
        token_type_ids: npt.NDArray[np.uint8] | None,
        cu_seqlens: npt.NDArray[np.int32],
        task: PoolingTask,
    ) -> FloatArray:
        """Packed sequences: i owns token_ids[cu_seqlens[i]:cu_seqlens[i+1]], of at least one token and at most
        `config.max_model_len`.

        "embed": [n, dimension], pooled and through the dense layers, not normalised; "token_embed": [tokens,
        hidden_size]; "classify": logits [n, labels].
        """
        bounds = cu_seqlens.tolist()
        types = token_type_ids if token_type_ids is not None else np.zeros_like(token_ids)
        hidden = torch.cat(
            [
                self._forward(
                    torch.from_numpy(token_ids[a:b].astype(np.int64)),
                    torch.from_numpy(types[a:b].astype(np.int64)),
                )
                for a, b in pairwise(bounds)
            ]
        )
        if task == "token_embed":
            return hidden.numpy()
        return torch.stack([hidden[a:b].mean(0) for a, b in pairwise(bounds)]).numpy()

    def _forward(self, ids: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        w, size, eps = self._weights, self._fields["hidden_size"], self._fields["layer_norm_eps"]
        e = "embeddings."
        x = w[e + "word_embeddings.weight"][ids] + w[e + "token_type_embeddings.weight"][types]
        x = x + w[e + "position_embeddings.weight"][: len(ids)]
        x = F.layer_norm(x, (size,), w[e + "LayerNorm.weight"], w[e + "LayerNorm.bias"], eps)
        for layer in range(self._fields["num_hidden_layers"]):
            p = f"encoder.layer.{layer}."

            def linear(name: str, t: torch.Tensor, p: str = p) -> torch.Tensor:
                return F.linear(t, w[f"{p}{name}.weight"], w[f"{p}{name}.bias"])

            heads = self._fields["num_attention_heads"]
            q, k, v = (
                linear(f"attention.self.{n}", x).view(len(ids), heads, -1).transpose(0, 1)
                for n in ("query", "key", "value")
            )
            a = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).reshape(len(ids), size)
            n = f"{p}attention.output.LayerNorm."
            x = F.layer_norm(x + linear("attention.output.dense", a), (size,), w[n + "weight"], w[n + "bias"], eps)
            n = f"{p}output.LayerNorm."
            h = linear("output.dense", F.gelu(linear("intermediate.dense", x)))
            x = F.layer_norm(x + h, (size,), w[n + "weight"], w[n + "bias"], eps)
        return x
