"""Ten times more requests than the server can serve: who is let in keeps the queue time, the others are told at once.

First the peak: as many streams as there are seats, closed loop. Then an open loop at `--times` that rate of requests.

    python -m benchmarks.bench_overload [--seconds 20] [--times 10]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import time

import uvloop

from benchmarks.door_load import Answer, Load, ask, quantile, running, settle

NUM_PROMPT, NUM_OUTPUT = 64, 64
QUEUE_S = 2.0
# Written down before the first run, on two cores that the clients share with the server.
PREDICTED = "accepted p99 TTFT 2.1 s of 2.0 s allowed, refused p99 8 ms, 97 % of the peak"


def prompt(number: int) -> list[int]:
    """No two are alike, so none is cached."""
    random_ = random.Random(number)
    return [random_.randrange(1000, 40000) for _ in range(NUM_PROMPT)]


async def peak(port: int, key: str, seats: int, seconds: float) -> float:
    """Tokens a second, all seats taken."""
    numbers = itertools.count(1)
    end_s = time.perf_counter() + seconds
    num_tokens = 0

    async def one_seat() -> None:
        nonlocal num_tokens
        while time.perf_counter() < end_s:
            answer = await ask(port, key, prompt(next(numbers)), NUM_OUTPUT)
            if answer.finished_at_s < end_s:
                num_tokens += answer.num_tokens

    # two waiting beside each that runs, so that no seat is ever empty
    await asyncio.gather(*(one_seat() for _ in range(3 * seats)))
    return num_tokens / seconds


async def flood(port: int, key: str, rate: float, seconds: float) -> tuple[list[Answer], float]:
    """Every answer to an open loop, and the seconds it was watched for."""
    begin_s = time.perf_counter()
    tasks = []
    for number in itertools.count(10**6):
        due_s = begin_s + (number - 10**6) / rate
        if due_s > begin_s + seconds:
            break
        await asyncio.sleep(max(due_s - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(ask(port, key, prompt(number % 997), NUM_OUTPUT)))
    return list(await asyncio.gather(*tasks)), begin_s


async def measure(seconds: float, times: float) -> None:
    load = Load(max_queue_time_s=QUEUE_S)
    settle()
    with running(load) as (port, keys):
        await peak(port, keys["flood"], load.max_num_seqs, 2)
        peak_rate = await peak(port, keys["flood"], load.max_num_seqs, min(seconds, 10))
        rate = times * peak_rate / NUM_OUTPUT
        answers, begin_s = await flood(port, keys["flood"], rate, seconds)
    accepted = [answer for answer in answers if answer.status == 200 and answer.num_tokens == NUM_OUTPUT]
    refused = [answer for answer in answers if answer.status == 429]
    others = len(answers) - len(accepted) - len(refused)
    # the queue fills in its first seconds: what is finished between its length and the last arrival is the steady state
    first_s, last_s = begin_s + QUEUE_S, begin_s + seconds
    num_tokens = sum(answer.num_tokens for answer in accepted if first_s <= answer.finished_at_s < last_s)
    rate_done = num_tokens / (last_s - first_s)
    ttft = [answer.first_token_s for answer in accepted]
    refusals = [answer.end_s for answer in refused]
    print(f"predicted: {PREDICTED}", flush=True)
    print(
        f"peak {peak_rate:.0f} tokens/s; {rate:.0f} requests/s for {seconds:.0f} s = {times:g} times the capacity\n"
        f"accepted {len(accepted)}: TTFT p50 {quantile(ttft, 0.5):.2f} s, p99 {quantile(ttft, 0.99):.2f} s "
        f"(queue time {QUEUE_S:g} s)\n"
        f"refused {len(refused)}: p50 {quantile(refusals, 0.5) * 1e3:.1f} ms, p99 {quantile(refusals, 0.99) * 1e3:.1f} "
        f"ms; Retry-After {sorted({answer.retry_after for answer in refused})[:4]}\n"
        f"neither: {others}\n"
        f"throughput {rate_done:.0f} tokens/s = {100 * rate_done / peak_rate:.1f} % of the peak"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--times", type=float, default=10.0)
    options = parser.parse_args()
    uvloop.run(measure(options.seconds, options.times))


if __name__ == "__main__":
    main()
