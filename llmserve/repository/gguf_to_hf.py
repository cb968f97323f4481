"""Turns a Llama model in GGUF into a Hugging Face folder in bfloat16, once. Knows no torch and no cache.

llama.cpp's converter permutes the rows of q and k for its rotary embedding; here that is undone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from llmserve.errors import ModelLoadError
from llmserve.gguf_file import GGUFFile, TensorInfo, read_gguf
from llmserve.gguf_tokenizer import build_gguf_tokenizer
from llmserve.repository.cache import Progress

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def convert_llama(source: Path, folder: Path, sampling: Mapping[str, float | bool], progress: Progress) -> None:
    """Writes model.safetensors, config.json, generation_config.json, tokenizer.json and tokenizer_config.json.

    `sampling` goes into generation_config.json: the defaults where a request says nothing.
    Raises ModelLoadError if the file is damaged, of another architecture or has a tensor Llama has not.
    """
    file = read_gguf(source)
    if (architecture := file.require("general.architecture", str)) != "llama":
        raise ModelLoadError(f"{source}: the architecture is {architecture!r}; only 'llama' can be converted.")
    tokenizer = build_gguf_tokenizer(file)
    _write_weights(file, folder / "model.safetensors", progress)
    _write_json(folder / "config.json", _model_config(file))
    _write_json(folder / "generation_config.json", _token_ids(file) | dict(sampling))
    _write_json(folder / "tokenizer_config.json", tokenizer.config)
    tokenizer.backend.save(str(folder / "tokenizer.json"))


def read_tensor(file: GGUFFile, info: TensorInfo) -> NDArray[np.float32]:
    """One tensor, dequantised: float32 of `info.shape`."""
    quantization = gguf.GGMLQuantizationType(info.ggml_type)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    stored = (*info.shape[:-1], info.shape[-1] // block_size * block_bytes)
    raw = np.memmap(file.path, np.uint8, "r", info.offset, stored)
    values: NDArray[np.float32] = gguf.quants.dequantize(raw, quantization)
    return values.reshape(info.shape)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of each value as bfloat16, rounded to nearest, ties to even. Finite values only."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def unpermute(rows: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """[heads * head_dim, hidden]: from interleaved rotary pairs back to the two halves of a head Hugging Face has."""
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _hugging_face_name(file: GGUFFile, name: str) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    prefix, _, rest = name.partition(".")
    block, _, part = rest.partition(".")
    if prefix != "blk" or not block.isdecimal() or part not in _BLOCK_NAMES:
        raise ModelLoadError(f"{file.path}: the tensor {name!r} is not one of a Llama model.")
    return f"model.layers.{block}.{_BLOCK_NAMES[part]}"


def _write_weights(file: GGUFFile, path: Path, progress: Progress) -> None:
    """In the safetensors format: length of the header, header, then the tensors, one at a time through memory."""
    names = {info.name: _hugging_face_name(file, info.name) for info in file.tensors.values()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in file.tensors.values():
        start, end = end, end + 2 * int(np.prod(info.shape))
        header[names[info.name]] = {"dtype": "BF16", "shape": list(info.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        done = 0
        for values in _hugging_face_tensors(file):
            done += out.write(to_bfloat16(values).tobytes())
            progress("converting", done, end)


def _hugging_face_tensors(file: GGUFFile) -> Iterator[NDArray[np.float32]]:
    num_heads, num_kv_heads = file.hparam("attention.head_count", int), file.hparam("attention.head_count_kv", int)
    for info in file.tensors.values():
        values = read_tensor(file, info)
        if info.name.endswith("attn_q.weight"):
            values = unpermute(values, num_heads)
        elif info.name.endswith("attn_k.weight"):
            values = unpermute(values, num_kv_heads)
        yield values


def _model_config(file: GGUFFile) -> dict[str, Any]:
    num_heads, hidden_size = file.hparam("attention.head_count", int), file.hparam("embedding_length", int)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": file.hparam("feed_forward_length", int),
        "num_hidden_layers": file.hparam("block_count", int),
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.hparam("attention.head_count_kv", int),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": file.hparam("context_length", int),
        "rms_norm_eps": _shortest(file.hparam("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest(file.hparam("rope.freq_base", float)),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_token_ids(file),
    }


def _token_ids(file: GGUFFile) -> dict[str, Any]:
    ids = {
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {name: value for name, value in ids.items() if value is not None}


def _shortest(value: float) -> float:
    """GGUF stores float32: 9.999999747e-06 was written as 1e-5."""
    return float(str(np.float32(value)))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
