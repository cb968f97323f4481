"""Threads: whether the system gives a process any more of them, and an executor that has its own from the start.

Many limits bound them (a user's processes, a container's pids, the machine's), and none says what is left. Libraries
that get none end the process (ZMQ, gRPC, OpenMP) or raise in the middle of a request. So whoever is about to start
something with threads in it asks first, and what requests need later is started before the first of them. Knows no
room.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait

from llmserve.gpu_driver import has_gpu_driver

_MAX_OPENBLAS_THREADS = 64  # numpy's wheels are built for so many


class ThreadLimitError(OSError):
    """There are fewer threads to be had than something needs; an OSError, as where a process cannot be started."""


def require_threads(num_threads: int, who: str) -> None:
    """Starts as many, and ends them again: some 50 us each, 6 ms beside a thread that computes in Python, so never on
    an event loop. Raises ThreadLimitError, which names `who` needs them."""
    over = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(num_threads):
            thread = threading.Thread(target=over.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise ThreadLimitError(
            f"{who} needs about {num_threads} threads, and the system gives only {len(started)} more. Raise the limit "
            "of this user's processes (ulimit -u), or the container's limit of pids."
        ) from error
    finally:
        over.set()
        for thread in started:
            thread.join()


def start_executor() -> ThreadPoolExecutor:
    """As many threads as asyncio's own executor has, but all of them now: a request never waits for one to be granted.

    Raises ThreadLimitError.
    """
    num_threads = min(32, num_cores() + 4)
    executor = ThreadPoolExecutor(num_threads, thread_name_prefix="work")
    all_run = threading.Barrier(num_threads)
    try:
        wait([executor.submit(all_run.wait) for _ in range(num_threads)])
    except RuntimeError as error:
        all_run.abort()
        executor.shutdown()
        raise ThreadLimitError(f"The server's {num_threads} working threads cannot be started: {error}.") from error
    return executor


def num_cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def server_threads() -> int:
    """What a server process starts in its life: numpy's and the tokenizers' pools, ZMQ's two, gRPC's, the executor."""
    cores = num_cores()
    return _numpy_threads() + _pool_threads("RAYON_NUM_THREADS") + 2 + min(max(cores, 4), 16) + 2 + min(32, cores + 4)


def engine_threads(num_threads: int | None, *, device: str = "auto", is_standby: bool = False) -> int:
    """What an engine's process surely still starts, itself included: numpy's pool, torch's, ZMQ's two, a compiler; on
    a CPU the kernels' too. A standby has its imports behind it, and numpy's pool with them.

    `num_threads`: those it computes on; None: one a core. `device` as in EngineConfig.
    """
    num_pools = 2 if _is_cpu(device) else 1
    return (0 if is_standby else _numpy_threads()) + num_pools * (num_threads or num_cores()) + 2


def standby_threads() -> int:
    """What a standby starts, itself included: it only imports."""
    return _numpy_threads() + 1


def _numpy_threads() -> int:
    return min(_pool_threads("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), _MAX_OPENBLAS_THREADS)


def _is_cpu(device: str) -> bool:
    """Whether an engine told so computes on the CPU for certain."""
    return device == "cpu" or (device == "auto" and not has_gpu_driver())


def _pool_threads(*variables: str) -> int:
    """Of a library's pool: one a core, unless one of these variables says otherwise."""
    for variable in variables:
        value = os.environ.get(variable, "")
        if value.isdecimal() and int(value):
            return int(value)
    return num_cores()
