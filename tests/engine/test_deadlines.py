"""Requests that are not answered in time leave the engine, waiting or running; by a clock that the test turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.engine.core import EngineCore
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.messages import EngineRequest, FinishReason, SamplingParams, StepOutputs
from llmserve.scheduler.budget import FixedBudget
from llmserve.scheduler.deadlines import Deadlines
from llmserve.scheduler.policy import make_policy
from llmserve.scheduler.scheduler import Scheduler
from tests.engine.scripted_engine import Script, ScriptedRunner


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Engine:
    """One seat: who comes second waits."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.cache = KVCacheManager(64, 16)
        budget = FixedBudget(64)
        scheduler = Scheduler(self.cache, policy=make_policy("fcfs"), budget=budget, max_num_seqs=1, max_model_len=512)
        self.core = EngineCore(scheduler, budget, ScriptedRunner(Script(step_s=0.0)), self.clock)

    def add(self, name: str, deadline_s: float | None, max_tokens: int = 100) -> None:
        params = SamplingParams(max_tokens=max_tokens, seed=1)
        self.core.add(
            EngineRequest(
                request_id=name,
                prompt_token_ids=[len(name), 1],
                params=params,
                arrival_s=0.0,
                deadline_s=deadline_s,
            )
        )

    def step_at(self, now_s: float) -> StepOutputs:
        self.clock.now_s = now_s
        return self.core.step()


def told(step: StepOutputs) -> dict[str, FinishReason | None]:
    return {output.request_id: output.finish_reason for output in step.outputs}


def test_the_overdue_end_and_who_waits_takes_the_seat() -> None:
    engine = Engine()
    engine.add("running", 5.0)
    engine.add("waiting", 3.0)
    engine.add("patient", None)
    assert told(engine.step_at(1.0)) == {"running": None}
    step = engine.step_at(3.0)
    assert told(step) == {"running": None, "waiting": FinishReason.ERROR}
    assert [output.error for output in step.outputs if output.error] == [
        ("deadline_exceeded", "The request was not answered by its deadline.")
    ]
    assert told(engine.step_at(5.5)) == {"running": FinishReason.ERROR, "patient": None}


def test_the_last_one_leaves_no_step_behind() -> None:
    engine = Engine()
    engine.add("only", 1.0)
    engine.step_at(0.5)
    num_steps = engine.core.num_steps
    assert told(engine.step_at(2.0)) == {"only": FinishReason.ERROR}
    assert engine.core.num_steps == num_steps
    assert not engine.core.has_work()
    assert engine.cache.num_free_blocks == engine.cache.num_blocks
    engine.add("next", None, max_tokens=1)
    assert told(engine.step_at(3.0)) == {"next": FinishReason.LENGTH}


@pytest.mark.parametrize("end", ["finish", "abort"])
def test_who_has_ended_in_time_is_not_ended_again(end: str) -> None:
    engine = Engine()
    engine.add("a", 1.0, max_tokens=1)
    if end == "finish":
        engine.step_at(0.5)
    else:
        engine.core.abort(["a"])
    engine.add("a", 9.0, max_tokens=3)  # the same id, used again
    assert told(engine.step_at(2.0)) == {"a": None}


steps = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 5), st.integers(0, 40)),
    st.tuples(st.just("forget"), st.integers(0, 5), st.just(0)),
    st.tuples(st.just("pass"), st.just(0), st.integers(0, 10)),
)


@given(st.lists(steps, max_size=200))
def test_each_is_overdue_once_and_in_time(events: list[tuple[str, int, int]]) -> None:
    deadlines, model, now = Deadlines(), dict[str, float](), 0
    for what, number, value in events:
        name = f"r{number}"
        if what == "add" and name not in model:
            model[name] = now + value
            deadlines.add(name, now + value)
        elif what == "forget":
            model.pop(name, None)
            deadlines.forget(name)
        elif what == "pass":
            now += value
            late = sorted((due, name) for name, due in model.items() if due <= now)
            overdue = deadlines.take_overdue(now)
            assert sorted(overdue) == sorted(name for _, name in late)
            assert [model.pop(name) for name in overdue] == [due for due, _ in late]
        assert len(deadlines) == len(model)


def test_those_that_left_are_not_kept() -> None:
    deadlines = Deadlines()
    for number in range(10_000):
        deadlines.add(f"r{number}", 1e9)
        deadlines.forget(f"r{number}")
    assert len(deadlines._heap) < 100
