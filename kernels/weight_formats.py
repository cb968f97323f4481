"""The formats a packed weight matrix may have, by name. Says which there are, not who computes them; needs no torch.

"dense" is the model's own dtype. "int8" and "fp8" (e4m3) are a byte a weight with a scale for each output, times
activations likewise, with a scale for each token; "fp8_g128" has a scale for each 128 inputs of an output, which the
tiles of DeepSeek's and Qwen's fp8 become. "w4a16_g128" is 4 bits a weight with a scale and a zero point for each 128
inputs (other sizes likewise; "w4a16": for each output), times activations of the model's dtype: what GPTQ, AWQ and
compressed-tensors store. "mxfp4" is E2M1 with a power of two for each 32 inputs (OCP Microscaling Formats 1.0), as
gpt-oss is published, times activations of the model's dtype. The others are GGUF's blocks, times activations in blocks
of 32 with a scale each. Any weights can be made "int8", "fp8" or "q8_0".
`Ops.weight_formats` says which of them an implementation computes.
"""

from __future__ import annotations

DENSE = "dense"
INT8 = "int8"
FP8 = "fp8"
FP8_G128 = "fp8_g128"
MXFP4 = "mxfp4"
Q8_0 = "q8_0"
# GGUF's, kept as they lie in the file: ggml's name in lower case -> (weights a block, bytes a block)
GGUF_FORMATS = {Q8_0: (32, 34), "q4_0": (32, 18), "q4_1": (32, 20), "q4_k": (256, 144)}
# Inputs that share a scale; 0: all.
W4A16_GROUPS = {"w4a16": 0, "w4a16_g32": 32, "w4a16_g64": 64, "w4a16_g128": 128}
ORDER = "_order"  # of 4 bits: inputs stand group by group, in an order that goes with the matrix (GPTQ's `desc_act`)
W4A16_GROUPS |= {f"{name}{ORDER}": size for name, size in W4A16_GROUPS.items() if size}
CPU_FORMATS = (DENSE, INT8, *GGUF_FORMATS)  # those the C kernels compute
NATIVE_FORMATS = (INT8, FP8, FP8_G128, MXFP4, *W4A16_GROUPS, *GGUF_FORMATS)  # those a file may have


def w4a16_format(group_size: int, in_features: int) -> str | None:
    """The format of 4-bit weights with a scale for so many inputs (0: for all); None if there is none."""
    fits = in_features % (group_size or 32) == 0
    return next((name for name, size in W4A16_GROUPS.items() if fits and size == group_size), None)


def row_bytes(fmt: str, in_features: int) -> int:
    """Bytes of one output in a file. Of 8 bits: a float32 scale, or one for each group, then a byte for each weight. Of
    4 bits: a byte for two inputs, the first in the low half; float16 scales, one for each group; a byte for each
    group's zero point; of "mxfp4" a byte for each group's exponent. Else GGUF's blocks."""
    if fmt in (INT8, FP8):
        return 4 + in_features
    if fmt == FP8_G128:
        return in_features + in_features // 128 * 4
    if fmt == MXFP4:
        return in_features // 2 + in_features // 32
    if fmt in W4A16_GROUPS:
        return in_features // 2 + 3 * (in_features // (W4A16_GROUPS[fmt] or in_features))
    weights, block_bytes = GGUF_FORMATS[fmt]
    return in_features // weights * block_bytes


def row_features(fmt: str, num_bytes: int) -> int:
    """Inputs of a row of so many bytes, of a format of 4 bits."""
    group = W4A16_GROUPS[fmt]
    return num_bytes // (group // 2 + 3) * group if group else (num_bytes - 3) * 2
