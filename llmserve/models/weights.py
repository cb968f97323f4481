"""Where weights come from: tensors by Hugging Face's names, copied one at a time. Knows formats, not models.

Both sources map their files and copy a tensor straight into its place, converting and dequantising on the way, so no
second copy of a model is ever in memory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import gguf
import numpy as np
import torch

from llmserve.errors import ModelLoadError
from llmserve.gguf_file import TensorInfo, read_gguf
from llmserve.models.config import ModelConfig
from llmserve.models.parameters import check_tensors
from llmserve.models.safetensors_file import SafetensorsFile, SafetensorsTensor, open_shards

_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DEQUANTISE_ELEMENTS = 1 << 22  # dequantised to float32 at once: 16 MiB

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GGUF_NORM_NAMES = {"post_attention_layernorm": "ffn_norm"}
_GGUF_POST_NORM_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


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


def open_weights(path: Path, config: ModelConfig) -> WeightSource:
    """A Hugging Face folder's safetensors or a .gguf file, which holds what `config` needs. Reads headers only.

    Raises ModelLoadError, naming file and tensor, for what is damaged, missing, misshapen or not known to the model.
    """
    source: WeightSource = SafetensorsWeights(path) if path.is_dir() else GgufWeights(path, config)
    check_tensors(config, source.shapes, source.where)
    return source


class SafetensorsWeights:
    """The safetensors files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._tensors: dict[str, tuple[SafetensorsFile, SafetensorsTensor]] = {}
        for file in open_shards(folder):
            for name, tensor in file.tensors.items():
                self._tensors[name] = (file, tensor)
        self.shapes = {name: tensor.shape for name, (_, tensor) in self._tensors.items()}
        self.types = {name: tensor.dtype for name, (_, tensor) in self._tensors.items()}

    def nbytes(self, name: str) -> int:
        return self._tensors[name][1].nbytes

    def read(self, name: str, out: torch.Tensor) -> None:
        file, tensor = self._tensors[name]
        dtype = _TORCH_DTYPES[tensor.dtype]
        count = tensor.nbytes // dtype.itemsize
        source = torch.frombuffer(file.buffer, dtype=dtype, count=count, offset=tensor.offset)
        out.copy_(source.view(tensor.shape))

    def read_raw(self, name: str, out: torch.Tensor) -> None:
        file, tensor = self._tensors[name]
        source = torch.frombuffer(file.buffer, dtype=torch.uint8, count=tensor.nbytes, offset=tensor.offset)
        out.copy_(source.view(out.shape))


class GgufWeights:
    """A GGUF file. Quantised tensors are dequantised by the `gguf` package's numpy code, some rows at a time."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.where = str(path)
        file = read_gguf(path)
        self._buffer = file.map()
        self._config = config
        self._tensors = {_hugging_face_name(tensor.name, config): tensor for tensor in file.tensors.values()}
        # Part of the configuration: see `RopeConfig.freq_factors`.
        self._tensors.pop("rope_freqs.weight", None)
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
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


def _hugging_face_name(gguf_name: str, config: ModelConfig) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; an unknown name stays as it is."""
    stem, _, kind = gguf_name.rpartition(".")
    layer_names = _GGUF_LAYER_NAMES | (_GGUF_POST_NORM_NAMES if config.post_norms else _GGUF_NORM_NAMES)
    layer = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    names, part, prefix = (
        (layer_names, layer[2], f"model.layers.{layer[1]}.") if layer is not None else (_GGUF_NAMES, stem, "")
    )
    for hugging_face, ggml in names.items():
        if ggml == part:
            return f"{prefix}{hugging_face}.{kind}"
    return gguf_name
