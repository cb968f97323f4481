"""What a step shall compute, as plain ids: the scheduler writes it, workers read it. Holds no token the model made,
only guesses of those it will make."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmserve.messages import SamplingParams


@dataclass(slots=True, frozen=True)
class NewRequestData:
    """A request the worker has not seen: everything it needs to know, once. One that another engine has begun brings
    the tokens of its answer with it."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    block_ids: list[int]
    num_computed_tokens: int
    output_token_ids: list[int] = field(default_factory=list)


@dataclass(slots=True, frozen=True)
class ResumedRequestData:
    """A preempted request comes back with a new block table. The worker has kept its tokens."""

    block_ids: list[int]
    num_computed_tokens: int


@dataclass(slots=True)
class SchedulerOutput:
    """One step's work. `num_scheduled_tokens` is in batch order and names every request of the step.

    A request samples a token in this step exactly when the tokens scheduled reach the end of what it has
    (prompt + generated): the worker, which counts tokens too, sees that by itself. If it has drafts, they are counted
    in `num_scheduled_tokens` and stand behind its last token; of the tokens sampled at that one and at each draft, the
    request gets those up to the first that differs from the next draft, that one included.
    """

    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    total_num_scheduled_tokens: int = 0
    new_requests: list[NewRequestData] = field(default_factory=list)
    resumed_requests: dict[str, ResumedRequestData] = field(default_factory=dict)
    new_block_ids: dict[str, list[int]] = field(default_factory=dict)  # appended to a running request's block table
    preempted_ids: list[str] = field(default_factory=list)  # drop the block table, keep the tokens
    finished_ids: list[str] = field(default_factory=list)  # forget: finished or aborted since the last step
    draft_token_ids: dict[str, list[int]] = field(default_factory=dict)
    offloads: list[tuple[int, int]] = field(default_factory=list)  # (device block, host slot): all are copied, then
    restores: list[tuple[int, int]] = field(default_factory=list)  # (host slot, device block), then the step runs
