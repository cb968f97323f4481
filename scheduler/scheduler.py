"""In-flight batching: which requests compute how many tokens in the next step. Knows no model, no worker and no clock.

There is no prefill phase and no decode phase: every request has tokens that are not computed yet, and a step spends one
token budget on them, running requests first. Blocks come from `KVCacheManager`, order from a policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from llmserve.errors import InvalidRequestError
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.messages import EngineRequest, EngineStats, SequenceOutput
from llmserve.scheduler.budget import TokenBudget, check_limits
from llmserve.scheduler.drafts import MAX_STEP_DRAFTS, DraftCandidate, Drafter
from llmserve.scheduler.output import ResumedRequestData, SchedulerOutput
from llmserve.scheduler.policy import Policy
from llmserve.scheduler.request import PENDING, Request, RequestStatus, check_prompt
from llmserve.scheduler.request_queue import RequestQueue


class Scheduler:
    """`schedule()`, run the step, `update()`; between steps `add()` and `abort()`.

    What it promises, and why it holds:

    * Running requests come before waiting ones, and each gets at least one token a step: the budget is never below
      their number, and a prompt's chunk leaves one token for every request behind it. So no decode waits for a prompt.
    * A step's victims of preemption have not been scheduled in it. Requests are walked best first and given up last
      first, so when the walk stands at a request, only it and those it has not come to can be given up.
    * Therefore a scheduled token is certain to be computed, and its block may be committed to the prefix cache while
      the step is being scheduled. Another request of the same step may share the block, because in every layer all keys
      and values of the step are written before attention reads any. So the `n` sequences of one prompt, or equal
      prompts that arrive together, are computed once. (A step that was scheduled must be run; if it fails, the
      cache is void and the engine ends.)
    * Drafts cost nobody anything but time: they get what is left of the budget and of the blocks when all others have
      been served. `num_computed_tokens` never counts a draft before it is verified, so none reaches the prefix cache;
      the slots of those rejected are written again by the tokens that came instead.
    * Nobody starves. The first request in order can give up all the others, and alone it always fits, because no
      request is let in, or grows, beyond the pool. Waiting requests are admitted strictly in order.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        *,
        policy: Policy,
        budget: TokenBudget,
        max_num_seqs: int,
        max_model_len: int,
        watermark: float = 0.01,
        drafter: Drafter | None = None,
    ) -> None:
        """A waiting request is admitted only if `watermark`, a share of all blocks, stays free for those that run; when
        nothing runs it is not held to that. Without a `drafter` there is no speculation. Raises ConfigError.
        """
        check_limits(max_num_seqs, budget.max_num_batched_tokens, watermark)
        self._kv_cache = kv_cache
        self._policy = policy
        self._budget = budget
        self._drafter = drafter
        self._max_num_seqs = max_num_seqs
        self._num_pool_tokens = kv_cache.num_blocks * kv_cache.block_size
        self._max_model_len = min(max_model_len, self._num_pool_tokens)
        self._num_watermark_blocks = math.ceil(watermark * kv_cache.num_blocks)
        self._requests: dict[str, Request] = {}
        self._waiting = RequestQueue()
        self._running = RequestQueue()
        self._finished_ids: list[str] = []  # known to the worker, not yet told to it
        self._num_added = 0
        self._stats = EngineStats(0, 0, 0, kv_cache.num_blocks)

    def has_work(self) -> bool:
        """Whether any request is unfinished. `finished_ids` not yet sent are no work: they go with the next step."""
        return bool(self._requests)

    def holds(self, request: Request) -> bool:
        """Whether this very request is unfinished; another may have its id."""
        return self._requests.get(request.request_id) is request

    def complete_requests(self, output: SchedulerOutput) -> list[Request]:
        """Those for which the step just scheduled draws a token: all they have will be computed."""
        scheduled = map(self._requests.__getitem__, output.num_scheduled_tokens)
        return [request for request in scheduled if request.num_computed_tokens == len(request.token_ids)]

    def stats(self) -> EngineStats:
        """The gauges as they are now, and what the last step scheduled did."""
        stats = self._stats
        stats.num_running = len(self._running)
        stats.num_waiting = len(self._waiting)
        stats.num_free_blocks = self._kv_cache.num_free_blocks
        return stats

    def add(self, request: EngineRequest) -> None:
        """Queues a request. Raises InvalidRequestError if it could never run, and then knows nothing of it."""
        if request.request_id in self._requests:
            raise InvalidRequestError(f"The request id {request.request_id!r} is in use.", "request_id")
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        check_prompt(num_tokens, self._num_pool_tokens, self._max_model_len)
        key = (self._policy.rank(request), request.arrival_s, self._num_added)
        self._num_added += 1
        added = Request(request, key, self._max_model_len)
        self._requests[request.request_id] = added
        self._kv_cache.add(request.request_id, request.cache_salt)
        self._waiting.add(added)

    def abort(self, request_ids: Iterable[str]) -> list[str]:
        """Drops requests, running or waiting; their blocks are free at once. Returns those that were still here."""
        aborted = []
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._remove(request)
                aborted.append(request_id)
        return aborted

    def schedule(self, now_s: float) -> SchedulerOutput:
        """Decides the next step and counts its tokens as computed. The step must be run, and `update` be called.

        A worker takes the parts of the output in this order: offloads, restores, finished_ids, preempted_ids, the rest.
        """
        output, self._finished_ids = SchedulerOutput(finished_ids=self._finished_ids), []
        self._stats = EngineStats(0, 0, 0, self._kv_cache.num_blocks)
        num_tokens = self._budget.next_step(len(self._running))
        num_kept = self._make_way(output, num_tokens)
        num_displaced = len(output.preempted_ids)
        num_left = self._schedule_running(output, num_tokens - num_kept) + num_kept
        if len(output.preempted_ids) == num_displaced:  # else blocks are short, and those that run need them
            num_left = self._admit_waiting(output, num_left, now_s)
        output.total_num_scheduled_tokens = num_tokens - num_left
        if self._drafter is not None and num_left and not output.preempted_ids:
            self._add_drafts(self._drafter, output, num_left)
        self._stats.num_step_tokens = output.total_num_scheduled_tokens
        self._stats.num_preemptions = len(output.preempted_ids)
        output.offloads, output.restores = self._kv_cache.take_pairs()
        self._stats.host_cache_hits = len(output.restores) * self._kv_cache.block_size
        return output

    def update(self, output: SchedulerOutput, sampled: Mapping[str, list[int]]) -> list[SequenceOutput]:
        """Takes the tokens a step brought; returns what to tell each request that got any (logprobs left out).

        `sampled` maps request ids of `output` to one or several tokens; requests in mid-prompt have none, and those
        aborted since are passed over. Tokens after the one that ends a request are dropped.
        """
        assert sampled.keys() <= output.num_scheduled_tokens.keys()
        if output.draft_token_ids:
            self._count_accepted(output, sampled)
        requests = self._requests
        updates = []
        for request_id, token_ids in sampled.items():
            request = requests.get(request_id)
            if request is None or not token_ids:
                continue
            num_before = len(request.token_ids)
            update = SequenceOutput(request_id, token_ids)
            updates.append(update)
            update.num_preemptions = request.num_preemptions
            if num_before == request.num_prompt_tokens:
                update.num_cached_tokens = request.num_cached_tokens
                update.first_scheduled_s = request.first_scheduled_s
            for token_id in token_ids:
                if request.append(token_id):
                    update.token_ids = request.token_ids[num_before:]
                    update.finish_reason = request.finish_reason
                    update.stop_token_id = request.stop_token_id
                    self._remove(request)
                    break
        return updates

    def _schedule_running(self, output: SchedulerOutput, num_left: int) -> int:
        """Gives every running request its tokens, best first, preempting from the end when blocks run out.

        Returns what is left of the budget. This loop is the cost of a step: for a request that decodes inside a block
        it only counts.
        """
        running, scheduled = self._running, output.num_scheduled_tokens
        for request in running:
            num_computed = len(request.token_ids)
            num_new = num_computed - request.num_computed_tokens
            if num_computed > request.num_slots and not self._grow(request, output):
                break  # it had to give up itself, and was the last
            if num_new == 1 and num_computed != request.num_prompt_tokens:
                request.num_computed_tokens = num_computed
                scheduled[request.request_id] = 1
                num_left -= 1
            elif num_new:  # a chunk of a prompt, or several tokens sampled in one step
                num_behind = len(running) - len(scheduled) - 1
                num_new = min(num_new, num_left - num_behind)
                self._schedule_chunk(request, num_new, output)
                num_left -= num_new
        return num_left

    def _schedule_chunk(self, request: Request, num_new: int, output: SchedulerOutput) -> None:
        """Schedules several tokens of a request that has blocks for them, and makes the blocks they fill findable."""
        num_prompt_tokens_left = request.num_prompt_tokens - request.num_computed_tokens
        self._stats.num_prompt_tokens += max(0, min(num_new, num_prompt_tokens_left))
        request.num_computed_tokens += num_new
        output.num_scheduled_tokens[request.request_id] = num_new
        self._kv_cache.commit(request.request_id, request.token_ids, request.num_computed_tokens)

    def _grow(self, request: Request, output: SchedulerOutput) -> bool:
        """Makes room for all tokens of a running request. False if the request itself had to be preempted."""
        kv_cache = self._kv_cache
        kv_cache.commit(request.request_id, request.token_ids, request.num_computed_tokens)
        while (block_ids := kv_cache.allocate(request.request_id, len(request.token_ids))) is None:
            victim = self._running.last
            self._preempt(victim, output)
            if victim is request:
                return False
        request.num_slots += len(block_ids) * kv_cache.block_size
        output.new_block_ids[request.request_id] = block_ids
        return True

    def _make_way(self, output: SchedulerOutput, num_tokens: int) -> int:
        """How many tokens of the step are kept for the first that waits, if the policy wants it served at once.

        Where there is neither seat nor block for it, the last that runs is given up.
        """
        waiting, running = self._waiting, self._running
        if not (waiting and running and self._policy.makes_way(waiting.first, running.last)):
            return 0
        num_new = waiting.first.num_tokens
        num_free_slots = (self._kv_cache.num_free_blocks - self._num_watermark_blocks) * self._kv_cache.block_size
        if len(running) >= self._max_num_seqs or num_free_slots < num_new:
            self._preempt(running.last, output)
        return min(num_new, num_tokens - len(running))

    def _preempt(self, request: Request, output: SchedulerOutput) -> None:
        """Takes a running request's blocks; it will be recomputed, from whatever of them is still cached then."""
        self._kv_cache.commit(request.request_id, request.token_ids, request.num_computed_tokens)
        self._kv_cache.free(request.request_id)
        self._running.remove(request)
        self._waiting.add(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = request.num_slots = 0
        request.num_preemptions += 1
        output.preempted_ids.append(request.request_id)

    def _admit_waiting(self, output: SchedulerOutput, num_left: int, now_s: float) -> int:
        """Starts waiting requests in order, as far as budget, seats and blocks go. Returns the budget left.

        A request gets blocks for all its tokens at once, though its first chunk may be shorter: so a prompt that is
        let in is not given up half-way for want of blocks of its own.
        """
        waiting, running, kv_cache = self._waiting, self._running, self._kv_cache
        while waiting and num_left and len(running) < self._max_num_seqs:
            request = waiting.first
            if request.token_ids[-1] == PENDING:
                break  # given up in this very step: its last token is known before the next
            # Found tokens have no logits, and the log-probabilities of a prompt need them all.
            may_skip = request.params.prompt_logprobs is None
            cached_block_ids = kv_cache.match_prefix(request.request_id, request.token_ids) if may_skip else []
            num_spare = self._num_watermark_blocks if running else 0
            block_ids = kv_cache.allocate(request.request_id, request.num_tokens, cached_block_ids, num_spare)
            if block_ids is None:
                assert running, "a lone request fits"
                break
            waiting.remove(request)
            running.add(request)
            request.num_computed_tokens = kv_cache.restore(request.request_id, request.token_ids) if may_skip else 0
            block_ids = cached_block_ids + block_ids
            request.num_slots = len(block_ids) * kv_cache.block_size
            if request.status is RequestStatus.WAITING:
                self._start(request, may_skip, now_s)
                output.new_requests.append(request.as_new(block_ids))
            else:
                output.resumed_requests[request.request_id] = ResumedRequestData(block_ids, request.num_computed_tokens)
            request.status = RequestStatus.RUNNING
            num_new = min(request.num_tokens - request.num_computed_tokens, num_left)
            self._schedule_chunk(request, num_new, output)
            num_left -= num_new
        return num_left

    def _add_drafts(self, drafter: Drafter, output: SchedulerOutput, num_left: int) -> None:
        """Puts drafts behind the last tokens of requests, from what is left of the budget and of the blocks."""
        scheduled = output.num_scheduled_tokens
        if not drafter.wants_drafts(len(scheduled), output.total_num_scheduled_tokens):
            return
        candidates = []
        for request in self._running:
            if (max_drafts := request.max_drafts) > 0:
                candidates.append(DraftCandidate(request.request_id, request.token_ids, max_drafts))
        for request_id, drafts in drafter.draft(candidates, min(num_left, MAX_STEP_DRAFTS)).items():
            num_drafts = self._make_room(self._requests[request_id], len(drafts), output)
            if num_drafts:
                output.draft_token_ids[request_id] = drafts[:num_drafts]
                scheduled[request_id] += num_drafts
                output.total_num_scheduled_tokens += num_drafts
                self._stats.num_drafts += 1
                self._stats.num_draft_tokens += num_drafts

    def _make_room(self, request: Request, num_drafts: int, output: SchedulerOutput) -> int:
        """Slots for drafts, as many as there are without taking a block that a running request may need next."""
        num_slots = request.num_tokens + num_drafts
        if num_slots > request.num_slots:
            kv_cache = self._kv_cache
            num_spare = max(self._num_watermark_blocks, len(self._running))
            block_ids = kv_cache.allocate(request.request_id, num_slots, num_spare_blocks=num_spare)
            if block_ids is None:
                return min(num_drafts, request.num_slots - request.num_tokens)
            kv_cache.commit(request.request_id, request.token_ids, request.num_computed_tokens)
            request.num_slots += len(block_ids) * kv_cache.block_size
            output.new_block_ids.setdefault(request.request_id, []).extend(block_ids)
        return num_drafts

    def _count_accepted(self, output: SchedulerOutput, sampled: Mapping[str, list[int]]) -> None:
        """The keys and values of accepted drafts are computed; `sampled` holds them and one token more."""
        for request_id in output.draft_token_ids:
            num_accepted = len(sampled[request_id]) - 1
            self._stats.num_accepted_tokens += num_accepted
            if request_id in self._requests:
                self._requests[request_id].num_computed_tokens += num_accepted

    def _start(self, request: Request, was_looked_up: bool, now_s: float) -> None:
        """Notes what a request that is scheduled for the first time found. Recomputations are no cache statistics."""
        self._policy.started(request)
        request.first_scheduled_s = now_s
        request.num_cached_tokens = request.num_computed_tokens
        if was_looked_up:
            self._stats.prefix_cache_queries += request.num_tokens
            self._stats.prefix_cache_hits += request.num_cached_tokens

    def _remove(self, request: Request) -> None:
        """Forgets a request in whatever state. What it computed, its answer too, stays in the prefix cache."""
        if request.status is RequestStatus.RUNNING:
            self._kv_cache.commit(request.request_id, request.token_ids, request.num_computed_tokens)
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        if request.status is not RequestStatus.WAITING:
            self._finished_ids.append(request.request_id)
        self._policy.finished(request)
        self._kv_cache.remove(request.request_id)
        if self._drafter is not None:
            self._drafter.forget(request.request_id)
        del self._requests[request.request_id]
