"""The published layouts of packed matrices, and what each number in them means. Knows tensors, not files or names.

Whatever the layout, a matrix is read as rows of w = (value - zero point) * scale, a scale for a group of inputs. From
that it becomes plain numbers, or rows of our own formats where these say the same (`raw_rows.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch

from llmserve.errors import ModelLoadError
from llmserve.kernels.weight_formats import FP8, FP8_G128, MXFP4, ORDER, w4a16_format
from llmserve.models.checkpoint_quantization import CheckpointQuantization
from llmserve.models.raw_rows import BLOCK, Rows, encode_rows

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each four bits of a word are of
# Twice the values of E2M1, so that they are whole: the sign is the highest of four bits.
_MXFP4_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_WORD_TENSORS = {"gptq": "qweight", "awq": "qweight", "packed": "weight_packed", "mxfp4": "weight_blocks"}
# The tensors that a layout's own stands beside; a question mark: it may be absent.
_COMPANIONS = {
    "gptq": ("qzeros", "scales", "g_idx?"),
    "awq": ("qzeros", "scales"),
    "packed": ("weight_scale", "weight_shape", "weight_zero_point?", "weight_g_idx?"),
    "int": ("weight_scale", "weight_zero_point?"),
    "float": ("weight_scale?", "weight_scale_inv?"),
    "mxfp4": ("weight_scales",),
}
# How activations or a cache were rounded when the checkpoint was made: our kernels have their own way.
IGNORED_SUFFIXES = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "k_scale", "v_scale")


def word_tensor(quantization: CheckpointQuantization) -> str:
    """The last part of the name of the tensor by which a packed matrix is known."""
    return _WORD_TENSORS.get(quantization.layout, "weight")


def companions(quantization: CheckpointQuantization) -> dict[str, bool]:
    """The tensors beside it: name -> whether it must be there."""
    return {name.rstrip("?"): not name.endswith("?") for name in _COMPANIONS[quantization.layout]}


class PackedMatrix:
    """One [out, in] matrix in its file. `type_name` is the format of ours it can become as it lies, by its name in
    `weight_formats` in capitals, or else what it is: "F8_E4M3", "W4", "W8"."""

    def __init__(
        self,
        where: str,
        tensors: Mapping[str, torch.Tensor],
        quantization: CheckpointQuantization,
        formats: Collection[str] = (),
    ) -> None:
        """`where` names file and matrix; `tensors` by the last part of their names; `formats`: see `open_weights`.
        Raises ModelLoadError."""
        self._where = where
        self._tensors = tensors
        self._quantization = quantization
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self.shape = _shape(tensors, quantization)
        self._check_shapes()
        self._group_of = self._group_index()
        self.type_name = self._own_format(formats) or self._type_name()
        # int64 [in], of formats whose inputs stand group by group: which one stands at each place
        self.input_order = self._group_of.argsort(stable=True) if self.type_name.lower().endswith(ORDER) else None

    def read(self, out: torch.Tensor, part: slice) -> None:
        """The outputs `part` as numbers: out [n, in] of any float type."""
        rows = self._rows(part)
        zeros = rows.zeros if rows.zeros.shape[1] == 1 else rows.zeros[:, self._group_of]
        scales = rows.scales if rows.scales.shape[1] == 1 else rows.scales[:, self._group_of]
        out.copy_((rows.values - zeros) * scales)

    def read_raw(self, out: torch.Tensor, part: slice) -> None:
        """The outputs `part` in the format `type_name`: out uint8 [n, bytes of a row]."""
        if self.type_name.lower() == MXFP4:
            blocks, scales = (self._tensors[name][part] for name in ("weight_blocks", "weight_scales"))
            out.copy_(torch.cat((blocks.flatten(1), scales), dim=1))
            return
        rows = self._rows(part)
        if self.input_order is not None:
            rows = replace(rows, values=rows.values[:, self.input_order])
        out.copy_(encode_rows(self.type_name.lower(), rows, self._group_of, self._where))

    def _check_shapes(self) -> None:
        (rows, columns), quantization = self.shape, self._quantization
        if quantization.layout == "float" and not {"weight_scale", "weight_scale_inv"} & set(self._tensors):
            raise ModelLoadError(
                f"{self._where}: 'weight' is in fp8, but neither 'weight_scale' nor 'weight_scale_inv' stands beside "
                "it, so nothing says what its numbers mean. Use a complete checkpoint."
            )
        per_word = 32 // quantization.bits
        groups = -(-columns // (quantization.group_size or columns))
        by_row: set[tuple[int, ...]] = {(rows, groups), (rows,), (1,), ()} if groups == 1 else {(rows, groups)}
        by_tile = by_row
        if quantization.block_size is not None:
            by_tile = {(-(-rows // quantization.block_size[0]), -(-columns // quantization.block_size[1]))}
        expected: dict[str, set[tuple[int, ...]]] = {
            "qzeros": {(groups, rows // per_word)},
            "scales": {(groups, rows)},
            "g_idx": {(columns,)},
            "weight_g_idx": {(columns,)},
            "weight_packed": {(rows, -(-columns // per_word))},
            "weight_scale": by_tile,
            "weight_scale_inv": by_tile,
            "weight_zero_point": {(-(-rows // per_word), groups)} if quantization.layout == "packed" else by_row,
            "weight_scales": {(rows, columns // BLOCK)},
        }
        for name, tensor in self._tensors.items():
            if name in expected and tuple(tensor.shape) not in expected[name]:
                raise ModelLoadError(
                    f"{self._where}: {name!r} has the shape {list(tensor.shape)}, but {quantization} of a matrix "
                    f"[{rows}, {columns}] needs {' or '.join(str(list(shape)) for shape in sorted(expected[name]))}."
                )

    def _rows(self, part: slice) -> Rows:
        return _ROWS[self._quantization.layout](self._tensors, self._quantization, part)

    def _group_index(self) -> torch.Tensor:
        """int64 [in]: the group of each input."""
        stored = self._tensors.get("g_idx", self._tensors.get("weight_g_idx"))
        columns = torch.arange(self.shape[1])
        if stored is not None and not bool((stored < 0).any()):
            return stored.long()
        if self._quantization.block_size is not None:
            return columns // self._quantization.block_size[1]
        return columns // (self._quantization.group_size or self.shape[1])

    def _own_format(self, formats: Collection[str]) -> str | None:
        """Of 4 bits with the file's own groups, of fp8 with a scale for an output or a tile; if it is computed."""
        quantization, name = self._quantization, None
        if quantization.layout == "float" and quantization.block_size is None:
            name = FP8
        elif quantization.block_size is not None:
            name = FP8_G128 if quantization.block_size[1] == 128 and self.shape[1] % 128 == 0 else None
        elif quantization.layout == "mxfp4":
            name = MXFP4 if self.shape[1] % 64 == 0 else None
        elif quantization.bits == 4 and quantization.layout in ("gptq", "awq", "packed"):
            name = w4a16_format(quantization.group_size, self.shape[1])
            size = quantization.group_size or self.shape[1]
            if name is not None and not torch.equal(self._group_of, torch.arange(self.shape[1]) // size):
                name = f"{name}{ORDER}" if bool((self._group_of.bincount() == size).all()) else None
        return name.upper() if name in formats and name is not None else None

    def _type_name(self) -> str:
        quantization = self._quantization
        kind = quantization.block_type
        if kind == "INT8":
            return kind
        in_order = self.shape[1] % BLOCK == 0 and bool(
            (self._group_of.view(-1, BLOCK) == self._group_of[::BLOCK, None]).all()
        )
        if kind is not None and in_order:
            return kind
        return "F8_E4M3" if quantization.layout == "float" else f"W{quantization.bits}"


def _unpack(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32 words [a, b] -> int16, several times as many along `dim`; the lowest bits are the first number."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    shifts = shifts[:, None] if dim == 0 else shifts
    numbers = (words.unsqueeze(dim + 1) >> shifts) & ((1 << bits) - 1)
    return numbers.flatten(dim, dim + 1).to(torch.int16)


def _gptq_rows(tensors: Mapping[str, torch.Tensor], quantization: CheckpointQuantization, part: slice) -> Rows:
    """qweight [in / n, out] and qzeros [groups, out / n], n numbers a word; scales [groups, out]."""
    bits = quantization.bits
    values = _unpack(tensors["qweight"][:, part], bits, 0).T
    # A zero point of 0 is stored as -1, which is the largest number.
    zeros = (_unpack(tensors["qzeros"], bits, 1)[:, part].T + quantization.zero_offset) & ((1 << bits) - 1)
    return Rows(values, zeros, tensors["scales"][:, part].T.float())


def _awq_rows(tensors: Mapping[str, torch.Tensor], quantization: CheckpointQuantization, part: slice) -> Rows:
    """qweight [in, out / 8] and qzeros [groups, out / 8], outputs in AutoAWQ's order; scales [groups, out]."""
    words = slice(part.start // 8, -(-part.stop // 8))
    order = torch.tensor(_AWQ_ORDER).argsort()

    def unpack(name: str) -> torch.Tensor:
        numbers = _unpack(tensors[name][:, words], 4, 1)
        return numbers.view(len(numbers), -1, 8)[:, :, order].flatten(1).T

    return Rows(unpack("qweight"), unpack("qzeros"), tensors["scales"][:, part].T.float())


def _packed_rows(tensors: Mapping[str, torch.Tensor], quantization: CheckpointQuantization, part: slice) -> Rows:
    """weight_packed [out, in / n], weight_scale [out, groups], weight_zero_point [out / n, groups]; numbers are signed
    ones plus 2^(bits - 1)."""
    bits = quantization.bits
    in_features = int(tensors["weight_shape"][1])
    values = _unpack(tensors["weight_packed"][part], bits, 1)[:, :in_features]
    zeros = torch.full((1, 1), 1 << (bits - 1), dtype=torch.int16)
    if "weight_zero_point" in tensors:
        zeros = _unpack(tensors["weight_zero_point"], bits, 0)[part]
    return Rows(values, zeros, _row_scales(tensors["weight_scale"], part))


def _int_rows(tensors: Mapping[str, torch.Tensor], quantization: CheckpointQuantization, part: slice) -> Rows:
    """weight int8 [out, in], weight_scale [out, 1] or of one number; weight_zero_point likewise."""
    zeros = torch.zeros((1, 1), dtype=torch.int16)
    if "weight_zero_point" in tensors:
        zeros = _row_scales(tensors["weight_zero_point"], part).to(torch.int16)
    return Rows(tensors["weight"][part].to(torch.int16), zeros, _row_scales(tensors["weight_scale"], part))


def _float_rows(tensors: Mapping[str, torch.Tensor], quantization: CheckpointQuantization, part: slice) -> Rows:
    """weight fp8 [out, in]; a scale for all, for an output [out, 1], or for a tile [out / a, in / b]."""
    scales = tensors["weight_scale_inv" if "weight_scale_inv" in tensors else "weight_scale"]
    if quantization.block_size is not None:
        scales = scales.float()[torch.arange(part.start, part.stop) // quantization.block_size[0]]
    else:
        scales = _row_scales(scales, part)
    return Rows(tensors["weight"][part].float(), torch.zeros((1, 1)), scales)


def _mxfp4_rows(tensors: Mapping[str, torch.Tensor], quantization: CheckpointQuantization, part: slice) -> Rows:
    """weight_blocks uint8 [out, in / 32, 16], two E2M1 numbers a byte, the lower bits first; weight_scales uint8
    [out, in / 32], exponents of two plus 127 (OCP Microscaling Formats 1.0)."""
    packed = tensors["weight_blocks"][part].long()
    doubled = torch.tensor(_MXFP4_DOUBLED, dtype=torch.int16)
    values = torch.stack((doubled[packed & 15], doubled[packed >> 4]), dim=-1).flatten(1)
    scales = torch.exp2(tensors["weight_scales"][part].float() - 128)
    return Rows(values, torch.zeros((1, 1), dtype=torch.int16), scales)


def _row_scales(scales: torch.Tensor, part: slice) -> torch.Tensor:
    """float32 [n, g] of what is stored for each output, or [1, 1] of what is stored once."""
    return scales.float().view(1, 1) if scales.numel() == 1 else scales[part].float().view(part.stop - part.start, -1)


_Reader = Callable[[Mapping[str, torch.Tensor], CheckpointQuantization, slice], Rows]
_ROWS: dict[str, _Reader] = {
    "gptq": _gptq_rows,
    "awq": _awq_rows,
    "packed": _packed_rows,
    "int": _int_rows,
    "float": _float_rows,
    "mxfp4": _mxfp4_rows,
}


def _shape(tensors: Mapping[str, torch.Tensor], quantization: CheckpointQuantization) -> tuple[int, int]:
    """(out, in) of the matrix."""
    if quantization.layout == "packed":
        out_features, in_features = tensors["weight_shape"].tolist()
        return out_features, in_features
    rows, columns = tensors[word_tensor(quantization)].shape[:2]
    if quantization.layout == "gptq":
        return columns, rows * 32 // quantization.bits
    if quantization.layout == "awq":
        return columns * 8, rows
    return rows, columns * (BLOCK if quantization.layout == "mxfp4" else 1)
