"""A worker without a model: it replays SchedulerOutput and checks that the view it gives is whole and consistent.

The "keys and values" of a token are one number that depends on the salt and on every token up to it, and a sampled
token depends on that number alone. So a block that is shared wrongly, reused too early or read before it is written
shows as a wrong number, and in the end as a wrong answer. It shares no code with the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmserve.messages import EngineRequest, SamplingParams
from llmserve.scheduler.output import SchedulerOutput

VOCAB_SIZE = 11
STOP_TOKEN_ID = 3


def engine_request(
    request_id: str,
    prompt_token_ids: Sequence[int],
    *,
    max_tokens: int = 16,
    min_tokens: int = 0,
    stop_token_ids: Sequence[int] = (),
    prompt_logprobs: int | None = None,
    arrival_s: float = 0.0,
    priority: int = 0,
    cache_salt: str = "",
    tenant: str = "",
    weight: float = 1.0,
) -> EngineRequest:
    """A request with defaults for all that a test does not care about."""
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        seed=0,
        stop_token_ids=list(stop_token_ids),
        prompt_logprobs=prompt_logprobs,
    )
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt_token_ids),
        params=params,
        arrival_s=arrival_s,
        priority=priority,
        cache_salt=cache_salt,
        tenant=tenant,
        weight=weight,
    )


def root_value(salt: str) -> int:
    return int.from_bytes(salt.encode()) + 7


def next_value(value: int, token_id: int) -> int:
    """The "keys and values" of a token after the one that had `value`."""
    return (value * 1_000_003 + token_id + 1) % (2**61 - 1)


def sample(value: int) -> int:
    return (value >> 9) % VOCAB_SIZE


def expected_answer(request: EngineRequest, max_num_tokens: int) -> list[int]:
    """What the request says if it runs alone and is never interrupted."""
    value = root_value(request.cache_salt)
    for token_id in request.prompt_token_ids:
        value = next_value(value, token_id)
    answer: list[int] = []
    max_tokens = min(request.params.max_tokens, max_num_tokens - len(request.prompt_token_ids))
    while len(answer) < max_tokens:
        answer.append(sample(value))
        if answer[-1] in request.params.stop_token_ids and len(answer) > request.params.min_tokens:
            break
        value = next_value(value, answer[-1])
    return answer


class _Sequence:
    def __init__(self, token_ids: list[int], salt: str) -> None:
        self.token_ids = token_ids
        self.values: list[int] = []  # what the cache must hold for each token
        self.block_ids: list[int] | None = None  # None: preempted
        self.num_computed = 0
        self.root = root_value(salt)
        self.extend_values()

    def extend_values(self) -> None:
        value = self.values[-1] if self.values else self.root
        for token_id in self.token_ids[len(self.values) :]:
            value = next_value(value, token_id)
            self.values.append(value)

    def values_with(self, drafts: list[int]) -> list[int]:
        """Its values, and those of drafts behind its last token."""
        values = self.values.copy()
        for token_id in drafts:
            values.append(next_value(values[-1], token_id))
        return values


class FakeWorker:
    """Executes steps. A request with drafts keeps those that came true and samples one token more; `num_sampled` says
    how many another samples at once (from a model that gives several)."""

    def __init__(
        self, num_blocks: int, block_size: int, num_sampled: Callable[[], int] = lambda: 1, num_host_blocks: int = 0
    ) -> None:
        self.block_size = block_size
        self.num_sampled = num_sampled
        self.salts: dict[str, str] = {}  # the scheduler does not send them; the test fills this in
        self.sequences: dict[str, _Sequence] = {}
        self.blocks: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.host_blocks: list[list[int | None]] = [[None] * block_size for _ in range(num_host_blocks)]

    def block_tables(self) -> dict[str, list[int]]:
        return {i: sequence.block_ids for i, sequence in self.sequences.items() if sequence.block_ids is not None}

    def execute(self, output: SchedulerOutput) -> dict[str, list[int]]:
        """One step; returns the sampled tokens."""
        self._copy(self.blocks, self.host_blocks, output.offloads)
        self._copy(self.host_blocks, self.blocks, output.restores)
        self._apply_changes(output)
        self._write(output)  # in every layer all writes of a step come before its reads
        return self._read_and_sample(output)

    def _copy(
        self, sources: list[list[int | None]], targets: list[list[int | None]], pairs: list[tuple[int, int]]
    ) -> None:
        assert len({target for _, target in pairs}) == len(pairs), "two copies to one place at once"
        for source, target in pairs:
            assert None not in sources[source]
            targets[target] = sources[source].copy()

    def _apply_changes(self, output: SchedulerOutput) -> None:
        for request_id in output.finished_ids:
            del self.sequences[request_id]
        for request_id in output.preempted_ids:
            assert self.sequences[request_id].block_ids is not None
            self.sequences[request_id].block_ids = None
        for new in output.new_requests:
            assert new.request_id not in self.sequences
            sequence = _Sequence(new.prompt_token_ids.copy(), self.salts[new.request_id])
            sequence.block_ids = new.block_ids.copy()
            sequence.num_computed = new.num_computed_tokens
            self.sequences[new.request_id] = sequence
        for request_id, resumed in output.resumed_requests.items():
            sequence = self.sequences[request_id]
            assert sequence.block_ids is None
            sequence.block_ids = resumed.block_ids.copy()
            sequence.num_computed = resumed.num_computed_tokens
        for request_id, block_ids in output.new_block_ids.items():
            table = self.sequences[request_id].block_ids
            assert table is not None
            table += block_ids

    def _write(self, output: SchedulerOutput) -> None:
        assert output.total_num_scheduled_tokens == sum(output.num_scheduled_tokens.values())
        written = set()
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            sequence = self.sequences[request_id]
            table = sequence.block_ids
            assert table is not None
            assert len(set(table)) == len(table)
            assert num_tokens > 0
            drafts = output.draft_token_ids.get(request_id, [])
            end = sequence.num_computed + num_tokens
            assert end <= min(len(sequence.token_ids) + len(drafts), len(table) * self.block_size)
            assert not drafts or end == len(sequence.token_ids) + len(drafts), "drafts stand behind the last token"
            values = sequence.values_with(drafts)
            for position in range(sequence.num_computed, end):
                slot = table[position // self.block_size], position % self.block_size
                assert slot not in written, "two requests write one slot"
                written.add(slot)
                self.blocks[slot[0]][slot[1]] = values[position]
            sequence.num_computed = end - len(drafts)

    def _read_and_sample(self, output: SchedulerOutput) -> dict[str, list[int]]:
        sampled = {}
        for request_id in output.num_scheduled_tokens:
            sequence = self.sequences[request_id]
            assert sequence.block_ids is not None
            context: list[int | None] = []
            for block_id in sequence.block_ids:
                context += self.blocks[block_id]
            assert context[: sequence.num_computed] == sequence.values[: sequence.num_computed], "wrong context read"
            if drafts := output.draft_token_ids.get(request_id):
                sampled[request_id] = self._verify(sequence, drafts)
            elif sequence.num_computed == len(sequence.token_ids):
                sampled[request_id] = [self._sample_one(sequence) for _ in range(self.num_sampled())]
        return sampled

    def _verify(self, sequence: _Sequence, drafts: list[int]) -> list[int]:
        """What the model says after the last token, and as long as that is the next draft, what it says after it."""
        sampled = [self._sample_one(sequence)]
        for draft in drafts:
            if sampled[-1] != draft:
                break
            sequence.num_computed += 1
            sampled.append(self._sample_one(sequence))
        return sampled

    def _sample_one(self, sequence: _Sequence) -> int:
        token_id = sample(sequence.values[-1])
        sequence.token_ids.append(token_id)
        sequence.extend_values()
        return token_id
