"""Whole models on this GPU: random weights in real shapes through the engine in this process, beside transformers.

No files and no network: what a tensor holds does not change how long it takes. Greedy, so that every request runs to
its end. Prompts of 128 tokens; a step's time is that of decoding, measured once all prompts are computed. With a
`Machine.dry()` the same code runs on the CPU, on a fake device and in tiny shapes, so that its first run on a GPU is
not the first at all.
"""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.random_model import LLAMA_8B, QWEN3_MOE, SMOLLM2_135M, TINY, RandomWeights, prepare_random_model
from benchmarks.row import Row
from benchmarks.timed_device import TimedCudaDevice
from llmserve.config import EngineConfig
from llmserve.engine.assembly import make_core
from llmserve.engine.core import EngineCore
from llmserve.kernels.ops import Ops
from llmserve.kernels.select import select_ops
from llmserve.kernels.weight_formats import W4A16_GROUPS
from llmserve.messages import EngineRequest, SamplingParams
from llmserve.models.config import ModelConfig
from llmserve.worker.device import Device
from llmserve.worker.gpu_model_runner import GPUModelRunner
from tests.worker.fake_device import FakeDevice

NUM_PROMPT_TOKENS = 128
ITL_SLOWDOWN = 2.0


@dataclass(frozen=True)
class Machine:
    """Where the rows are measured, and how large they are."""

    device: torch.device
    open_device: Callable[[], Device]
    is_dry: bool

    @classmethod
    def gpu(cls) -> Machine:
        device = torch.device("cuda")
        return cls(device, lambda: TimedCudaDevice(device), is_dry=False)

    @classmethod
    def dry(cls) -> Machine:
        """Nothing of what it measures means anything."""
        return cls(torch.device("cpu"), FakeDevice, is_dry=True)

    def model(self, config: ModelConfig) -> ModelConfig:
        return TINY if self.is_dry else config

    def ops(self, model: ModelConfig) -> Ops:
        return select_ops(self.device, self.dtype, model.head_dim)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.is_dry else torch.bfloat16

    def scaled(self, number: int, dry: int) -> int:
        return dry if self.is_dry else number


@dataclass
class Served:
    """An engine as the server would run it, but for its process; and how long it took to be ready."""

    core: EngineCore
    runner: GPUModelRunner
    device: Device
    warm_up_s: float
    next_id: int = 0

    def ask(self, num_prompt_tokens: int, num_tokens: int) -> str:
        """Adds a request unlike all before it; returns its id."""
        first = self.next_id = self.next_id + 1
        prompt = [(first * 31 + 7 * position) % 300 for position in range(num_prompt_tokens)]
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, seed=0)
        name = str(first)
        self.core.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params, arrival_s=float(first)))
        return name


def serve(machine: Machine, config: ModelConfig, weight_format: str = "dense", **settings: object) -> Served:
    """Loads, measures, captures. `settings` of `EngineConfig`."""
    model = machine.model(config)
    engine = EngineConfig(
        device=machine.device.type,
        max_model_len=machine.scaled(36864 if config is LLAMA_8B else 8192, 512),
        max_num_seqs=machine.scaled(256, 8),
        max_num_batched_tokens=machine.scaled(8192, 128),
        kv_cache_memory=2**24 if machine.is_dry else None,
        speculation="off",
        itl_slowdown=ITL_SLOWDOWN,
    )
    engine = replace(engine, **settings)  # type: ignore[arg-type]
    ops = machine.ops(model)
    weights = RandomWeights(model, packed=weight_format if weight_format in W4A16_GROUPS else "")
    prepared = prepare_random_model(engine, model, ops, machine.device, machine.dtype, weights, weight_format)
    loaded = prepared.load_weights()
    device = machine.open_device()
    opened = iter((machine.open_device(), device))
    started = time.perf_counter()
    runner = prepared.launching_runner(loaded, lambda: next(opened))
    return Served(make_core(engine, runner), runner, device, time.perf_counter() - started)


def decode(served: Served, batch: int, num_tokens: int, num_prompt_tokens: int = NUM_PROMPT_TOKENS) -> float:
    """Seconds a step, all prompts computed."""
    names = {served.ask(num_prompt_tokens, num_tokens) for _ in range(batch)}
    core = served.core
    while names:
        names -= {output.request_id for output in core.step().outputs}
    served.device.synchronize()
    if isinstance(served.device, TimedCudaDevice):
        served.device.forget_times()
    started, steps = time.perf_counter(), 0
    while core.has_work():
        core.step()
        steps += 1
    return (time.perf_counter() - started) / max(steps, 1)


def latencies_beside(served: Served, num_streams: int, num_prompt_tokens: int) -> tuple[float, list[float]]:
    """A step of the streams alone, and what stood between their tokens while a long prompt was computed beside them."""
    core = served.core
    streams = {served.ask(NUM_PROMPT_TOKENS, 10**6) for _ in range(num_streams)}
    waiting = set(streams)
    while waiting:
        waiting -= {output.request_id for output in core.step().outputs}
    alone = [_step_s(core) for _ in range(60)]
    long_prompt = served.ask(num_prompt_tokens, 4)
    last = dict.fromkeys(streams, time.perf_counter())
    gaps: list[float] = []
    is_answered = False
    while not is_answered:
        outputs = core.step().outputs
        now = time.perf_counter()
        for output in outputs:
            is_answered = is_answered or output.request_id == long_prompt
            if output.request_id in last:
                gaps.append(now - last[output.request_id])
                last[output.request_id] = now
    core.abort([*streams, long_prompt])
    while core.has_work():
        core.step()
    return statistics.median(alone), gaps


def _step_s(core: EngineCore) -> float:
    started = time.perf_counter()
    core.step()
    return time.perf_counter() - started


def small_model_rows(machine: Machine) -> Iterator[Row]:
    """SmolLM2-135M at batch 1: 30 layers whose kernels take a microsecond or two each. What graphs and overlap
    bring."""
    cases = (
        ("", {}, "0.6 ms", "0.60 ms: 330 kernels of 1.5 us, 12 of them beside the layers"),
        (", no overlap", {"async_scheduling": False}, "", "0.85 ms: 0.25 ms of host a step"),
        (", no graphs", {"enforce_eager": True}, "", "4 ms: 330 launches of 12 us"),
    )
    for name, settings, target, predicted in cases:
        served = serve(machine, SMOLLM2_135M, **settings)
        decode(served, 1, machine.scaled(32, 4))
        took = decode(served, 1, machine.scaled(512, 8))
        yield Row(f"SmolLM2-135M bf16, 1 request{name}", "decode", target, predicted, f"{took * 1e3:.2f} ms a token")
        del served
        _empty_cache(machine)


def large_model_rows(machine: Machine) -> Iterator[Row]:
    """Llama-3.1-8B in bf16 at 1, 64 and 256 requests; the device's idle time; a long prompt among streams."""
    served = serve(machine, LLAMA_8B)
    name = "Llama-3.1-8B bf16"
    result = f"{served.warm_up_s:.1f} s, {served.runner.num_graphs} graphs"
    yield Row(
        name, "memory measured, graphs captured", "10 s", "6 s: 150 graphs of 30 ms, twice the large ones", result
    )
    cases = (
        (1, "3.9 ms", "3.8 ms: 16.1 GB at 4.3 TB/s"),
        (64, "2 x transformers", "5.6 ms: 4.0 of weights, 0.8 of cache, the rest small kernels"),
        (256, "2 x transformers", "9.5 ms: 4.3 of weights, 3.3 of cache, 1.9 the rest"),
    )
    for batch, target, predicted in cases:
        batch = machine.scaled(batch, min(batch, 6))
        decode(served, batch, machine.scaled(8, 4))
        took = decode(served, batch, machine.scaled(256 if batch < 64 else 384, 8))
        result = f"{took * 1e3:.2f} ms a step, {batch / took:.0f} tokens/s"
        yield Row(f"{name}, {batch} requests", "decode", target, predicted, result)
        if isinstance(served.device, TimedCudaDevice) and batch == 64:
            idle = served.device.idle_s()
            result = f"{idle * 1e6:.0f} us, median"
            yield Row(f"{name}, 64 requests", "device idle between two steps", "100 us", "10 us", result)
    step_s, gaps = latencies_beside(served, machine.scaled(32, 4), machine.scaled(32768, 300))
    p99 = statistics.quantiles(gaps, n=100)[98] if len(gaps) > 1 else 0.0
    result = f"p99 {p99 * 1e3:.1f} ms, a step alone {step_s * 1e3:.1f} ms, {len(gaps)} gaps"
    target = f"2 x {ITL_SLOWDOWN:.0f} x a step alone"
    yield Row(f"{name}, 32k prompt among 32 streams", "between tokens", target, "11 ms, 5 alone", result)


def fp8_rows(machine: Machine) -> Iterator[Row]:
    """The same shape with weights in fp8."""
    served = serve(machine, LLAMA_8B, "int8" if machine.is_dry else "fp8")
    decode(served, 1, machine.scaled(8, 4))
    took = decode(served, 1, machine.scaled(256, 8))
    predicted = "2.3 ms: 8.0 GB at 4.0 TB/s, 0.2 of quantising"
    yield Row("Llama-3.1-8B fp8, 1 request", "decode", "1.6 x bf16", predicted, f"{took * 1e3:.2f} ms a token")


def w4a16_rows(machine: Machine) -> Iterator[Row]:
    """The same shape with weights of 4 bits, a scale for 128 of them."""
    served = serve(machine, LLAMA_8B, "int8" if machine.is_dry else "w4a16_g128")
    for batch, predicted in ((1, "2.3 ms"), (64, "8 ms")):
        batch = machine.scaled(batch, min(batch, 6))
        decode(served, batch, machine.scaled(8, 4))
        took = decode(served, batch, machine.scaled(256, 8))
        yield Row(f"Llama-3.1-8B w4a16, {batch} requests", "decode", "", predicted, f"{took * 1e3:.2f} ms a step")


def moe_rows(machine: Machine) -> Iterator[Row]:
    """A mixture of experts. Of 48 layers' 1.9 GB that a token touches, a quarter: 0.11 ms; ten launches a layer."""
    served = serve(machine, QWEN3_MOE)
    for batch, predicted in ((1, "1 ms"), (64, "5 ms")):
        batch = machine.scaled(batch, min(batch, 6))
        decode(served, batch, machine.scaled(8, 4))
        took = decode(served, batch, machine.scaled(256, 8))
        name = f"Qwen3-30B-A3B, 12 of its 48 layers, {batch} requests"
        yield Row(name, "decode", "", predicted, f"{took * 1e3:.2f} ms a step")


def transformers_rows(machine: Machine) -> Iterator[Row]:
    """`generate_batch`, transformers' continuous batching, on a model of the same shape, random too."""
    for batch in (64, 256):
        found = _transformers_tokens_per_s(machine, machine.scaled(batch, 3), machine.scaled(128, 4))
        name = f"Llama-3.1-8B bf16, {batch} requests, transformers"
        yield Row(name, "continuous batching", "", "1500-4000 tokens/s", f"{found:.1f} tokens/s")
        _empty_cache(machine)


def _transformers_tokens_per_s(machine: Machine, batch: int, num_tokens: int) -> float:
    import transformers

    shape = machine.model(LLAMA_8B)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2048,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.device(machine.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=machine.dtype).eval()
    generation = transformers.GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    # It stays warm between the two calls, where this version of transformers can.
    options = {"persistent_manager"} & inspect.signature(model.generate_batch).parameters.keys()
    for first in (10**6, 0):  # the first to warm it up; no prompt is found in its cache
        prompts = [[(first + i * 31 + 7 * at) % 300 for at in range(NUM_PROMPT_TOKENS)] for i in range(batch)]
        started = time.perf_counter()
        outputs = model.generate_batch(inputs=prompts, generation_config=generation, **dict.fromkeys(options, True))
        took = time.perf_counter() - started
    if options:
        model.destroy_cached_continuous_batching_manager()
    num_generated = sum(len(output.generated_tokens) for output in outputs.values())
    if num_generated < batch * num_tokens:
        raise RuntimeError(f"transformers made {num_generated} tokens of {batch * num_tokens}")
    return num_generated / took


def _empty_cache(machine: Machine) -> None:
    gc.collect()  # a runner and its graphs hold each other
    if not machine.is_dry:
        torch.cuda.empty_cache()


PARTS: dict[str, Callable[[Machine], Iterator[Row]]] = {  # named in gpu.py too
    "small model": small_model_rows,
    "large model": large_model_rows,
    "fp8": fp8_rows,
    "w4a16": w4a16_rows,
    "mixture of experts": moe_rows,
    "transformers": transformers_rows,
}
