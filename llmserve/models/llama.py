"""The decoder: Llama, Mistral, SmolLM, Qwen2, Qwen3, Gemma 2 and 3, and mixtures of experts built like them.

Knows no scheduler, no sampling, no files.
"""

from __future__ import annotations

import torch

from llmserve.kernels.ops import AttentionMetadata, KVCache, KVCacheSpec, LinearWeight, Ops
from llmserve.models.config import ModelConfig
from llmserve.models.layers import DecoderLayer, stack_layers


class LlamaModel:
    """A decoder with its weights. Call it under `torch.inference_mode()`; one thread at a time."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        embedding: torch.Tensor,
        layers: list[DecoderLayer],
        final_norm: torch.Tensor,
        lm_head: LinearWeight | None,
    ) -> None:
        """embedding [vocab, hidden]; final_norm float32 [hidden]; lm_head [vocab, hidden], or some rows of it, or none
        of a model that only embeds."""
        self.config = config
        self.num_layers = config.num_layers
        self._ops = ops
        self._embedding = embedding
        self._layers = layers
        self._final_norm = final_norm
        self._stack = stack_layers(ops, layers, final_norm, config.rms_norm_eps)
        self._lm_head = lm_head
        # Rounded to the weights' type, as the Gemma models were trained.
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=embedding.dtype).item()

    @property
    def dtype(self) -> torch.dtype:
        """The type of hidden states and weights."""
        return self._embedding.dtype

    @property
    def nbytes(self) -> int:
        """Memory the weights take, norms included."""
        packed = [linear.nbytes for layer in self._layers for linear in layer.linears]
        vectors = [vector.nbytes for layer in self._layers for vector in layer.vectors] + [self._final_norm.nbytes]
        head_bytes = 0 if self._lm_head is None else self._lm_head.nbytes
        return self._embedding.nbytes + sum(packed) + head_bytes + sum(vectors)

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    def kv_cache_spec(self, block_size: int, dtype: torch.dtype) -> KVCacheSpec:
        """What each layer's cache must hold; all layers are alike."""
        return KVCacheSpec(self.config.num_kv_heads, self.config.head_dim, block_size, dtype)

    def forward(self, token_ids: torch.Tensor, meta: AttentionMetadata, kv_caches: list[KVCache]) -> torch.Tensor:
        """token_ids int64 [t] of a ragged batch, one cache a layer -> hidden states [t, hidden], final norm applied."""
        embedded = self._ops.embedding(token_ids, self._embedding)
        if self._embedding_scale != 1.0:
            embedded = embedded * self._embedding_scale
        return self._stack.forward(embedded, meta, kv_caches)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [r, hidden], the rows to be sampled -> float32 [r, vocab]."""
        assert self._lm_head is not None
        logits = self._ops.linear(hidden, self._lm_head, torch.float32)
        cap = self.config.logits_soft_cap
        return cap * torch.tanh(logits / cap) if cap else logits
