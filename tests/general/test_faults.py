"""Models that raise, exit, hang, are killed or stopped: what it costs, and what it leaves behind."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from llmserve.backends.instance import InstanceSettings
from llmserve.backends.shared_memory import SegmentPool
from llmserve.errors import LLMServeError, ModelExecutionError, ModelLoadError, NotReadyError
from tests.general.general_models import (
    IDENTITY,
    MOODY,
    PYTHON,
    fp32,
    infer,
    infer_all,
    is_alive,
    open_descriptors,
    request,
    running,
    until,
)

RAISE, EXIT, SYS_EXIT, KILL, HANG, NONSENSE, PID, DEAF, GREEDY = range(1, 10)
TWO = PYTHON + "instance_group [ { count: 2 kind: KIND_CPU } ]"


def model_processes() -> list[psutil.Process]:
    """Children of this process that run a model: other tests' servers are none of ours."""
    return [child for child in psutil.Process().children() if "llmserve.backends.model_process" in _command(child)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.parametrize(
    ("mood", "text"),
    [
        (EXIT, r"ended \(exit status 7\)"),
        (SYS_EXIT, r"ended \(exit status 8\)"),
        (KILL, r"ended \(killed by signal 9, as the kernel does when memory runs out\)"),
        (HANG, "has not answered for 0.3 s: it is hung"),
        (NONSENSE, "sent a message that cannot be read"),
        (DEAF, "ended|hung"),
    ],
)
def test_a_model_that_dies_costs_its_own_request_and_is_restarted(tmp_path: Path, mood: int, text: str) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": MOODY}, execution_timeout_s=0.3) as model:
            assert (await infer(model, INPUT0=fp32(0)))["OUTPUT0"] == 0
            (old,) = model.pids
            dying = asyncio.create_task(infer(model, INPUT0=fp32(mood)))
            await asyncio.sleep(0)
            waiting = asyncio.create_task(infer(model, INPUT0=fp32(0)))  # not the dead one's: served after the restart
            with pytest.raises(ModelExecutionError, match=text):
                await dying
            assert not model.is_ready()
            assert "m_0_0" in model.reason
            assert (await waiting)["OUTPUT0"] == 0
            assert model.is_ready()
            assert model.reason == ""
            assert not is_alive(old)
            assert model.pids != [old]
            assert model.statistics().fail.count == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(("mood", "text"), [(RAISE, "RuntimeError: bad mood"), (GREEDY, "MemoryError")])
def test_a_model_that_raises_goes_on_in_its_process(tmp_path: Path, mood: int, text: str) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": MOODY}) as model:
            pids = model.pids
            with pytest.raises(ModelExecutionError, match=text):
                await infer(model, INPUT0=fp32(mood))
            assert (await infer(model, INPUT0=fp32(0)))["OUTPUT0"] == 0
            assert model.pids == pids

    asyncio.run(scenario())


# its first input's first element says how many MiB it takes, in steps, under a limit of its own; it answers with its id
HUNGRY = """
import os, resource, signal
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.killed = LIKE_THE_KERNEL
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)

    def execute(self, requests):
        (request,) = requests
        taken = []
        try:
            for _ in range(int(request.inputs()[0].as_numpy()[0])):
                taken.append(bytearray(1 << 20))
        except MemoryError:
            taken.clear()
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", np.array([os.getpid()], np.float32))])]
"""


@pytest.mark.parametrize("kills", [False, True], ids=["raises", "is killed by the kernel"])
def test_a_model_that_runs_out_of_memory_costs_that_request(tmp_path: Path, kills: bool) -> None:
    async def scenario() -> None:
        source = HUNGRY.replace("LIKE_THE_KERNEL", str(kills))
        async with running(tmp_path, {"model.py": source}, min_backoff_s=0.2) as model:
            before = int((await infer(model, INPUT0=fp32(1)))["OUTPUT0"][0])
            said = "killed by signal 9, as the kernel does when memory runs out" if kills else "MemoryError"
            for _ in range(2):
                with pytest.raises(ModelExecutionError, match=said):
                    await infer(model, INPUT0=fp32(10_000))
                if not kills:
                    continue
                assert not model.is_ready()
                await until(model.is_ready)  # the second time after a pause
            after = int((await infer(model, INPUT0=fp32(1)))["OUTPUT0"][0])
            assert (after == before) is not kills
            assert model.statistics().fail.count == 2

    asyncio.run(scenario())


def test_without_memory_for_a_batch_only_the_batch_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": IDENTITY}) as model:
            monkeypatch.setattr(SegmentPool, "_make", refuse)
            with pytest.raises(ModelExecutionError, match="no memory"):
                await infer(model, INPUT0=fp32(*range(100_000)))
            assert (await infer(model, INPUT0=fp32(1)))["OUTPUT0"] == 1
            monkeypatch.undo()
            assert len((await infer(model, INPUT0=fp32(*range(100_000))))["OUTPUT0"]) == 100_000

    asyncio.run(scenario())


def test_a_model_that_raises_as_it_is_unloaded_is_unloaded(tmp_path: Path) -> None:
    source = MOODY + "    def finalize(self): raise RuntimeError('never')\n"

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": source}):
            started = time.monotonic()
        assert time.monotonic() - started < 4  # not the unload's time-out

    asyncio.run(scenario())


def test_requests_go_on_while_threads_for_a_process_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, went_on = threading.Event(), []
    monkeypatch.setattr("llmserve.backends.instance.require_threads", lambda *_: went_on.append(goes_on.wait(3)))

    async def use() -> None:
        asyncio.get_running_loop().call_soon(goes_on.set)
        async with running(tmp_path, {"model.py": IDENTITY}):
            assert went_on == [True]

    asyncio.run(use())


def test_the_other_instances_serve_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": MOODY}, TWO, execution_timeout_s=1.0) as model:
            assert len(set(model.pids)) == 2
            hung = asyncio.create_task(infer(model, INPUT0=fp32(HANG)))
            await asyncio.sleep(0)
            started = time.monotonic()
            pids = {int((await infer(model, INPUT0=fp32(PID)))["OUTPUT0"][0]) for _ in range(20)}
            assert len(pids) == 1
            assert time.monotonic() - started < 0.9
            assert model.is_ready()
            with pytest.raises(ModelExecutionError, match="hung"):
                await hung

    asyncio.run(scenario())


def test_a_stopped_process_is_not_ready_and_is_replaced_when_it_is_needed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": MOODY}, execution_timeout_s=0.5) as model:
            (pid,) = model.pids
            os.kill(pid, signal.SIGSTOP)
            await until(lambda: not model.is_ready())
            os.kill(pid, signal.SIGCONT)
            await until(model.is_ready)
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(ModelExecutionError, match="hung"):
                await infer(model, INPUT0=fp32(0))
            assert (await infer(model, INPUT0=fp32(0)))["OUTPUT0"] == 0
            assert not is_alive(pid)

    asyncio.run(scenario())


def test_what_a_killed_model_has_started_is_killed_with_it(tmp_path: Path) -> None:
    source = MOODY + (
        "    def initialize(self, args):\n"
        "        import subprocess\n"
        f"        child = subprocess.Popen(['sleep', '1000'])\n"
        f"        open({str(tmp_path / 'children')!r}, 'a').write(f'{{child.pid}} ')\n"
    )

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": source}) as model:
            with pytest.raises(ModelExecutionError):
                await infer(model, INPUT0=fp32(KILL))
            await until(model.is_ready)
            first, second = (int(pid) for pid in (tmp_path / "children").read_text().split())
            await until(lambda: not is_alive(first))
            assert is_alive(second)

    asyncio.run(scenario())


def test_a_model_with_nothing_to_do_may_be_silent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": IDENTITY}, execution_timeout_s=0.2) as model:
            pids = model.pids
            await infer(model, INPUT0=fp32(1))
            await asyncio.sleep(0.5)
            assert model.pids == pids
            assert model.is_ready()

    asyncio.run(scenario())


def test_a_model_that_goes_on_answering_is_not_hung(tmp_path: Path) -> None:
    source = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        (request,) = requests
        sender = request.get_response_sender()
        for _ in range(6):
            time.sleep(0.2)
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", request.inputs()[0].as_numpy())]))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

    async def scenario() -> None:
        config = PYTHON + "model_transaction_policy { decoupled: true }"
        async with running(tmp_path, {"model.py": source}, config, execution_timeout_s=0.8) as model:
            assert len(await infer_all(model, request({"INPUT0": fp32(1)}))) == 7

    asyncio.run(scenario())


def test_an_idle_model_that_is_killed_is_back_before_anybody_asks(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": IDENTITY}) as model:
            (pid,) = model.pids
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not model.is_ready())
            await until(model.is_ready)
            assert model.pids != [pid]
            assert (await infer(model, INPUT0=fp32(3)))["OUTPUT0"] == 3

    asyncio.run(scenario())


def test_a_model_that_keeps_dying_is_given_pauses_and_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": MOODY}, min_backoff_s=0.4) as model:
            for _ in range(2):
                with pytest.raises(ModelExecutionError):
                    await infer(model, INPUT0=fp32(KILL))
            with pytest.raises(NotReadyError, match=r"waiting to be restarted.*killed by signal 9"):
                await infer(model, INPUT0=fp32(0))
            await until(model.is_ready)
            assert (await infer(model, INPUT0=fp32(0)))["OUTPUT0"] == 0

    asyncio.run(scenario())


def test_pauses_double_up_to_their_limit() -> None:
    settings = InstanceSettings(min_backoff_s=0.5, max_backoff_s=3.0)
    assert [settings.pause_s(failures) for failures in range(6)] == [0, 0.5, 1, 2, 3, 3]


def test_pauses_are_kept_and_forgiven(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": MOODY}, min_backoff_s=0.3, healthy_s=0.8) as model:

            async def down_s() -> float:
                """Kills it; how long it is not ready."""
                started_s = time.monotonic()
                with pytest.raises(ModelExecutionError):
                    await infer(model, INPUT0=fp32(KILL))
                await until(model.is_ready)
                return time.monotonic() - started_s

            await down_s()
            assert await down_s() >= 0.3
            assert await down_s() >= 0.6
            await asyncio.sleep(0.9)  # it has run so long now that it counts as healthy
            with pytest.raises(ModelExecutionError):
                await infer(model, INPUT0=fp32(KILL))
            assert "waiting to be restarted" not in model.reason  # at once, as the first time
            await until(model.is_ready)

    asyncio.run(scenario())


def test_a_restart_that_fails_fails_who_waits_for_it(tmp_path: Path) -> None:
    source = f"import os\nif os.path.exists({str(tmp_path / 'broken')!r}): raise OSError('disk is gone')\n" + MOODY

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": source}, min_backoff_s=5.0) as model:
            (tmp_path / "broken").touch()
            dying = asyncio.create_task(infer(model, INPUT0=fp32(KILL)))
            await asyncio.sleep(0)
            waiting = asyncio.create_task(infer(model, INPUT0=fp32(0)))
            with pytest.raises(ModelExecutionError):
                await dying
            with pytest.raises(NotReadyError, match="disk is gone"):
                await waiting
            assert "disk is gone" in model.reason

    asyncio.run(scenario())


@pytest.mark.parametrize("where", ["import", "initialize"])
def test_a_load_that_hangs_is_ended(tmp_path: Path, where: str) -> None:
    hang = "import threading; threading.Event().wait()"
    source = hang if where == "import" else MOODY + f"    def initialize(self, args):\n        {hang}\n"

    async def scenario() -> None:
        before = model_processes()
        with pytest.raises(ModelLoadError, match="within 1 s; it has been killed"):
            async with running(tmp_path, {"model.py": source}, load_timeout_s=1.0):
                pass
        assert model_processes() == before

    asyncio.run(scenario())


def test_one_instance_that_cannot_load_ends_them_all(tmp_path: Path) -> None:
    source = MOODY + (
        "    def initialize(self, args):\n"
        "        if args['model_instance_name'] == 'm_0_1': raise ValueError('not twice')\n"
    )

    async def scenario() -> None:
        with pytest.raises(ModelLoadError, match="not twice"):
            async with running(tmp_path, {"model.py": source}, TWO):
                pass
        assert model_processes() == []

    asyncio.run(scenario())


def test_a_model_that_will_not_unload_is_killed_with_what_it_started(tmp_path: Path) -> None:
    source = MOODY + (
        "    def initialize(self, args):\n"
        "        import subprocess\n"
        f"        child = subprocess.Popen(['sleep', '1000'])\n"
        f"        open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "    def finalize(self):\n        threading.Event().wait()\n"
    )

    async def scenario() -> int:
        async with running(tmp_path, {"model.py": source}, unload_timeout_s=0.3):
            child = int((tmp_path / "child").read_text())
            assert is_alive(child)
        return child

    child = asyncio.run(scenario())
    asyncio.run(until(lambda: not is_alive(child)))


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_models_die_with_the_server_even_when_they_hang(tmp_path: Path, kill: signal.Signals) -> None:
    server = textwrap.dedent(
        f"""
        import asyncio
        from pathlib import Path
        from tests.general.general_models import *
        async def main():
            async with running(Path({str(tmp_path)!r}), {{"model.py": MOODY}}) as model:
                print(*model.pids, flush=True)
                await infer(model, INPUT0=fp32({HANG}))
        asyncio.run(main())
        """
    )
    with subprocess.Popen([sys.executable, "-c", server], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert is_alive(pid)
        process.send_signal(kill)
    asyncio.run(until(lambda: not is_alive(pid)))


def test_twenty_loads_leave_nothing_behind(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": IDENTITY}):
            pass
        before = open_descriptors()
        shared = set(os.listdir("/dev/shm"))
        for _ in range(20):
            async with running(tmp_path, {"model.py": IDENTITY}) as model:
                await infer(model, INPUT0=fp32(*range(50_000)))
        assert open_descriptors() == before
        assert set(os.listdir("/dev/shm")) == shared
        assert model_processes() == []

    asyncio.run(scenario())


def test_a_stop_fails_what_is_in_flight_and_refuses_what_comes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": MOODY}, unload_timeout_s=0.2) as model:
            task = asyncio.create_task(infer(model, INPUT0=fp32(HANG)))
            await asyncio.sleep(0.05)
            stopping = asyncio.create_task(model.stop())
            await asyncio.sleep(0)
            with pytest.raises(NotReadyError, match="being unloaded"):
                await infer(model, INPUT0=fp32(9))
            await stopping
            with pytest.raises(NotReadyError, match="unloaded"):
                await task

    asyncio.run(scenario())


def test_a_killed_model_never_ends_a_request_without_an_answer(tmp_path: Path) -> None:
    """Killed again and again under load: every request ends, with its own answer or an error of ours."""

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": IDENTITY}, TWO, min_backoff_s=0.05) as model:
            stop = asyncio.Event()
            outcomes: list[bool] = []

            async def client(value: float) -> None:
                while not stop.is_set():
                    try:
                        outcomes.append(float((await infer(model, INPUT0=fp32(value)))["OUTPUT0"][0]) == value)
                    except LLMServeError:
                        await asyncio.sleep(0.01)

            clients = [asyncio.create_task(client(i)) for i in range(6)]
            for _ in range(6):
                await asyncio.sleep(0.15)
                if pids := [pid for pid in model.pids if is_alive(pid)]:
                    os.kill(pids[0], signal.SIGKILL)
            stop.set()
            await asyncio.wait_for(asyncio.gather(*clients), 20)
            assert all(outcomes)
            assert len(outcomes) > 20
            assert model.statistics().pending == 0

    asyncio.run(scenario())


def test_who_cannot_take_an_answer_does_not_keep_it_from_those_behind(tmp_path: Path) -> None:
    async def scenario() -> None:
        config = PYTHON + "dynamic_batching { max_queue_delay_microseconds: 50000 }"
        async with running(tmp_path, {"model.py": MOODY}, "max_batch_size: 4 " + config) as model:
            first = asyncio.create_task(infer(model, INPUT0=fp32(0).reshape(1, 1)))
            await asyncio.sleep(0)  # it finds an idle instance; the next two are one batch, answered in one message

            def take(_: object) -> None:
                raise RuntimeError("its books are closed")

            model.infer(request({"INPUT0": fp32(0).reshape(1, 1)})).deliver(take)
            behind = asyncio.create_task(infer(model, INPUT0=fp32(0).reshape(1, 1)))
            await first
            with pytest.raises(ModelExecutionError, match="could not be passed on: RuntimeError"):
                await asyncio.wait_for(behind, 20)
            await until(model.is_ready)
            assert (await infer(model, INPUT0=fp32(0).reshape(1, 1)))["OUTPUT0"] == 0

    asyncio.run(scenario())
