"""What must hold of the dynamic batcher however requests come, go, expire and are taken."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llmserve.errors import QueueFullError
from llmserve.scheduler.dynamic_batcher import BatchReason, DynamicBatcher
from llmserve.scheduler.priority_level import QueuedRequest
from llmserve.scheduler.queue_policy import BatcherConfig, QueuePolicy

MAX_ROWS = 8
LENGTHS = {"a": 2, "b": 5}  # of the rows of a shape

policies = st.builds(
    QueuePolicy,
    max_queue_size=st.integers(0, 6),
    default_timeout_s=st.sampled_from([0.0, 1.0, 4.0]),
    delay_expired=st.booleans(),
    allow_timeout_override=st.booleans(),
)
configs = st.builds(
    BatcherConfig,
    max_batch_size=st.sampled_from([0, 1, 4, MAX_ROWS]),
    max_batch_tokens=st.sampled_from([0, 1, 12]),
    preferred_batch_sizes=st.frozensets(st.integers(1, 4), max_size=2),
    max_queue_delay_s=st.sampled_from([0.0, 2.0]),
    preserve_ordering=st.booleans(),
    priority_levels=st.integers(0, 3),
    default_priority_level=st.just(1),
    default_policy=policies,
    priority_policies=st.dictionaries(st.integers(1, 3), policies, max_size=2),
)


class BatcherMachine(RuleBasedStateMachine):
    """A model of who waits: requests by id, in the order they came."""

    @initialize(config=configs)
    def start(self, config: BatcherConfig) -> None:
        self.config = config
        self.batcher = DynamicBatcher(config)
        self.now_s = 0.0
        self.next_id = 0
        self.waiting: dict[int, QueuedRequest] = {}
        self.deadlines: dict[int, float] = {}
        self.delayed: list[int] = []  # by when their time ran out
        self.put_back: list[int] = []  # the last of them is the first

    def policy_of(self, request: QueuedRequest) -> QueuePolicy:
        return self.config.policies()[request.level]

    @rule(
        rows=st.integers(1, 4),
        key=st.sampled_from("ab"),
        priority=st.integers(0, 4),
        idle=st.booleans(),
        asked=st.sampled_from([0.0, 0.5, 9.0]),
    )
    def add(self, rows: int, key: str, priority: int, idle: bool, asked: float) -> None:
        self.next_id += 1
        rows = min(rows, self.config.max_batch_size or rows)
        request = QueuedRequest(self.next_id, rows, key, LENGTHS[key], priority, asked)
        level = self.config.level_of(priority)
        policy = self.config.policies()[level]
        same = [other for other in self.waiting.values() if other.level == level]
        full = 0 < policy.max_queue_size <= len(same)
        try:
            self.batcher.add(request, self.now_s, idle)
        except QueueFullError:
            assert full
            return
        assert not full
        self.waiting[request.id] = request
        if timeout_s := policy.timeout_s(asked):
            self.deadlines[request.id] = self.now_s + timeout_s

    @rule(step=st.sampled_from([0.25, 1.0, 3.0]))
    def pass_time(self, step: float) -> None:
        self.now_s += step
        due = {i for i, deadline in self.deadlines.items() if deadline <= self.now_s}
        to_delay = {i for i in due if self.policy_of(self.waiting[i]).delay_expired}
        rejected = {request.id for request in self.batcher.expire(self.now_s)}
        assert rejected == due - to_delay
        for i in rejected:
            del self.waiting[i]
        self.delayed += sorted(to_delay, key=lambda i: (self.deadlines[i], i))
        for i in due:
            del self.deadlines[i]
        self.put_back = [i for i in self.put_back if i not in to_delay]

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.waiting:
            i = data.draw(st.sampled_from(sorted(self.waiting)))
            assert self.batcher.remove(i)
            del self.waiting[i]
            self.deadlines.pop(i, None)

    @rule(dies_after=st.sampled_from([None, None, 0.0, 1.0]))
    def take(self, dies_after: float | None) -> None:
        """`dies_after`: so long after it was given the batch, the instance dies that had not begun it."""
        batch = self.batcher.next_batch(self.now_s)
        if batch is None:
            if self.waiting:  # it waits for company, and says until when
                assert self.config.max_queue_delay_s
                event_s = self.batcher.next_event_s(True)
                assert event_s is not None
                assert event_s > self.now_s
                assert not self.in_order()[0].found_idle
            return
        ids = [request.id for request in batch.requests]
        assert ids[0] == self.in_order()[0].id
        assert len(set(ids)) == len(ids)
        assert batch.rows == sum(request.rows for request in batch.requests)
        assert len({request.shape_key for request in batch.requests}) == 1
        if self.config.max_batch_size:
            assert batch.rows <= self.config.max_batch_size
            tokens = batch.rows * batch.requests[0].tokens_per_row
            assert tokens <= (self.config.max_batch_tokens or tokens) or len(ids) == 1
        else:
            assert len(ids) == 1
            assert batch.reason is BatchReason.NOT_BATCHED
        # within a level and a shape nobody is overtaken but those whose time ran out
        order = [request.id for request in self.in_order() if request.shape_key == batch.requests[0].shape_key]
        assert order[: len(ids)] == ids
        assert batch.num_left == len(self.waiting) - len(ids)
        if dies_after is None:
            for i in ids:
                del self.waiting[i]
                self.deadlines.pop(i, None)
        else:
            self.now_s += dies_after
            self.batcher.next_event_s(False)  # forgets the times of those that do not wait
            self.batcher.put_back(batch.requests)
            self.delayed = [i for i in self.delayed if i not in ids]
            self.put_back = [i for i in self.put_back if i not in ids] + ids[::-1]

    def in_order(self) -> list[QueuedRequest]:
        """As the queue should stand: by level; who was put back, in time as they came, then as their time ran out."""
        place = {i: index for index, i in enumerate(self.delayed)}
        place |= {i: -2 - index for index, i in enumerate(self.put_back)}
        return sorted(self.waiting.values(), key=lambda request: (request.level, place.get(request.id, -1), request.id))

    @invariant()
    def nobody_is_lost(self) -> None:
        if hasattr(self, "batcher"):
            assert len(self.batcher) == len(self.waiting) == sum(self.batcher.num_queued_by_level)
            assert all(i in self.batcher for i in self.waiting)


BatcherMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestDynamicBatcher = BatcherMachine.TestCase
