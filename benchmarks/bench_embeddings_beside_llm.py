"""What batches of embeddings cost a chat stream beside them, and what they still get: one server, the default models.

A stream of tokens alone, then with requests of 64 texts back to back. The model's process steps back for others
(`niceness`); the inter-token latency must not double at p99.

    python -m benchmarks.bench_embeddings_beside_llm [--rounds 2]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from itertools import pairwise

from benchmarks.bench_embedding_server import body_of, connect
from benchmarks.bench_end_to_end import running_server
from benchmarks.stdlib_texts import mixed_texts
from llmserve.repository.embedded import DEFAULT_EMBEDDING, DEFAULT_LLM

NUM_TEXTS, NUM_TOKENS, ALONE_S = 64, 300, 3.0
TARGET = 2.0
PREDICTED = 1.5  # a tenth of each core, taken in slices of a few milliseconds from steps of about eight


async def stream(url: str) -> list[float]:
    """The times between the pieces of one answer, in milliseconds."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    ask = {"model": DEFAULT_LLM, "prompt": "The history of the river", "max_tokens": NUM_TOKENS, "stream": True}
    body = json.dumps({**ask, "temperature": 0.8, "seed": 1, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)
    times = []
    while b"[DONE]" not in (line := await reader.readline()):
        if line.startswith(b"data:"):
            times.append(time.perf_counter())
    writer.close()
    return [(b - a) * 1e3 for a, b in pairwise(times[8:])]  # from where the stream runs evenly


async def embed(url: str, texts: list[str], counted: list[int]) -> None:
    """Requests of all texts, one after the other, for ever."""
    (client,) = await connect(url, 1)
    body = body_of(texts).replace(b'"minilm"', f'"{DEFAULT_EMBEDDING}"'.encode())
    while True:
        await client.post("/v1/embeddings", body)
        counted.append(len(texts))


async def measure(url: str, texts: list[str]) -> dict[str, float]:
    """One round: embeddings alone, the stream alone, both."""
    counted: list[int] = []
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(embed(url, texts, counted), ALONE_S)
    alone = sum(counted) / ALONE_S
    quiet = await stream(url)
    counted.clear()
    load = asyncio.create_task(embed(url, texts, counted))
    begin_s = time.perf_counter()
    beside = await stream(url)
    texts_s = sum(counted) / (time.perf_counter() - begin_s)
    load.cancel()
    await asyncio.wait([load])
    return {
        "ITL p50 alone, ms": statistics.median(quiet),
        "ITL p99 alone, ms": statistics.quantiles(quiet, n=100)[98],
        "ITL p50 beside, ms": statistics.median(beside),
        "ITL p99 beside, ms": statistics.quantiles(beside, n=100)[98],
        "texts/s alone": alone,
        "texts/s beside": texts_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    texts = [text for text in mixed_texts(2 * NUM_TEXTS) if len(text) < 600][:NUM_TEXTS]
    flags = ["--no-grpc", "--speculation", "off", "--kv-cache-memory", "256MiB", "--embedding-model", "auto"]
    with running_server(flags) as url:
        rounds = [asyncio.run(measure(url, texts)) for _ in range(args.rounds + 1)][1:]  # the first warms up
    median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    for name, value in median.items():
        print(f"{name:24} {value:8.1f}   ({min(r[name] for r in rounds):.1f}-{max(r[name] for r in rounds):.1f})")
    ratio = median["ITL p99 beside, ms"] / median["ITL p99 alone, ms"]
    print(f"{'ITL p99, times':24} {ratio:8.2f}   target {TARGET}, predicted {PREDICTED}")


if __name__ == "__main__":
    main()
