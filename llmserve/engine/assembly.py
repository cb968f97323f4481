"""From a loaded runner to an engine around it. Knows no model, no process and no socket."""

from __future__ import annotations

import time

from llmserve.config import EngineConfig
from llmserve.engine.core import EngineCore
from llmserve.engine.flight_recorder import FlightRecorder, RecordedLauncher, RecordedRunner
from llmserve.engine.overlap import OverlappedCore
from llmserve.kv_cache.host_tier import HostTier
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.scheduler.adaptive_drafter import make_drafter
from llmserve.scheduler.latency_budget import make_budget
from llmserve.scheduler.lookahead import SettledDrafter
from llmserve.scheduler.policy import make_policy
from llmserve.scheduler.scheduler import Scheduler
from llmserve.worker.gpu_model_runner import GPUModelRunner
from llmserve.worker.model_runner import ModelRunner


def make_core(
    config: EngineConfig, runner: ModelRunner | GPUModelRunner, recorder: FlightRecorder | None = None
) -> EngineCore:
    """A scheduler for what the runner's plan allows, and the loop around both: a step ahead where steps are
    launched."""
    plan = runner.plan
    budget = make_budget(plan.max_num_batched_tokens, config.itl_slowdown)
    drafter = make_drafter(config.speculation)
    overlaps = isinstance(runner, GPUModelRunner) and config.async_scheduling
    settled = SettledDrafter(drafter) if overlaps and drafter is not None else None
    host_tier = HostTier(plan.num_host_blocks) if plan.num_host_blocks else None
    scheduler = Scheduler(
        KVCacheManager(plan.num_blocks, plan.block_size, config.enable_prefix_caching, host_tier),
        policy=make_policy(config.scheduling_policy),
        budget=budget,
        max_num_seqs=plan.max_num_seqs,
        max_model_len=plan.max_model_len,
        drafter=settled or drafter,
    )
    if isinstance(runner, GPUModelRunner) and overlaps:
        launcher = runner if recorder is None else RecordedLauncher(runner, recorder)
        return OverlappedCore(scheduler, budget, launcher, time.monotonic, settled)
    recorded = runner if recorder is None else RecordedRunner(runner, recorder)
    return EngineCore(scheduler, budget, recorded, time.monotonic, drafter)
