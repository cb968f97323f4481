"""GGUF's quantised matrices laid out for the block GEMM kernels, at their own size. Reads blocks, knows no file.

Formats as ggml defines them, 32 weights a block: Q8_0 (fp16 scale, 32 signed bytes), Q4_0 (fp16 scale, 16 bytes of two
weights + 8), Q4_1 (fp16 scale and minimum, 16 bytes); and Q4_K, whose 256 weights share two fp16 factors over eight
6-bit scales and minima: its sub-blocks are blocks of Q4_1 once multiplied out, which costs half a bit a weight.
"""

from __future__ import annotations

import torch

from llmserve.kernels.cpu.weights import GROUP, CPULinearWeight, pack_int8_rows, pad_rows, row_slices
from llmserve.kernels.memory import WeightMemory
from llmserve.kernels.weight_formats import GGUF_FORMATS, INT8

BLOCK = 32


def pack_raw(raw: torch.Tensor, fmt: str, bias: torch.Tensor | None, memory: WeightMemory) -> CPULinearWeight:
    """Rows as they lie in a file, of GGUF's blocks or "int8" -> a weight of the same format. Raises ValueError."""
    return pack_int8_rows(raw, bias, memory) if fmt.lower() == INT8 else pack_gguf(raw, fmt, bias, memory)


def pack_gguf(raw: torch.Tensor, fmt: str, bias: torch.Tensor | None, memory: WeightMemory) -> CPULinearWeight:
    """raw uint8 [out, bytes of a row], rows as in the file -> a weight of the same format. Raises ValueError."""
    name = fmt.lower()
    if name not in GGUF_FORMATS:
        raise ValueError(f"The CPU kernels compute the GGUF types {', '.join(GGUF_FORMATS)}, not {fmt!r}.")
    weights, block_bytes = GGUF_FORMATS[name]
    out_features, row_bytes = raw.shape
    if raw.dtype != torch.uint8 or row_bytes % block_bytes:
        raise ValueError(f"{name} rows are uint8 in blocks of {block_bytes} bytes, not {raw.dtype} [{row_bytes}].")
    in_features = row_bytes // block_bytes * weights
    kernel = "q4_1" if name == "q4_k" else name
    group_bytes = GROUP * GGUF_FORMATS[kernel][1]
    data = memory.empty((-(-out_features // GROUP), in_features // BLOCK, group_bytes), torch.uint8)
    for part, groups in row_slices(out_features, in_features):
        blocks = raw[part].reshape(part.stop - part.start, -1, block_bytes)
        data[groups] = _pack_blocks(_q4_1_from_q4_k(blocks) if name == "q4_k" else blocks, kernel)
    return CPULinearWeight(name, kernel, (out_features, in_features), in_features, data, bias=bias)


def pack_q8_0(weight: torch.Tensor, bias: torch.Tensor | None, memory: WeightMemory) -> CPULinearWeight:
    """[out, in] of any float type -> blocks of Q8_0: 32 signed bytes and their scale (absmax / 127) in fp16."""
    rows, columns = weight.shape
    if columns % BLOCK:
        raise ValueError(f"Rows of {columns} elements cannot be cut into the blocks of 32 that q8_0 needs.")
    data = memory.empty((-(-rows // GROUP), columns // BLOCK, GROUP * GGUF_FORMATS["q8_0"][1]), torch.uint8)
    for part, groups in row_slices(rows, columns):
        values = weight[part].float().reshape(-1, columns // BLOCK, BLOCK)
        scales = values.abs().amax(dim=2, keepdim=True) / 127
        quants = (values / scales.clamp(min=1e-35)).round_().to(torch.int8)
        blocks = torch.cat((scales.half().view(torch.uint8), quants.view(torch.uint8)), dim=2)
        data[groups] = _pack_blocks(blocks, "q8_0")
    return CPULinearWeight("q8_0", "q8_0", (rows, columns), columns, data, bias=bias)


def _pack_blocks(blocks: torch.Tensor, kernel: str) -> torch.Tensor:
    """uint8 [rows, blocks, bytes of a block] -> uint8 [rows / 16, blocks, bytes of 16 blocks]."""
    num_factors = 2 if kernel == "q4_1" else 1
    factors = blocks[:, :, : 2 * num_factors]  # fp16 as bytes [out, blocks, 2 or 4]
    quants = blocks[:, :, 2 * num_factors :]
    if kernel == "q8_0":
        quants = quants ^ 0x80  # signed -> unsigned, + 128
    return _interleave(factors, quants, num_factors)


def _interleave(factors: torch.Tensor, quants: torch.Tensor, num_factors: int) -> torch.Tensor:
    """[out, blocks, bytes] each -> uint8 [out / 16, blocks, 16 scales, (16 minima,) lanes of 4 bytes x 16 outputs].

    A byte of two weights holds elements i and i + 16 of its block: low halves are the first 4 lanes, high the others.
    """
    num_blocks, lanes = quants.shape[1], quants.shape[2] // 4
    factors = pad_rows(factors).view(-1, GROUP, num_blocks, num_factors, 2).permute(0, 2, 3, 1, 4)
    quants = pad_rows(quants).view(-1, GROUP, num_blocks, lanes, 4).permute(0, 2, 3, 1, 4)
    return torch.cat((factors.flatten(2), quants.flatten(2)), dim=2).contiguous()


def _q4_1_from_q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """uint8 [out, n, 144] -> blocks of Q4_1 uint8 [out, 8n, 20]; w = d * scale * q - dmin * minimum."""
    rows, num_super = blocks.shape[:2]
    d, dmin = blocks[:, :, :4].contiguous().view(torch.float16).float().unbind(-1)  # [out, n]
    packed = blocks[:, :, 4:16].to(torch.int32)
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((low & 63, (high & 15) | (low >> 6 << 4)), dim=-1)  # [out, n, 8]
    minima = torch.cat((middle & 63, (high >> 4) | (middle >> 6 << 4)), dim=-1)
    factors = torch.stack((d[..., None] * scales, -dmin[..., None] * minima), dim=-1).half().contiguous()
    # 32 bytes hold two sub-blocks: the low halves are the first, the high halves the second.
    pairs = blocks[:, :, 16:].reshape(rows, num_super, 4, 1, BLOCK)
    elements = torch.cat((pairs & 15, pairs >> 4), dim=3).view(rows, num_super * 8, BLOCK)
    quants = elements[..., :16] | (elements[..., 16:] << 4)
    return torch.cat((factors.view(torch.uint8).view(rows, -1, 4), quants), dim=2)
