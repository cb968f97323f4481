"""Which waiting texts of a pooling model run together. Knows no model, no tensors, no tasks and no clock.

A batch is packed: its cost is its tokens, whatever their lengths, so it is filled up to a token budget and nothing is
sorted to save padding. What the order decides is who waits. Tenants share by start-time fair queueing (Goyal et al.,
1996) over tokens and weights, whatever number of requests or texts they send; the texts of one tenant are in the order
of its `TextQueue`. So neither a request of many texts nor a tenant of many requests stands before everybody else.
"""

from __future__ import annotations

import heapq

from llmserve.scheduler.text_queue import QueuedText, TextQueue

_LOOKAHEAD = 64  # texts of another kind that are stepped over for a batch
_MAX_TENANTS = 4096  # whose past is remembered after they have nothing left here


class TextBatcher:
    """`add` and `remove` texts, take `next_batch` while an instance is free.

    All times are seconds of whatever clock the caller reads; they only ever grow.
    """

    def __init__(self, max_batch_tokens: int, max_batch_texts: int = 1024, max_wait_s: float = 30.0) -> None:
        """A text that has waited `max_wait_s` is the next of its tenant."""
        self.max_batch_tokens = max_batch_tokens
        self._max_batch_texts = max_batch_texts
        self._max_wait_s = max_wait_s
        self._queued: dict[int, QueuedText] = {}
        self._queues: dict[str, TextQueue] = {}  # of the tenants that have texts here
        self._starts: dict[str, float] = {}  # of those that have none now: where they would go on
        self._virtual_time = 0.0  # the start of the last text that was served
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, text_id: int) -> bool:
        return text_id in self._queued

    def add(self, text: QueuedText, now_s: float) -> None:
        """Queues a text behind those of its own request."""
        text.arrival_s = now_s
        self._queued[text.id] = text
        self.num_tokens += text.num_tokens
        self._enqueue(text)

    def join(self, text_id: int, request_id: int, tenant: str = "", weight: float = 1.0) -> None:
        """Another request wants a text that waits here: it moves forward to where that request's own would stand.
        One that has left is left alone."""
        text = self._queued.get(text_id)
        if text is None:
            return
        if tenant == text.tenant:
            self._queues[tenant].join(text, request_id)
        elif self._start_of(tenant) < self._queues[text.tenant].start:
            self._dequeue(text)
            text.tenant, text.weight, text.request_id = tenant, weight, request_id
            self._enqueue(text)

    def remove(self, text_id: int) -> bool:
        """Forgets a text that nobody waits for; False if it is not here (any more)."""
        text = self._queued.get(text_id)
        if text is not None:
            self._forget(text)
            self._dequeue(text)
        return text is not None

    def next_batch(self, now_s: float) -> list[QueuedText]:
        """The texts to run now, all of one kind, within the budget; one that is longer than the budget runs alone."""
        chosen: list[QueuedText] = []
        num_tokens = 0
        stepped_over: list[QueuedText] = []
        tenants = [(queue.start, name) for name, queue in self._queues.items()]
        heapq.heapify(tenants)
        while tenants and len(chosen) < self._max_batch_texts and len(stepped_over) <= _LOOKAHEAD:
            queue = self._queues[tenants[0][1]]
            text = queue.first(now_s)
            if text is None:
                heapq.heappop(tenants)
            elif chosen and text.kind != chosen[0].kind:
                stepped_over.append(text)
                queue.step_over()
            elif chosen and num_tokens + text.num_tokens > self.max_batch_tokens:
                break
            else:
                chosen.append(text)
                num_tokens += text.num_tokens
                self._serve(queue, text)
                heapq.heapreplace(tenants, (queue.start, text.tenant))
        for text in stepped_over:
            self._queues[text.tenant].put_back(text)
        for text in chosen:
            self._retire(text.tenant)
        return chosen

    def _serve(self, queue: TextQueue, text: QueuedText) -> None:
        self._virtual_time = max(self._virtual_time, queue.start)
        queue.start += text.num_tokens / max(text.weight, 1e-6)
        queue.serve(text)
        self._forget(text)

    def _start_of(self, tenant: str) -> float:
        queue = self._queues.get(tenant)
        return queue.start if queue is not None else max(self._virtual_time, self._starts.get(tenant, 0.0))

    def _enqueue(self, text: QueuedText) -> None:
        queue = self._queues.get(text.tenant)
        if queue is None:
            queue = TextQueue(self._max_wait_s)
            queue.start = self._start_of(text.tenant)
            self._queues[text.tenant] = queue
        queue.add(text)

    def _dequeue(self, text: QueuedText) -> None:
        self._queues[text.tenant].take(text)
        self._retire(text.tenant)

    def _forget(self, text: QueuedText) -> None:
        del self._queued[text.id]
        self.num_tokens -= text.num_tokens

    def _retire(self, tenant: str) -> None:
        """One that has nothing here is remembered only for what it has had beyond its turn."""
        queue = self._queues.get(tenant)
        if queue is None or queue:
            return
        del self._queues[tenant]
        self._starts[tenant] = queue.start
        if len(self._starts) > _MAX_TENANTS:
            self._starts = {name: start for name, start in self._starts.items() if start > self._virtual_time}
