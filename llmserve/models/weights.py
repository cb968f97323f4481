"""Where weights come from: tensors by Hugging Face's names, copied one at a time. Knows formats, not models.

Both sources map their files and copy a tensor straight into its place, converting and dequantising on the way, so no
second copy of a model is ever in memory.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import gguf
import numpy as np
import torch

from llmserve.errors import ModelLoadError
from llmserve.gguf_file import TensorInfo, read_gguf
from llmserve.models.config import ModelConfig
from llmserve.models.gguf_names import hugging_face_name, split_experts
from llmserve.models.parameters import check_tensors
from llmserve.models.quantized_weights import QuantizedWeights
from llmserve.models.safetensors_weights import SafetensorsWeights, StoredTensors

_DEQUANTISE_ELEMENTS = 1 << 22  # dequantised to float32 at once: 16 MiB


class WeightSource(Protocol):
    """A model's tensors in files."""

    where: str  # the path, for messages
    shapes: dict[str, tuple[int, ...]]  # of every tensor, by Hugging Face's names
    types: dict[str, str]  # likewise, as the format calls them: "BF16", "Q4_1"

    def nbytes(self, name: str) -> int:
        """Bytes the tensor takes in its file."""
        ...

    def read(self, name: str, out: torch.Tensor) -> None:
        """Copies a tensor into `out`, of the same shape, any floating-point type and device."""
        ...

    def read_raw(self, name: str, out: torch.Tensor) -> None:
        """Copies a matrix as it is stored into `out`, uint8 [rows, bytes of a row]."""
        ...

    def input_order(self, name: str) -> torch.Tensor | None:
        """int64 [in], of a matrix whose type ends in "_ORDER": which input stands at each place of a row read raw."""
        ...


def open_weights(path: Path, config: ModelConfig, formats: Collection[str] = ()) -> WeightSource:
    """A Hugging Face folder's safetensors or a .gguf file, which holds what `config` needs. Reads headers only.

    `formats` are those the device computes (`Ops.weight_formats`): a packed matrix is of the first type it can be read
    as among these, else of GGUF's blocks. Raises ModelLoadError, naming file and tensor, for what is damaged, missing,
    misshapen or not known to the model.
    """
    source = open_folder(path, config, formats) if path.is_dir() else GgufWeights(path, config)
    check_tensors(config, source.shapes, source.where)
    return source


def open_folder(path: Path, config: ModelConfig, formats: Collection[str] = ()) -> WeightSource:
    """A Hugging Face folder's tensors, whatever they are; quantised ones by what `config` says of them."""
    if config.quantization is None:
        return SafetensorsWeights(path, config.moe)
    return QuantizedWeights(StoredTensors(path, config.moe), config.quantization, formats)


class GgufWeights:
    """A GGUF file. Quantised tensors are dequantised by the `gguf` package's numpy code, some rows at a time."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.where = str(path)
        file = read_gguf(path)
        self._buffer = file.map()
        self._config = config
        self._tensors = {
            hugging_face_name(tensor.name, config): tensor
            for stored in file.tensors.values()
            for tensor in split_experts(stored)
        }
        # Part of the configuration: see `RopeConfig.freq_factors`.
        self._tensors.pop("rope_freqs.weight", None)
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        if config.moe is not None and config.moe.has_shared_gate:  # a matrix of one row, which GGUF has as a vector
            self.shapes |= {n: (1, *s) for n, s in self.shapes.items() if n.endswith("shared_expert_gate.weight")}
        self.types = {name: tensor.type_name for name, tensor in self._tensors.items()}
        # llama.cpp rotates neighbouring elements for this architecture: its converter has reordered q's and k's rows.
        self._is_permuted = file.metadata.get("general.architecture") == "llama"

    def nbytes(self, name: str) -> int:
        return self._tensors[name].nbytes

    def read(self, name: str, out: torch.Tensor) -> None:
        tensor = self._tensors[name]
        num_rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        raw = self._rows(tensor, num_rows)
        rows_at_once = max(1, _DEQUANTISE_ELEMENTS * num_rows // max(1, out.numel()))
        row_order = self._row_order(name, tensor)
        if row_order is not None and len(tensor.shape) == 1:
            out.copy_(self._dequantise(tensor, raw).flatten()[torch.argsort(row_order)])
            return
        target = out.view(num_rows, -1)
        for start in range(0, num_rows, rows_at_once):
            values = self._dequantise(tensor, raw[start : start + rows_at_once]).to(out.device, out.dtype)
            if row_order is None:
                target[start : start + rows_at_once] = values
            else:
                target[row_order[start : start + rows_at_once].to(out.device)] = values

    def read_raw(self, name: str, out: torch.Tensor) -> None:
        tensor = self._tensors[name]
        raw = torch.from_numpy(self._rows(tensor, tensor.shape[0]))
        row_order = self._row_order(name, tensor)
        if row_order is None:
            out.copy_(raw)
        else:
            out[row_order.to(out.device)] = raw.to(out.device)  # blocks lie along a row: whole rows may change places

    def input_order(self, name: str) -> torch.Tensor | None:
        return None

    def _rows(self, tensor: TensorInfo, num_rows: int) -> np.ndarray:
        return np.frombuffer(self._buffer, np.uint8, tensor.nbytes, tensor.offset).reshape(num_rows, -1)

    def _dequantise(self, tensor: TensorInfo, raw: np.ndarray) -> torch.Tensor:
        quantisation = gguf.GGMLQuantizationType(tensor.ggml_type)
        try:
            values = gguf.quants.dequantize(raw, quantisation)
        except NotImplementedError as error:
            raise ModelLoadError(
                f"{self.where}: the tensor {tensor.name!r} is {tensor.type_name}, which cannot be dequantised here."
            ) from error
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

    def _row_order(self, name: str, tensor: TensorInfo) -> torch.Tensor | None:
        """For each row in the file, the row of the Hugging Face tensor that it is; None where they are the same.

        The converter turns a head's rows (half, i) into (i, half), so that the pair (i, i + d/2) becomes neighbours.
        """
        if not self._is_permuted or not re.search(r"self_attn\.[qk]_proj\.", name):
            return None
        num_heads = self._config.num_heads if "q_proj" in name else self._config.num_kv_heads
        return torch.arange(tensor.shape[0]).view(num_heads, 2, -1).transpose(1, 2).flatten()
