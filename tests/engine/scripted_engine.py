"""An engine process without a model: the real loop, scheduler and messages, around tokens that are a hash.

A token depends on every token before it and on the seed, so one that is lost, doubled or changed changes all that
follow. Started in place of `llmserve.engine.process`, with a Script as JSON for its argument. It starts quickly: it
imports no torch.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import zlib
from collections.abc import Sequence

import msgspec

from llmserve.engine.core import EngineCore
from llmserve.engine.flight_recorder import FlightRecorder, RecordedLauncher, RecordedRunner
from llmserve.engine.launch import EngineLaunch
from llmserve.engine.loop import Send, run_engine
from llmserve.engine.overlap import OverlappedCore
from llmserve.errors import ModelLoadError
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.messages import EngineReady, MemoryPlan, TokenLogprobs
from llmserve.scheduler.budget import FixedBudget
from llmserve.scheduler.output import SchedulerOutput
from llmserve.scheduler.policy import make_policy
from llmserve.scheduler.scheduler import Scheduler
from llmserve.worker.output import ModelRunnerOutput

POISON = 999  # a prompt that begins with it is the end of an engine
VOCAB_SIZE = 1000


class Script(msgspec.Struct):
    """What goes wrong, and when."""

    step_s: float = 0.002
    poison_after: int = 0  # tokens of a poisoned answer
    poison: str = "raise"  # or crash, kill, hang, memory
    max_num_seqs: int = 64
    overlapped: bool = False  # a step ahead of its tokens
    fail_load_if: str = ""  # while this file is there: not a model that can be loaded
    die_in_load_if: str = ""  # while this file is there; its last byte is taken away, and with it the file


def next_token(seed: int, token_ids: Sequence[int]) -> int:
    return 5 + zlib.crc32(repr((seed, list(token_ids))).encode()) % 300


def answer(prompt: list[int], seed: int, num_tokens: int) -> list[int]:
    """What an undisturbed engine says."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(next_token(seed, token_ids))
    return token_ids[len(prompt) :]


class ScriptedRunner:
    """Keeps every request's tokens, as a worker does."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._token_ids: dict[str, list[int]] = {}
        self._num_prompt: dict[str, int] = {}
        self._num_computed: dict[str, int] = {}
        self._params: dict[str, tuple[int, bool]] = {}

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        for request_id in output.finished_ids:
            del self._token_ids[request_id]
        for new in output.new_requests:
            self._token_ids[new.request_id] = new.prompt_token_ids + new.output_token_ids
            self._num_prompt[new.request_id] = len(new.prompt_token_ids)
            self._num_computed[new.request_id] = new.num_computed_tokens
            self._params[new.request_id] = (new.params.seed, new.params.prompt_logprobs is not None)
        for request_id, resumed in output.resumed_requests.items():
            self._num_computed[request_id] = resumed.num_computed_tokens
        time.sleep(self._script.step_s)
        computed = ModelRunnerOutput()
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            token_ids, num_prompt = self._token_ids[request_id], self._num_prompt[request_id]
            if token_ids[0] == POISON and len(token_ids) - num_prompt >= self._script.poison_after:
                self._go_wrong()
            self._num_computed[request_id] += num_tokens
            if self._num_computed[request_id] != len(token_ids):
                continue
            seed, scores_prompt = self._params[request_id]
            if scores_prompt and len(token_ids) == num_prompt:
                scores = [TokenLogprobs(token_id, -0.5, 1, []) for token_id in token_ids[1:]]
                computed.prompt_logprobs[request_id] = [None, *scores]
            token_ids.append(next_token(seed, token_ids))
            computed.sampled[request_id] = [token_ids[-1]]
        return computed

    def _go_wrong(self) -> None:
        match self._script.poison:
            case "raise":
                raise ArithmeticError("a poisoned prompt")
            case "crash":
                signal.signal(signal.SIGSEGV, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGSEGV)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "memory":
                resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
                bytearray(2**40)
            case "hang":
                time.sleep(3600)


class LaunchingRunner:
    """The same, its steps done in their order when somebody waits for one of them."""

    def __init__(self, runner: ScriptedRunner) -> None:
        self._runner = runner
        self._launched: list[SchedulerOutput] = []

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        return self.launch(output).result()

    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        self._launched.append(output)
        return LaunchedStep(self, output)

    def do_until(self, last: SchedulerOutput) -> ModelRunnerOutput:
        while True:
            output = self._launched.pop(0)
            computed = self._runner.execute(output)
            if output is last:
                return computed


class LaunchedStep:
    holds_up_next = False

    def __init__(self, runner: LaunchingRunner, output: SchedulerOutput) -> None:
        self._runner = runner
        self._output = output

    def result(self) -> ModelRunnerOutput:
        return self._runner.do_until(self._output)


def build(launch: EngineLaunch, send: Send, recorder: FlightRecorder) -> tuple[EngineCore, EngineReady]:
    script = msgspec.json.decode(sys.argv[1], type=Script)
    if script.fail_load_if and os.path.exists(script.fail_load_if):
        raise ModelLoadError("the weights are damaged")
    if script.die_in_load_if and os.path.exists(script.die_in_load_if):
        os.truncate(script.die_in_load_if, max(0, os.path.getsize(script.die_in_load_if) - 1))
        if not os.path.getsize(script.die_in_load_if):
            os.unlink(script.die_in_load_if)
        os.kill(os.getpid(), signal.SIGKILL)
    num_blocks, block_size = 4000, 16
    budget = FixedBudget(1024)
    scheduler = Scheduler(
        KVCacheManager(num_blocks, block_size),
        policy=make_policy("fcfs"),
        budget=budget,
        max_num_seqs=script.max_num_seqs,
        max_model_len=4096,
    )
    plan = MemoryPlan(
        device="none",
        dtype="none",
        weight_format="none",
        weight_bytes=0,
        activation_bytes=0,
        kv_cache_bytes=num_blocks * block_size,
        available_bytes=0,
        block_size=block_size,
        num_blocks=num_blocks,
        num_tokens=num_blocks * block_size,
        max_model_len=4096,
        max_num_seqs=script.max_num_seqs,
        max_num_batched_tokens=1024,
        vocab_size=VOCAB_SIZE,
    )
    runner = ScriptedRunner(script)
    core: EngineCore
    if script.overlapped:
        launcher = RecordedLauncher(LaunchingRunner(runner), recorder)
        core = OverlappedCore(scheduler, budget, launcher, time.monotonic)
    else:
        core = EngineCore(scheduler, budget, RecordedRunner(runner, recorder), time.monotonic)
    return core, EngineReady(plan)


if __name__ == "__main__":
    sys.exit(run_engine(build))
