"""How late a request that runs out of time is told so: four times more streams than seats, each with a timeout.

    python -m benchmarks.bench_deadline [--seconds 15]

Measured at the client, from its timeout after sending to the last byte of the answer: so connecting, and the client's
own turn on the cores that both share, are in it. The clients begin one after the other within a second: a burst of them
would measure how long the server takes to read all their requests, as a deadline counts from when one is read.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time

import uvloop

from benchmarks.door_load import Answer, Load, ask, quantile, running, settle

NUM_SEATS, NUM_CLIENTS = 16, 64
# Written down before the first run, on two idle cores.
PREDICTED = "p50 1.5 ms, p99 5 ms late; none early"


async def client(port: int, key: str, number: int, seconds: float) -> list[tuple[Answer, float]]:
    """(answer, seconds late) of each request of one client, one after the other."""
    random_ = random.Random(number)
    end_s = time.perf_counter() + seconds
    await asyncio.sleep(random_.random())
    late = []
    while time.perf_counter() < end_s:
        timeout_s = round(random_.uniform(0.1, 0.8), 3)
        prompt = [random_.randrange(1000, 40000) for _ in range(32)]
        answer = await ask(port, key, prompt, 4000, timeout_s)
        late.append((answer, answer.end_s - timeout_s))
    return late


async def measure(seconds: float) -> None:
    print(f"predicted: {PREDICTED}", flush=True)
    settle()
    with running(Load(max_num_seqs=NUM_SEATS, max_queue_time_s=0.0)) as (port, keys):
        runs = await asyncio.gather(*(client(port, keys["quiet"], number, seconds) for number in range(NUM_CLIENTS)))
    answers = [pair for run in runs for pair in run]
    ended = {
        "waiting (504)": [late for answer, late in answers if answer.status == 504],
        "running (an error event)": [late for answer, late in answers if answer.status == 200],
    }
    others = [answer.status for answer, _ in answers if answer.status not in (200, 504)]
    for name, late in ended.items():
        print(
            f"{name}: {len(late)} requests, late by p50 {quantile(late, 0.5) * 1e3:.2f} ms, "
            f"p99 {quantile(late, 0.99) * 1e3:.2f} ms, most {max(late, default=0) * 1e3:.2f} ms"
        )
    print(f"refused because their time would not do: {others.count(429)}; neither: {len(others) - others.count(429)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0)
    uvloop.run(measure(parser.parse_args().seconds))


if __name__ == "__main__":
    main()
