"""Embeddings through the server beside sentence-transformers in its own process and infinity's server.

All with all-MiniLM-L6-v2 and the same threads, in interleaved rounds over the same texts: documentation of the standard
library, 3 to 180 words. sentence-transformers' `encode` gets the whole list in one call and no server stands between.

    python -m benchmarks.bench_embedding_server [--rounds 3] [--format float32] [--infinity PYTHON]

`PYTHON` is the interpreter of an environment with infinity-emb[server,torch]; see `install_infinity`, which makes one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np

from benchmarks.stdlib_texts import mixed_texts
from llmserve.backends.pooling_tokenizer import NEVER, PoolingTokenizer, Truncation
from llmserve.kernels.cpu.ops import usable_cores
from llmserve.pooling_config import read_pooling_config
from llmserve.repository import embedded
from llmserve.repository.cache import cache_dir

NUM_TEXTS, CONCURRENCY, NUM_LONE = 256, 32, 100
SHORT = "How do I open a file for reading?"
INFINITY = ["infinity-emb[server,torch]==0.0.78", "torch==2.13.0"]
# Written down before the first run; by format of our weights.
TARGETS = {"32 clients / encode": 1.5, "32 clients / infinity": 2.0, "one of 256 / encode": 1.5}
PREDICTED = {"32 clients / encode": 1.6, "32 clients / infinity": 3.0, "one of 256 / encode": 1.7, "lone ms": 0.9}


def install_infinity() -> Path:
    """The interpreter of an environment of infinity's own in the cache; made if it is not there."""
    folder = cache_dir() / "peers" / "infinity" / "venv"
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *INFINITY], check=True)
        (folder / ".installed").touch()
    return python


@contextmanager
def our_server(folder: Path, weight_format: str, threads: int) -> Iterator[str]:
    """The URL of a server of the model in that weight format."""
    with tempfile.TemporaryDirectory() as repository:
        version = Path(repository) / "minilm" / "1"
        shutil.copytree(folder, version)
        (version.parent / "config.pbtxt").write_text(
            'backend: "pooling" parameters { key: "weight_format" value { string_value: "' + weight_format + '" } }'
        )
        command = [sys.executable, "-m", "llmserve.cli", "serve", "--port", "0", "--no-grpc"]
        command += ["--model-repository", repository]
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
            assert process.stderr is not None
            try:
                for line in process.stderr:
                    if match := re.search(r"Ready in .*: (http://\S+)/v1", line):
                        yield match[1]
                        return
                raise SystemExit("the server did not start")
            finally:
                process.terminate()


@contextmanager
def infinity_server(python: Path, folder: Path, threads: int) -> Iterator[str]:
    """The URL of infinity's server of the model, with its defaults but for the compiler and the warm-up."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(python.parent / "infinity_emb"), "v2", "--model-id", str(folder), "--port", str(port)]
    command += ["--engine", "torch", "--device", "cpu", "--no-bettertransformer", "--no-model-warmup"]
    command += ["--served-model-name", "minilm"]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    env.pop("PYTHONPATH", None)
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                try:
                    if httpx.get(url + "/health").status_code == 200:
                        break
                except httpx.TransportError:
                    if process.poll() is not None:
                        raise SystemExit("infinity did not start") from None
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()


class Client:
    """One kept-alive connection that costs little: it reads no more of an answer than its length."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def post(self, path: str, body: bytes) -> bytes:
        """The answer's body."""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        match = re.search(r"content-length: (\d+)", head)
        assert match is not None
        answer = await self._reader.readexactly(int(match[1]))
        if " 200 " not in head.partition("\r\n")[0]:
            raise SystemExit(answer.decode())
        return answer


async def connect(url: str, count: int) -> list[Client]:
    host, port = url.removeprefix("http://").split(":")
    return [Client(*await asyncio.open_connection(host, int(port), limit=1 << 24)) for _ in range(count)]


def body_of(texts: str | list[str]) -> bytes:
    return json.dumps({"model": "minilm", "input": texts, "encoding_format": "base64"}).encode()


async def many_clients(url: str, path: str, texts: list[str]) -> float:
    """Texts a second of clients that each send one text at a time."""
    clients = await connect(url, CONCURRENCY)
    bodies = [body_of(text) for text in texts]

    async def run(client: Client) -> None:
        while bodies:
            await client.post(path, bodies.pop())

    begin_s = time.perf_counter()
    await asyncio.gather(*(run(client) for client in clients))
    return len(texts) / (time.perf_counter() - begin_s)


async def one_request(url: str, path: str, texts: list[str]) -> float:
    """Texts a second of one request that has them all."""
    (client,) = await connect(url, 1)
    begin_s = time.perf_counter()
    await client.post(path, body_of(texts))
    return len(texts) / (time.perf_counter() - begin_s)


async def lone(url: str, path: str) -> float:
    """The median time of a short text when nothing else is asked, in milliseconds."""
    (client,) = await connect(url, 1)
    times = []
    for number in range(NUM_LONE):
        begin_s = time.perf_counter()
        await client.post(path, body_of(f"{SHORT} {number % 10}"))
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times) * 1e3


class Bare:
    """The model without a server, in this process."""

    def __init__(self, folder: Path, weight_format: str, threads: int) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        from llmserve.worker.pooling_runner import PoolingRunner

        config = read_pooling_config(folder)
        self._tokenizer = PoolingTokenizer(folder, config)
        self._runner = PoolingRunner.load(folder, config, weight_format, threads)
        torch.set_num_threads(threads)
        self._reference = SentenceTransformer(str(folder), device="cpu")

    def lone(self) -> float:
        """The median of a short text's forward pass, in milliseconds."""
        times = []
        for number in range(NUM_LONE):
            (text,) = self._tokenizer.encode([f"{SHORT} {number % 10}"], NEVER, ["x"])
            cu_seqlens = np.array([0, len(text.token_ids)], np.int32)
            begin_s = time.perf_counter()
            self._runner.run(text.token_ids, None, cu_seqlens, "embed")
            times.append(time.perf_counter() - begin_s)
        return statistics.median(times) * 1e3

    def encode(self, texts: list[str]) -> float:
        """Texts a second of sentence-transformers."""
        begin_s = time.perf_counter()
        self._reference.encode(texts, batch_size=32, normalize_embeddings=True)
        return len(texts) / (time.perf_counter() - begin_s)

    def cut(self, texts: list[str]) -> list[str]:
        """Without those that the model would not read whole: infinity cuts in silence, ours refuses."""
        encoded = self._tokenizer.encode(texts, Truncation(allowed=True), ["x"] * len(texts))
        return [
            text for text, e in zip(texts, encoded, strict=True) if len(e.token_ids) < self._tokenizer.max_model_len
        ]


async def measure(bare: Bare, ours: str, infinity: str | None, texts: list[str]) -> dict[str, float]:
    """One round of everything."""
    path = "/v1/embeddings"
    figures = {"encode": bare.encode(texts)}
    figures["32 clients"] = await many_clients(ours, path, texts)
    if infinity is not None:
        figures["infinity, 32 clients"] = await many_clients(infinity, "/embeddings", texts)
    figures["one of 256"] = await one_request(ours, path, texts)
    figures["bare ms"] = bare.lone()
    figures["lone ms"] = await lone(ours, path)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--format", default="auto", help="weight format of ours")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--infinity", help="an interpreter with infinity-emb; 'install' makes one in the cache")
    args = parser.parse_args()
    folder = embedded.fetch(embedded.DEFAULT_EMBEDDING)
    python = install_infinity() if args.infinity == "install" else Path(args.infinity) if args.infinity else None
    bare = Bare(folder, args.format, args.threads)
    texts = bare.cut(mixed_texts(NUM_TEXTS + 64))[:NUM_TEXTS]
    rounds: list[dict[str, float]] = []
    with our_server(folder, args.format, args.threads) as ours:
        if python is None:
            rounds = [asyncio.run(measure(bare, ours, None, texts)) for _ in range(args.rounds + 1)]
        else:
            with infinity_server(python, folder, args.threads) as infinity:
                rounds = [asyncio.run(measure(bare, ours, infinity, texts)) for _ in range(args.rounds + 1)]
    report(rounds[1:])  # the first warms everything up


def report(rounds: list[dict[str, float]]) -> None:
    median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    for name, value in median.items():
        spread = f"{min(r[name] for r in rounds):.1f}-{max(r[name] for r in rounds):.1f}"
        print(f"{name:24} {value:10.2f}   ({spread})")
    pairs = {"32 clients / encode": ("32 clients", "encode"), "one of 256 / encode": ("one of 256", "encode")}
    pairs["32 clients / infinity"] = ("32 clients", "infinity, 32 clients")
    for name, (ours, theirs) in pairs.items():
        if theirs in median:
            ratio = statistics.median(r[ours] / r[theirs] for r in rounds)
            print(f"{name:24} {ratio:10.2f}   target {TARGETS[name]}, predicted {PREDICTED[name]}")
    bound_ms = 1.2 * median["bare ms"] + 1.0
    print(f"{'lone text':24} {median['lone ms']:10.2f}   ms; target {bound_ms:.2f}, predicted bare + 0.9")


if __name__ == "__main__":
    main()
