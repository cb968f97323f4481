"""Whole model folders with packed matrices, by every published layout, beside the plain tensors that they mean."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.models import checkpoint_packers as packers

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUP = 32


def ct(layout: str, bits: int, strategy: str, *, activations: bool = False, **weights: object) -> dict[str, object]:
    """compressed-tensors' quantization_config."""
    kind = "float" if layout == "float-quantized" else "int"
    scheme: dict[str, object] = {"targets": ["Linear"], "input_activations": {"num_bits": 8} if activations else None}
    scheme["weights"] = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }


# name -> (quantization_config, the format its matrices are kept in)
CASES: dict[str, tuple[dict[str, object], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}, "Q4_0"),
    "gptq-asym": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False}, "Q4_1"),
    "gptq-v2": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "checkpoint_format": "gptq_v2"},
        "Q4_1",
    ),
    "gptq-act-order": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": True}, "W4"),
    "gptq-8": ({"quant_method": "gptq", "bits": 8, "group_size": GROUP, "sym": True}, "Q8_0"),
    "gptq-8-asym": ({"quant_method": "gptq", "bits": 8, "group_size": GROUP, "sym": False}, "W8"),
    "gptq-channel": ({"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True}, "Q4_0"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, "Q4_1"),
    "w4a16": (ct("pack-quantized", 4, "group", group_size=GROUP), "Q4_0"),
    "w4a16-asym": (ct("pack-quantized", 4, "group", group_size=GROUP, symmetric=False), "Q4_1"),
    "w4a16-act-order": (ct("pack-quantized", 4, "group", group_size=GROUP, actorder="group"), "W4"),
    "w8a16": (ct("pack-quantized", 8, "channel"), "Q8_0"),
    "w8a8": (ct("int-quantized", 8, "channel", activations=True), "INT8"),
    "w8a8-asym": (ct("int-quantized", 8, "channel", activations=True, symmetric=False), "W8"),
    "fp8-channel": (ct("float-quantized", 8, "channel", activations=True), "F8_E4M3"),
    "fp8-tensor": (ct("float-quantized", 8, "tensor", activations=True), "F8_E4M3"),
    "fp8-block": ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [48, 40]}, "F8_E4M3"),
    "fp8-plain": ({"quant_method": "fp8", "activation_scheme": "static"}, "F8_E4M3"),
}


def pack(case: str, weight: torch.Tensor, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a packed matrix of weight's shape, and the plain matrix they mean."""
    config = CASES[case][0]
    (rows, columns), method = weight.shape, config["quant_method"]
    if case.startswith("fp8"):
        return pack_float(case, weight)
    weights = config["config_groups"]["group_0"]["weights"] if method == "compressed-tensors" else config
    symmetric = weights.get("symmetric", weights.get("sym", False))
    bits, group = weights.get("bits", weights.get("num_bits")), weights.get("group_size", -1)
    group = columns if group == -1 else group
    values, scales, zeros = packers.random_integers((rows, columns), bits, group, seed, symmetric)
    group_of = torch.arange(columns) // group
    if case.endswith("act-order"):
        # As quantisers do: matrices of the same inputs have them in the same order.
        group_of = group_of[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
    expected = packers.plain(values, scales, zeros, group_of)
    if method == "gptq":
        offset = 0 if case == "gptq-v2" else 1
        return packers.gptq(values, scales, zeros, bits, group_of, offset), expected
    if method == "awq":
        return packers.awq(values, scales, zeros), expected
    if config["format"] == "pack-quantized":
        order = group_of if case.endswith("act-order") else None
        return packers.pack_quantized(values, scales, zeros, bits, symmetric, order), expected
    tensors = {"weight": (values - 128).to(torch.int8), "weight_scale": scales}
    if not symmetric:
        tensors["weight_zero_point"] = (zeros - 128).to(torch.int8)
    return tensors, expected


def pack_float(case: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    if case == "fp8-block":
        rows, columns = weight.shape
        scales = torch.rand(-(-rows // 48), -(-columns // 40), generator=torch.Generator().manual_seed(1)) * 0.01 + 1e-3
        full = scales.repeat_interleave(48, 0)[:rows].repeat_interleave(40, 1)[:, :columns]
        quantised, expected = packers.fp8(weight, full)
        return {"weight": quantised, "weight_scale_inv": scales}, expected
    scales = weight.abs().amax(dim=1, keepdim=True) / 448 if case == "fp8-channel" else weight.abs().max().view(1) / 448
    scales = scales.bfloat16()
    quantised, expected = packers.fp8(weight, scales.float())
    extra = {"input_scale": torch.ones(1)} if case == "fp8-plain" else {}
    return {"weight": quantised, "weight_scale": scales, **extra}, expected


def build_folder(case: str, folder: Path, model) -> dict[str, torch.Tensor]:
    """Saves `model` with packed matrices; returns the plain tensors that they mean."""
    model.save_pretrained(folder)
    tensors, meaning = {}, {}
    for index, (name, tensor) in enumerate(load_file(folder / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in MATRICES and name.endswith(".weight"):
            packed, meaning[name] = pack(case, tensor, index)
            tensors |= {f"{module}.{part}": value for part, value in packed.items()}
        else:
            tensors[name] = meaning[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": CASES[case][0]}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return meaning
