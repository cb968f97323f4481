"""Mixtures of experts beyond equality with transformers: the C kernels, fused tensors, the plan, and refusals."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmserve.config import EngineConfig
from llmserve.errors import ModelLoadError
from llmserve.kernels.cpu.build import find_compiler
from llmserve.kernels.cpu.ops import create_cpu_ops
from llmserve.models.config import read_model_config
from llmserve.models.parameters import linear_parameters
from llmserve.models.quantization import choose_formats
from llmserve.worker.loader import prepare_model
from llmserve.worker.memory import WeightPlan, plan_memory

_SIZES = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
SIZES = _SIZES | {"num_experts": 4}
FAMILIES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2moe": ("Qwen2Moe", SIZES | {"shared_expert_intermediate_size": 64, "mlp_only_layers": [0]}),
    "qwen3moe": ("Qwen3Moe", SIZES | {"head_dim": 32}),
    "dots1": ("Dots1", {"n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 16, "sliding_window": None} | _SIZES),
    "gpt-oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 9}),
}
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")


@pytest.fixture(scope="module", params=FAMILIES)
def mixture(request, build_model, tmp_path_factory):
    """(name, folder) of a tiny random mixture whose rows are whole blocks."""
    family, changes = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    build_model(family, **changes).save_pretrained(folder)
    return request.param, folder


@needs_compiler
@pytest.mark.parametrize("quantization", ["none", "q8_0", "int8"])
def test_the_c_kernels_agree_and_do_not_depend_on_the_batch(mixture, load, driver_class, prompt, quantization):
    _, folder = mixture
    ops, config = create_cpu_ops(2), read_model_config(folder)
    formats = choose_formats(config, {}, quantization, ops.weight_formats)
    model = load(folder, torch.bfloat16 if quantization == "none" else torch.float32, ops, formats=formats)
    ids, alone = driver_class(model, ops, block_size=16).generate(prompt, 5)
    exact = driver_class(load(folder)).step({0: ids[:-1]})[0]
    error = (alone - exact).norm(dim=-1) / exact.norm(dim=-1)
    # A rounding may send a token to another expert, so a few rows may be far off; most are near.
    assert 0 < error.median() < 0.15

    crowd = driver_class(model, ops, block_size=16)
    rng = random.Random(1)
    strangers = {n: [rng.randrange(101) for _ in range(rng.choice([1, 3, 30]))] for n in range(9)}
    rows = [crowd.step({"a": ids[:7], **strangers})["a"], crowd.step({3: [5], "a": ids[7:20], 4: [9, 9]})["a"]]
    rows += [crowd.step({5: [token], "a": [token], 6: [1]})["a"] for token in ids[20:-1]]
    assert torch.equal(torch.cat(rows), alone)


@needs_compiler
@pytest.mark.parametrize("quantization", ["none", "q8_0"])
def test_the_plan_counts_every_expert(mixture, quantization):
    _, folder = mixture
    config = EngineConfig(
        model=str(folder), quantization=quantization, device="cpu", kv_cache_memory=2**20, num_threads=1
    )
    prepared = prepare_model(config)
    assert prepared.plan.weight_format == ("dense" if quantization == "none" else quantization)
    assert prepared.load().model.nbytes == prepared.plan.weight_bytes


def test_activations_grow_with_the_experts_a_token_takes(mixture):
    model = read_model_config(mixture[1])
    ops, engine = create_cpu_ops(1) or pytest.skip("no C compiler"), EngineConfig(kv_cache_memory=2**24)
    more = replace(model, moe=replace(model.moe, num_experts_per_token=4))
    few, many = (
        plan_memory(engine, m, WeightPlan("dense", 0), torch.bfloat16, torch.device("cpu"), ops, 2**34).activation_bytes
        for m in (model, more)
    )
    assert many - few == 1024 * 2 * 2 * 3 * (model.hidden_size + model.moe.intermediate_size)


def test_layers_without_experts_are_plain(tmp_path, build_model):
    changes = SIZES | {"num_experts": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 6}
    build_model("Qwen3Moe", **changes).save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    assert [layer for layer in range(6) if config.moe_of_layer(layer) is not None] == [1, 5]
    names = {matrix.name for matrix in linear_parameters(config)}
    assert "model.layers.3.mlp.gate_up_proj" in names
    assert "model.layers.5.mlp.experts.3.gate_up_proj" in names


@pytest.mark.parametrize("case", ["mixtral", "qwen2moe", "qwen3moe"])
def test_fused_experts_are_those_that_stand_apart(case, tmp_path, build_model, load, driver_class, prompt):
    """As a state dict of transformers 5 has them: all experts of a layer in one tensor, gate before up."""
    family, changes = FAMILIES[case]
    model = build_model(family, **changes)
    apart, fused = tmp_path / "apart", tmp_path / "fused"
    model.save_pretrained(apart)
    model.save_pretrained(fused)
    tensors = load_file(fused / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    tensors |= {name: tensor for name, tensor in model.state_dict().items() if ".experts." in name}
    assert "model.layers.2.mlp.experts.gate_up_proj" in tensors
    save_file(tensors, fused / "model.safetensors")
    reports = []
    found = driver_class(load(fused, progress=lambda *counts: reports.append(counts))).step({0: prompt})[0]
    assert torch.equal(found, driver_class(load(apart)).step({0: prompt})[0])
    assert reports[-1][0] == reports[-1][1] == sum(tensor.nbytes for tensor in tensors.values())


class TestRefusals:
    @pytest.fixture
    def folder(self, tmp_path, build_model):
        build_model("Qwen3Moe", **SIZES).save_pretrained(tmp_path)
        return tmp_path

    def change(self, folder, **values):
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))

    def test_a_missing_expert_is_named(self, folder, load):
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ModelLoadError, match=r"model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight.*missing"):
            load(folder)

    def test_an_expert_too_many_is_named(self, folder, load):
        self.change(folder, num_local_experts=3)
        with pytest.raises(ModelLoadError, match=r"mlp\.gate\.weight.*\[4, 64\].*\[3, 64\]"):
            load(folder)

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"num_experts_per_tok": 5}, ["num_experts_per_tok", "from 1 to 4"]),
            ({"num_local_experts": 0}, ["num_local_experts", "it is 0"]),
            ({"num_local_experts": None}, ["num_local_experts", "missing"]),
            ({"moe_intermediate_size": "wide"}, ["moe_intermediate_size", "'wide'"]),
            ({"mlp_only_layers": "all"}, ["mlp_only_layers", "list of layers"]),
            ({"n_group": 4, "topk_group": 2}, ["group by group"]),
            ({"architectures": ["DeepseekV3ForCausalLM"]}, ["DeepseekV3ForCausalLM", "Qwen3MoeForCausalLM"]),
        ],
    )
    def test_what_is_wrong_or_unsupported_is_named(self, folder, values, words):
        self.change(folder, **values)
        with pytest.raises(ModelLoadError) as caught:
            read_model_config(folder)
        for word in ["config.json", *words]:
            assert word in caught.value.message
