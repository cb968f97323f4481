"""The waiting texts of one tenant, in the order in which they are served. Knows no batch, no other tenant, no clock.

A request of many texts is split, and its texts queue by self-clocked fair queueing (Golestani, 1994), counted in
tokens: each is tagged with the tokens its request will have had by then, so that a request of one text, or of short
ones, is not behind another's thousand. A text that has waited `max_wait_s` goes before all tags.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(slots=True)
class QueuedText:
    """What the batcher knows of a text. Only texts of equal `kind` share a batch."""

    id: int
    request_id: int  # whose it is: requests share the model
    num_tokens: int
    kind: Hashable = None
    tenant: str = ""
    weight: float = 1.0  # the tenant's part of the tokens
    # set when it is queued
    arrival_s: float = 0.0
    tag: float = 0.0


class TextQueue:
    """`first` is what to serve next; `step_over` hides it until `put_back`."""

    def __init__(self, max_wait_s: float) -> None:
        self.start = 0.0  # the tenant's virtual time, kept by the batcher
        self._max_wait_s = max_wait_s
        self._queued: dict[int, QueuedText] = {}  # in order of arrival
        self._by_tag: list[tuple[float, int]] = []  # a heap; entries whose tag is not the text's (any more) are void
        self._last_tags: dict[int, float] = {}  # of the requests that have texts here
        self._num_texts: dict[int, int] = {}  # of each request
        self._virtual_time = 0.0  # the highest tag that has been served

    def __len__(self) -> int:
        return len(self._queued)

    def add(self, text: QueuedText) -> None:
        """Queues a text behind those of its own request."""
        text.tag = self._next_tag(text.request_id, text.num_tokens)
        self._last_tags[text.request_id] = text.tag
        self._num_texts[text.request_id] = self._num_texts.get(text.request_id, 0) + 1
        self._queued[text.id] = text
        heapq.heappush(self._by_tag, (text.tag, text.id))

    def join(self, text: QueuedText, request_id: int) -> None:
        """Another request wants it too: it moves forward to where that request's own would stand."""
        tag = self._next_tag(request_id, text.num_tokens)
        if tag < text.tag:
            text.tag = tag
            heapq.heappush(self._by_tag, (tag, text.id))

    def first(self, now_s: float) -> QueuedText | None:
        """The oldest if it has waited long enough, else the one of the lowest tag; None if all are stepped over."""
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

    def step_over(self) -> None:
        """The first is of another kind than the batch."""
        heapq.heappop(self._by_tag)

    def put_back(self, text: QueuedText) -> None:
        """It was stepped over, and keeps its place."""
        heapq.heappush(self._by_tag, (text.tag, text.id))

    def serve(self, text: QueuedText) -> None:
        """It runs."""
        self._virtual_time = max(self._virtual_time, text.tag)
        self.take(text)

    def take(self, text: QueuedText) -> None:
        """It is no longer here, for whatever reason."""
        del self._queued[text.id]
        self._num_texts[text.request_id] -= 1
        if not self._num_texts[text.request_id]:
            del self._num_texts[text.request_id], self._last_tags[text.request_id]
        if len(self._by_tag) > 4 * len(self._queued) + 256:  # mostly texts that have left
            self._by_tag = [entry for entry in self._by_tag if entry[1] in self._queued]
            heapq.heapify(self._by_tag)

    def _next_tag(self, request_id: int, num_tokens: int) -> float:
        return max(self._virtual_time, self._last_tags.get(request_id, 0.0)) + num_tokens
