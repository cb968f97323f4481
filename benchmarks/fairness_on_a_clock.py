"""A flood and a quiet tenant over the real scheduler, budget and `fair`, on a clock that only steps move.

    python -m benchmarks.fairness_on_a_clock

A step costs 5 ms, 0.5 ms a decode and 0.3 ms a prompt token; nothing else takes time, and no machine has to be quiet.
What is left is what scheduling does: how long the step in progress still took, and how many steps a first token needed.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from benchmarks.door_load import quantile
from llmserve.engine.core import EngineCore
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.messages import EngineRequest, SamplingParams
from llmserve.scheduler.latency_budget import make_budget
from llmserve.scheduler.output import SchedulerOutput
from llmserve.scheduler.policy import make_policy
from llmserve.scheduler.scheduler import Scheduler
from llmserve.worker.output import ModelRunnerOutput

STEP_S, DECODE_S, PROMPT_TOKEN_S = 5e-3, 0.5e-3, 0.3e-3
MAX_SEQS, FLOOD, SECONDS = 16, 100, 60.0


@dataclass(frozen=True)
class Case:
    """Tokens of a prompt of each tenant, seconds between two of the quiet one's, the engine's `--itl-slowdown`."""

    flood_tokens: int = 64
    quiet_tokens: int = 64
    every_s: float = 0.1
    slowdown: float = 2.0


class ClockedRunner:
    """Draws a token for every request that is complete, and moves the clock. Implements `Runner`."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._num_left: dict[str, int] = {}
        self._num_tokens: dict[str, int] = {}

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        for new in output.new_requests:
            self._num_tokens[new.request_id] = len(new.prompt_token_ids)
            self._num_left[new.request_id] = len(new.prompt_token_ids) - new.num_computed_tokens
        for request_id, resumed in output.resumed_requests.items():
            self._num_left[request_id] = self._num_tokens[request_id] - resumed.num_computed_tokens
        sampled = {}
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            self.now_s += DECODE_S if num_tokens == 1 else num_tokens * PROMPT_TOKEN_S
            self._num_left[request_id] -= num_tokens
            if not self._num_left[request_id]:
                sampled[request_id] = [0]
                self._num_left[request_id] = 1
                self._num_tokens[request_id] += 1
        self.now_s += STEP_S
        return ModelRunnerOutput(sampled=sampled)


class Tenants:
    """Both of them: what they ask, and how long the quiet one's first tokens took."""

    def __init__(self, case: Case, flood: int) -> None:
        self.ttft_s: list[float] = []
        self.rest_s: list[float] = []  # of the step in progress
        self.num_steps: Counter[int] = Counter()
        self._case, self._flood = case, flood
        self._runner, budget = ClockedRunner(), make_budget(1024, case.slowdown)
        policy, blocks = make_policy("fair"), KVCacheManager(4000, 16)
        scheduler = Scheduler(blocks, policy=policy, budget=budget, max_num_seqs=MAX_SEQS, max_model_len=4096)
        self._core = EngineCore(scheduler, budget, self._runner, lambda: self._runner.now_s)
        self._random = random.Random(1)
        self._num_asked = self._num_flooding = 0
        self._due_s = 2.0
        self._waiting: dict[str, tuple[float, int]] = {}

    def run(self) -> None:
        while self._runner.now_s < SECONDS:
            while self._num_flooding < self._flood:
                self._num_flooding += 1
                self._ask("flood", self._case.flood_tokens, 64, self._runner.now_s)
            while self._due_s <= self._runner.now_s:
                self.rest_s.append(self._runner.now_s - self._due_s)
                request_id = self._ask("quiet", self._case.quiet_tokens, 16, self._due_s)
                self._waiting[request_id] = (self._due_s, self._core.num_steps)
                self._due_s += self._case.every_s * self._random.uniform(0.5, 1.5)
            if self._core.has_work():
                self._step()
            else:
                self._runner.now_s = self._due_s

    def _ask(self, tenant: str, num_prompt_tokens: int, max_tokens: int, at_s: float) -> str:
        self._num_asked += 1
        request_id = f"{tenant}/{self._num_asked}"
        prompt = [self._random.randrange(1000, 40000) for _ in range(num_prompt_tokens)]
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0)
        self._core.add(
            EngineRequest(
                request_id=request_id, prompt_token_ids=prompt, params=params, arrival_s=at_s, tenant=tenant, weight=1.0
            )
        )
        return request_id

    def _step(self) -> None:
        for output in self._core.step().outputs:
            if output.request_id in self._waiting and output.token_ids:
                due_s, num_steps = self._waiting.pop(output.request_id)
                self.ttft_s.append(self._runner.now_s - due_s)
                self.num_steps[self._core.num_steps - num_steps] += 1
            if output.finish_reason is not None and output.request_id.startswith("flood"):
                self._num_flooding -= 1


def main() -> None:
    for case in (Case(), Case(flood_tokens=512), Case(quiet_tokens=256, every_s=0.4), Case(slowdown=0)):
        print(case)
        for name, flood in (("alone", 0), ("beside the flood", FLOOD)):
            tenants = Tenants(case, flood)
            tenants.run()
            p50, p99 = (quantile(tenants.ttft_s, share) * 1e3 for share in (0.5, 0.99))
            rest, steps = quantile(tenants.rest_s, 0.99) * 1e3, dict(tenants.num_steps.most_common(3))
            print(f"  {name:16} TTFT p50 {p50:5.1f} ms, p99 {p99:5.1f} ms; rest of a step {rest:4.1f}; steps {steps}")


if __name__ == "__main__":
    main()
