"""The plan: every open limit resolved, and what does not fit refused before anything is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from llmserve.config import EngineConfig
from llmserve.errors import ConfigError, InsufficientMemoryError
from llmserve.kernels.reference import ReferenceOps
from llmserve.messages import MemoryPlan
from llmserve.models.config import ModelConfig, read_model_config
from llmserve.worker.loader import prepare_model
from llmserve.worker.memory import WeightPlan, available_bytes, cache_dtype, plan_memory

GIB = 2**30
BLOCK_BYTES = 2 * 16 * 3 * 64 * 2 * 30  # SmolLM2-135M in bf16: keys and values of 16 tokens in 30 layers


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> ModelConfig:
    return read_model_config(smollm2_path)


def plan(model: ModelConfig, free: int = 16 * GIB, **settings: object) -> MemoryPlan:
    config = EngineConfig(**settings)  # type: ignore[arg-type]
    weights = WeightPlan("dense", 300 * 2**20)
    return plan_memory(config, model, weights, torch.bfloat16, torch.device("cpu"), ReferenceOps(), free)


def test_a_cache_is_as_large_as_it_was_asked_to_be(model: ModelConfig) -> None:
    result = plan(model, kv_cache_memory=GIB)
    assert result.num_blocks == GIB // BLOCK_BYTES
    assert result.kv_cache_bytes == result.num_blocks * BLOCK_BYTES <= GIB
    assert result.num_tokens == 16 * result.num_blocks


def test_the_default_cache_leaves_room_and_is_no_larger_than_useful(model: ModelConfig) -> None:
    assert plan(model, free=4 * GIB).kv_cache_bytes < 2 * GIB
    assert plan(model, free=1000 * GIB).kv_cache_bytes <= 4 * GIB
    assert plan(model, max_num_seqs=2, max_model_len=1024).num_tokens == 2 * 1024


def test_an_8_bit_cache_holds_nearly_twice_the_tokens_where_there_is_one(model: ModelConfig) -> None:
    full, half = plan(model, kv_cache_memory=GIB), plan(model, kv_cache_memory=GIB, kv_cache_dtype="fp8")
    assert (full.kv_cache_dtype, cache_dtype(full)) == ("bfloat16", torch.bfloat16)
    assert (half.kv_cache_dtype, cache_dtype(half)) == ("float8_e4m3fn", torch.float8_e4m3fn)
    assert half.num_blocks == GIB // (BLOCK_BYTES // 128 * 68)  # 64 bytes and a scale, where there were 128
    ops = ReferenceOps()
    ops.caches_fp8 = False
    config = EngineConfig(kv_cache_dtype="fp8")
    with pytest.raises(ConfigError, match="--kv-cache-dtype at auto"):
        plan_memory(config, model, WeightPlan("dense", 0), torch.bfloat16, torch.device("cpu"), ops, GIB)


def test_a_host_tier_is_planned_in_blocks_and_only_for_a_gpu(model: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="--kv-cache-host-memory out"):
        plan(model, kv_cache_host_memory=GIB)
    ops = ReferenceOps()
    ops.name = "triton"

    def of(num_bytes: int) -> int:
        config = EngineConfig(kv_cache_host_memory=num_bytes)
        weights, device = WeightPlan("dense", 0), torch.device("cpu")
        return plan_memory(config, model, weights, torch.bfloat16, device, ops, 16 * GIB).num_host_blocks

    assert of(0) == 0
    assert of(7 * BLOCK_BYTES + 5) == 7
    with pytest.raises(ConfigError, match="less than one block"):
        of(BLOCK_BYTES - 1)
    with pytest.raises(InsufficientMemoryError, match="kv_cache_host_memory asks for"):
        of(2**60)


def test_an_open_context_shrinks_to_the_cache_and_a_stated_one_is_refused(model: ModelConfig) -> None:
    assert plan(model, kv_cache_memory=100 * BLOCK_BYTES).max_model_len == 1600
    with pytest.raises(InsufficientMemoryError, match="one sequence of 4096 tokens"):
        plan(model, kv_cache_memory=100 * BLOCK_BYTES, max_model_len=4096)


def test_what_does_not_fit_is_refused_with_what_to_change(model: ModelConfig) -> None:
    with pytest.raises(InsufficientMemoryError, match="max_model_len or max_num_batched_tokens"):
        plan(model, free=200 * 2**20)
    with pytest.raises(InsufficientMemoryError, match="kv_cache_memory asks for 20"):
        plan(model, kv_cache_memory=20 * GIB)


def test_a_context_beyond_the_models_own_is_refused(model: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="8192 positions"):
        plan(model, max_model_len=9000)


def test_a_step_has_room_for_every_sequence(model: ModelConfig) -> None:
    assert plan(model, max_num_seqs=5000, kv_cache_memory=GIB).max_num_batched_tokens >= 5000


def test_activations_grow_with_the_budget(model: ModelConfig) -> None:
    small, large = (plan(model, max_num_batched_tokens=n).activation_bytes for n in (512, 8192))
    assert large - small == 7680 * 2 * (4 * 576 + 2 * (9 + 6) * 64 + 3 * 1536)


def test_this_machine_has_memory() -> None:
    assert 2**26 < available_bytes(torch.device("cpu")) < 2**50


def test_a_plan_is_plain_data(model: ModelConfig) -> None:
    import msgspec

    result = plan(model)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=MemoryPlan) == result
    assert not dataclasses.is_dataclass(result)


def test_a_share_of_a_gpu_is_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="--gpu-memory"):
        prepare_model(EngineConfig(model=str(tmp_path), gpu_memory=0.5))
