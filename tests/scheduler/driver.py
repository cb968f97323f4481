"""Drives a Scheduler with a FakeWorker and checks after each step what must hold after every step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

from llmserve.kv_cache.host_tier import HostTier
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.messages import EngineRequest, FinishReason, SequenceOutput
from llmserve.scheduler.budget import FixedBudget
from llmserve.scheduler.output import SchedulerOutput
from llmserve.scheduler.policy import Policy, make_policy
from llmserve.scheduler.scheduler import Scheduler
from tests.scheduler.fake_worker import FakeWorker, expected_answer
from tests.scheduler.random_drafter import RandomDrafter


class Driver:
    """One scheduler, its blocks and its worker. The clock is the number of the step."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_batched_tokens: int = 32,
        max_num_seqs: int = 8,
        max_model_len: int = 1000,
        watermark: float = 0.01,
        enable_prefix_caching: bool = True,
        policy: Policy | None = None,
        num_sampled: Callable[[], int] = lambda: 1,
        drafts_seed: int | None = None,
        num_host_blocks: int = 0,
    ) -> None:
        """With a `drafts_seed` there is speculation, with drafts of which many come true."""
        self.host_tier = HostTier(num_host_blocks) if num_host_blocks else None
        self.kv_cache = KVCacheManager(num_blocks, block_size, enable_prefix_caching, self.host_tier)
        self.worker = FakeWorker(num_blocks, block_size, num_sampled, num_host_blocks)
        self.drafter = None if drafts_seed is None else RandomDrafter(random.Random(drafts_seed), self.worker.salts)
        self.scheduler = Scheduler(
            self.kv_cache,
            policy=policy or make_policy("fcfs"),
            budget=FixedBudget(max_num_batched_tokens),
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            watermark=watermark,
            drafter=self.drafter,
        )
        self.makes_way = policy is not None and policy.name == "fair"
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.num_watermark_blocks = math.ceil(watermark * num_blocks)
        self.max_num_tokens = min(max_model_len, num_blocks * block_size)
        self.now_s = 0.0
        self.requests: dict[str, EngineRequest] = {}  # unfinished
        self.running: set[str] = set()
        self.answers: dict[str, list[int]] = {}
        self.finish_reasons: dict[str, FinishReason] = {}
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.num_restored_tokens = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    def add(self, *requests: EngineRequest) -> None:
        for request in requests:
            self.scheduler.add(request)
            self.requests[request.request_id] = request
            self.answers[request.request_id] = []
            self.worker.salts[request.request_id] = request.cache_salt

    def abort(self, request_ids: Iterable[str]) -> list[str]:
        aborted = self.scheduler.abort(request_ids)
        for request_id in aborted:
            del self.requests[request_id]
            self.running.discard(request_id)
        return aborted

    def step(self) -> tuple[SchedulerOutput, list[SequenceOutput]]:
        self.now_s += 1
        output = self.scheduler.schedule(self.now_s)
        self._check_output(output)
        self._check_drafts(output)
        sampled = self.worker.execute(output)
        self._check_blocks()
        updates = self.scheduler.update(output, sampled)
        for update in updates:
            self._take(update)
        self.running = output.num_scheduled_tokens.keys() & self.requests.keys()
        self._check_stats(output)
        return output, updates

    def run(self, max_steps: int = 10_000) -> None:
        """Until nothing is left; then nothing may be left anywhere."""
        for _ in range(max_steps):
            if not self.scheduler.has_work():
                break
            self.step()
        assert not self.scheduler.has_work()
        self.check_empty()

    def check_empty(self) -> None:
        assert not self.requests
        assert self.kv_cache.num_free_blocks == self.kv_cache.num_blocks
        stats = self.scheduler.stats()
        assert stats.num_running == stats.num_waiting == 0
        output, updates = self.step()  # carries the last finished ids, and nothing else
        assert not output.num_scheduled_tokens
        assert not updates
        assert not self.worker.sequences
        assert self.drafter is None or not self.drafter.live

    def _check_output(self, output: SchedulerOutput) -> None:
        scheduled = output.num_scheduled_tokens
        started = [new.request_id for new in output.new_requests] + list(output.resumed_requests)
        assert output.total_num_scheduled_tokens <= self.max_num_batched_tokens
        assert len(scheduled) <= self.max_num_seqs
        # Whoever ran gets a token or is preempted, never both; running requests stand before those that start.
        assert self.running == (scheduled.keys() - set(started)) | set(output.preempted_ids)
        assert not scheduled.keys() & set(output.preempted_ids)
        assert set(list(scheduled)[len(scheduled) - len(started) :]) == set(started)
        if output.preempted_ids and not self.makes_way:
            assert not started
        if started and len(scheduled) > 1:
            assert self.kv_cache.num_free_blocks >= self.num_watermark_blocks
        self.num_preemptions += len(output.preempted_ids)

    def _check_drafts(self, output: SchedulerOutput) -> None:
        """Drafts stand behind a last token, keep within what their request may say, and never come with preemption."""
        drafts = output.draft_token_ids
        self.num_draft_tokens += sum(map(len, drafts.values()))
        assert not (drafts and output.preempted_ids)
        for request_id, token_ids in drafts.items():
            assert 0 < len(token_ids) < output.num_scheduled_tokens[request_id]
            request, answer = self.requests[request_id], self.answers[request_id]
            assert len(answer) + len(token_ids) < request.params.max_tokens
            assert len(answer) >= request.params.min_tokens

    def _check_blocks(self) -> None:
        """The worker's tables are the manager's, and every block is either in one of them or free."""
        tables = self.worker.block_tables()
        for request_id, block_ids in tables.items():
            assert self.kv_cache.block_ids(request_id) == block_ids
        held = {block_id for block_ids in tables.values() for block_id in block_ids}
        assert self.kv_cache.num_free_blocks == self.kv_cache.num_blocks - len(held)

    def _check_stats(self, output: SchedulerOutput) -> None:
        stats = self.scheduler.stats()
        assert stats.num_running == len(self.running)
        assert stats.num_running + stats.num_waiting == len(self.requests)
        assert stats.num_free_blocks == self.kv_cache.num_free_blocks
        assert stats.num_step_tokens == output.total_num_scheduled_tokens
        assert stats.num_prompt_tokens <= stats.num_step_tokens
        assert stats.num_preemptions == len(output.preempted_ids)
        assert stats.num_drafts == len(output.draft_token_ids)
        assert stats.num_draft_tokens == sum(map(len, output.draft_token_ids.values()))
        assert stats.num_accepted_tokens <= stats.num_draft_tokens
        self.num_accepted_tokens += stats.num_accepted_tokens
        assert stats.prefix_cache_hits <= stats.prefix_cache_queries
        assert stats.host_cache_hits == len(output.restores) * self.kv_cache.block_size
        self.num_restored_tokens += stats.host_cache_hits

    def _take(self, update: SequenceOutput) -> None:
        request = self.requests[update.request_id]
        answer = self.answers[update.request_id]
        assert update.token_ids
        if not answer:
            assert 0 < update.first_scheduled_s <= self.now_s
            assert update.num_cached_tokens < len(request.prompt_token_ids)
            self.num_cached_tokens += update.num_cached_tokens
        answer += update.token_ids
        if update.finish_reason is None:
            return
        assert answer == expected_answer(request, self.max_num_tokens)
        stopped = answer[-1] in request.params.stop_token_ids and len(answer) > request.params.min_tokens
        assert update.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
        assert update.stop_token_id == (answer[-1] if stopped else None)
        self.finish_reasons[update.request_id] = update.finish_reason
        del self.requests[update.request_id]
