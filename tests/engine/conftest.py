"""A tiny random model on disk, and an engine around it that runs in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file

from llmserve.config import EngineConfig
from llmserve.engine.core import EngineCore
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.messages import EngineRequest, FinishReason, SamplingParams, SequenceOutput, TokenLogprobs
from llmserve.scheduler.budget import FixedBudget
from llmserve.scheduler.drafts import Drafter
from llmserve.scheduler.policy import make_policy
from llmserve.scheduler.scheduler import Scheduler
from llmserve.worker.loader import prepare_model
from tests.models.gguf_writer import write_gguf


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, grouped heads, 512 positions: random weights, the real code."""
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # sharper distributions: sampling has something to choose between
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same model as a GGUF file with matrices of the named type."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    tensors = load_file(tiny_llama / "model.safetensors")

    def write(ggml_type: str) -> Path:
        path = tmp_path_factory.mktemp("gguf") / f"tiny.{ggml_type}.gguf"
        write_gguf(path, model, tensors, "llama", gguf.GGMLQuantizationType[ggml_type])
        return path

    return write


@dataclass
class Answer:
    """Everything the engine said to one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    def add(self, output: SequenceOutput) -> None:
        if not self.token_ids:
            self.num_cached_tokens = output.num_cached_tokens
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or []
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        self.num_preemptions = output.num_preemptions
        self.finish_reason = output.finish_reason


class ChunkBudget(FixedBudget):
    """Has prompts computed in chunks of so many tokens at most."""

    def __init__(self, max_num_batched_tokens: int, max_chunk: int) -> None:
        super().__init__(max_num_batched_tokens)
        self._max_chunk = max_chunk

    def next_step(self, num_running: int) -> int:
        return min(max(num_running, 1) + self._max_chunk - 1, super().next_step(num_running))


class Engine:
    """An EngineCore over a real model, driven by hand."""

    def __init__(
        self,
        path: Path,
        dtype: str,
        num_blocks: int,
        budget: int,
        max_chunk: int,
        max_num_seqs: int,
        drafter: Drafter | None,
        quantization: str,
    ) -> None:
        self.cache = KVCacheManager(num_blocks, 16)
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        token_budget = ChunkBudget(budget, max_chunk) if max_chunk else FixedBudget(budget)
        scheduler = Scheduler(
            self.cache,
            policy=make_policy("fcfs"),
            budget=token_budget,
            max_num_seqs=max_num_seqs,
            max_model_len=512,
            drafter=drafter,
        )
        config = EngineConfig(
            model=str(path),
            dtype=dtype,
            quantization=quantization,
            device="cpu",
            max_model_len=512,
            max_num_seqs=64,
            kv_cache_memory=2**29,
        )
        prepared = prepare_model(config)
        assert prepared.plan.num_blocks >= num_blocks
        runner = prepared.load()
        self.core = EngineCore(scheduler, token_budget, runner, time.monotonic, drafter)

    def new_answer(self) -> Answer:
        """For tests that step by themselves."""
        return Answer()

    def run(self, *requests: EngineRequest) -> dict[str, Answer]:
        """Adds the requests and steps until all have finished."""
        answers = {request.request_id: Answer() for request in requests}
        for request in requests:
            self.core.add(request)
        while self.core.has_work():
            step = self.core.step()
            self.num_draft_tokens += step.stats.num_draft_tokens
            self.num_accepted_tokens += step.stats.num_accepted_tokens
            for output in step.outputs:
                answers[output.request_id].add(output)
        return answers


@pytest.fixture(scope="session")
def make_engine() -> Callable[..., Engine]:
    def make(
        path: Path,
        dtype: str = "float32",
        num_blocks: int = 400,
        budget: int = 512,
        max_chunk: int = 0,
        max_num_seqs: int = 64,
        drafter: Drafter | None = None,
        quantization: str = "none",
    ) -> Engine:
        return Engine(path, dtype, num_blocks, budget, max_chunk, max_num_seqs, drafter, quantization)

    return make


@pytest.fixture(scope="session")
def make_request() -> Callable[..., EngineRequest]:
    counter = iter(range(10**9))

    def make(prompt: list[int], max_tokens: int = 24, *, cache_salt: str = "", **params: Any) -> EngineRequest:
        number = next(counter)
        values = {"max_tokens": max_tokens, "seed": 1, "temperature": 0.0} | params
        return EngineRequest(
            request_id=f"request-{number}",
            prompt_token_ids=prompt,
            params=SamplingParams(**values),
            arrival_s=float(number),
            cache_salt=cache_salt,
        )

    return make
