"""Which waiting texts of a pooling model run together. Knows no model, no tensors, no tasks and no clock.

A batch is packed: its cost is its tokens, whatever their lengths, so it is filled up to a token budget and nothing is
sorted to save padding. What the order decides is who waits. A client's request of many texts is split, and its texts
queue by self-clocked fair queueing (Golestani, 1994), counted in tokens: each is tagged with the tokens its request
will have had by then, so that a request of one text, or of short ones, is not behind another's thousand. A text that
has waited `max_wait_s` goes before all tags.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable
from dataclasses import dataclass

_LOOKAHEAD = 64  # texts of another kind that are stepped over for a batch


@dataclass(slots=True)
class QueuedText:
    """What the batcher knows of a text. Only texts of equal `kind` share a batch."""

    id: int
    request_id: int  # whose it is: requests share the model
    num_tokens: int
    kind: Hashable = None
    # set when it is queued
    arrival_s: float = 0.0
    tag: float = 0.0


class TextBatcher:
    """`add` and `remove` texts, take `next_batch` while an instance is free.

    All times are seconds of whatever clock the caller reads; they only ever grow.
    """

    def __init__(self, max_batch_tokens: int, max_batch_texts: int = 1024, max_wait_s: float = 1.0) -> None:
        self.max_batch_tokens = max_batch_tokens
        self._max_batch_texts = max_batch_texts
        self._max_wait_s = max_wait_s
        self._queued: dict[int, QueuedText] = {}  # in order of arrival
        self._by_tag: list[tuple[float, int]] = []  # a heap; entries whose tag is not the text's (any more) are void
        self._last_tags: dict[int, float] = {}  # of the requests that have texts here
        self._num_texts: dict[int, int] = {}  # of each request
        self._virtual_time = 0.0  # the highest tag that has been served
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, text_id: int) -> bool:
        return text_id in self._queued

    def add(self, text: QueuedText, now_s: float) -> None:
        """Queues a text behind those of its own request."""
        text.arrival_s = now_s
        text.tag = self._next_tag(text.request_id, text.num_tokens)
        self._last_tags[text.request_id] = text.tag
        self._num_texts[text.request_id] = self._num_texts.get(text.request_id, 0) + 1
        self._queued[text.id] = text
        self.num_tokens += text.num_tokens
        heapq.heappush(self._by_tag, (text.tag, text.id))

    def join(self, text_id: int, request_id: int) -> None:
        """Another request wants a text that waits here: it moves forward to where that request's own would stand.
        One that has left is left alone."""
        text = self._queued.get(text_id)
        if text is None:
            return
        tag = self._next_tag(request_id, text.num_tokens)
        if tag < text.tag:
            text.tag = tag
            heapq.heappush(self._by_tag, (tag, text_id))

    def remove(self, text_id: int) -> bool:
        """Forgets a text that nobody waits for; False if it is not here (any more)."""
        text = self._queued.get(text_id)
        if text is not None:
            self._take(text)
        return text is not None

    def drain(self) -> list[int]:
        """Takes every text out; their ids."""
        ids = list(self._queued)
        for text in list(self._queued.values()):
            self._take(text)
        return ids

    def next_batch(self, now_s: float) -> list[QueuedText]:
        """The texts to run now, all of one kind, within the budget; one that is longer than the budget runs alone."""
        chosen: list[QueuedText] = []
        num_tokens = 0
        stepped_over: list[tuple[float, int]] = []
        while len(chosen) < self._max_batch_texts and len(stepped_over) <= _LOOKAHEAD:
            text = self._first(now_s)
            if text is None:
                break
            if chosen and text.kind != chosen[0].kind:
                stepped_over.append((text.tag, text.id))
                heapq.heappop(self._by_tag)
                continue
            if chosen and num_tokens + text.num_tokens > self.max_batch_tokens:
                break
            chosen.append(text)
            num_tokens += text.num_tokens
            self._virtual_time = max(self._virtual_time, text.tag)
            self._take(text)
        for entry in stepped_over:
            heapq.heappush(self._by_tag, entry)
        return chosen

    def _first(self, now_s: float) -> QueuedText | None:
        """The oldest if it has waited long enough, else the one of the lowest tag; at the top of the heap then."""
        if not self._queued:
            return None
        oldest = next(iter(self._queued.values()))
        if now_s - oldest.arrival_s >= self._max_wait_s and oldest.tag > -math.inf:
            oldest.tag = -math.inf  # before all others, but behind those that came here before it
            heapq.heappush(self._by_tag, (oldest.tag, oldest.id))
        while self._by_tag:
            tag, text_id = self._by_tag[0]
            text = self._queued.get(text_id)
            if text is not None and text.tag == tag:
                return text
            heapq.heappop(self._by_tag)
        return None

    def _next_tag(self, request_id: int, num_tokens: int) -> float:
        return max(self._virtual_time, self._last_tags.get(request_id, 0.0)) + num_tokens

    def _take(self, text: QueuedText) -> None:
        del self._queued[text.id]
        self.num_tokens -= text.num_tokens
        self._num_texts[text.request_id] -= 1
        if not self._num_texts[text.request_id]:
            del self._num_texts[text.request_id], self._last_tags[text.request_id]
        if len(self._by_tag) > 4 * len(self._queued) + 256:  # mostly texts that have left
            self._by_tag = [entry for entry in self._by_tag if entry[1] in self._queued]
            heapq.heapify(self._by_tag)
