"""Runs an embedding, reranker or classifier model: packed token ids in, vectors or logits out. Forms no batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from llmserve.kernels.ops import PackedSequences
from llmserve.pooling_config import PoolingConfig
from llmserve.worker.loader import choose_device
from llmserve.worker.pooling_loader import LoadedModel, load_pooling_model

PoolingTask = Literal["embed", "token_embed", "classify"]
Int32Array = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

# Of one forward pass: its activations should stay in the caches of a CPU. A longer sequence goes alone.
_MAX_TOKENS = {"cpu": 1024, "cuda": 32768}
_MAX_SEQS = {"cpu": 256, "cuda": 2048}


class PoolingRunner:
    """One model on one device. `run` may be called by one thread at a time.

    A sequence's result is the same to the bit, whatever stands beside it in the batch.
    """

    def __init__(self, config: PoolingConfig, loaded: LoadedModel) -> None:
        self.config = config
        self.device = loaded.device
        self.weight_format = loaded.weight_format  # what "auto" became
        self._loaded = loaded
        self._max_tokens = _MAX_TOKENS[loaded.device.type]
        self._max_seqs = _MAX_SEQS[loaded.device.type]

    @classmethod
    def load(
        cls,
        folder: Path,
        config: PoolingConfig,
        weight_format: str = "auto",
        num_threads: int | None = None,
        device: str = "auto",
    ) -> PoolingRunner:
        """`weight_format` is "auto", "float32", "bfloat16", "float16" (not on a CPU), "q8_0" or "int8"; `num_threads`
        is for a CPU. Raises ModelLoadError, ConfigError."""
        at = choose_device(device)
        max_tokens = max(_MAX_TOKENS[at.type], config.max_model_len)
        loaded = load_pooling_model(folder, config, weight_format, num_threads, at, max_tokens, _MAX_SEQS[at.type])
        if loaded.ops.name == "cpu":
            torch.set_num_threads(1)  # from here on torch's threads would only spin beside those of the kernels
        return cls(config, loaded)

    @torch.inference_mode()
    def run(
        self,
        token_ids: Int32Array,
        token_type_ids: npt.NDArray[np.uint8] | None,
        cu_seqlens: Int32Array,
        task: PoolingTask,
    ) -> FloatArray:
        """Packed sequences: i owns token_ids[cu_seqlens[i]:cu_seqlens[i + 1]], of at least one token and at most
        `config.max_model_len`. Without token_type_ids they are all zero.

        "embed": [n, dimension], pooled and through the dense layers, not normalised; "token_embed": [tokens,
        hidden_size]; "classify", of a model of kind "score" or "classify": logits [n, labels].
        """
        assert len(cu_seqlens) > 1
        assert cu_seqlens[-1] == len(token_ids)
        types = token_type_ids if self.config.num_token_types > 1 else None
        parts = []
        for first, last in self._chunks(cu_seqlens):
            start, stop = cu_seqlens[first], cu_seqlens[last]
            hidden, sequences = self._forward(
                token_ids[start:stop],
                None if types is None else types[start:stop],
                cu_seqlens[first : last + 1] - start,
            )
            if task == "token_embed":
                parts.append(hidden.float())
                continue
            scorer = self._loaded.embed if task == "embed" else self._loaded.classify
            assert scorer is not None
            parts.append(scorer.forward(hidden, sequences))
        whole: FloatArray = (parts[0] if len(parts) == 1 else torch.cat(parts)).cpu().numpy()
        return whole

    def _chunks(self, cu_seqlens: Int32Array) -> Iterator[tuple[int, int]]:
        """Runs of sequences [first, last) within the limits of one forward pass."""
        first, num_seqs = 0, len(cu_seqlens) - 1
        while first < num_seqs:
            fitting = int(np.searchsorted(cu_seqlens, cu_seqlens[first] + self._max_tokens, side="right")) - 1
            last = min(max(fitting, first + 1), first + self._max_seqs)
            yield first, last
            first = last

    def _forward(
        self, token_ids: Int32Array, token_types: npt.NDArray[np.uint8] | None, cu_seqlens: Int32Array
    ) -> tuple[torch.Tensor, PackedSequences]:
        lengths = np.diff(cu_seqlens)
        assert 0 < lengths.min() <= lengths.max() <= self.config.max_model_len
        positions = np.arange(len(token_ids)) - np.repeat(cu_seqlens[:-1], lengths)
        sequences = PackedSequences(
            cu_seqlens=torch.from_numpy(cu_seqlens).to(self.device),
            positions=torch.from_numpy(positions).to(self.device),
            max_seq_len=int(lengths.max()),
        )
        types = None if token_types is None else self._int64(token_types)
        return self._loaded.model.forward(self._int64(token_ids), types, sequences), sequences

    def _int64(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)
