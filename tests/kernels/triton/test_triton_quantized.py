"""Quantised Hugging Face folders through the Triton kernels: kept in their few bits, and saying what they mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmserve.errors import ModelLoadError
from llmserve.kernels.ops import AttentionMetadata, Ops
from llmserve.kernels.reference import ReferenceOps
from llmserve.kernels.weight_formats import row_bytes
from llmserve.models.checkpoint_quantization import CheckpointQuantization
from llmserve.models.config import read_model_config
from llmserve.models.loader import load_model
from llmserve.models.packed_weights import PackedMatrix
from llmserve.models.parameters import weight_bytes
from llmserve.models.quantization import choose_formats, resolve_quantization
from llmserve.models.weights import open_weights
from tests.kernels.triton.triton_cases import DEVICE, triton_ops
from tests.models.checkpoint_folders import build_folder

TOKENS = 6


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return transformers.Qwen2ForCausalLM(config)


def run(folder: Path, ops: Ops, device: torch.device, quantization: str) -> tuple[torch.Tensor, int, int, set[str]]:
    """Logits of a prompt; bytes of the weights, and what was planned; the formats of the matrices."""
    config = read_model_config(folder)
    source = open_weights(folder, config, ops.weight_formats)
    resolved = resolve_quantization(
        quantization, source.where, source.types.values(), ops.weight_formats, dtype_is_auto=True
    )
    formats = choose_formats(config, source.types, resolved, ops.weight_formats)
    made = load_model(source, config, torch.float32, device, ops, formats, max_model_len=64)
    caches = [ops.allocate_kv_cache(made.kv_cache_spec(16, torch.float32), 2, device)]
    meta = AttentionMetadata(
        query_start_loc=torch.tensor([0, TOKENS], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([TOKENS], dtype=torch.int32, device=device),
        block_table=torch.tensor([[1]], dtype=torch.int32, device=device),
        slot_mapping=torch.arange(16, 16 + TOKENS, device=device),
        positions=torch.arange(TOKENS, device=device),
        max_seq_len=TOKENS,
    )
    with torch.inference_mode():
        logits = made.compute_logits(made.forward(torch.arange(3, 3 + TOKENS, device=device), meta, caches))
    planned = weight_bytes(
        config,
        4,
        lambda matrix: ops.linear_bytes(
            formats[matrix.name], matrix.out_features, matrix.in_features, torch.float32, matrix.has_bias
        ),
    )
    return logits.cpu(), made.nbytes, planned, set(formats.values())


@pytest.mark.parametrize(
    ("case", "fmt", "tolerance"),
    [
        ("gptq", "w4a16_g32", 1e-4),
        ("awq", "w4a16_g32", 1e-4),
        ("gptq-channel", "w4a16", 1e-4),
        ("w4a16-asym", "w4a16_g32", 1e-4),
        ("gptq-act-order", "w4a16_g32_order", 1e-4),
        ("w8a8", "int8", 3e-2),
        ("fp8-tensor", "fp8", 8e-2),
    ],
)
def test_a_packed_folder_stays_packed_and_says_what_it_means(case, fmt, tolerance, model, tmp_path) -> None:
    ops = triton_ops()
    if fmt == "fp8" and fmt not in ops.weight_formats:
        pytest.skip("this GPU has no fp8")
    build_folder(case, tmp_path, model)
    logits, taken, planned, formats = run(tmp_path, ops, DEVICE, "auto")
    assert taken == planned
    assert formats == {fmt, "dense"}  # the head is not packed
    expected, dense_bytes, *_ = run(tmp_path, ReferenceOps(), torch.device("cpu"), "none")
    assert (logits - expected).norm() / expected.norm() < tolerance
    assert fmt == "dense" or taken < 0.6 * dense_bytes


def test_parts_whose_inputs_stand_in_different_orders_are_refused(model, tmp_path) -> None:
    build_folder("gptq-act-order", tmp_path, model)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"'model.layers.0.self_attn.qkv_proj'.*different orders \('g_idx'\)"):
        run(tmp_path, triton_ops(), DEVICE, "auto")


@pytest.mark.parametrize("case", ["awq", "gptq-act-order"])
def test_experts_of_4_bits(case, tmp_path) -> None:
    """Each expert has its own order."""
    torch.manual_seed(5)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    build_folder(case, tmp_path, transformers.Qwen3MoeForCausalLM(config))
    if case == "gptq-act-order":
        tensors = load_file(tmp_path / "model.safetensors")
        for part in ("gate_proj", "up_proj"):
            name = f"model.layers.0.mlp.experts.2.{part}.g_idx"
            tensors[name] = tensors[name].flip(0).contiguous()
        save_file(tensors, tmp_path / "model.safetensors")
    logits, taken, planned, formats = run(tmp_path, triton_ops(), DEVICE, "auto")
    assert taken == planned
    assert formats == {"w4a16_g32" if case == "awq" else "w4a16_g32_order", "dense"}
    expected, *_ = run(tmp_path, ReferenceOps(), torch.device("cpu"), "none")
    assert (logits - expected).norm() / expected.norm() < 1e-4


def test_fp8_of_any_weights_on_request(model, tmp_path) -> None:
    ops = triton_ops()
    if "fp8" not in ops.weight_formats:
        pytest.skip("this GPU has no fp8")
    model.save_pretrained(tmp_path)
    logits, taken, planned, formats = run(tmp_path, ops, DEVICE, "fp8")
    assert (taken, formats) == (planned, {"fp8"})
    expected, *_ = run(tmp_path, ReferenceOps(), torch.device("cpu"), "none")
    assert 0 < (logits - expected).norm() / expected.norm() < 8e-2


def test_fp8_in_tiles_stays_in_fp8() -> None:
    """As DeepSeek and Qwen publish it; tiles at the edges are cut."""
    ops = triton_ops()
    if "fp8_g128" not in ops.weight_formats:
        pytest.skip("this GPU has no fp8")
    torch.manual_seed(4)
    scales = torch.rand(2, 3) + 0.5
    numbers = torch.randn(200, 384).to(torch.float8_e4m3fn)
    quantization = CheckpointQuantization(method="fp8", layout="float", bits=8, block_size=(128, 128))
    matrix = PackedMatrix("x", {"weight": numbers, "weight_scale_inv": scales}, quantization, ops.weight_formats)
    assert matrix.type_name == "FP8_G128"
    raw, dense = torch.empty(200, row_bytes("fp8_g128", 384), dtype=torch.uint8), torch.empty(200, 384)
    for part in (slice(0, 96), slice(96, 200)):
        matrix.read_raw(raw[part], part)
        matrix.read(dense[part], part)
    x = torch.randn(5, 384)
    found = ops.linear(x.to(DEVICE), ops.pack_quantized(raw.to(DEVICE), "fp8_g128")).cpu()
    expected = x @ dense.T
    assert (found - expected).norm() / expected.norm() < 4e-2
