"""Who is resubmitted, who is suspected and who is convicted after an engine's death: in ids alone, no process."""

from __future__ import annotations

from llmserve.engine.in_flight import InFlightRequests
from llmserve.messages import (
    EngineRequest,
    EngineStats,
    FinishReason,
    SamplingParams,
    SequenceOutput,
    StepOutputs,
)


def of(*names: str, prompt_logprobs: int | None = None) -> InFlightRequests:
    requests = InFlightRequests()
    for name in names:
        params = SamplingParams(max_tokens=9, seed=1, prompt_logprobs=prompt_logprobs)
        requests.add(EngineRequest(request_id=name, prompt_token_ids=[1, 2], params=params, arrival_s=0.0))
    return requests


def sent(requests: InFlightRequests) -> list[str]:
    return [request.request_id for request in requests.take_unsent()]


def say(requests: InFlightRequests, *names: str, finish: FinishReason | None = None) -> None:
    outputs = [SequenceOutput(name, [5], finish) for name in names]
    requests.record(StepOutputs(1, 0.0, outputs, EngineStats(0, 0, 0, 0)))


def test_what_is_resumed_has_its_tokens_and_its_prompt_is_not_scored_twice() -> None:
    requests = of("a", "b", prompt_logprobs=2)
    assert sent(requests) == ["a", "b"]
    assert sent(requests) == []
    say(requests, "a")
    say(requests, "a")
    assert requests.engine_died(["a", "b"], for_certain=True) == []
    first, second = requests.take_unsent()
    assert (first.output_token_ids, first.params.prompt_logprobs) == ([5, 5], None)
    assert (second.output_token_ids, second.params.prompt_logprobs) == ([], 2)


def test_a_step_may_bring_several_tokens_and_all_are_kept_in_order() -> None:
    requests = of("a")
    sent(requests)
    for token_ids in ([5, 6, 7], [], [8]):
        outputs = [SequenceOutput("a", token_ids, None)]
        requests.record(StepOutputs(1, 0.0, outputs, EngineStats(0, 0, 0, 0)))
    assert requests.num_tokens == 4
    requests.engine_died([], for_certain=True)
    (resumed,) = requests.take_unsent()
    assert resumed.output_token_ids == [5, 6, 7, 8]


def test_the_finished_and_the_unwanted_are_not_resumed() -> None:
    requests = of("a", "b", "c")
    sent(requests)
    say(requests, "a", finish=FinishReason.STOP)
    assert requests.forget(["b", "never"]) == ["b"]
    requests.engine_died([], for_certain=False)
    assert sent(requests) == ["c"]
    assert len(requests) == 1


def test_nobody_is_told_of_what_no_engine_knows() -> None:
    requests = of("a")
    assert requests.forget(["a"]) == []
    assert sent(requests) == []


def test_one_death_makes_nobody_a_suspect() -> None:
    requests = of("a", "b")
    sent(requests)
    requests.engine_died(["a", "b"], for_certain=True)
    assert sent(requests) == ["a", "b"]


def test_suspects_go_in_one_at_a_time_the_first_alone_and_a_token_clears_them() -> None:
    requests = of("a", "b", "c")
    for _ in range(2):
        sent(requests)
        requests.engine_died(["a", "b"], for_certain=True)
    assert sent(requests) == ["a"]
    assert sent(requests) == []  # c has not been in the steps that died, but might be at fault in the next
    say(requests, "a")
    assert sent(requests) == ["c", "b"]
    say(requests, "c")
    assert sent(requests) == []
    say(requests, "b")
    requests.engine_died(["a", "b", "c"], for_certain=True)  # all start anew
    assert sent(requests) == ["a", "b", "c"]


def test_one_that_dies_beside_others_is_tried_alone_and_convicted_then() -> None:
    requests = of("good", "bad")
    for _ in range(2):
        sent(requests)
        assert requests.engine_died(["good", "bad"], for_certain=True) == []
    assert sent(requests) == ["good"]
    say(requests, "good")
    assert sent(requests) == ["bad"]
    assert requests.engine_died(["good", "bad"], for_certain=True) == []
    assert sent(requests) == ["bad"]
    assert requests.engine_died(["bad"], for_certain=True) == ["bad"]
    assert sent(requests) == ["good"]
    assert requests.ids() == ["good"]


def test_newcomers_do_not_wait_for_the_prompts_of_those_of_a_death() -> None:
    requests = of("a")
    sent(requests)
    requests.engine_died(["a"], for_certain=True)
    requests.add(
        EngineRequest(request_id="b", prompt_token_ids=[1], params=SamplingParams(max_tokens=9, seed=1), arrival_s=1.0)
    )
    assert sent(requests) == ["a", "b"]
    assert requests.engine_died(["a", "b"], for_certain=True) == []  # the newcomer has a mark, and is no suspect yet
    assert sent(requests) == ["a"]
    assert requests.engine_died(["a"], for_certain=True) == ["a"]
    assert sent(requests) == ["b"]


def test_where_chance_may_be_the_cause_it_takes_three_deaths_alone() -> None:
    requests = of("a")
    for _ in range(2):
        sent(requests)
        assert requests.engine_died(["a"], for_certain=False) == []
    sent(requests)
    assert requests.engine_died(["a"], for_certain=False) == ["a"]


def test_chance_that_hits_many_convicts_nobody() -> None:
    names = [f"r{number}" for number in range(8)]
    requests = of(*names)
    for _ in range(2):
        sent(requests)
        assert requests.engine_died(names, for_certain=False) == []
    for _ in range(16):  # whoever is on trial is hit, and then comes last: two each
        (on_trial,) = sent(requests)
        assert requests.engine_died([on_trial], for_certain=False) == []
    assert len(requests) == 8


def test_a_suspect_that_leaves_makes_room_for_the_next() -> None:
    requests = of("a", "b", "c")
    for _ in range(2):
        sent(requests)
        requests.engine_died(["a", "b", "c"], for_certain=True)
    assert sent(requests) == ["a"]
    assert sent(requests) == []
    requests.forget(["a", "b"])
    assert sent(requests) == ["c"]


def test_those_that_are_held_during_a_trial_are_counted() -> None:
    requests = of("a", "b")
    assert requests.num_held == 2
    for _ in range(2):
        sent(requests)
        requests.engine_died(["a"], for_certain=False)
    for name in ("c", "d"):
        requests.add(next(of(name).take_unsent()))
    assert sent(requests) == ["a"]
    assert requests.num_held == 3
    requests.forget(["c"])
    assert requests.num_held == 2
    say(requests, "a")
    assert sent(requests) == ["b", "d"]
    requests.pause(["a"])
    assert requests.num_held == 0
