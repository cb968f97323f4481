"""Which instance of a model gets the next batch: an idle one, or a busy one ahead of its time. Knows no requests.

A process that answers one request and then waits for the next costs two wake-ups a request, which is more than a small
model costs. So where executions are short and every request runs alone, a busy instance gets what waits: it reads the
next requests with the one before. It runs them in their order, so that when it dies it is known which it had begun.
"""

from __future__ import annotations

from llmserve.backends.instance_pool import Instance

_MAX_AHEAD = 16  # batches one instance has at a time
_SHORT_NS = 1_000_000  # an execution that is over so soon keeps nobody waiting who would be better off elsewhere
_LEARN = 0.125


class InstanceLoads:
    """`hands_ahead`: whether a busy instance may be given more; that is for models whose queue has no rules."""

    def __init__(self, hands_ahead: bool = False) -> None:
        self.hands_ahead = hands_ahead
        self._idle: list[Instance] = []
        self._busy: dict[Instance, list[int]] = {}  # its batches, in the order in which it runs them
        self._mean_ns = float(_SHORT_NS)  # of an execution; nothing is handed ahead before one was measured

    @property
    def has_idle(self) -> bool:
        """Whether a batch would run at once."""
        return bool(self._idle)

    def is_idle(self, instance: Instance) -> bool:
        """Whether it runs, and has no batch."""
        return instance in self._idle

    def add(self, instance: Instance) -> None:
        """It takes batches from here on."""
        self._idle.append(instance)

    def remove(self, instance: Instance) -> list[int]:
        """It does no more. Returns the batches it was given and never began."""
        if instance in self._idle:
            self._idle.remove(instance)
        return self._busy.pop(instance, [])[1:]

    def next(self) -> Instance | None:
        """Who gets the next batch now; None: nobody."""
        if self._idle:
            return self._idle[-1]
        if not self.hands_ahead or self._mean_ns >= _SHORT_NS or not self._busy:
            return None
        least = min(self._busy, key=lambda instance: len(self._busy[instance]))
        return least if len(self._busy[least]) < _MAX_AHEAD else None

    def begin(self, instance: Instance, batch_id: int) -> None:
        """It has been given a batch."""
        if self._idle and self._idle[-1] is instance:
            self._idle.pop()
        self._busy.setdefault(instance, []).append(batch_id)

    def end(self, instance: Instance, batch_id: int, executed_ns: int | None) -> None:
        """It is done with it; None: it never got it."""
        batches = self._busy[instance]
        batches.remove(batch_id)
        if not batches:
            del self._busy[instance]
            self._idle.append(instance)
        if executed_ns is not None:
            self._mean_ns += _LEARN * (executed_ns - self._mean_ns)
