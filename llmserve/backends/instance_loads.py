"""Which instance of a model gets the next batch: an idle one, or a busy one ahead of its time. Knows no requests.

A process that answers one request and then waits for the next costs two wake-ups a request, which is more than a small
model costs. So where executions are short and every request runs alone, a busy instance gets what waits: it reads the
next requests with the one before. It runs them in their order, so that when it dies it is known which it had begun.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmserve.backends.instance_pool import Instance
from llmserve.backends.model_messages import Results
from llmserve.general_metrics import ExecutionTimes
from llmserve.scheduler.dynamic_batcher import Batch

_MAX_BATCHES = 16  # that an instance has at a time, if it is the only one
_MAX_BATCHES_OF_SEVERAL = 2  # no more may stand behind one long execution while the others are idle
_SHORT_NS = 1_000_000  # an execution that is over so soon keeps nobody waiting who would be better off elsewhere
_LEARN = 0.125


@dataclass(slots=True)
class RunningBatch:
    """A batch that an instance has. `begun_ns`: when the instance could begin with it."""

    batch: Batch
    begun_ns: int


class InstanceLoads:
    """The instances that run, and the batches each has."""

    def __init__(self) -> None:
        self.hands_ahead = False  # whether a busy instance may be given more: for models whose queue has no rules
        self._idle: list[Instance] = []
        self._busy: dict[Instance, dict[int, RunningBatch]] = {}  # by batch id, in the order in which it runs them
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

    def remove(self, instance: Instance) -> list[Batch]:
        """It has died. Returns the batches it was given and never began."""
        if instance in self._idle:
            self._idle.remove(instance)
        return [running.batch for running in self._busy.pop(instance, {}).values()][1:]

    def next(self) -> Instance | None:
        """Who gets the next batch now; None: nobody."""
        if self._idle:
            return self._idle[-1]
        if not self.hands_ahead or self._mean_ns >= _SHORT_NS or not self._busy:
            return None
        least = min(self._busy, key=lambda instance: len(self._busy[instance]))
        most = _MAX_BATCHES if len(self._busy) == 1 else _MAX_BATCHES_OF_SEVERAL
        return least if len(self._busy[least]) < most else None

    def begin(self, instance: Instance, batch_id: int, batch: Batch, now_ns: int) -> None:
        """It is given a batch."""
        if instance in self._idle:
            self._idle.remove(instance)
        self._busy.setdefault(instance, {})[batch_id] = RunningBatch(batch, now_ns)

    def give_up(self, instance: Instance, batch_id: int) -> None:
        """It could not be given the batch after all."""
        self._end(instance, batch_id)

    def end(self, instance: Instance, results: Results, now_ns: int) -> tuple[RunningBatch, ExecutionTimes] | None:
        """It is done with a batch; None if nothing is known of it any more."""
        if instance not in self._busy or results.batch_id not in self._busy[instance]:
            return None
        running = self._end(instance, results.batch_id)
        for following in self._busy.get(instance, {}).values():
            following.begun_ns = max(following.begun_ns, results.ended_ns)
            break
        computed_ns = max(0, results.ended_ns - results.started_ns)
        self._mean_ns += _LEARN * (computed_ns - self._mean_ns)
        # both processes read the same clock, so nothing is missing between the phases
        input_ns, output_ns = results.started_ns - running.begun_ns, now_ns - results.ended_ns
        return running, ExecutionTimes(max(0, input_ns), computed_ns, max(0, output_ns))

    def _end(self, instance: Instance, batch_id: int) -> RunningBatch:
        batches = self._busy[instance]
        running = batches.pop(batch_id)
        if not batches:
            del self._busy[instance]
            self._idle.append(instance)
        return running
