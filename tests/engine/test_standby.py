"""The standby engine: who takes it, who replaces it, and that it never outlives its server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable

import msgspec
import psutil
import pytest

from llmserve.config import EngineConfig
from llmserve.engine.client import EngineClient
from llmserve.engine.processes import EngineProcesses
from llmserve.threads import engine_threads
from tests.engine.scripted_engine import Script

COMMAND = (sys.executable, "-m", "tests.engine.scripted_engine", msgspec.json.encode(Script()).decode())


def make_client(processes: EngineProcesses) -> EngineClient:
    return EngineClient(EngineConfig(model="m"), print, print, print, "critical", processes)


@pytest.mark.parametrize("given", [None, "active"])
def test_threads_of_an_engine_wait_asleep_unless_the_operator_wants_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)

    async def scenario() -> int:
        wanted = given or "passive"
        code = f"import os, sys; sys.exit(os.environ['OMP_WAIT_POLICY'] != {wanted!r})"
        engine = await EngineProcesses((sys.executable, "-c", code)).take()
        status = await engine.process.wait()
        await engine.end()
        return status

    assert asyncio.run(scenario()) == 0


def test_ctrl_c_in_the_terminal_reaches_no_engine_from_its_first_moment() -> None:
    async def scenario() -> int:
        code = "import os, sys; sys.exit(os.getpgid(0) != os.getpid())"
        engine = await EngineProcesses((sys.executable, "-c", code)).take()
        status = await engine.process.wait()
        await engine.end()
        return status

    assert asyncio.run(scenario()) == 0


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """What is opened once for all engines is opened before descriptors are counted."""

    async def scenario() -> None:
        client = make_client(EngineProcesses(COMMAND))
        await client.start()
        await client.shutdown(drain=False, timeout_s=5)

    asyncio.run(scenario())


def run(use: Callable[[EngineProcesses], Awaitable[None]], command: tuple[str, ...] = COMMAND) -> None:
    """Runs `use`; then no process, descriptor or task may be left."""
    me = psutil.Process()

    async def scenario() -> None:
        processes = EngineProcesses(COMMAND, command)
        tasks = asyncio.all_tasks()
        try:
            await use(processes)
        finally:
            await processes.close()
            await processes.close()
        processes.prepare()
        assert processes.standby_pid is None
        assert asyncio.all_tasks() == tasks

    num_fds = me.num_fds()
    asyncio.run(asyncio.wait_for(scenario(), 60))
    _wait_until(lambda: me.num_fds() <= num_fds, "all descriptors closed")  # zmq closes its own a little later
    alive = [child for child in me.children() if child.status() != psutil.STATUS_ZOMBIE]
    assert [child for child in alive if "scripted_engine" in " ".join(child.cmdline())] == []


async def standby_of(processes: EngineProcesses, other_than: int | None = None) -> int:
    for _ in range(3000):
        if (pid := processes.standby_pid) is not None and pid != other_than:
            return pid
        await asyncio.sleep(0.01)
    raise AssertionError("there is no standby")


def test_it_becomes_the_next_engine_and_is_renewed_only_when_asked() -> None:
    async def use(processes: EngineProcesses) -> None:
        processes.prepare()
        pid = await standby_of(processes)
        processes.prepare()
        assert await standby_of(processes) == pid
        first, second = make_client(processes), make_client(processes)
        try:
            await first.start()
            assert first.pid == pid
            assert processes.standby_pid is None
            processes.prepare()
            renewed = await standby_of(processes)
            assert renewed not in (None, pid)
            await second.start()
            assert second.pid == renewed
        finally:
            await first.shutdown(drain=False, timeout_s=5)
            await second.shutdown(drain=False, timeout_s=5)

    run(use)


class SlowGrant:
    """In the place of `require_threads`: grants when the event loop has gone on meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[int] = []
        self.loop_went_on: list[bool] = []
        self._goes_on = threading.Event()
        monkeypatch.setattr("llmserve.engine.processes.require_threads", self._require)

    def watch(self) -> None:
        """From now on; to be called on the event loop."""
        asyncio.get_running_loop().call_soon(self._goes_on.set)

    def _require(self, num_threads: int, _who: str) -> None:
        self.asked.append(num_threads)
        self.loop_went_on.append(self._goes_on.wait(3))


def test_streams_go_on_while_threads_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    grant = SlowGrant(monkeypatch)

    async def use(processes: EngineProcesses) -> None:
        grant.watch()
        await (await processes.take()).end()

    run(use)
    assert grant.loop_went_on == [True]


def test_streams_go_on_while_a_standby_asks_for_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    grant = SlowGrant(monkeypatch)

    async def use(processes: EngineProcesses) -> None:
        processes.prepare()
        await asyncio.sleep(0)  # now it asks, or has done so
        grant.watch()
        await standby_of(processes)

    run(use)
    assert grant.loop_went_on == [True]


def test_who_comes_too_late_for_the_standby_asks_for_what_a_new_process_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(processes: EngineProcesses) -> None:
        processes.prepare()
        pid = await standby_of(processes)
        grant = SlowGrant(monkeypatch)
        grant.watch()
        engines = await asyncio.gather(processes.take(8), processes.take(8))
        assert [engine.process.pid == pid for engine in engines].count(True) == 1
        of_a_standby, of_a_new = engine_threads(8, is_standby=True), engine_threads(8)
        assert sorted(grant.asked) == [of_a_standby, of_a_standby, of_a_new]
        for engine in engines:
            await engine.end()

    run(use)


def test_who_leaves_while_threads_are_asked_for_leaves_the_standby(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(processes: EngineProcesses) -> None:
        processes.prepare()
        pid = await standby_of(processes)
        grant = SlowGrant(monkeypatch)
        taking = asyncio.create_task(processes.take())
        await asyncio.sleep(0)
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        assert taking.cancelled()
        assert processes.standby_pid == pid
        grant.watch()

    run(use)


def test_one_that_streams_wait_for_gives_way_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def use(processes: EngineProcesses) -> None:
        processes.prepare(is_awaited=True)
        await standby_of(processes)
        assert "There is no standby engine" not in caplog.text  # its own command was not asked for

    run(use, ("/nowhere/python",))


def test_one_that_dies_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async def use(processes: EngineProcesses) -> None:
        processes.prepare()
        pid = await standby_of(processes)
        os.kill(pid, signal.SIGKILL)
        await standby_of(processes, other_than=pid)
        assert "There is no standby engine: it ended with status -9" in caplog.text

    run(use)


def test_one_that_cannot_be_started_is_said_and_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def use(processes: EngineProcesses) -> None:
        processes.prepare()
        await asyncio.sleep(0.1)
        client = make_client(processes)
        await client.start()
        await client.shutdown(drain=False, timeout_s=5)
        assert "There is no standby engine" in caplog.text

    run(use, ("/nowhere/python",))


SERVER = """
import asyncio
from llmserve.engine.processes import EngineProcesses, STANDBY_COMMAND
async def main():
    processes = EngineProcesses(standby_command=STANDBY_COMMAND)
    processes.prepare()
    while processes.standby_pid is None:
        await asyncio.sleep(0)
    print(processes.standby_pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_it_waits_without_work_and_ends_with_its_server_even_if_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        standby = psutil.Process(int(server.stdout.readline()))
        try:
            _wait_until(lambda: any("libtorch_cpu" in area.path for area in standby.memory_maps()), "torch imported")
            _wait_until(lambda: _is_at_rest(standby), "all imports made")
            assert standby.nice() == psutil.Process().nice()
            for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: not for it to obey
                standby.send_signal(number)
            began = standby.cpu_times()
            threading.Event().wait(1.0)
            ended = standby.cpu_times()
            assert (ended.user, ended.system) == (began.user, began.system)
        finally:
            server.kill()
    standby.wait(10)


def _is_at_rest(process: psutil.Process) -> bool:
    began = sum(process.cpu_times()[:2])
    threading.Event().wait(0.5)
    return sum(process.cpu_times()[:2]) == began


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(1200):
        if condition():
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"never: {what}")
