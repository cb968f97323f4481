"""The sampler over steps: counts that grow as it draws, rows that change hands, log-probabilities of raw logits."""

from __future__ import annotations

import torch

from llmserve.kernels.reference import ReferenceOps
from llmserve.messages import SamplingParams
from llmserve.scheduler.output import NewRequestData, ResumedRequestData, SchedulerOutput
from llmserve.worker.input_batch import InputBatch
from llmserve.worker.sampler import Sampler, SamplerOutput

VOCAB = 40


class Stage:
    """A batch and its sampler; logits are made up."""

    def __init__(self) -> None:
        self.batch = InputBatch(max_num_seqs=4, max_model_len=64, block_size=16)
        self.sampler = Sampler(ReferenceOps(), self.batch, VOCAB, torch.device("cpu"))

    def step(self, output: SchedulerOutput, logits: torch.Tensor) -> SamplerOutput:
        self.batch.apply(output)
        self.sampler.apply(output)
        inputs = self.batch.gather(output)
        drawn = self.sampler.sample(logits, inputs)
        self.batch.advance(inputs, drawn.token_ids)
        return drawn


def greedy(**values: object) -> SamplingParams:
    return SamplingParams(max_tokens=20, seed=0, temperature=0.0, **values)  # type: ignore[arg-type]


def entering(request_id: str, params: SamplingParams, block: int) -> NewRequestData:
    return NewRequestData(request_id, [1, 2], params, [block], 0)


def falling() -> torch.Tensor:
    """One row: token 0 is likeliest, then 1, by a step of 1 each."""
    return -torch.arange(VOCAB, dtype=torch.float32)[None]


def test_a_penalised_request_takes_the_next_best_each_time() -> None:
    stage = Stage()
    new = entering("a", greedy(presence_penalty=100.0), 0)
    said = stage.step(SchedulerOutput({"a": 2}, new_requests=[new]), falling()).token_ids.tolist()
    for _ in range(3):
        said += stage.step(SchedulerOutput({"a": 1}), falling()).token_ids.tolist()
    assert said == [0, 1, 2, 3]
    # preempted, it comes back with the counts it had, into another row
    other = entering("b", greedy(), 1)
    stage.step(SchedulerOutput({"b": 2}, preempted_ids=["a"], new_requests=[other]), falling())
    back = SchedulerOutput({"b": 1, "a": 6}, resumed_requests={"a": ResumedRequestData([0], 0)})
    assert stage.step(back, falling().repeat(2, 1)).token_ids.tolist() == [0, 4]


def test_logprobs_are_of_the_model_s_own_distribution() -> None:
    stage = Stage()
    wanted = [
        entering("plain", greedy(), 0),
        entering("penalised", greedy(presence_penalty=100.0, logprobs=3), 1),
        entering("biased", greedy(logit_bias={5: 50.0}, logprobs=1), 2),
        entering("worded", greedy(bad_words=[[2, 9], [0]], logprobs=0), 3),
    ]
    first = {new.request_id: 2 for new in wanted}
    stage.step(SchedulerOutput(first, new_requests=wanted), falling().repeat(4, 1))
    drawn = stage.step(SchedulerOutput(dict.fromkeys(first, 1)), falling().repeat(4, 1))
    assert drawn.token_ids.tolist() == [0, 1, 5, 1]
    raw = falling()[0].log_softmax(0)
    assert drawn.logprobs.keys() == {1, 2, 3}
    for index, (token_id, num_top) in {1: (1, 3), 2: (5, 1), 3: (1, 0)}.items():
        scores = drawn.logprobs[index]
        assert (scores.token_id, scores.rank) == (token_id, token_id + 1)
        assert abs(scores.logprob - float(raw[token_id])) < 1e-6
        assert [token for token, _ in scores.top] == list(range(num_top))


def test_what_the_host_has_a_part_in() -> None:
    stage = Stage()
    wanted = {"plain": greedy(), "biased": greedy(logit_bias={3: 1.0}), "worded": greedy(bad_words=[[1, 2]])}
    new = [entering(name, params, block) for block, (name, params) in enumerate(wanted.items())]
    stage.step(SchedulerOutput(dict.fromkeys(wanted, 2), new_requests=new), falling().repeat(3, 1))
    settled = {name: stage.sampler.settles_on_host([name]) for name in wanted}
    assert settled == {"plain": False, "biased": False, "worded": True}
    stage.step(SchedulerOutput({"plain": 1}, finished_ids=["biased", "worded"]), falling())
    assert not stage.sampler.settles_on_host(["plain"])
