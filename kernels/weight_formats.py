"""The formats a packed weight matrix may have, by name. Says which there are, not who computes them; needs no torch.

"dense" is the model's own dtype. "int8" is a signed byte a weight with a scale for each output, times activations with
a scale for each token. The others are GGUF's blocks, times activations in blocks of 32 with a scale each. Any weights
can be made "int8" or "q8_0".
`Ops.weight_formats` says which of them an implementation computes.
"""

from __future__ import annotations

DENSE = "dense"
INT8 = "int8"
Q8_0 = "q8_0"
# GGUF's, kept as they lie in the file: ggml's name in lower case -> (weights a block, bytes a block)
GGUF_FORMATS = {Q8_0: (32, 34), "q4_0": (32, 18), "q4_1": (32, 20), "q4_k": (256, 144)}
ALL_FORMATS = (DENSE, INT8, *GGUF_FORMATS)


def row_bytes(fmt: str, in_features: int) -> int:
    """Bytes of one output in a file: GGUF's blocks; of "int8" a float32 scale, then a byte for each weight."""
    if fmt == INT8:
        return 4 + in_features
    weights, block_bytes = GGUF_FORMATS[fmt]
    return in_features // weights * block_bytes
