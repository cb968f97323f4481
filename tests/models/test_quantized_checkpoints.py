"""Quantised Hugging Face folders, packed here by their published layouts: numbers, blocks, whole models, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmserve.config import EngineConfig
from llmserve.errors import ModelLoadError
from llmserve.kernels.cpu.build import find_compiler
from llmserve.kernels.weight_formats import DENSE, FP8, INT8, MXFP4, W4A16_GROUPS, row_bytes
from llmserve.models.checkpoint_quantization import CheckpointQuantization
from llmserve.models.config import read_model_config
from llmserve.models.packed_decoder import open_decoder
from llmserve.models.packed_weights import PackedMatrix
from llmserve.models.quantization import choose_formats, native_types
from llmserve.models.weights import open_weights
from llmserve.worker.loader import prepare_model
from tests.models import checkpoint_packers as packers
from tests.models.checkpoint_folders import CASES, build_folder, ct

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")


@pytest.fixture(scope="module", params=CASES)
def packed(request, tmp_path_factory, build_model):
    """(case, a folder with packed matrices, a folder of what they mean)."""
    folder, plain = tmp_path_factory.mktemp("packed"), tmp_path_factory.mktemp("plain")
    model = build_model("Qwen2", intermediate_size=160, head_dim=16)
    meaning = build_folder(request.param, folder, model)
    model.save_pretrained(plain)
    save_file(meaning, plain / "model.safetensors")
    return request.param, folder, plain


def test_the_numbers_are_those_that_were_packed(packed, load, driver_class, prompt):
    _, folder, plain = packed
    source, expected = open_weights(folder, read_model_config(folder)), load_file(plain / "model.safetensors")
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        out = torch.empty_like(tensor)
        source.read(name, out)
        torch.testing.assert_close(out, tensor, atol=0, rtol=1e-6, msg=name)
    found, wanted = (driver_class(load(path)).step({0: prompt})[0] for path in (folder, plain))
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)


def test_blocks_hold_the_same_numbers(packed):
    """What can be kept as it lies is known by its type; the `gguf` package reads it back."""
    case, folder, plain = packed
    source, expected = open_weights(folder, read_model_config(folder)), load_file(plain / "model.safetensors")
    name, kind = "model.layers.1.mlp.down_proj.weight", CASES[case][1]
    assert source.types[name] == kind
    if kind.startswith(("W", "F")):
        return
    rows, columns = source.shapes[name]
    row_bytes = 4 + columns if kind == "INT8" else columns // 32 * {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    raw = torch.empty(rows, row_bytes, dtype=torch.uint8)
    source.read_raw(name, raw)
    if kind == "INT8":
        found = raw[:, 4:].contiguous().view(torch.int8).float() * raw[:, :4].contiguous().view(torch.float32)
    else:
        found = torch.from_numpy(gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind]))
    exact = kind != "Q4_1"  # whose fp16 minimum is a rounded product
    torch.testing.assert_close(found, expected[name], atol=0 if exact else 2.5e-4, rtol=1e-6 if exact else 0)


GPU_FORMATS = (DENSE, INT8, FP8, *W4A16_GROUPS)
# What becomes of them where those are computed; of the others, nothing that is kept as it lies.
ON_A_GPU = {
    **dict.fromkeys(("gptq", "gptq-asym", "gptq-v2", "awq", "w4a16", "w4a16-asym"), "w4a16_g32"),
    **dict.fromkeys(("gptq-act-order", "w4a16-act-order"), "w4a16_g32_order"),
    "gptq-channel": "w4a16",
    "w8a8": "int8",
    **dict.fromkeys(("fp8-channel", "fp8-tensor", "fp8-plain"), "fp8"),
}


def test_rows_for_a_gpu_hold_the_same_numbers(packed):
    case, folder, plain = packed
    config, expected = read_model_config(folder), load_file(plain / "model.safetensors")
    source = open_weights(folder, config, GPU_FORMATS)
    name, fmt = "model.layers.1.mlp.down_proj.weight", ON_A_GPU.get(case)
    assert native_types([source.types[name]], GPU_FORMATS) == ([] if fmt is None else [fmt.upper()])
    chosen = choose_formats(config, source.types, "gguf", GPU_FORMATS)
    assert chosen["model.layers.1.self_attn.qkv_proj"] == chosen["model.layers.1.mlp.down_proj"] == (fmt or DENSE)
    order = source.input_order(name)
    assert (order is not None) == (fmt is not None and fmt.endswith("_order"))
    if fmt is None:
        return
    rows, columns = source.shapes[name]
    raw = torch.empty(rows, row_bytes(fmt, columns), dtype=torch.uint8)
    source.read_raw(name, raw)
    if fmt in (INT8, FP8):
        numbers = raw[:, 4:].contiguous().view(torch.int8 if fmt == INT8 else torch.float8_e4m3fn).float()
        found = numbers * raw[:, :4].contiguous().view(torch.float32)
    else:
        group = W4A16_GROUPS[fmt] or columns
        pairs, factors = raw.split([columns // 2, 3 * (columns // group)], dim=1)
        scales, zeros = factors.split([2 * (columns // group), columns // group], dim=1)
        numbers = torch.stack((pairs & 15, pairs >> 4), dim=-1).view(rows, -1, group).int() - zeros[..., None].int()
        found = (numbers * scales.clone().view(torch.float16)[..., None].float()).flatten(1)
    torch.testing.assert_close(found, expected[name] if order is None else expected[name][:, order], atol=0, rtol=1e-6)


def test_a_folder_without_a_head_and_its_packed_matrices(packed, tmp_path):
    """As embedding models are saved: names without `model.`."""
    _, folder, plain = packed
    tensors = load_file(folder / "model.safetensors")
    headless = {n.removeprefix("model."): tensor for n, tensor in tensors.items() if not n.startswith("lm_head")}
    save_file(headless, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    _, source = open_decoder(tmp_path, with_head=False)
    name = "model.layers.0.mlp.up_proj.weight"
    found = torch.empty(source.shapes[name])
    source.read(name, found)
    torch.testing.assert_close(found, load_file(plain / "model.safetensors")[name], atol=0, rtol=1e-6)


@pytest.mark.parametrize("case", ["fp8-channel", "fp8-block"])
def test_fp8_without_a_scale_is_refused_by_name(case, tmp_path, build_model):
    build_folder(case, tmp_path, build_model("Qwen2", intermediate_size=160, head_dim=16))
    tensors = load_file(tmp_path / "model.safetensors")
    module = "model.layers.0.mlp.up_proj"
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{module}.weight_scale")}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=f"'{module}': 'weight' is in fp8, but neither 'weight_scale' nor"):
        open_weights(tmp_path, read_model_config(tmp_path))


@needs_compiler
def test_such_a_folder_simply_runs(packed, driver_class, prompt):
    case, folder, plain = packed
    prepared = prepare_model(EngineConfig(model=str(folder), device="cpu", kv_cache_memory=2**20, num_threads=1))
    kind = CASES[case][1]
    own = kind.lower() if not kind.startswith(("W", "F")) else "q8_0"
    assert prepared.plan.weight_format in (own, f"{own}, dense")  # the head is not packed
    runner = prepared.load()
    assert runner.model.nbytes == prepared.plan.weight_bytes
    exact = prepare_model(
        EngineConfig(model=str(plain), device="cpu", kv_cache_memory=2**20, num_threads=1, dtype="float32")
    )
    found, expected = (
        driver_class(each.load().model, each.ops, block_size=16).step({0: prompt})[0] for each in (prepared, exact)
    )
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 0 < error.max() < 0.1  # bf16, and activations of 8 bits


@needs_compiler
def test_dense_on_request(packed, driver_class, prompt):
    _, folder, _ = packed
    config = EngineConfig(
        model=str(folder), device="cpu", kv_cache_memory=2**20, num_threads=1, quantization="none", dtype="bfloat16"
    )
    assert prepare_model(config).plan.weight_format == "dense"


def test_large_matrices_are_read_in_slices(packed, monkeypatch):
    _, folder, plain = packed
    monkeypatch.setattr("llmserve.models.quantized_weights._SLICE_ELEMENTS", 100)  # 32 rows at a time
    source, expected = open_weights(folder, read_model_config(folder)), load_file(plain / "model.safetensors")
    for name in ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        out = torch.empty_like(expected[name])
        source.read(name, out)
        torch.testing.assert_close(out, expected[name], atol=0, rtol=1e-6)


@pytest.mark.parametrize("case", ["awq", "w8a8", "fp8-block"])
def test_experts_are_packed_one_by_one(case, tmp_path, build_model, load, driver_class, prompt):
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    model = build_model("Qwen3Moe", **changes)
    meaning = build_folder(case, tmp_path, model)
    found = driver_class(load(tmp_path)).step({0: prompt})[0]
    save_file(meaning, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(found, driver_class(load(tmp_path)).step({0: prompt})[0], atol=1e-3, rtol=0)


def test_gpt_oss_as_it_is_published(tmp_path, build_model, load, driver_class, prompt):
    """Experts in mxfp4, gate's and up's rows alternating; kept as q8_0, which holds their numbers exactly."""
    model = build_model("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=9)
    state, tensors = model.state_dict(), {}
    for index, (name, tensor) in enumerate(state.items()):
        if not name.endswith(("gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        shape = (tensor.shape[0], tensor.shape[2], tensor.shape[1])  # [e, out, in]
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"], numbers = packers.mxfp4(shape, index)
        tensor.copy_(numbers.transpose(1, 2))
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "packed")
    save_file(tensors, tmp_path / "packed" / "model.safetensors")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    expected = driver_class(load(tmp_path / "plain")).step({0: prompt})[0]
    torch.testing.assert_close(
        driver_class(load(tmp_path / "packed")).step({0: prompt})[0], expected, atol=1e-4, rtol=0
    )

    source = open_weights(tmp_path / "packed", read_model_config(tmp_path / "packed"))
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    assert source.types[name] == "Q8_0"
    raw, dense = torch.empty(source.shapes[name][0], 2 * 34, dtype=torch.uint8), torch.empty(source.shapes[name])
    source.read_raw(name, raw)
    source.read(name, dense)
    blocks = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(torch.from_numpy(blocks), dense)

    on_a_gpu = open_weights(tmp_path / "packed", read_model_config(tmp_path / "packed"), (MXFP4,))
    assert on_a_gpu.types[name] == "MXFP4"
    raw = torch.empty(source.shapes[name][0], row_bytes(MXFP4, 64), dtype=torch.uint8)
    on_a_gpu.read_raw(name, raw)
    fused = name.partition("experts.")[0] + "experts.gate_up_proj"  # up's rows are every other one
    assert torch.equal(raw[:, :32], tensors[f"{fused}_blocks"][3, 1::2].flatten(1))
    assert torch.equal(raw[:, 32:], tensors[f"{fused}_scales"][3, 1::2])


class TestRefusals:
    @pytest.fixture
    def folder(self, tmp_path, build_model):
        build_folder("gptq", tmp_path, build_model("Llama"))
        return tmp_path

    def configure(self, folder: Path, quantization: dict[str, object]) -> None:
        config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
        (folder / "config.json").write_text(json.dumps(config))

    @pytest.mark.parametrize(
        ("quantization", "words"),
        [
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["bitsandbytes", "awq, compressed-tensors, fp8"]),
            ({"quant_method": "gptq", "bits": 3, "group_size": 128}, ["bits", "3", "4, 8"]),
            ({"quant_method": "gptq", "group_size": 128}, ["bits", "missing"]),
            ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, ["checkpoint_format", "marlin"]),
            ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*down.*": {}}}, ["dynamic"]),
            ({"quant_method": "awq", "bits": 4, "version": "gemv"}, ["version", "gemv", "'gemm'"]),
            ({"quant_method": "awq", "bits": 4, "zero_point": False}, ["zero_point"]),
            ({"quant_method": "fp8", "fmt": "e5m2"}, ["fmt", "e5m2"]),
            ({"quant_method": "fp8", "weight_block_size": [128]}, ["weight_block_size", "two positive integers"]),
            (ct("nvfp4-pack-quantized", 4, "group"), ["format", "nvfp4-pack-quantized", "pack-quantized"]),
            (ct("marlin-24", 4, "group"), ["marlin-24"]),
            (ct("pack-quantized", 3, "group"), ["num_bits", "3"]),
            (ct("int-quantized", 8, "group"), ["strategy", "group"]),
            (ct("pack-quantized", 4, "group") | {"config_groups": {"a": {}, "b": {}}}, ["config_groups", "'a', 'b'"]),
            (ct("pack-quantized", 4, "group") | {"sparsity_config": {"format": "sparse-24"}}, ["sparsity_config"]),
        ],
    )
    def test_what_is_not_read_is_named(self, folder, quantization, words):
        self.configure(folder, quantization)
        with pytest.raises(ModelLoadError) as caught:
            read_model_config(folder)
        for word in ["config.json", *words]:
            assert word in caught.value.message

    def change(self, folder: Path, name: str, tensor: torch.Tensor | None) -> None:
        tensors = load_file(folder / "model.safetensors") | ({name: tensor} if tensor is not None else {})
        if tensor is None:
            del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    @pytest.mark.parametrize(
        ("part", "tensor", "words"),
        [
            ("scales", None, ["o_proj.scales", "missing beside", "gptq (4 bits, groups of 32)"]),
            ("scales", torch.ones(3, 64).half(), ["o_proj", "'scales'", "[3, 64]", "[2, 64]"]),
            ("qzeros", torch.ones(2, 4, dtype=torch.int32), ["'qzeros'", "[2, 8]"]),
            ("qweight", torch.ones(4, 64, dtype=torch.int32), ["'qzeros'", "a matrix [64, 32]"]),
        ],
    )
    def test_damaged_parts_are_named(self, folder, load, part, tensor, words):
        self.change(folder, f"model.layers.0.self_attn.o_proj.{part}", tensor)
        with pytest.raises(ModelLoadError) as caught:
            load(folder)
        for word in [str(folder), *words]:
            assert word in caught.value.message

    def test_zero_points_that_are_not_symmetric(self, folder):
        self.change(folder, "model.layers.0.self_attn.o_proj.qzeros", torch.ones(2, 8, dtype=torch.int32))
        source = open_weights(folder, read_model_config(folder))
        with pytest.raises(ModelLoadError, match=r"o_proj.*zero points other than 8"):
            source.read_raw("model.layers.0.self_attn.o_proj.weight", torch.empty(64, 36, dtype=torch.uint8))

    def test_packed_numbers_without_a_configuration(self, folder, load):
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelLoadError, match=r"type I32.*quantization_config"):
            load(folder)


@pytest.mark.parametrize("layout", ["gptq", "int"])
def test_zero_points_that_symmetric_8_bit_blocks_cannot_hold_are_refused(layout: str) -> None:
    values, scales, zeros = packers.random_integers((32, 64), 8, 64, 0, symmetric=True)
    values[0, 0] = 0
    zeros = zeros + 1  # as where a "gptq_v2" checkpoint calls itself "gptq"
    group_of = torch.zeros(64, dtype=torch.int64)
    if layout == "gptq":
        quantization = CheckpointQuantization(method="gptq", layout="gptq", bits=8, group_size=64, zero_offset=1)
        tensors = packers.gptq(values, scales, zeros, 8, group_of)
    else:
        quantization = CheckpointQuantization(method="compressed-tensors", layout="int", bits=8)
        tensors = {"weight": (values - 128).to(torch.int8), "weight_scale": scales}
        tensors["weight_zero_point"] = (zeros - 128).to(torch.int8)
    matrix = PackedMatrix("x", tensors, quantization)
    row_bytes = 64 + 4 if layout == "int" else 2 * 34
    with pytest.raises(ModelLoadError, match="says symmetric"):
        matrix.read_raw(torch.empty(32, row_bytes, dtype=torch.uint8), slice(0, 32))
