"""The rows and what is gathered from them, against a plain model of every request."""

from __future__ import annotations

import random

import numpy as np

from llmserve.messages import SamplingParams
from llmserve.scheduler.output import NewRequestData, ResumedRequestData, SchedulerOutput
from llmserve.worker.input_batch import InputBatch, StepInputs

BLOCK = 16
PARAMS = SamplingParams(max_tokens=100, seed=7, temperature=0.5, top_k=3)


def new(request_id: str, prompt: list[int], blocks: list[int], computed: int = 0) -> NewRequestData:
    return NewRequestData(request_id, prompt, PARAMS, blocks, computed)


def step(batch: InputBatch, output: SchedulerOutput) -> StepInputs:
    batch.apply(output)
    return batch.gather(output)


def test_a_mixed_batch_is_gathered_in_the_schedulers_order() -> None:
    batch = InputBatch(max_num_seqs=4, max_model_len=64, block_size=BLOCK)
    first = step(batch, SchedulerOutput({"a": 3}, new_requests=[new("a", [10, 11, 12], [5])]))
    assert first.num_samples.tolist() == [1]
    batch.advance(first, np.array([99]))
    chunk = new("b", list(range(100, 140)), [7, 2, 9], computed=16)
    mixed = step(batch, SchedulerOutput({"a": 1, "b": 10}, new_requests=[chunk]))
    assert mixed.request_ids == ["a", "b"]
    assert mixed.token_ids.tolist() == [99, *range(116, 126)]
    assert mixed.positions.tolist() == [3, *range(16, 26)]
    assert mixed.slot_mapping.tolist() == [5 * BLOCK + 3, *(2 * BLOCK + i for i in range(10))]
    assert mixed.seq_lens.tolist() == [4, 26]
    assert mixed.query_start.tolist() == [0, 1, 11]
    assert mixed.num_samples.tolist() == [1, 0]


def test_a_preempted_request_keeps_its_tokens_and_gets_a_new_table() -> None:
    batch = InputBatch(max_num_seqs=2, max_model_len=64, block_size=BLOCK)
    batch.advance(step(batch, SchedulerOutput({"a": 2}, new_requests=[new("a", [1, 2], [0])])), np.array([3]))
    other = SchedulerOutput({"b": 1}, preempted_ids=["a"], new_requests=[new("b", [50], [0])])
    batch.advance(step(batch, other), np.array([51]))
    resumed = step(batch, SchedulerOutput({"b": 1, "a": 3}, resumed_requests={"a": ResumedRequestData([6], 0)}))
    assert resumed.token_ids.tolist() == [51, 1, 2, 3]
    assert resumed.slot_mapping.tolist()[1:] == [6 * BLOCK, 6 * BLOCK + 1, 6 * BLOCK + 2]
    assert resumed.num_samples.tolist() == [1, 1]
    row = int(resumed.rows[1])
    assert batch.prompt_token_ids(row).tolist() == [1, 2]
    assert batch.output_token_ids(row).tolist() == [3]


def test_random_lives_agree_with_a_plain_model_and_leave_no_row_taken() -> None:
    source = random.Random(2)
    batch = InputBatch(max_num_seqs=8, max_model_len=128, block_size=BLOCK)
    alive: dict[str, tuple[list[int], list[int], int]] = {}  # tokens, blocks, computed
    num_accepted = 0
    for number in range(400):
        output = SchedulerOutput()
        if alive and source.random() < 0.2:
            gone = source.choice(list(alive))
            del alive[gone]
            output.finished_ids.append(gone)
        if len(alive) < 8 and source.random() < 0.5:
            prompt = [source.randrange(1000) for _ in range(source.randint(1, 100))]
            alive[f"r{number}"] = (prompt, blocks := source.sample(range(1000), 8), 0)
            output.new_requests.append(new(f"r{number}", list(prompt), list(blocks)))
        for request_id, (tokens, _, computed) in alive.items():
            if len(tokens) < 118:
                output.num_scheduled_tokens[request_id] = source.randint(1, len(tokens) - computed)
                if computed + output.num_scheduled_tokens[request_id] == len(tokens) and source.random() < 0.6:
                    drafts = [source.randrange(3) for _ in range(source.randint(1, 8))]
                    output.draft_token_ids[request_id] = drafts
                    output.num_scheduled_tokens[request_id] += len(drafts)
        inputs = step(batch, output)
        drawn: list[int] = []
        expected_kept = []
        for index, request_id in enumerate(inputs.request_ids):
            tokens, blocks, computed = alive[request_id]
            drafts = output.draft_token_ids.get(request_id, [])
            end = computed + output.num_scheduled_tokens[request_id]
            rows = slice(inputs.query_start[index], inputs.query_start[index + 1])
            assert inputs.token_ids[rows].tolist() == (tokens + drafts)[computed:end]
            expected = [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(computed, end)]
            assert inputs.slot_mapping[rows].tolist() == expected
            num_samples = len(drafts) + 1 if end == len(tokens) + len(drafts) else 0
            assert inputs.num_samples[index] == num_samples
            sampled = [source.randrange(3) for _ in range(num_samples)]
            assert inputs.sample_rows[len(drawn) : len(drawn) + num_samples].tolist() == [
                inputs.query_start[index + 1] - num_samples + offset for offset in range(num_samples)
            ]
            drawn += sampled
            kept = [token for at, token in enumerate(sampled) if sampled[:at] == drafts[:at]]
            expected_kept.append(len(kept))
            num_accepted += max(len(kept) - 1, 0)
            alive[request_id] = (tokens + kept, blocks, end - len(drafts) + max(len(kept) - 1, 0))
        assert batch.advance(inputs, np.array(drawn, dtype=np.int64)).tolist() == expected_kept
    assert num_accepted > 50
    batch.apply(SchedulerOutput(finished_ids=list(alive)))
    assert batch.row_of == {}
    assert batch.params == {}


def test_promised_tokens_find_their_requests_wherever_those_are() -> None:
    """In their rows, parked by a preemption, gone, and replaced by others with the same row or id."""
    batch = InputBatch(max_num_seqs=3, max_model_len=64, block_size=BLOCK)
    names = ["stays", "parked", "gone"]
    first = SchedulerOutput(dict.fromkeys(names, 2), new_requests=[new(n, [1, 2], [i]) for i, n in enumerate(names)])
    inputs = step(batch, first)
    draws = batch.promise(inputs)
    assert batch.num_tokens[inputs.rows].tolist() == [3, 3, 3]
    changed = SchedulerOutput(finished_ids=["gone"], preempted_ids=["parked"])
    changed.new_requests = [new("gone", [7, 8, 9], [5]), new("other", [6] * 5, [6])]
    changed.num_scheduled_tokens = {"stays": 1, "gone": 3, "other": 5}
    following = step(batch, changed)
    assert following.token_ids.tolist() == [-1, 7, 8, 9, 6, 6, 6, 6, 6]
    batch.fulfil(draws, np.array([40, 41, 42]))
    assert batch.output_token_ids(batch.row_of["stays"]).tolist() == [40]
    assert batch.output_token_ids(batch.row_of["gone"]).tolist() == []
    assert batch.output_token_ids(batch.row_of["other"]).tolist() == []
    assert 41 not in batch.token_ids
    assert 42 not in batch.token_ids
    finished = SchedulerOutput(finished_ids=["other"], resumed_requests={"parked": ResumedRequestData([9], 0)})
    finished.num_scheduled_tokens = {"parked": 3}
    assert step(batch, finished).token_ids.tolist() == [1, 2, 41]
