"""An engine process whose model is nothing: real messages, real scheduler, tokens ready made, at a chosen pace.

Started in place of `llmserve.engine.process`, with the time of a step (seconds, 0: as fast as it goes) as its argument,
then maybe how many sequences run at once and the scheduling policy.
"""

from __future__ import annotations

import sys
import time

import msgspec
import zmq

from llmserve.engine.core import EngineCore
from llmserve.engine.launch import EngineLaunch
from llmserve.engine.loop import EngineLoop
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.messages import EngineReady, FromEngine, MemoryPlan
from llmserve.scheduler.budget import FixedBudget
from llmserve.scheduler.output import SchedulerOutput
from llmserve.scheduler.policy import make_policy
from llmserve.scheduler.scheduler import Scheduler
from llmserve.worker.output import ModelRunnerOutput

NUM_BLOCKS, BLOCK_SIZE, MAX_LEN, MAX_SEQS, BUDGET = 20_000, 16, 8192, 256, 8192
TOKEN_ID = 281  # " in": every token is one ordinary word


class NullRunner:
    """Answers a step when its time has passed."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._due_s = time.monotonic()
        self._left: dict[str, int] = {}  # tokens of a request that are not computed

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        for request_id in output.finished_ids:
            del self._left[request_id]
        for new in output.new_requests:
            self._left[new.request_id] = len(new.prompt_token_ids) - new.num_computed_tokens
        sampled = {}
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            self._left[request_id] -= num_tokens
            if not self._left[request_id]:
                sampled[request_id] = [TOKEN_ID]
                self._left[request_id] = 1
        self._due_s = max(self._due_s + self._step_s, time.monotonic())
        time.sleep(max(self._due_s - time.monotonic(), 0))
        return ModelRunnerOutput(sampled=sampled)


def main() -> None:
    launch = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineLaunch)
    context = zmq.Context()
    inbox: zmq.Socket[bytes] = context.socket(zmq.PULL)
    outbox: zmq.Socket[bytes] = context.socket(zmq.PUSH)
    inbox.connect(launch.in_address)
    outbox.connect(launch.out_address)
    encoder = msgspec.msgpack.Encoder()

    def send(message: FromEngine) -> None:
        outbox.send(encoder.encode(message))

    step_s, max_seqs, policy = float(sys.argv[1]), int((sys.argv[2:] or [MAX_SEQS])[0]), (sys.argv[3:] or ["fcfs"])[0]
    budget = FixedBudget(BUDGET)
    scheduler = Scheduler(
        KVCacheManager(NUM_BLOCKS, BLOCK_SIZE),
        policy=make_policy(policy),
        budget=budget,
        max_num_seqs=max_seqs,
        max_model_len=MAX_LEN,
    )
    core = EngineCore(scheduler, budget, NullRunner(step_s), time.monotonic)
    plan = MemoryPlan(
        device="none",
        dtype="none",
        weight_format="none",
        weight_bytes=0,
        activation_bytes=0,
        kv_cache_bytes=1,  # none at all would be no plan
        available_bytes=0,
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        num_tokens=NUM_BLOCKS * BLOCK_SIZE,
        max_model_len=MAX_LEN,
        max_num_seqs=max_seqs,
        max_num_batched_tokens=BUDGET,
        vocab_size=49152,
    )
    send(EngineReady(plan))
    EngineLoop(core, inbox, send, launch.server_pid).run()
    context.destroy(linger=0)


if __name__ == "__main__":
    main()
