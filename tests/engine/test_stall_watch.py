"""When silence is a hang: against the work in hand, and not when it is our own fault. The test turns the clock."""

from __future__ import annotations

from llmserve.engine.stall_watch import StallWatch


def working(first_step_s: float = 1.0) -> StallWatch:
    """Has made one step, and has work left."""
    watch = StallWatch(10.0, 0.0)
    watch.work(0.0)
    watch.step(first_step_s, work_left=True)
    watch.due_s = 0.0
    return watch


def look(watch: StallWatch, now: float, is_stopped: bool = False) -> float | None:
    """A check that comes when it is due."""
    watch.due_s = now
    return watch.check(now, is_stopped)


def test_silence_counts_from_the_last_step() -> None:
    watch = working()
    assert look(watch, 10.9) is None
    assert watch.due_s == 11.0
    assert look(watch, 11.0) == 10.0


def test_heartbeats_excuse_only_an_engine_without_work() -> None:
    watch = StallWatch(10.0, 0.0)
    watch.heartbeat(9.0, work_left=False)
    assert look(watch, 18.0) is None
    watch.work(18.0)
    watch.step(18.5, work_left=True)
    watch.heartbeat(28.0, work_left=True)
    assert look(watch, 28.5) == 10.0


def test_no_step_is_due_for_work_that_was_taken_back() -> None:
    watch = working()
    watch.heartbeat(2.0, work_left=False)
    assert look(watch, 11.9) is None
    watch.work(100.0)
    assert look(watch, 109.9) is None
    assert look(watch, 110.0) == 10.0


def test_a_heartbeat_may_be_late_however_short_the_timeout() -> None:
    watch = StallWatch(0.5, 0.0)
    assert look(watch, 2.9) is None
    assert look(watch, 3.0) == 3.0


def test_work_that_comes_after_a_pause_starts_the_clock_and_more_of_it_does_not() -> None:
    watch = working()
    watch.step(2.0, work_left=False)
    watch.work(100.0)
    watch.work(108.0)
    assert look(watch, 109.9) is None
    assert look(watch, 110.0) == 10.0


def test_an_engine_with_long_steps_may_take_longer() -> None:
    watch = working(first_step_s=5.0)
    assert look(watch, 24.9) is None
    assert look(watch, 25.0) == 20.0


def test_a_first_step_may_take_longer() -> None:
    watch = StallWatch(10.0, 0.0)
    watch.work(0.0)
    assert look(watch, 59.9) is None
    assert look(watch, 60.0) == 60.0


def test_one_stopped_by_a_signal_has_no_excuse() -> None:
    watch = StallWatch(10.0, 0.0)
    watch.work(0.0)
    assert look(watch, 9.0, is_stopped=True) is None
    assert watch.due_s == 10.0
    assert look(watch, 10.0, is_stopped=True) == 10.0


def test_a_check_is_due_at_least_every_timeout() -> None:
    watch = StallWatch(10.0, 0.0)
    watch.work(0.0)
    assert look(watch, 5.0) is None
    assert watch.due_s == 15.0  # a whole minute is allowed, but it might be stopped meanwhile


def test_when_we_have_been_asleep_ourselves_the_engine_gets_time_to_be_heard() -> None:
    watch = working()
    watch.due_s = 11.0
    assert watch.check(300.0, is_stopped=False) is None
    assert watch.due_s == 305.0
    assert watch.check(305.0, is_stopped=False) == 10.0


def test_a_load_that_goes_on_is_no_hang() -> None:
    watch = StallWatch(10.0, 0.0, first_factor=30.0)
    watch.work(0.0)
    watch.progress(200.0)
    assert look(watch, 400.0) is None
    assert look(watch, 500.0) == 300.0
