"""A tenant that floods beside one that asks now and then: what the quiet one waits for its first token.

Alone, then beside the flood, under `fair` and under `fcfs`. `--real` takes the embedded model instead of none: then a
step beside others takes longer too, which no policy can change.

    python -m benchmarks.bench_fairness [--seconds 10] [--flood 100] [--real]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import time

import uvloop

from benchmarks.door_load import Load, ask, quantile, running

EVERY_S = 0.1
# Written down before the first run.
PREDICTED = "fair: 1.3 times alone, fcfs: 100 times"


def prompt(random_: random.Random) -> list[int]:
    return [random_.randrange(1000, 40000) for _ in range(64)]


async def quiet_ttft(load: Load, flood: int, seconds: float) -> list[float]:
    """Seconds to the first token of the quiet tenant's requests; `flood` is how many the other keeps in flight."""
    random_ = random.Random(1)
    with running(load) as (port, keys):
        stop = False

        async def flooding() -> None:
            while not stop:
                await ask(port, keys["flood"], prompt(random_), 64)

        floods = [asyncio.create_task(flooding()) for _ in range(flood)]
        await asyncio.sleep(2.0)
        begin_s = time.perf_counter()
        asked = []
        for number in itertools.count():
            due_s = begin_s + number * EVERY_S
            if due_s > begin_s + seconds:
                break
            await asyncio.sleep(max(due_s - time.perf_counter(), 0))
            asked.append(asyncio.create_task(ask(port, keys["quiet"], prompt(random_), 16)))
        answers = await asyncio.gather(*asked)
        stop = True
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
    assert all(answer.status == 200 for answer in answers), {answer.status for answer in answers}
    return [answer.first_token_s for answer in answers]


async def measure(seconds: float, flood: int, real: bool) -> None:
    print(f"predicted: {PREDICTED}", flush=True)
    step_s = 0.0 if real else 0.01
    alone = 0.0
    for name, policy, num_others in (("alone", "fair", 0), ("fair", "fair", flood), ("fcfs", "fcfs", flood)):
        ttft = await quiet_ttft(Load(step_s, 16, policy, 0.0), num_others, seconds)
        p99 = quantile(ttft, 0.99)
        alone = alone or p99
        print(
            f"{name:6} {len(ttft)} requests: TTFT p50 {quantile(ttft, 0.5) * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms "
            f"= {p99 / alone:.2f} times alone",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--flood", type=int, default=100, help="requests that the other tenant keeps in flight")
    parser.add_argument("--real", action="store_true", help="the embedded model")
    options = parser.parse_args()
    uvloop.run(measure(options.seconds, options.flood, options.real))


if __name__ == "__main__":
    main()
