"""The servers that are compared: how each is started for each weight format, and one running at a time.

Knows where `install` put things and the flags that give each peer its best figures; measures nothing.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

SLOTS, SLOT_TOKENS = 32, 1280  # the largest load, and room for its longest request: prefill, or prompt and answer
KV_GIB = 2
START_TIMEOUT_S, STOP_TIMEOUT_S = 900.0, 20.0  # vLLM compiles at its first start


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One server with one weight format. `{port}` in the command is filled in when it starts."""

    peer: str
    format: str
    bits: int  # of a weight, nominally: what is compared with what
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    in_ratios: bool = True

    @property
    def name(self) -> str:
        return f"{self.peer}:{self.format}"


@dataclass(frozen=True)
class Layout:
    """Where everything lies: a folder for each peer, and one for the model's files in the peers' formats."""

    work: Path
    model: Path  # a Hugging Face folder

    @property
    def llama_server(self) -> Path:
        return self.work / "llama.cpp" / "build" / "bin" / "llama-server"

    def python(self, peer: str) -> Path:
        """The interpreter of the peer's own environment."""
        return self.work / peer / "venv" / "bin" / "python"

    def gguf(self, format_name: str) -> Path:
        return self.work / "models" / self.model.name / f"{format_name}.gguf"

    def openvino(self, format_name: str) -> Path:
        return self.work / "models" / self.model.name / f"openvino-{format_name}"


def contenders(layout: Layout, threads: int) -> list[Contender]:
    """All there are, ours first."""
    return [
        *_llmserve(layout, threads),
        *_llama_cpp(layout, threads),
        *_openvino(layout, threads),
        *_vllm(layout, threads),
    ]


def _llmserve(layout: Layout, threads: int) -> list[Contender]:
    """Without speculation, which no peer has switched on; `default` is what a user gets, and takes part in no ratio."""
    base = [sys.executable, "-m", "llmserve.cli", "serve", "--port", "{port}", "--no-grpc"]
    base += ["--num-threads", str(threads)]
    plain = [*base, "--speculation", "off"]
    folder = str(layout.model)
    formats = [
        ("bf16", 16, [*plain, "--dtype", "bfloat16", "--quantization", "none", folder]),
        ("int8", 8, [*plain, "--quantization", "int8", folder]),
        ("q8_0", 8, [*plain, str(layout.gguf("q8_0"))]),
        ("q4_0", 4, [*plain, str(layout.gguf("q4_0"))]),
        ("q4_1", 4, [*plain, str(layout.gguf("q4_1"))]),
    ]
    default = Contender(peer="llmserve", format="default", bits=8, command=[*base, folder], in_ratios=False)
    return [*(Contender(peer="llmserve", format=n, bits=b, command=c) for n, b, c in formats), default]


def _llama_cpp(layout: Layout, threads: int) -> list[Contender]:
    """A slot for each user and no copying of finished slots' caches, which this load has no use for."""
    flags = ["--port", "{port}", "-t", str(threads), "-tb", str(threads), "-np", str(SLOTS)]
    flags += ["-c", str(SLOTS * SLOT_TOKENS), "--cache-ram", "0", "--no-webui"]
    return [
        Contender(
            peer="llama.cpp",
            format=name,
            bits=bits,
            command=[str(layout.llama_server), "-m", str(layout.gguf(name)), *flags],
        )
        for name, bits in (("bf16", 16), ("q8_0", 8), ("q4_0", 4), ("q4_1", 4))
    ]


def _openvino(layout: Layout, threads: int) -> list[Contender]:
    """`kv16`: the cache in bfloat16 in place of the pipeline's 8 bits, faster at some loads and slower at others."""
    shim = str(Path(__file__).with_name("openvino_server.py"))
    command = [str(layout.python("openvino")), shim, "--port", "{port}", "--threads", str(threads)]
    command += ["--max-num-seqs", str(SLOTS), "--cache-gib", str(KV_GIB), "--tokenizer", str(layout.model)]
    kv16 = ["--kv-precision", "bf16"]
    formats = [
        ("fp16", 16, [*command, str(layout.openvino("fp16"))]),
        ("int8", 8, [*command, str(layout.openvino("int8"))]),
        ("int8-kv16", 8, [*command, *kv16, str(layout.openvino("int8"))]),
        ("int4", 4, [*command, str(layout.openvino("int4"))]),
        ("q4_1", 4, [*command, str(layout.gguf("q4_1"))]),
    ]
    return [Contender(peer="openvino", format=n, bits=b, command=c) for n, b, c in formats]


def _vllm(layout: Layout, threads: int) -> list[Contender]:
    command = [str(layout.python("vllm")), "-m", "vllm.entrypoints.openai.api_server", "--model", str(layout.model)]
    command += ["--host", "127.0.0.1", "--port", "{port}", "--dtype", "bfloat16", "--max-num-seqs", str(SLOTS)]
    command += ["--max-model-len", str(SLOT_TOKENS), "--disable-uvicorn-access-log"]
    cores = sorted(os.sched_getaffinity(0))[:threads]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CACHE_ROOT": str(layout.work / "vllm" / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return [Contender(peer="vllm", format="bf16", bits=16, command=command, env=env)]


@dataclass(frozen=True)
class RunningServer:
    """Where it answers, and its first process."""

    url: str
    pid: int


@contextmanager
def running(contender: Contender, log: Path) -> Iterator[RunningServer]:
    """A fresh server that has answered once. It and all its children have ended afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [part.replace("{port}", str(port)) for part in contender.command]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | contender.env, start_new_session=True
        )
        try:
            _wait_until_it_answers(url, process, log)
            yield RunningServer(url, process.pid)
        finally:
            _stop(process)


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """By asking for a token: every server has an own idea of what its health page means."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        try:
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "The", "max_tokens": 1}, timeout=60)
        except httpx.TransportError:
            time.sleep(0.2)
            continue
        if answer.is_success:
            return
        time.sleep(0.2)  # llama-server answers 503 while it loads
    raise RuntimeError(f"the server did not start; its output is in {log}:\n{log.read_text()[-2000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The session was made for this server: what is left of it after its own end is its children."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
