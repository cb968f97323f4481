"""A decoder that reads whole texts: the LLM's own layers over packed sequences, for embeddings and judgements.

Nothing is generated, so no keys outlive a layer: one layer's KV cache serves all of them in turn.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from llmserve.kernels.ops import AttentionMetadata, Ops, PackedSequences
from llmserve.models.config import ModelConfig, read_model_config
from llmserve.models.llama import LlamaModel
from llmserve.models.parameters import LM_HEAD, check_tensors
from llmserve.models.renamed_weights import RenamedWeights
from llmserve.models.weights import WeightSource, open_folder

_BLOCK_SIZE = 16
_ROOTS = ("embed_tokens.", "layers.", "norm.")  # of checkpoints saved without the language model's head


class PackedDecoder:
    """Hidden states of every token, causal within its sequence."""

    def __init__(self, model: LlamaModel, ops: Ops, max_tokens: int, max_seqs: int) -> None:
        """The limits are of one call to `forward`."""
        self.model = model
        self._device = model.device
        spec = model.kv_cache_spec(_BLOCK_SIZE, model.dtype)
        num_blocks = max_tokens // _BLOCK_SIZE + max_seqs  # each sequence's last block may hold a single token
        self._kv_cache = ops.allocate_kv_cache(spec, num_blocks, self._device)

    def forward(
        self, token_ids: torch.Tensor, token_types: torch.Tensor | None, sequences: PackedSequences
    ) -> torch.Tensor:
        """int64 [t] -> hidden states [t, hidden], the final norm applied. There are no token types here."""
        assert token_types is None
        caches = [self._kv_cache] * self.model.num_layers
        return self.model.forward(token_ids, self._metadata(sequences), caches)

    def _metadata(self, sequences: PackedSequences) -> AttentionMetadata:
        """Each sequence in blocks of its own, one behind the other."""
        lengths = sequences.cu_seqlens.diff()
        num_blocks = (lengths + _BLOCK_SIZE - 1) // _BLOCK_SIZE
        first_blocks = num_blocks.cumsum(0) - num_blocks
        widest = -(-sequences.max_seq_len // _BLOCK_SIZE)
        block_table = first_blocks[:, None] + torch.arange(widest, device=self._device)
        first_slots = (first_blocks * _BLOCK_SIZE).repeat_interleave(lengths)
        return AttentionMetadata(
            query_start_loc=sequences.cu_seqlens,
            seq_lens=lengths,
            block_table=block_table.int(),
            slot_mapping=first_slots + sequences.positions,
            positions=sequences.positions,
            max_seq_len=sequences.max_seq_len,
        )


def open_decoder(folder: Path, *, with_head: bool) -> tuple[ModelConfig, WeightSource]:
    """The configuration and the base model's weights, saved with or without a head. Reads headers only.

    `with_head` asks for the language model's. Raises ModelLoadError for what is missing or not known.
    """
    config = read_model_config(folder)
    if not with_head:
        config = replace(config, tie_word_embeddings=True)  # no head of its own is needed, then
    source = RenamedWeights(open_folder(folder, config), _base_name)
    check_tensors(config, source.shapes, source.where)
    return config, source


def _base_name(name: str) -> str:
    """With the prefix that a checkpoint without a head lacks; heads of other kinds are not the decoder's."""
    if name.startswith(_ROOTS):
        return f"model.{name}"
    return name if name.startswith("model.") or name == LM_HEAD else ""
