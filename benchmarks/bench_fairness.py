"""A tenant that floods beside one that asks now and then: what the quiet one waits for its first token.

Alone, then beside the flood, under `fair` and under `fcfs`. `--real` takes the embedded model instead of none: then a
step beside others takes longer too, which no policy can change. So the time of a step beside the flood is measured as
well, as the flood sees it between two tokens: who asks waits for the rest of the step in progress, and then for one of
their own, at least. In the worst case that is two steps.

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


async def quiet_ttft(load: Load, flood: int, seconds: float) -> tuple[list[float], list[float]]:
    """Seconds to the first token of the quiet tenant's requests, and between two tokens of the other tenant, which
    keeps `flood` requests in flight."""
    random_, gaps_s = random.Random(1), list[float]()
    with running(load) as (port, keys):
        stop = False

        async def flooding() -> None:
            while not stop:
                gaps_s.extend((await ask(port, keys["flood"], prompt(random_), 64)).gaps_s)

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
    return [answer.first_token_s for answer in answers], gaps_s


async def measure(seconds: float, flood: int, real: bool) -> None:
    print(f"predicted: {PREDICTED}", flush=True)
    engine_step_s = 0.0 if real else 0.01  # 0: as long as it takes
    alone = 0.0
    for name, policy, num_others in (("alone", "fair", 0), ("fair", "fair", flood), ("fcfs", "fcfs", flood)):
        ttft, gaps_s = await quiet_ttft(Load(engine_step_s, 16, policy, 0.0), num_others, seconds)
        p99 = quantile(ttft, 0.99)
        alone = alone or p99
        print(
            f"{name:6} {len(ttft)} requests: TTFT p50 {quantile(ttft, 0.5) * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms "
            f"= {p99 / alone:.2f} times alone",
            flush=True,
        )
        if gaps_s:
            step_s, late_s = quantile(gaps_s, 0.5), quantile(gaps_s, 0.99)
            print(
                f"{'':6} a step beside the flood: p50 {step_s * 1e3:.1f} ms, p99 {late_s * 1e3:.1f} ms; "
                f"two of them are {2 * step_s / alone:.2f} times alone",
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
