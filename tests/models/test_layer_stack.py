"""All layers in one call give the bits that one op after another gives, in every architecture that the kernels run."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from llmserve.kernels.cpu.build import find_compiler
from llmserve.kernels.cpu.library import load_library
from llmserve.kernels.cpu.ops import CPUOps
from llmserve.kernels.ops import LayerParameters
from llmserve.models.layers import DecoderLayers

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")
PROMPTS = {"long": list(range(2, 92)) * 3, "short": [5, 9, 7]}  # the long one is more than a part of the rows
CASES = {
    "llama": ("Llama", {"head_dim": 32, "attention_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 48}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 2.0}),
    "odd": ("Llama", {"head_dim": 16, "intermediate_size": 97}),  # rows that bfloat16 kernels must pad
}


class SeparateOps(CPUOps):
    """The same kernels, one call each."""

    def fuse_layers(self, layers: Sequence[LayerParameters], final_norm: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_one_call_gives_the_bits_of_many(case, dtype, build_model, load, driver_class, tmp_path):
    family, changes = CASES[case]
    build_model(family, **({"max_position_embeddings": 512} | changes)).save_pretrained(tmp_path)
    library = load_library(2)
    assert library is not None
    found = []
    for ops in (CPUOps(library), SeparateOps(library)):
        model = load(tmp_path, dtype, ops)
        driver = driver_class(model, ops, block_size=16, num_blocks=64)
        steps = [driver.step(PROMPTS), driver.step({"short": [11], "long": [3, 4]}), driver.step({"short": [12]})]
        found.append([logits for step in steps for logits in step.values()])
        is_fused = ops.fuse_layers([layer.parameters() for layer in model._layers], model._final_norm) is not None
        assert is_fused == (type(ops) is CPUOps and not (case == "odd" and dtype == torch.bfloat16))
    for fused, separate in zip(*found, strict=True):
        assert torch.isfinite(fused).all()
        assert torch.equal(fused, separate)


def test_a_stack_follows_the_caches_it_is_given(build_model, load, driver_class, tmp_path):
    """Two drivers with a cache each over one model: neither writes into the other's."""
    build_model("Llama", head_dim=32).save_pretrained(tmp_path)
    library = load_library(1)
    assert library is not None
    ops = CPUOps(library)
    model = load(tmp_path, torch.float32, ops)
    assert not isinstance(model._stack, DecoderLayers)
    one, other = (driver_class(model, ops, block_size=16, num_blocks=8) for _ in range(2))
    one.step({"a": [5, 6, 7]})
    other.step({"a": [9, 9, 9]})
    apart = driver_class(model, ops, block_size=16, num_blocks=8)
    apart.step({"a": [5, 6, 7]})
    assert torch.equal(one.step({"a": [8]})["a"], apart.step({"a": [8]})["a"])
