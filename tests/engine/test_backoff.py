"""When another engine is started: what cannot run is tried ever more rarely, what somebody kills is not."""

from __future__ import annotations

import signal

from llmserve.engine.backoff import Backoff
from llmserve.engine.launch import FAILED_STATUS, OUT_OF_MEMORY_STATUS, was_ended_from_outside


def pauses(*ends: bool) -> list[float]:
    """Seconds before the start after each end, of engines that never worked; True: by accident."""
    backoff, paused = Backoff(0.5, 4.0), []
    for by_accident in ends:
        backoff.started()
        backoff.ended(by_accident=by_accident)
        paused.append(backoff.pause_s)
    return paused


def test_one_that_had_worked_is_replaced_at_once() -> None:
    backoff = Backoff(0.5, 4.0)
    assert backoff.pause_s == 0.0
    for by_accident in (True, False):
        backoff.started()
        backoff.worked()
        backoff.ended(by_accident=by_accident)
        assert backoff.pause_s == 0.0


def test_pauses_between_starts_that_come_to_nothing_double_up_to_a_limit() -> None:
    assert pauses(*[False] * 6) == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    assert pauses(*[False] * 3000)[-1] == 4.0  # a night of failures is no error


def test_accidents_double_nothing() -> None:
    assert pauses(*[True] * 6) == [0.5] * 6
    assert pauses(False, False, True, True, False) == [0.5, 1.0, 1.0, 1.0, 2.0]


def test_a_step_ends_the_count() -> None:
    backoff = Backoff(0.5, 4.0)
    for _ in range(5):
        backoff.started()
        backoff.ended(by_accident=False)
    backoff.started()
    backoff.worked()
    backoff.ended(by_accident=False)
    backoff.started()
    backoff.ended(by_accident=False)
    assert (backoff.num_failures, backoff.pause_s) == (1, 0.5)


def test_who_ended_an_engine_is_told_by_its_exit_status() -> None:
    by_others = [-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP, 0]
    by_itself = [-signal.SIGSEGV, -signal.SIGABRT, FAILED_STATUS, OUT_OF_MEMORY_STATUS, None]
    assert [was_ended_from_outside(status) for status in by_others + by_itself] == [True] * 4 + [False] * 5
