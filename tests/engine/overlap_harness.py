"""One model behind two engines: the plain one, and the overlapped one on the fake device. Lives made of a seed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from llmserve.config import EngineConfig
from llmserve.engine.core import EngineCore
from llmserve.engine.overlap import OverlappedCore
from llmserve.kernels.select import select_step_ops
from llmserve.kv_cache.host_tier import HostTier
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.messages import EngineRequest, FinishReason, SamplingParams, SequenceOutput
from llmserve.models.llama import LlamaModel
from llmserve.scheduler.adaptive_drafter import AdaptiveDrafter
from llmserve.scheduler.budget import FixedBudget
from llmserve.scheduler.drafts import Drafter, FixedDrafter, Proposal
from llmserve.scheduler.lookahead import SettledDrafter
from llmserve.scheduler.policy import make_policy
from llmserve.scheduler.scheduler import Scheduler
from llmserve.worker.device import Device
from llmserve.worker.gpu_model_runner import GPUModelRunner, GraphSettings
from llmserve.worker.loader import PreparedModel, prepare_model
from llmserve.worker.model_runner import ModelRunner
from tests.worker.fake_device import FakeDevice

MAX_LEN = 192
MAX_SEQS = 8
CONFIG = EngineConfig(
    dtype="float32",
    quantization="none",
    device="cpu",
    max_model_len=MAX_LEN,
    max_num_seqs=MAX_SEQS,
    max_num_batched_tokens=64,
    kv_cache_memory=2**24,
)


@dataclass
class Said:
    """All that one request was told."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, float]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0

    def add(self, output: SequenceOutput) -> None:
        assert self.finish_reason is None, "nothing is said to a request that has ended"
        self.token_ids += output.token_ids
        self.logprobs += [(entry.token_id, entry.logprob) for entry in output.logprobs or []]
        if output.prompt_logprobs and not self.prompt_logprobs:  # said again where a preempted prompt is computed again
            self.prompt_logprobs = [entry.logprob for entry in output.prompt_logprobs if entry is not None]
        self.finish_reason = output.finish_reason
        self.num_preemptions = output.num_preemptions


@dataclass
class Life:
    """Requests, and at which step each is added or taken back."""

    num_blocks: int = 400
    num_host_blocks: int = 0  # of the overlapped engine
    budget: int = 64
    policy: str = "fcfs"
    arrivals: list[tuple[int, EngineRequest]] = field(default_factory=list)
    aborts: list[tuple[int, str]] = field(default_factory=list)


class Guesser:
    """A proposer that has seen the answers, and is wrong about one token in six."""

    def __init__(self, said: Mapping[str, Said], seed: int) -> None:
        self._said = said
        self._source = random.Random(seed)
        self._num_prompt: dict[str, int] = {}

    def propose(self, request_id: str, token_ids: Sequence[int], max_drafts: int) -> Proposal | None:
        assert min(token_ids) >= 0, "drafts are guessed from tokens that are known"
        answer = self._said[request_id].token_ids
        start = len(token_ids) - self._num_prompt.setdefault(request_id, len(token_ids))
        drafts = [3 if self._source.random() < 1 / 6 else token_id for token_id in answer[start : start + max_drafts]]
        return Proposal(drafts, 4) if drafts and self._source.random() < 0.8 else None

    def forget(self, request_id: str) -> None:
        """Nothing is kept that matters."""


def fixed_drafter(said: Mapping[str, Said], seed: int) -> Drafter:
    return FixedDrafter(Guesser(said, seed), 5)


def adaptive_drafter(said: Mapping[str, Said], seed: int) -> Drafter:
    return AdaptiveDrafter(Guesser(said, seed))


class Engines:
    """Makes engines over one loaded model."""

    def __init__(
        self, prepared: PreparedModel, model: LlamaModel, open_device: Callable[[], Device] = FakeDevice
    ) -> None:
        self.prepared = prepared
        self.model = model
        self.open_device = open_device

    @classmethod
    def from_folder(cls, path: Path) -> Engines:
        """On the CPU."""
        prepared = prepare_model(replace(CONFIG, model=str(path)))
        loaded = prepared.load()
        assert isinstance(loaded, ModelRunner)
        return cls(prepared, loaded.model)

    @property
    def fake(self) -> FakeDevice:
        """The device of the last overlapped engine."""
        assert isinstance(self.device, FakeDevice)
        return self.device

    def plain(self, life: Life) -> EngineCore:
        """Schedule, execute, update."""
        prepared = self.prepared
        plan = msgspec.structs.replace(prepared.plan, num_blocks=life.num_blocks)
        runner = ModelRunner(self.model, prepared.ops, plan, prepared.dtype, prepared.device)
        self.manager, budget = KVCacheManager(life.num_blocks, 16), FixedBudget(life.budget)
        scheduler = self._scheduler(self.manager, budget, None, life.policy)
        return EngineCore(scheduler, budget, runner, time.monotonic)

    def overlapped(
        self,
        life: Life,
        drafter: Drafter | None = None,
        graphs: GraphSettings | None = None,
    ) -> OverlappedCore:
        """A step ahead, on a device that does everything as late as it may."""
        prepared = self.prepared
        plan = msgspec.structs.replace(
            prepared.plan,
            num_blocks=life.num_blocks,
            num_host_blocks=life.num_host_blocks,
            max_num_batched_tokens=life.budget,
        )
        self.device = self.open_device()
        step_ops = select_step_ops(prepared.ops)
        self.runner = GPUModelRunner(
            self.model, prepared.ops, step_ops, plan, prepared.dtype, self.device, graphs or GraphSettings()
        )
        self.runner.warm_up()
        if isinstance(self.device, FakeDevice):
            self.device.counts.clear()
        settled = None if drafter is None else SettledDrafter(drafter)
        host_tier = HostTier(life.num_host_blocks) if life.num_host_blocks else None
        self.manager, budget = KVCacheManager(life.num_blocks, 16, host_tier=host_tier), FixedBudget(life.budget)
        scheduler = self._scheduler(self.manager, budget, settled, life.policy)
        return OverlappedCore(scheduler, budget, self.runner, time.monotonic, settled)

    def _scheduler(
        self, manager: KVCacheManager, budget: FixedBudget, drafter: Drafter | None, policy: str
    ) -> Scheduler:
        return Scheduler(
            manager,
            policy=make_policy(policy),
            budget=budget,
            max_num_seqs=MAX_SEQS,
            max_model_len=MAX_LEN,
            drafter=drafter,
        )


def live(core: EngineCore, life: Life) -> dict[str, Said]:
    """Runs a life to its end."""
    said = {request.request_id: Said() for _, request in life.arrivals}
    number = 0
    arrivals, aborts = list(life.arrivals), list(life.aborts)
    while core.has_work() or arrivals:
        while arrivals and arrivals[0][0] <= number:
            core.add(arrivals.pop(0)[1])
        for at, request_id in aborts:
            if at == number:
                core.abort([request_id])
        if core.has_work():
            for output in core.step().outputs:
                said[output.request_id].add(output)
        number += 1
        assert number < 5000, "an engine that never ends"
    return said


def random_life(seed: int, *, num_requests: int = 14, aborts: bool = False) -> Life:
    """Ragged prompts that share beginnings, repeat themselves and arrive in bursts; few blocks; ends by every
    reason."""
    source = random.Random(seed)
    life = Life(num_blocks=source.choice([14, 20, 400]), budget=source.choice([8, 24, 64]))
    life.policy = source.choice(["fcfs", "fair"])
    shared = [source.randrange(3, 320) for _ in range(48)]
    at = 0
    for number in range(num_requests):
        at += source.choice([0, 0, 0, 1, 6])
        prompt = [source.randrange(3, 320) for _ in range(source.randint(1, 60))]
        if source.random() < 0.3:
            prompt = shared[: source.randint(1, 48)] + prompt[:20]
        if source.random() < 0.3:
            prompt = prompt[:6] * 6
        params = SamplingParams(
            max_tokens=source.choice([1, 2, 17, 60, 500]),
            seed=number,
            temperature=source.choice([0.0, 0.0, 0.7, 1.5]),
            top_k=source.choice([0, 0, 20]),
            top_p=source.choice([1.0, 0.9]),
            min_p=source.choice([0.0, 0.0, 0.02]),
            stop_token_ids=source.sample(range(3, 320), source.choice([0, 1, 12, 60])),
            repetition_penalty=source.choice([1.0] * 5 + [1.3]),
            logprobs=source.choice([None] * 5 + [2]),
            prompt_logprobs=source.choice([None] * 7 + [1]),
            min_tokens=source.choice([0] * 5 + [4]),
        )
        name = f"r{number}"
        added = EngineRequest(
            request_id=name,
            prompt_token_ids=prompt,
            params=params,
            arrival_s=float(number),
            tenant=source.choice("xyz"),
        )
        life.arrivals.append((at, added))
        if aborts and source.random() < 0.3:
            life.aborts.append((at + source.randint(1, 25), name))
    return life
