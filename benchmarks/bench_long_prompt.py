"""The longest prompt that the context admits beside 8 streams: what it does to the time between their tokens.

    python -m benchmarks.bench_long_prompt [--rounds 3] [-- --itl-slowdown 2]

Without drafts, so that a quiet step is a step, and each piece of a stream a token. The target is what the server was
told to keep to: by default `--itl-slowdown`, times the time of a step without a prompt in it.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics

import httpx

from benchmarks.bench_end_to_end import NUM_STREAMS, interference, running_server

# Written down before the first run.
PREDICTED = "p99 2.0 times the quiet one, of the 2 times that `--itl-slowdown` allows a step"


async def measure(url: str, rounds: int) -> None:
    async with httpx.AsyncClient() as client:
        cards = (await client.get(f"{url}/v1/models")).json()["data"]
    num_tokens = cards[0]["max_model_len"] - 2
    print(f"predicted: {PREDICTED}", flush=True)
    await interference(url, 0, 512)  # warm
    figures = [await interference(url, number + 1, num_tokens) for number in range(rounds)]
    print(f"a prompt of {num_tokens} tokens beside {NUM_STREAMS} streams, median of {rounds} rounds:")
    for name in figures[0]:
        print(f"  {name}: {statistics.median(figure[name] for figure in figures):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="flags for `llmserve serve`")
    options = parser.parse_args()
    with running_server(["--speculation", "off", *options.flags]) as url:
        asyncio.run(measure(url, options.rounds))


if __name__ == "__main__":
    main()
