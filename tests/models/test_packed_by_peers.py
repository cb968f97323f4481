"""Matrices packed by the libraries whose layouts we read: what they say their tensors mean is what we find in them.

`data/packed_by_peers.safetensors` was computed by AutoGPTQ 0.7.1 (`QuantLinear.pack`, and its product with the unit
matrix), AutoAWQ 0.2.9 (`WQLinear_GEMM.from_linear`, `dequantize_gemm`) and compressed-tensors 0.20.0 (its compressors,
and their `decompress`) from random matrices [32, 64], groups of 32. Tensors are named `<case>.<last part>`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmserve.json_fields import read_json
from llmserve.kernels.weight_formats import W4A16_GROUPS, row_bytes
from llmserve.models.checkpoint_quantization import read_quantization
from llmserve.models.packed_weights import PackedMatrix
from tests.models.checkpoint_folders import CASES

# case -> (its quantization_config, the type its matrices have where kernels compute 4 bits in groups and fp8)
PEERS: dict[str, tuple[dict[str, object], str]] = {
    "gptq": (CASES["gptq-asym"][0], "W4A16_G32"),
    "gptq-sym": (CASES["gptq"][0], "W4A16_G32"),
    "gptq-act-order": (CASES["gptq-act-order"][0] | {"sym": False}, "W4A16_G32_ORDER"),
    "gptq-channel": (CASES["gptq-channel"][0], "W4A16"),
    "gptq-8": (CASES["gptq-8"][0], "Q8_0"),
    "awq": (CASES["awq"][0], "W4A16_G32"),
    "w4a16": (CASES["w4a16"][0], "W4A16_G32"),
    "w4a16-asym": (CASES["w4a16-asym"][0], "W4A16_G32"),
    "w8a16": (CASES["w8a16"][0], "Q8_0"),
    "w8a8": (CASES["w8a8"][0], "INT8"),
    "fp8-channel": (CASES["fp8-channel"][0], "FP8"),
}
STORED = load_file(Path(__file__).parent / "data" / "packed_by_peers.safetensors")


def open_matrix(case: str, folder: Path, formats: tuple[str, ...]) -> tuple[PackedMatrix, torch.Tensor]:
    """The matrix, and what its packer says it means."""
    (folder / "config.json").write_text(json.dumps({"quantization_config": PEERS[case][0]}))
    quantization = read_quantization(read_json(folder / "config.json"))
    assert quantization is not None
    parts = {n.removeprefix(f"{case}."): tensor for n, tensor in STORED.items() if n.startswith(f"{case}.")}
    meaning = parts.pop("meaning")
    return PackedMatrix(case, parts, quantization, formats), meaning


def test_every_case_is_there() -> None:
    assert {name.partition(".")[0] for name in STORED} == set(PEERS)


@pytest.mark.parametrize("case", PEERS)
def test_the_numbers_are_those_of_the_packer(case: str, tmp_path: Path) -> None:
    matrix, meaning = open_matrix(case, tmp_path, ())
    assert matrix.shape == (32, 64)
    found = torch.empty(32, 64)
    matrix.read(found, slice(0, 32))
    torch.testing.assert_close(found, meaning, atol=0, rtol=1e-6)
    assert meaning.unique().numel() > 100  # it is no matrix of zeros


@pytest.mark.parametrize("case", [case for case, (_, kind) in PEERS.items() if kind.startswith("W4A16")])
def test_rows_of_4_bits_are_those_of_the_packer(case: str, tmp_path: Path) -> None:
    matrix, meaning = open_matrix(case, tmp_path, tuple(W4A16_GROUPS))
    fmt = PEERS[case][1].lower()
    assert matrix.type_name.lower() == fmt
    raw = torch.empty(32, row_bytes(fmt, 64), dtype=torch.uint8)
    matrix.read_raw(raw, slice(0, 32))
    group = W4A16_GROUPS[fmt] or 64
    pairs, scales, zeros = raw.split([32, 2 * (64 // group), 64 // group], dim=1)
    numbers = torch.stack((pairs & 15, pairs >> 4), dim=-1).view(32, -1, group).int() - zeros[..., None].int()
    found = (numbers * scales.clone().view(torch.float16)[..., None].float()).view(32, 64)
    order = torch.arange(64) if matrix.input_order is None else matrix.input_order
    assert (matrix.input_order is not None) == (case == "gptq-act-order")
    torch.testing.assert_close(found, meaning[:, order], atol=0, rtol=1e-6)


@pytest.mark.parametrize("case", PEERS)
def test_types(case: str, tmp_path: Path) -> None:
    assert open_matrix(case, tmp_path, ("int8", "fp8", *W4A16_GROUPS))[0].type_name == PEERS[case][1]
