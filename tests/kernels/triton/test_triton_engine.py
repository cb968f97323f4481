"""A whole model through the Triton kernels: the engine says what it says with plain torch."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
import transformers

from llmserve.config import EngineConfig
from llmserve.engine.assembly import make_core
from llmserve.engine.core import EngineCore
from llmserve.engine.overlap import OverlappedCore
from llmserve.kernels.ops import Ops
from llmserve.kernels.triton.step_inputs import TritonStepOps
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.messages import EngineRequest, SamplingParams
from llmserve.scheduler.budget import FixedBudget
from llmserve.scheduler.policy import make_policy
from llmserve.scheduler.scheduler import Scheduler
from llmserve.worker.device import CudaDevice
from llmserve.worker.gpu_model_runner import GPUModelRunner, GraphSettings
from llmserve.worker.loader import PreparedModel, prepare_model
from llmserve.worker.model_runner import ModelRunner
from tests.kernels.triton.interpreter import reachable
from tests.kernels.triton.triton_cases import DEVICE, IS_INTERPRETED, REFERENCE, SmallTileOps
from tests.worker.fake_device import FakeDevice


@pytest.fixture(scope="module")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped heads with q and k norms; one layer, random weights."""
    torch.manual_seed(3)
    config = transformers.Qwen3Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
    )
    model = transformers.Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)
    path = tmp_path_factory.mktemp("models") / "tiny-qwen3"
    model.save_pretrained(path)
    return path


def prepared_with(path: Path, ops: Ops) -> PreparedModel:
    config = EngineConfig(
        model=str(path),
        dtype="float32",
        quantization="none",
        device="cpu" if DEVICE.type == "cpu" else "cuda",
        max_model_len=128,
        max_num_seqs=8,
        kv_cache_memory=2**22,
    )
    return replace(prepare_model(config), ops=ops)


def answers(path: Path, ops: Ops, budget: int, *, overlapped: bool = False) -> list[list[int]]:
    """Tokens of a greedy and two sampled requests, prompts cut by the budget of a step. `overlapped`: a step ahead, in
    padded graphs, their inputs made by a kernel; on a device that a test can hold up, or the real one."""
    prepared = prepared_with(path, ops)
    tokens = FixedBudget(budget)
    scheduler = Scheduler(
        KVCacheManager(40, 16), policy=make_policy("fcfs"), budget=tokens, max_num_seqs=8, max_model_len=128
    )
    core: EngineCore
    if overlapped:
        plan = msgspec.structs.replace(prepared.plan, num_blocks=40, max_num_batched_tokens=budget)
        device = FakeDevice() if IS_INTERPRETED else CudaDevice(DEVICE)
        runner = GPUModelRunner(
            prepared.load_weights(), ops, TritonStepOps(), plan, prepared.dtype, device, GraphSettings(lazily=True)
        )
        core = OverlappedCore(scheduler, tokens, runner, time.monotonic)
    else:
        plain = ModelRunner(prepared.load_weights(), ops, prepared.plan, prepared.dtype, prepared.device)
        core = EngineCore(scheduler, tokens, plain, time.monotonic)
    wanted = [
        SamplingParams(max_tokens=4, temperature=0.0, seed=1),
        SamplingParams(max_tokens=4, temperature=0.8, seed=5, top_k=20),
        SamplingParams(max_tokens=4, temperature=1.2, seed=9, top_p=0.9, min_p=0.01),
    ]
    said: dict[str, list[int]] = {}
    for number, params in enumerate(wanted):
        prompt = [(7 * number + 3 * i) % 96 for i in range(11 + 9 * number)]
        said[str(number)] = []
        core.add(EngineRequest(request_id=str(number), prompt_token_ids=prompt, params=params, arrival_s=float(number)))
    while core.has_work():
        for output in core.step().outputs:
            said[output.request_id] += output.token_ids
    return list(said.values())


def test_the_engine_says_the_same_on_triton(tiny_qwen3: Path) -> None:
    expected = answers(tiny_qwen3, REFERENCE, 64)
    assert [len(tokens) for tokens in expected] == [4, 4, 4]
    assert answers(tiny_qwen3, SmallTileOps(), 64) == expected
    assert answers(tiny_qwen3, SmallTileOps(split=16), 16) == expected
    assert answers(tiny_qwen3, SmallTileOps(split=16), 16, overlapped=True) == expected


def returning_answers(path: Path, num_blocks: int, num_host_blocks: int) -> tuple[list[list[int]], int]:
    """Three prompts in turn, twice, through the assembled engine; and how many tokens were restored from the host."""
    prepared = prepared_with(path, SmallTileOps())
    plan = msgspec.structs.replace(
        prepared.plan, num_blocks=num_blocks, num_host_blocks=num_host_blocks, max_num_batched_tokens=64
    )
    device = FakeDevice() if IS_INTERPRETED else CudaDevice(DEVICE)
    model = prepared.load_weights()
    runner = GPUModelRunner(
        model, prepared.ops, TritonStepOps(), plan, prepared.dtype, device, GraphSettings(max_size=0)
    )
    core = make_core(replace(prepared.config, speculation="off"), runner)
    said: list[list[int]] = []
    num_restored = 0
    caches = [part for cache in runner.kv_caches for part in cache.parts()]
    with reachable(caches + (runner._host_blocks.slots if runner._host_blocks is not None else [])):
        for number in range(6):
            prompt = [(11 * (number % 3) + 3 * i) % 96 for i in range(50)]
            params = SamplingParams(max_tokens=2, temperature=0.0, seed=1)
            core.add(EngineRequest(request_id=str(number), prompt_token_ids=prompt, params=params, arrival_s=0.0))
            said.append([])
            while core.has_work():
                step = core.step()
                num_restored += step.stats.host_cache_hits
                for output in step.outputs:
                    said[-1] += output.token_ids
    return said, num_restored


def test_what_comes_back_from_the_host_is_what_was_computed(tiny_qwen3: Path) -> None:
    expected, num_restored = returning_answers(tiny_qwen3, 40, 0)
    assert num_restored == 0
    found, num_restored = returning_answers(tiny_qwen3, 5, 20)
    assert found == expected
    assert num_restored >= 3 * 2 * 16
