"""Whole models on this GPU: random weights in real shapes through the engine in this process, beside transformers.

No files and no network: what a tensor holds does not change how long it takes. Greedy, so that every request runs to
its end. Prompts of 128 tokens; a step's time is that of decoding, measured once all prompts are computed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from benchmarks.gpu_rows import Row
from llmserve.config import EngineConfig
from llmserve.engine.core import EngineCore
from llmserve.kernels.triton.ops import create_triton_ops
from llmserve.kernels.weight_formats import W4A16_GROUPS
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.messages import EngineRequest, SamplingParams
from llmserve.models.config import ModelConfig, MoEConfig, RopeConfig
from llmserve.models.loader import load_model
from llmserve.models.moe import MOE_ARCHITECTURES
from llmserve.models.parameters import expected_tensors, linear_parameters, weight_bytes
from llmserve.scheduler.budget import FixedBudget
from llmserve.scheduler.policy import make_policy
from llmserve.scheduler.scheduler import Scheduler
from llmserve.worker.memory import WeightPlan, available_bytes, plan_memory
from llmserve.worker.model_runner import ModelRunner

DEVICE = torch.device("cuda")
NUM_PROMPT_TOKENS = 128
LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=500_000.0),
    sliding_windows=(0,) * 32,
    query_scale=128**-0.5,
    dtype="bfloat16",
)
SMOLLM2_135M = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=30,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=100_000.0),
    tie_word_embeddings=True,
    sliding_windows=(0,) * 30,
    query_scale=64**-0.5,
    dtype="bfloat16",
)


QWEN3_MOE = ModelConfig(
    architecture="Qwen3MoeForCausalLM",
    num_layers=12,
    hidden_size=2048,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=6144,
    vocab_size=151936,
    max_position_embeddings=8192,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=1e6),
    qk_norm=True,
    sliding_windows=(0,) * 12,
    query_scale=128**-0.5,
    dtype="bfloat16",
    moe=MoEConfig(
        names=MOE_ARCHITECTURES["Qwen3MoeForCausalLM"].names,
        num_experts=128,
        num_experts_per_token=8,
        intermediate_size=768,
        renormalize=True,
    ),
)


class RandomWeights:
    """A `WeightSource` without files: small normal values, made where they are wanted. Packed matrices, of a format
    that is not made of plain ones, are of one number."""

    where = "random weights"

    def __init__(self, config: ModelConfig, packed: str = "") -> None:
        self.shapes: dict[str, tuple[int, ...]] = dict(expected_tensors(config))
        self.types = dict.fromkeys(self.shapes, "BF16")
        if packed:
            parts = [part for matrix in linear_parameters(config) if not matrix.is_small for part in matrix.parts]
            self.types |= {f"{part}.weight": packed.upper() for part in parts}

    def nbytes(self, name: str) -> int:
        return 2 * torch.Size(self.shapes[name]).numel()

    def read(self, name: str, out: torch.Tensor) -> None:
        out.normal_(std=0.02)

    def read_raw(self, name: str, out: torch.Tensor) -> None:
        out.fill_(17)  # of 4 bits: a scale of 6e-4, a zero point of 17


def make_core(config: ModelConfig, fmt: str = "dense") -> EngineCore:
    """An engine as the server would run it, but for its process; the matrices in the format `fmt`."""
    engine = EngineConfig(
        device="cuda", max_model_len=2048, max_num_seqs=256, max_num_batched_tokens=8192, speculation="off"
    )
    ops = create_triton_ops(DEVICE)
    formats = {matrix.name: "dense" if matrix.is_small else fmt for matrix in linear_parameters(config)}
    num_bytes = weight_bytes(
        config,
        2,
        lambda m: ops.linear_bytes(formats[m.name], m.out_features, m.in_features, torch.bfloat16, m.has_bias),
    )
    weights = WeightPlan(fmt, num_bytes)
    plan = plan_memory(engine, config, weights, torch.bfloat16, DEVICE, ops, available_bytes(DEVICE))
    source = RandomWeights(config, fmt if fmt in W4A16_GROUPS else "")
    model = load_model(source, config, torch.bfloat16, DEVICE, ops, formats, max_model_len=2048)
    runner = ModelRunner(model, ops, plan, torch.bfloat16, DEVICE)
    budget = FixedBudget(plan.max_num_batched_tokens)
    scheduler = Scheduler(
        KVCacheManager(plan.num_blocks, plan.block_size),
        policy=make_policy("fcfs"),
        budget=budget,
        max_num_seqs=plan.max_num_seqs,
        max_model_len=plan.max_model_len,
    )
    return EngineCore(scheduler, budget, runner, time.monotonic)


def decode(core: EngineCore, batch: int, num_tokens: int, first_id: int) -> float:
    """Seconds a step, all prompts computed."""
    for index in range(batch):
        prompt = [(first_id + index + 7 * position) % 40_000 for position in range(NUM_PROMPT_TOKENS)]
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, seed=0)
        name = str(first_id + index)
        core.add(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params, arrival_s=0.0))
    answered: set[str] = set()
    while len(answered) < batch:
        answered |= {output.request_id for output in core.step().outputs}
    torch.cuda.synchronize()
    started, steps = time.perf_counter(), 0
    while core.has_work():
        core.step()
        steps += 1
    return (time.perf_counter() - started) / max(steps, 1)


def transformers_tokens_per_s(batch: int, num_tokens: int) -> float:
    """Output tokens a second of `generate_batch`, transformers' continuous batching, on a model of the same shape."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=LLAMA_8B.vocab_size,
        hidden_size=LLAMA_8B.hidden_size,
        intermediate_size=LLAMA_8B.intermediate_size,
        num_hidden_layers=LLAMA_8B.num_layers,
        num_attention_heads=LLAMA_8B.num_heads,
        num_key_value_heads=LLAMA_8B.num_kv_heads,
        max_position_embeddings=2048,
        eos_token_id=None,
        attn_implementation="sdpa",
        dtype="bfloat16",
    )
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    generation = transformers.GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    prompts = [[(i + 7 * position) % 40_000 for position in range(NUM_PROMPT_TOKENS)] for i in range(batch)]
    model.generate_batch(inputs=prompts[:2], generation_config=generation)  # warm
    started = time.perf_counter()
    outputs = model.generate_batch(inputs=prompts, generation_config=generation)
    took = time.perf_counter() - started
    return sum(len(output.generated_tokens) for output in outputs.values()) / took


def engine_rows(
    config: ModelConfig, name: str, cases: tuple[tuple[int, str, str], ...], fmt: str = "dense"
) -> Iterator[Row]:
    """Batches, targets and predictions."""
    core = make_core(config, fmt)
    decode(core, 4, 8, 10**6)  # compiles the kernels
    for batch, target, predicted in cases:
        decode(core, batch, 4, 2 * 10**6 + batch)
        took = decode(core, batch, 256 if batch < 64 else 384, batch * 1000)
        result = f"{took * 1e3:.2f} ms a step, {batch / took:.0f} tokens/s"
        yield Row(f"{name} {'bf16' if fmt == 'dense' else fmt}, {batch} requests", "decode", target, predicted, result)


def model_rows() -> Iterator[Row]:
    """Small model, large model, and transformers beside it."""
    yield from engine_rows(SMOLLM2_135M, "SmolLM2-135M", ((1, "0.6 ms", "4 ms: launches, no graphs yet"),))
    torch.cuda.empty_cache()
    cases = ((1, "3.9 ms", "5.5 ms: launches"), (64, "2 x transformers", "9 ms"), (256, "2 x transformers", "14 ms"))
    yield from engine_rows(LLAMA_8B, "Llama-3.1-8B", cases)
    torch.cuda.empty_cache()
    # Weights alone: 1.8 and 0.9 ms. The head too is in fp8, and a quantisation stands before each product.
    cases = ((1, "1.6 x bf16", "3.0 ms with graphs"), (64, "", "7 ms"))
    yield from engine_rows(LLAMA_8B, "Llama-3.1-8B", cases, "fp8")
    torch.cuda.empty_cache()
    yield from engine_rows(LLAMA_8B, "Llama-3.1-8B", ((1, "", "2.3 ms with graphs"), (64, "", "8 ms")), "w4a16_g128")
    torch.cuda.empty_cache()
    # Of 48 layers' 1.9 GB that a token touches, a quarter: 0.11 ms; ten launches a layer.
    cases = ((1, "", "1 ms with graphs"), (64, "", "5 ms"))
    yield from engine_rows(QWEN3_MOE, "Qwen3-30B-A3B, 12 of its 48 layers,", cases)
    torch.cuda.empty_cache()
    for batch in (64, 256):
        found = transformers_tokens_per_s(batch, 128)
        name = f"Llama-3.1-8B bf16, {batch} requests, transformers"
        yield Row(name, "continuous batching", "", "1500-4000 tokens/s", f"{found:.0f} tokens/s")
