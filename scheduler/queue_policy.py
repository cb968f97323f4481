"""How requests to a general model may wait: the configuration of a dynamic batcher. Knows no requests and no clock.

The fields are those of Triton's `ModelDynamicBatching` and `ModelQueuePolicy`, in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """What becomes of the requests of one priority level while they wait."""

    max_queue_size: int = 0  # requests; 0: no limit
    default_timeout_s: float = 0.0  # 0: none
    delay_expired: bool = False  # timeout_action DELAY: serve it behind those in time; else REJECT
    allow_timeout_override: bool = False  # a request may ask for less time than the default, never for more

    def timeout_s(self, requested_s: float) -> float:
        """The time a request may wait that asks for `requested_s` (0: asks for nothing); 0 is no limit."""
        if self.allow_timeout_override and requested_s > 0:
            return min(requested_s, self.default_timeout_s or requested_s)
        return self.default_timeout_s


@dataclass(frozen=True, slots=True)
class BatcherConfig:
    """The default is a model without dynamic batching: every request alone, first come first served, no limits."""

    max_batch_size: int = 0  # rows of a batch; 0: a batch is one request
    max_batch_tokens: int = 0  # rows times their padded length; 0: no limit
    preferred_batch_sizes: frozenset[int] = frozenset()
    max_queue_delay_s: float = 0.0
    preserve_ordering: bool = False
    priority_levels: int = 0  # 0: there is one level
    default_priority_level: int = 0
    default_policy: QueuePolicy = QueuePolicy()
    priority_policies: Mapping[int, QueuePolicy] = field(default_factory=dict)  # by level, 1 the highest

    def level_of(self, priority: int) -> int:
        """The level a request's `priority` means, 0-based. One out of range is the default's, as Triton has it."""
        if not self.priority_levels:
            return 0
        level = priority if 1 <= priority <= self.priority_levels else self.default_priority_level
        return max(level, 1) - 1

    def policies(self) -> list[QueuePolicy]:
        """One for each level, the highest first."""
        levels = range(1, max(self.priority_levels, 1) + 1)
        return [self.priority_policies.get(level, self.default_policy) for level in levels]
