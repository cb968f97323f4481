"""Packs random matrices as the published layouts have them, and says which numbers a reader must find.

Written from the formats' documents, number by number, so that a mistake in the reader is not repeated here.
"""

from __future__ import annotations

import numpy as np
import torch


def random_integers(shape: tuple[int, int], bits: int, group: int, seed: int, symmetric: bool):
    """Values, scales and zero points: int64 [out, in], float16-exact float32 [out, groups], int64 [out, groups]."""
    generator = torch.Generator().manual_seed(seed)
    groups = shape[1] // group
    values = torch.randint(0, 1 << bits, shape, generator=generator)
    scales = (torch.rand(shape[0], groups, generator=generator) + 0.5) * 0.5 / (1 << bits)
    zeros = torch.randint(0, 1 << bits, (shape[0], groups), generator=generator)
    if symmetric:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    return values, scales.bfloat16().float(), zeros


def plain(values, scales, zeros, group_of: torch.Tensor) -> torch.Tensor:
    """What it all means."""
    return ((values - zeros[:, group_of]).double() * scales[:, group_of].double()).float()


def words(numbers: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Whole numbers [rows, columns] -> int32 [rows, columns * bits / 32]: number j of a word is shifted by j * bits;
    `order` says which column number j is, of those of its word."""
    per_word = 32 // bits
    out = np.zeros((numbers.shape[0], numbers.shape[1] // per_word), dtype=np.uint32)
    for row in range(out.shape[0]):
        for word in range(out.shape[1]):
            for j in range(per_word):
                column = word * per_word + (j if order is None else order[j])
                out[row, word] |= np.uint32(int(numbers[row, column]) << (j * bits))
    return torch.from_numpy(out.view(np.int32))


def gptq(values, scales, zeros, bits: int, group_of: torch.Tensor, offset: int = 1) -> dict[str, torch.Tensor]:
    """AutoGPTQ: qweight packed along the inputs, qzeros along the outputs and less one, scales by group."""
    return {
        "qweight": words(values, bits).T.contiguous(),
        "qzeros": words((zeros.T - offset) % (1 << bits), bits),
        "scales": scales.T.half().contiguous(),
        "g_idx": group_of.int(),
    }


def awq(values, scales, zeros) -> dict[str, torch.Tensor]:
    """AutoAWQ's gemm: [in, out / 8], the outputs of a word in the order 0 2 4 6 1 3 5 7."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(values.T, 4, order),
        "qzeros": words(zeros.T, 4, order),
        "scales": scales.T.half().contiguous(),
    }


def pack_quantized(values, scales, zeros, bits: int, symmetric: bool, group_of=None) -> dict[str, torch.Tensor]:
    """compressed-tensors: signed numbers plus 2^(bits - 1), which is what `values` and `zeros` are already."""
    tensors = {
        "weight_packed": words(values, bits),
        "weight_scale": scales.bfloat16(),
        "weight_shape": torch.tensor(values.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    if group_of is not None:
        tensors["weight_g_idx"] = group_of.int()
    return tensors


def fp8(weight: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp8 numbers of weight / scales, and what they mean; `scales` broadcasts."""
    quantised = (weight / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    return quantised, quantised.float() * scales


def mxfp4(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random blocks [..., in / 32, 16] and scales [..., in / 32], uint8, and the numbers [..., in] they are."""
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (*shape[:-1], shape[-1] // 32, 32), generator=generator)
    exponents = torch.randint(123, 127, codes.shape[:-1], generator=generator)
    numbers = torch.tensor(table + [-number for number in table])[codes] * 2.0 ** (exponents - 127)[..., None]
    blocks = codes[..., 0::2] + 16 * codes[..., 1::2]
    return blocks.to(torch.uint8), exponents.to(torch.uint8), numbers.reshape(shape)
