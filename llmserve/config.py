"""Every setting of the server: one frozen dataclass a room, one definition a setting. Knows no flags and no files.

`llmserve/settings.py` fills these from flags, environment and TOML; a resolved value makes a new object.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from llmserve.errors import ConfigError

GPU_SETTINGS = ("gpu_memory", "kv_cache_host_memory")  # of an engine; nothing on a CPU
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """'2GiB', '512M', '1.5g' or a plain number of bytes -> bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{text!r} is not an amount of memory. Write it like 512M, 2GiB or 1073741824.")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_memory(text: str) -> float:
    """'0.6' or '60%' -> that share, at most 1; '40GiB' or a number above 1 -> bytes. Raises ConfigError."""
    number = text.strip().removesuffix("%")
    try:
        share = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        return float(parse_bytes(text))
    if 0 < share <= 1:
        return share
    if text.strip().endswith("%"):
        raise ConfigError(f"{text!r} is not a share of a device's memory. Write it like 60% or 0.6.")
    return float(parse_bytes(text))


def format_bytes(num_bytes: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def setting(default: Any, text: str, *, kind: str = "", choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is also a flag, an environment variable and a TOML key. "bytes" takes units,
    "memory" a share as well."""
    metadata = {"help": text, "kind": kind, "choices": choices}
    return field(default=default, metadata=metadata)


def _require_at_least(config: object, name: str, least: int) -> None:
    value = getattr(config, name)
    if value is not None and value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}.")


def _require_choice(config: Any, name: str) -> None:
    choices = next(f.metadata["choices"] for f in fields(config) if f.name == name)
    if getattr(config, name) not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {getattr(config, name)!r}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One LLM and the process that runs it. None means: what is right for the model and the machine found."""

    model: str = ""  # a resolved path: a Hugging Face folder or a .gguf file
    device: str = setting("auto", "Where the model runs.", choices=("auto", "cpu", "cuda"))
    dtype: str = setting(
        "auto", "Weights and activations.", choices=("auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16")
    )
    quantization: str = setting(
        "auto",
        "Weight format: none (the dtype), q8_0 (8 bits, a scale for 32 weights), int8 (8 bits, a scale for a row), fp8 "
        "(likewise, on a GPU), or gguf (the file's own, or a quantised folder's). auto is gguf, else q8_0, where the "
        "device computes it; none if a dtype is given.",
        choices=("auto", "none", "q8_0", "int8", "fp8", "gguf"),
    )
    kv_cache_dtype: str = setting(
        "auto",
        "Keys and values in the KV cache: auto (the dtype), or fp8 (e4m3, with a scale for each token and head), in "
        "half the memory, on a GPU that computes it.",
        choices=("auto", "fp8", "fp8_e4m3"),
    )
    max_model_len: int | None = setting(None, "Longest context, prompt and answer together, in tokens.")
    max_num_seqs: int | None = setting(None, "Most sequences that run at once.")
    max_queued_seqs: int = setting(4096, "Most sequences in flight, waiting ones too; beyond it requests get a 429.")
    max_queued_tokens: int = setting(2**20, "Most tokens that wait, prompts and probable answers; beyond it: 429.")
    max_queue_time_s: float = setting(60.0, "A request that would wait longer for its turn gets a 429; 0: none does.")
    max_num_batched_tokens: int | None = setting(None, "Token budget of a step.")
    kv_cache_memory: int | None = setting(None, "Memory for the KV cache, e.g. 2GiB.", kind="bytes")
    kv_cache_host_memory: int = setting(
        0,
        "On a GPU, memory of the host that keeps blocks of the KV cache which the GPU has no more room for, e.g. 8GiB; "
        "0: none.",
        kind="bytes",
    )
    gpu_memory: float | None = setting(
        None,
        "Memory of the GPU that this model may take in all: a share of the device (0.6) or an amount (40GiB). By "
        "default nine tenths of what is free.",
        kind="memory",
    )
    enforce_eager: bool = setting(False, "On a GPU, launch every step op by op: no CUDA graphs.")
    cuda_graph_capture: str = setting(
        "start",
        "When CUDA graphs are captured: before the first request, or when first needed.",
        choices=("start", "lazy"),
    )
    async_scheduling: bool = setting(True, "On a GPU, schedule a step while the one before it runs.")
    block_size: int = setting(16, "Tokens in a KV cache block.")
    enable_prefix_caching: bool = setting(True, "Reuse cached blocks of equal prompt beginnings.")
    scheduling_policy: str = setting("fcfs", "Order of waiting requests.", choices=("fcfs", "priority", "fair"))
    itl_slowdown: float = setting(
        2.0,
        "While others decode, prompts may stretch a step to this multiple of a decode-only step; 0: off.",
    )
    speculation: str = setting(
        "auto",
        "Draft tokens from the text itself, verified several a step: where that pays, never, or always.",
        choices=("auto", "off", "ngram"),
    )
    num_threads: int | None = setting(None, "CPU threads of an engine; by default the cores it may use.")
    max_logprobs: int = setting(20, "Most log-probabilities a request may ask for at one position.")

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory", "num_threads"):
            _require_at_least(self, name, 1)
        _require_at_least(self, "max_logprobs", 0)
        _require_at_least(self, "kv_cache_host_memory", 0)
        if self.kv_cache_host_memory and not self.enable_prefix_caching:
            raise ConfigError(
                "kv_cache_host_memory keeps what the prefix cache finds, and enable_prefix_caching is off: turn it on, "
                "or leave --kv-cache-host-memory out."
            )
        for name, least in (("max_queued_seqs", 1), ("max_queued_tokens", 1), ("max_queue_time_s", 0)):
            _require_at_least(self, name, least)
        if self.gpu_memory is not None and not self.gpu_memory > 0:
            raise ConfigError(f"gpu_memory must be a share (0.6) or an amount (40GiB), not {self.gpu_memory}.")
        for name in ("device", "dtype", "quantization", "kv_cache_dtype", "speculation", "cuda_graph_capture"):
            _require_choice(self, name)
        for name in GPU_SETTINGS:
            if self.device == "cpu" and getattr(self, name):
                raise ConfigError(f"{name} is for models on a GPU, and device is 'cpu'. Leave one of them out.")
        if self.block_size < 16 or self.block_size % 16:
            raise ConfigError(f"block_size must be a multiple of 16, not {self.block_size}.")
        if self.itl_slowdown != 0 and not 1.1 <= self.itl_slowdown <= 1000:
            raise ConfigError(f"itl_slowdown must be 0 (off) or from 1.1 to 1000, not {self.itl_slowdown}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The server process: where it listens and what it bounds."""

    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(8000, "Port to listen on; 0 takes a free one.")
    grpc: bool = setting(True, "Serve the Open Inference Protocol over gRPC too.")
    grpc_port: int | None = setting(None, "Port of gRPC; by default the one after --port (8001).")
    log_level: str = setting("info", "Log level.", choices=("debug", "info", "warning", "error"))
    max_body_bytes: int = setting(32 * 2**20, "Largest request body.", kind="bytes")
    keep_alive_s: float = setting(15.0, "A silent stream gets an SSE comment this often.")
    drain_timeout_s: float = setting(30.0, "After SIGTERM, requests in flight may take this long to finish.")
    stall_timeout_s: float = setting(
        10.0, "An engine that has work, and whose steps do not advance for this long, is replaced."
    )
    restart_timeout_s: float = setting(120.0, "Requests in flight wait this long for an engine to be replaced.")
    standby_engine: bool = setting(
        True, "Keep a process with an engine's imports made, so that one that dies is replaced within a second."
    )
    vllm_metrics: bool = setting(True, "Expose metrics under vLLM's names too, for its dashboards.")

    def __post_init__(self) -> None:
        for name, port in (("port", self.port), ("grpc_port", self.grpc_port or 0)):
            if not 0 <= port <= 65535:
                raise ConfigError(f"{name} must be between 0 and 65535, not {port}.")
        for name in ("max_body_bytes", "keep_alive_s", "stall_timeout_s", "restart_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}.")
        _require_at_least(self, "drain_timeout_s", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorConfig:
    """Who is let in, how much of the server one of them may take, and what is written down about it."""

    api_keys: str = setting("", "File of API keys (see `llmserve keys`); with it, all but liveness needs one.")
    tls_certificate: str = setting("", "PEM certificate chain for HTTP and gRPC; may be replaced while serving.")
    tls_key: str = setting("", "PEM private key of the certificate.")
    cors_origin: tuple[str, ...] = setting((), "Web origin whose pages may ask; repeatable; * is any.", kind="list")
    request_timeout_s: float = setting(0.0, "Longest time a request may take, unless it asks for less; 0: any.")
    max_connections: int = setting(8192, "Most HTTP connections; never more than the open files allowed.")
    header_timeout_s: float = setting(10.0, "A request's headers must have come within this time.")
    body_timeout_s: float = setting(120.0, "A request's body must have come within this time.")
    max_body_memory: int = setting(
        2 * 2**30, "Memory for the bodies of all HTTP requests in flight; a large one beyond is told 429.", kind="bytes"
    )
    send_timeout_s: float = setting(30.0, "A client that reads nothing for this long is let go.")
    resume_window_s: float = setting(
        0.0, "Events carry ids, and a stream with an Idempotency-Key waits this long for a lost client; 0: off."
    )
    request_log: str = setting("", "File that gets one JSON line a request; - is standard error.")
    slow_request_s: float = setting(60.0, "A request that takes longer is logged with what it waited for; 0: none.")
    otel: bool = setting(False, "Send OpenTelemetry traces, where OTEL_EXPORTER_OTLP_ENDPOINT says.")

    def __post_init__(self) -> None:
        for name in ("max_connections", "header_timeout_s", "body_timeout_s", "max_body_memory", "send_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}.")
        for name in ("request_timeout_s", "resume_window_s", "slow_request_s"):
            _require_at_least(self, name, 0)
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ConfigError("tls_certificate and tls_key belong together: give both or none.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryConfig:
    """The model repository of general models, under the names of Triton Inference Server's flags."""

    model_repository: tuple[str, ...] = setting((), "Folder or URL of a model repository; repeatable.", kind="list")
    model_control_mode: str = setting("none", "Who decides what is loaded.", choices=("none", "poll", "explicit"))
    load_model: tuple[str, ...] = setting(
        (), "Loaded at the start in mode explicit; repeatable; * is all.", kind="list"
    )
    model_config_name: str = setting("", "Use configs/<name>.pbtxt of a model where there is one.")
    repository_poll_secs: float = setting(15.0, "Seconds between two looks at the repository in mode poll.")
    strict_readiness: bool = setting(True, "Ready only when every model is.")
    exit_on_error: bool = setting(False, "End if a model cannot be loaded at the start.")
    model_load_thread_count: int = setting(4, "Models that load at the same time.")
    embedding_model: str = setting(
        "auto",
        "An embedding, reranker or classifier model to serve beside the others: a folder or a name, or none. auto is "
        "the embedded one beside the embedded LLM, where no other model is named.",
    )
    inline: tuple[str, ...] = setting(
        (), "A model to run in the server's process, where breakpoint() works; repeatable; * is all.", kind="list"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfigEntry:
    """One model to serve: what the user called it, under which names, with which settings."""

    model: str
    served_names: tuple[str, ...] = ()
    engine: EngineConfig = EngineConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """All that `llmserve serve` needs."""

    server: ServerConfig = ServerConfig()
    door: DoorConfig = DoorConfig()
    repository: RepositoryConfig = RepositoryConfig()
    engine: EngineConfig = EngineConfig()  # of LLMs that have no entry of their own
    models: tuple[ModelConfigEntry, ...] = ()


def setting_names(config_class: type) -> list[str]:
    """The names of the settings a config class holds, in order."""
    return [f.name for f in fields(config_class) if "help" in f.metadata]
