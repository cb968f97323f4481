"""Threads are asked for before they are needed, and those of the executor are all there from the start."""

from __future__ import annotations

import threading
from concurrent.futures import wait

import pytest

from llmserve import cli, threads
from llmserve.config import ServeConfig
from llmserve.threads import ThreadLimitError


class Granted:
    """In the place of `threading.Thread.start`: so many are granted, and no more."""

    def __init__(self, num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
        start = threading.Thread.start
        self.num_left = num_threads

        def limited(thread: threading.Thread) -> None:
            if not self.num_left:
                raise RuntimeError("can't start new thread")
            self.num_left -= 1
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)


def test_what_is_asked_for_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    granted = Granted(20, monkeypatch)
    threads.require_threads(20, "A test")
    assert granted.num_left == 0
    assert threading.active_count() == before


def test_too_few_are_an_error_that_counts_them_and_none_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    Granted(3, monkeypatch)
    with pytest.raises(ThreadLimitError, match=r"A test needs about 4 threads, .* only 3 more\. .*ulimit -u"):
        threads.require_threads(4, "A test")
    assert threading.active_count() == before


def test_the_executor_needs_no_thread_later(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = threads.start_executor()
    Granted(0, monkeypatch)
    with executor:
        wait([executor.submit(threading.Event().wait, 0.001) for _ in range(200)])


def test_an_executor_without_all_its_threads_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    Granted(2, monkeypatch)
    with pytest.raises(ThreadLimitError, match="working threads cannot be started"):
        threads.start_executor()
    assert threading.active_count() == before


def test_a_server_without_enough_does_not_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Granted(5, monkeypatch)
    assert cli.main(["serve", "--port", "0"]) == 1
    assert "the system gives only 5 more" in capsys.readouterr().err


def test_the_engines_it_is_to_start_do_not_keep_a_server_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each asks for its own, and says so if it gets none: together they were more than a container gives."""
    served: list[ServeConfig] = []
    monkeypatch.setattr("llmserve.serve.serve", lambda config: served.append(config) or 0)
    Granted(threads.server_threads(), monkeypatch)
    assert cli.main(["serve", "--port", "0", "--num-threads", "1000"]) == 0
    assert [entry.engine.num_threads for entry in served[0].models] == [1000]


def test_on_a_large_machine_no_pool_is_counted_that_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(threads, "num_cores", lambda: 192)
    assert threads.standby_threads() == 64 + 1  # OpenBLAS has no more
    assert threads.engine_threads(None, device="cuda") == 64 + 192 + 2  # no kernels on the CPU
    assert threads.engine_threads(None, device="cpu") == 64 + 2 * 192 + 2
    assert threads.server_threads() == 64 + 192 + 2 + 16 + 2 + 32


@pytest.mark.parametrize(("has_gpu", "num_pools"), [(True, 1), (False, 2)])
def test_a_device_that_is_not_said_is_a_cpu_for_certain_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, num_pools: int
) -> None:
    monkeypatch.setattr(threads, "has_gpu_driver", lambda: has_gpu)
    assert threads.engine_threads(8, is_standby=True) == num_pools * 8 + 2


def test_pools_that_are_made_smaller_are_counted_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(threads, "num_cores", lambda: 64)
    server, engine = threads.server_threads(), threads.engine_threads(8, device="cpu")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setenv("RAYON_NUM_THREADS", "4")
    assert threads.server_threads() == server - 63 - 60
    assert threads.engine_threads(8, device="cpu") == engine - 63
    assert threads.engine_threads(8, device="cpu", is_standby=True) == 18
