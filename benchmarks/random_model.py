"""Models of real shapes with random weights, ready to be loaded: no files, no network. Measures nothing."""

from __future__ import annotations

import zlib
from dataclasses import replace

import torch

from llmserve.config import EngineConfig
from llmserve.kernels.ops import Ops
from llmserve.models.config import ModelConfig, MoEConfig, RopeConfig
from llmserve.models.moe import MOE_ARCHITECTURES
from llmserve.models.parameters import expected_tensors, linear_parameters, weight_bytes
from llmserve.worker.loader import PreparedModel
from llmserve.worker.memory import WeightPlan, available_bytes, plan_memory, total_bytes, usable_bytes

LLAMA_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    max_position_embeddings=131072,
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
QWEN3_MOE = ModelConfig(  # Qwen3-30B-A3B's, a quarter as deep
    architecture="Qwen3MoeForCausalLM",
    num_layers=12,
    hidden_size=2048,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=6144,
    vocab_size=151936,
    max_position_embeddings=40960,
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
TINY = replace(
    SMOLLM2_135M,
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    vocab_size=320,
    max_position_embeddings=512,
    sliding_windows=(0,) * 2,
    query_scale=0.25,
    dtype="float32",
)


class RandomWeights:
    """A `WeightSource` without files: small normal values, made where they are wanted; or, if `seeded`, the same ones
    on every device. Matrices of a format that is packed in files are of one number."""

    where = "random weights"

    def __init__(self, config: ModelConfig, *, seeded: bool = False, scale: float = 0.02, packed: str = "") -> None:
        self.shapes: dict[str, tuple[int, ...]] = dict(expected_tensors(config))
        self.types = dict.fromkeys(self.shapes, "BF16")
        if packed:
            parts = [part for matrix in linear_parameters(config) if not matrix.is_small for part in matrix.parts]
            self.types |= {f"{part}.weight": packed.upper() for part in parts}
        self._seeded = seeded
        self._scale = scale

    def nbytes(self, name: str) -> int:
        return 2 * torch.Size(self.shapes[name]).numel()

    def read(self, name: str, out: torch.Tensor) -> None:
        if not self._seeded:
            out.normal_(std=self._scale)
            return
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        mean = 1.0 if len(out.shape) == 1 else 0.0  # norms
        out.copy_(torch.empty(self.shapes[name]).normal_(mean, self._scale, generator=generator).view(out.shape))

    def input_order(self, name: str) -> torch.Tensor | None:
        return None

    def read_raw(self, name: str, out: torch.Tensor) -> None:
        out.fill_(17)  # of 4 bits: a scale of 6e-4, a zero point of 17


def prepare_random_model(
    config: EngineConfig,
    model: ModelConfig,
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    weights: RandomWeights,
    weight_format: str = "dense",
) -> PreparedModel:
    """As `prepare_model` does it for a model that has files. Raises InsufficientMemoryError."""
    formats = {matrix.name: "dense" if matrix.is_small else weight_format for matrix in linear_parameters(model)}
    num_bytes = weight_bytes(
        model,
        dtype.itemsize,
        lambda m: ops.linear_bytes(formats[m.name], m.out_features, m.in_features, dtype, m.has_bias),
    )
    free = available_bytes(device)
    usable = usable_bytes(config.gpu_memory, device, free, total_bytes(device))
    plan = plan_memory(config, model, WeightPlan(weight_format, num_bytes), dtype, device, ops, usable)
    return PreparedModel(config, model, device, dtype, ops, weights, formats, free, plan)
