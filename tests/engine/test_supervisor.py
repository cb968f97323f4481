"""Engines that are killed, stopped, crash and fail to start: what every request gets is what it would have got anyway.

The engine is the real process, loop and scheduler around tokens that are a hash (`scripted_engine.py`).
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import time
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from llmserve.config import EngineConfig
from llmserve.engine.processes import EngineProcesses
from llmserve.engine.supervision import Phase, SupervisionSettings
from llmserve.engine.supervisor import EngineSupervisor
from llmserve.errors import EngineDeadError, LLMServeError, ModelLoadError
from llmserve.messages import EngineRequest, EngineStats, FinishReason, SamplingParams, StepOutputs, TokenLogprobs
from llmserve.metrics import ModelMetrics
from tests.engine.scripted_engine import POISON, Script, answer

SETTINGS = SupervisionSettings(stall_timeout_s=1.0, restart_timeout_s=30.0, min_backoff_s=0.05)
PROMPT = [7, 8, 9]


def seed_of(name: str) -> int:
    return zlib.crc32(name.encode()) % 1000


class Clients:
    """Collects what is said to each request."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, FinishReason] = {}
        self.failed: dict[str, LLMServeError] = {}
        self.prompt_logprobs: dict[str, list[list[TokenLogprobs | None]]] = {}
        self.stats: list[EngineStats] = []
        self.changed = asyncio.Event()

    def on_step(self, step: StepOutputs) -> None:
        for output in step.outputs:
            if not output.request_id:
                continue  # nobody's any more
            assert output.request_id not in self.finished
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.prompt_logprobs is not None:
                self.prompt_logprobs.setdefault(output.request_id, []).append(output.prompt_logprobs)
            if output.finish_reason is not None:
                self.finished[output.request_id] = output.finish_reason
        self.changed.set()

    def on_idle(self, stats: EngineStats) -> None:
        self.stats.append(stats)
        self.changed.set()

    def on_failed(self, request_ids: list[str], error: LLMServeError) -> None:
        for request_id in request_ids:
            self.failed[request_id] = error
        self.changed.set()

    def num_tokens(self) -> int:
        return sum(map(len, self.tokens.values()))

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


class House:
    """A supervisor, its clients, and the hand that does harm."""

    def __init__(self, script: Script, settings: SupervisionSettings, with_standby: bool) -> None:
        self.clients = Clients()
        self.metrics = ModelMetrics("m")
        command = (sys.executable, "-m", "tests.engine.scripted_engine", msgspec.json.encode(script).decode())
        self.processes = EngineProcesses(command, command if with_standby else None)
        self.supervisor = EngineSupervisor(
            "m", EngineConfig(model="m"), self.clients, self.metrics, settings, self.processes, "critical"
        )

    def ask(self, name: str, num_tokens: int, prompt: list[int] = PROMPT, **params: Any) -> None:
        values = {"max_tokens": num_tokens, "seed": seed_of(name)} | params
        self.supervisor.add(
            EngineRequest(
                request_id=name,
                prompt_token_ids=prompt,
                params=SamplingParams(**values),
                arrival_s=time.monotonic(),
            )
        )

    def send(self, number: signal.Signals) -> int:
        pid = self.supervisor.pid
        assert pid is not None
        os.kill(pid, number)
        return pid

    async def until_restarted(self, times: int) -> None:
        await self.clients.until(lambda: self.metrics.engine_restarts >= times)

    def check(self, name: str, num_tokens: int, prompt: list[int] = PROMPT) -> None:
        assert self.clients.tokens[name] == answer(prompt, seed_of(name), num_tokens)
        assert self.clients.finished[name] is FinishReason.LENGTH


def run(
    use: Callable[[House], Awaitable[None]],
    script: Script | None = None,
    settings: SupervisionSettings = SETTINGS,
    with_standby: bool = False,
) -> None:
    """Runs `use` against a supervised engine; nothing may be left of it afterwards."""
    me = psutil.Process()

    async def scenario() -> None:
        house = House(script or Script(), settings, with_standby)
        tasks = asyncio.all_tasks()
        try:
            await house.supervisor.start()
            await use(house)
        finally:
            await house.supervisor.shutdown(timeout_s=5)
            await house.processes.close()
        assert asyncio.all_tasks() == tasks

    asyncio.run(asyncio.wait_for(scenario(), 60))
    alive = [child for child in me.children() if child.status() != psutil.STATUS_ZOMBIE]
    assert [child for child in alive if "scripted_engine" in " ".join(child.cmdline())] == []


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_killed_engine_is_replaced_and_every_answer_goes_on(overlapped: bool) -> None:
    async def use(house: House) -> None:
        for number in range(16):
            house.ask(f"r{number}", 300)
        for kills in range(1, 4):
            heard = house.clients.num_tokens()
            await house.clients.until(lambda heard=heard: house.clients.num_tokens() > heard + 160)
            house.send(signal.SIGKILL)
            await house.until_restarted(kills)
        await house.clients.until(lambda: len(house.clients.finished) == 16)
        for number in range(16):
            house.check(f"r{number}", 300)
        assert house.metrics.engine_restarts == 3
        assert house.metrics.requests_resubmitted == 48
        assert house.metrics.engine_recovery_s.counts
        assert not house.clients.failed

    run(use, Script(overlapped=overlapped))


def test_the_standby_takes_over_and_is_renewed() -> None:
    async def use(house: House) -> None:
        house.ask("a", 600)
        for kills in range(1, 4):
            heard = house.clients.num_tokens()
            await house.clients.until(lambda heard=heard: house.clients.num_tokens() > heard + 60)
            standby = house.processes.standby_pid
            assert standby not in (None, house.supervisor.pid)
            house.send(signal.SIGKILL)
            await house.until_restarted(kills)
            assert house.supervisor.pid == standby
        await house.clients.until(lambda: house.clients.finished)
        house.check("a", 600)

    run(use, with_standby=True)


def test_a_stopped_engine_is_replaced_after_the_stall_time() -> None:
    async def use(house: House) -> None:
        house.ask("a", 400)
        house.ask("b", 200)
        await house.clients.until(lambda: house.clients.num_tokens() > 40)
        stopped = house.send(signal.SIGSTOP)
        began_s = time.monotonic()
        await house.until_restarted(1)
        assert SETTINGS.stall_timeout_s <= time.monotonic() - began_s
        assert house.metrics.engine_stalls == 1
        assert house.supervisor.pid != stopped
        await house.clients.until(lambda: len(house.clients.finished) == 2)
        house.check("a", 400)
        house.check("b", 200)

    run(use)


def test_an_idle_engine_that_is_stopped_is_replaced_too() -> None:
    async def use(house: House) -> None:
        house.send(signal.SIGSTOP)
        await house.until_restarted(1)
        house.ask("a", 5)
        await house.clients.until(lambda: "a" in house.clients.finished)
        house.check("a", 5)

    run(use)


def test_an_engine_whose_work_was_taken_back_before_a_step_of_it_is_left_alone() -> None:
    async def use(house: House) -> None:
        house.ask("warm", 2)
        await house.clients.until(lambda: "warm" in house.clients.finished)
        pid = house.send(signal.SIGSTOP)  # so that it reads both messages at once
        house.ask("a", 100)
        house.supervisor.abort(["a"])
        house.send(signal.SIGCONT)
        await asyncio.sleep(2.5 * SETTINGS.stall_timeout_s)
        assert house.supervisor.pid == pid
        assert house.metrics.engine_stalls == 0

    run(use)


def test_a_request_that_nobody_reads_stands_still_and_goes_on_where_it_was() -> None:
    async def use(house: House) -> None:
        house.ask("slow", 300)
        house.ask("quick", 300)
        for _ in range(5):
            heard = len(house.clients.tokens.get("slow", ()))
            await house.clients.until(lambda heard=heard: len(house.clients.tokens.get("slow", ())) > heard + 20)
            house.supervisor.pause(["slow"])
            heard = len(house.clients.tokens["slow"])
            others = len(house.clients.tokens["quick"])
            await house.clients.until(lambda others=others: len(house.clients.tokens["quick"]) > others + 20)
            assert len(house.clients.tokens["slow"]) == heard
            house.supervisor.unpause(["slow"])
        await house.clients.until(lambda: len(house.clients.finished) == 2)
        house.check("slow", 300)
        house.check("quick", 300)

    run(use)


def test_an_engine_whose_requests_all_stand_still_is_idle_and_not_hung() -> None:
    async def use(house: House) -> None:
        pid = house.supervisor.pid
        house.ask("slow", 100)
        await house.clients.until(lambda: house.clients.num_tokens() > 20)
        house.supervisor.pause(["slow"])
        house.supervisor.unpause(["slow"])  # at once: what was on its way of the first time must not be heard twice
        house.supervisor.pause(["slow"])
        await house.clients.until(lambda: house.clients.stats)
        stats = house.clients.stats[-1]
        assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)
        await asyncio.sleep(2.5 * SETTINGS.stall_timeout_s)
        assert house.supervisor.pid == pid
        house.send(signal.SIGKILL)
        await house.until_restarted(1)
        house.supervisor.unpause(["slow"])
        await house.clients.until(lambda: house.clients.finished)
        house.check("slow", 100)

    run(use)


def test_one_that_is_only_held_up_for_a_while_is_left_alone() -> None:
    async def use(house: House) -> None:
        house.ask("a", 300)
        await house.clients.until(lambda: house.clients.num_tokens() > 20)
        pid = house.send(signal.SIGSTOP)
        await asyncio.sleep(SETTINGS.stall_timeout_s / 3)
        os.kill(pid, signal.SIGCONT)
        await house.clients.until(lambda: house.clients.finished)
        assert house.supervisor.pid == pid
        house.check("a", 300)

    run(use)


def test_requests_that_come_while_the_engine_is_replaced_wait_for_it() -> None:
    async def use(house: House) -> None:
        house.ask("before", 200)
        await house.clients.until(lambda: house.clients.num_tokens() > 5)
        house.send(signal.SIGKILL)
        await house.clients.until(lambda: house.supervisor.phase is Phase.RESTARTING)
        assert house.supervisor.takes_requests
        assert not house.supervisor.is_ready
        assert house.supervisor.is_live
        assert "signal 9" in house.supervisor.reason
        house.ask("meanwhile", 20)
        house.ask("unwanted", 20)
        house.supervisor.abort(["unwanted"])
        await house.clients.until(lambda: len(house.clients.finished) == 2)
        house.check("before", 200)
        house.check("meanwhile", 20)
        assert "unwanted" not in house.clients.tokens
        assert house.supervisor.is_ready
        assert house.supervisor.reason == ""

    run(use)


@pytest.mark.parametrize("overlapped", [False, True])
def test_more_requests_than_seats_survive_with_their_order(overlapped: bool) -> None:
    async def use(house: House) -> None:
        for number in range(40):
            house.ask(f"r{number}", 30)
        for kills in (1, 2):
            heard = house.clients.num_tokens()
            await house.clients.until(lambda heard=heard: house.clients.num_tokens() > heard + 20)
            house.send(signal.SIGKILL)
            await house.until_restarted(kills)
        await house.clients.until(lambda: len(house.clients.finished) == 40)
        for number in range(40):
            house.check(f"r{number}", 30)
        assert sorted(house.clients.finished, key=list(house.clients.finished).index)[:4] == ["r0", "r1", "r2", "r3"]

    run(use, Script(max_num_seqs=4, overlapped=overlapped))


def test_what_was_said_of_a_prompt_is_not_said_again() -> None:
    async def use(house: House) -> None:
        house.ask("scored", 200, prompt_logprobs=0)
        await house.clients.until(lambda: house.clients.num_tokens() > 5)
        house.send(signal.SIGKILL)
        await house.clients.until(lambda: house.supervisor.phase is Phase.RESTARTING)
        house.ask("early", 3, prompt_logprobs=0)
        await house.clients.until(lambda: len(house.clients.finished) == 2)
        house.check("scored", 200)
        assert [len(scores) for scores in house.clients.prompt_logprobs["scored"]] == [len(PROMPT)]
        assert [len(scores) for scores in house.clients.prompt_logprobs["early"]] == [len(PROMPT)]

    run(use)


@pytest.mark.parametrize(
    ("how", "most_restarts", "overlapped"),
    [("raise", 4, False), ("crash", 4, False), ("kill", 8, False), ("memory", 8, False), ("kill", 8, True)],
)
@pytest.mark.parametrize("after", [0, 12])
def test_a_request_that_ends_every_engine_fails_alone(
    how: str, after: int, most_restarts: int, overlapped: bool
) -> None:
    async def use(house: House) -> None:
        for number in range(6):
            house.ask(f"good{number}", 150)
        await house.clients.until(lambda: house.clients.num_tokens() > 20)
        house.ask("poison", 100, [POISON, 1, 2])
        await house.clients.until(lambda: len(house.clients.finished) == 6 and house.clients.failed)
        for number in range(6):
            house.check(f"good{number}", 150)
        assert list(house.clients.failed) == ["poison"]
        assert isinstance(house.clients.failed["poison"], EngineDeadError)
        assert "every time it was tried" in house.clients.failed["poison"].message
        assert len(house.clients.tokens.get("poison", [])) == after
        await house.until_restarted(2)
        await house.clients.until(lambda: house.supervisor.is_ready)
        assert house.metrics.engine_restarts <= most_restarts
        assert house.metrics.requests_isolated == 1
        house.ask("next", 5)
        await house.clients.until(lambda: "next" in house.clients.finished)
        house.check("next", 5)

    run(use, Script(poison=how, poison_after=after, overlapped=overlapped))


def test_alone_it_fails_at_its_second_engine() -> None:
    async def use(house: House) -> None:
        house.ask("poison", 10, [POISON])
        await house.clients.until(lambda: house.clients.failed)
        await house.until_restarted(2)
        assert house.metrics.engine_restarts == 2

    run(use)


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_request_that_hangs_its_engine_fails_alone(overlapped: bool) -> None:
    async def use(house: House) -> None:
        house.ask("good", 40)
        await house.clients.until(lambda: house.clients.num_tokens() > 3)
        house.ask("poison", 10, [POISON])
        await house.clients.until(lambda: house.clients.failed and house.clients.finished)
        assert list(house.clients.failed) == ["poison"]
        house.check("good", 40)
        assert house.metrics.engine_stalls >= 3

    run(
        use, Script(poison="hang", overlapped=overlapped), SupervisionSettings(stall_timeout_s=0.15, min_backoff_s=0.02)
    )


def test_an_engine_that_dies_while_it_loads_is_started_again(tmp_path: Path) -> None:
    mark = tmp_path / "die"
    mark.touch()

    async def use(house: House) -> None:
        assert not mark.exists()
        house.ask("a", 60)
        await house.clients.until(lambda: house.clients.num_tokens() > 3)
        mark.touch()
        house.send(signal.SIGKILL)  # and the next one dies while it loads
        await house.until_restarted(1)
        assert not mark.exists()
        await house.clients.until(lambda: house.clients.finished)
        house.check("a", 60)

    run(use, Script(die_in_load_if=str(mark)))


def test_streams_do_not_wait_ever_longer_for_an_engine_that_somebody_kills(tmp_path: Path) -> None:
    mark = tmp_path / "die"

    async def use(house: House) -> None:
        house.ask("a", 60)
        await house.clients.until(lambda: house.clients.num_tokens() > 3)
        mark.write_bytes(bytes(8))  # with pauses that double, that would take longer than anybody waits here
        house.send(signal.SIGKILL)
        await house.clients.until(lambda: house.clients.finished)
        assert not mark.exists()
        house.check("a", 60)

    settings = SupervisionSettings(stall_timeout_s=1.0, restart_timeout_s=100.0, min_backoff_s=0.15)
    run(use, Script(die_in_load_if=str(mark)), settings)


def test_once_nobody_waits_any_longer_it_is_tried_more_rarely_whoever_kills_it(tmp_path: Path) -> None:
    mark = tmp_path / "die"

    async def use(house: House) -> None:
        house.ask("a", 400)
        await house.clients.until(lambda: house.clients.num_tokens() > 3)
        mark.write_bytes(bytes(1000))
        house.send(signal.SIGKILL)
        await house.clients.until(lambda: house.clients.failed)
        async with asyncio.timeout(30):
            while house.supervisor._backoff.num_failures < 2:  # noqa: ASYNC110  # nothing says so
                await asyncio.sleep(0.02)

    settings = SupervisionSettings(stall_timeout_s=1.0, restart_timeout_s=0.01, min_backoff_s=0.05)
    run(use, Script(die_in_load_if=str(mark)), settings)


def test_a_model_that_cannot_be_loaded_any_more_is_said_and_retried(tmp_path: Path) -> None:
    damage = tmp_path / "damaged"

    async def use(house: House) -> None:
        house.ask("a", 400)
        await house.clients.until(lambda: house.clients.num_tokens() > 3)
        damage.touch()
        house.send(signal.SIGKILL)
        await house.clients.until(lambda: house.clients.failed)
        assert "weights are damaged" in house.clients.failed["a"].message
        supervisor = house.supervisor
        assert (supervisor.is_live, supervisor.is_ready, supervisor.takes_requests) == (False, False, False)
        assert supervisor.reason == "failed: the weights are damaged"
        damage.unlink()
        await house.until_restarted(1)
        assert supervisor.is_live
        house.ask("b", 5)
        await house.clients.until(lambda: "b" in house.clients.finished)
        house.check("b", 5)

    run(use, Script(fail_load_if=str(damage)))


def test_what_never_loads_is_raised_at_the_start(tmp_path: Path) -> None:
    damage = tmp_path / "damaged"
    damage.touch()

    async def use(house: House) -> None:
        raise AssertionError("it must not start")

    with pytest.raises(ModelLoadError, match="weights are damaged"):
        run(use, Script(fail_load_if=str(damage)))


def test_an_engine_command_that_cannot_be_started_is_an_error_that_says_so() -> None:
    async def scenario() -> None:
        supervisor = EngineSupervisor(
            *("m", EngineConfig(model="m"), Clients(), ModelMetrics("m"), SETTINGS),
            EngineProcesses(("/nowhere/python",)),
        )
        with pytest.raises(EngineDeadError, match="cannot be started"):
            await supervisor.start()
        assert supervisor.phase is Phase.FAILED
        await supervisor.shutdown(timeout_s=1)

    asyncio.run(asyncio.wait_for(scenario(), 30))


@pytest.mark.parametrize("overlapped", [False, True])
def test_draining_survives_the_death_of_the_engine(overlapped: bool) -> None:
    async def use(house: House) -> None:
        house.ask("a", 200)
        await house.clients.until(lambda: house.clients.num_tokens() > 5)
        ending = asyncio.create_task(house.supervisor.drain(timeout_s=20))
        await asyncio.sleep(0)
        assert not house.supervisor.takes_requests
        assert house.supervisor.reason.startswith("draining")
        house.send(signal.SIGKILL)
        await ending
        house.check("a", 200)

    run(use, Script(overlapped=overlapped))


def test_what_is_not_finished_when_the_drain_time_is_over_is_told() -> None:
    async def use(house: House) -> None:
        house.ask("a", 4000)
        await house.clients.until(lambda: house.clients.num_tokens() > 5)
        await house.supervisor.drain(timeout_s=0.05)
        await house.supervisor.shutdown(timeout_s=5)
        assert "stopped" in house.clients.failed["a"].message

    run(use)


def test_restarts_leave_no_descriptor_behind() -> None:
    async def use(house: House) -> None:
        house.ask("a", 2000)
        me = psutil.Process()
        open_before = 0
        for kills in range(1, 9):
            heard = house.clients.num_tokens()
            await house.clients.until(lambda heard=heard: house.clients.num_tokens() > heard)
            if kills == 2:
                open_before = me.num_fds()
            house.send(signal.SIGKILL)
            await house.until_restarted(kills)
        assert me.num_fds() <= open_before
        house.supervisor.abort(["a"])

    run(use)


@pytest.mark.parametrize("want", ["descriptors", "disk"])
def test_a_server_that_has_run_out_says_so_and_goes_on_when_it_has_again(
    want: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(house: House) -> None:
        house.ask("a", 300)
        await house.clients.until(lambda: house.clients.num_tokens() > 5)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        if want == "disk":
            monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))  # no folder can be made there
        else:
            resource.setrlimit(resource.RLIMIT_NOFILE, (4, limits[1]))  # those that are open stay open
        try:
            house.send(signal.SIGKILL)
            await house.clients.until(lambda: house.supervisor.phase is Phase.RESTARTING)
            words = "full" if want == "disk" else "Too many open files"
            for _ in range(1000):
                if words in house.supervisor.reason:
                    break
                await asyncio.sleep(0.02)
            assert words in house.supervisor.reason
            assert house.supervisor.is_live
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            monkeypatch.undo()
        await house.clients.until(lambda: house.clients.finished)
        house.check("a", 300)

    run(use)


def test_requests_that_no_engine_has_yet_are_said_to_wait() -> None:
    """Who limits the time in the queue goes by that number."""

    async def scenario() -> None:
        house = House(Script(), SETTINGS, with_standby=False)
        for name in ("a", "b"):
            house.ask(name, 3)
        house.supervisor._on_idle(stats := EngineStats(1, 4, 0, 0))
        house.supervisor._on_step(step := StepOutputs(1, 0.0, [], EngineStats(1, 4, 0, 0)))
        assert stats.num_waiting == step.stats.num_waiting == 6

    asyncio.run(scenario())
