"""Which Triton kernels are compiled for the table in docs/kernels.md, in which shapes, and what each must keep to.

The shapes are those of Llama-3.1-8B unless the name says another. A ceiling is what the design of the kernel allows:
registers and shared memory for so many programs on a multiprocessor, and the instructions that make it fast.
"""

from __future__ import annotations

from typing import Any

from benchmarks.kernel_case import ARCHITECTURES, KernelCase
from benchmarks.product_cases import product_cases
from benchmarks.sampling_kernel_cases import sampling_kernel_cases
from llmserve.kernels.ops import FP8_LARGEST
from llmserve.kernels.triton import (
    activation,
    attention,
    block_copier,
    embedding,
    layer_norm,
    norm,
    packed_attention,
    rotary,
    segment_sum,
    split_attention,
    step_inputs,
)
from llmserve.kernels.triton.tables import attention_tiles


def _attention(
    name: str, head_dim: int, heads: int, kv_heads: int, element: str = "bf16", kv: str = "", **changes: Any
) -> list[KernelCase]:
    """The unified kernel with each architecture's tiles, walking through partitions and sharing them out."""
    types = {
        **dict.fromkeys(("q_ptr", "out_ptr"), f"*{element}"),
        "cache_ptr": f"*{kv or element}",
        **dict.fromkeys(("scales_ptr", "sinks_ptr", "parts_ptr", "stats_ptr"), "*fp32"),
        **dict.fromkeys(("query_start_ptr", "seq_lens_ptr", "table_ptr"), "*i32"),
        **dict.fromkeys(("num_seqs", "table_stride", "num_partitions"), "i32"),
        **dict.fromkeys(("scale_log2", "soft_cap"), "fp32"),
    }
    cases = []
    for split in (False, True):
        for architecture in ("sm_90", "sm_100") if kv else ARCHITECTURES:
            tiles = attention_tiles(architecture, head_dim, 1 if kv else 4 if element == "fp32" else 2)
            constants = {
                "NUM_HEADS": heads,
                "NUM_KV_HEADS": kv_heads,
                "HEAD_DIM": head_dim,
                "DIM": 1 << (head_dim - 1).bit_length(),
                "BLOCK_SIZE": 16,
                "WINDOW": 0,
                "SOFT_CAP": False,
                "HAS_SINKS": False,
                "FP8_KV": bool(kv),
                "SPLIT": split,
                "ROWS": tiles.rows,
                "KEYS": tiles.keys,
                "PARTITION": tiles.partition,
                "STAGES": tiles.num_stages,
            }
            cases.append(
                KernelCase(
                    f"attention {name}{' split' if split else ''}",
                    attention.attention_kernel,
                    types,
                    constants | changes,
                    num_warps=tiles.num_warps,
                    max_registers=255,
                    max_shared_bytes=64 * 2**10 if architecture == "gfx942" else 112 * 2**10,
                    matrix=element != "fp32",
                    architectures=(architecture,),
                )
            )
    return cases


def _norm(name: str, size: int, has_residual: bool) -> KernelCase:
    block = 1 << (size - 1).bit_length()
    return KernelCase(
        name,
        norm.rms_norm_kernel,
        {"x_ptr": "*bf16", "residual_ptr": "*fp32", "weight_ptr": "*fp32", "out_ptr": "*bf16", "eps": "fp32"},
        {"SIZE": size, "BLOCK": block, "HAS_RESIDUAL": has_residual},
        num_warps=norm.num_warps(block),
        max_registers=64,
        max_shared_bytes=32 * 2**10,  # x in 16 bits and the residual in 32 lie in threads differently
    )


def _rotary(name: str, head_dim: int, heads: int, kv_heads: int, cache: str, **changes: Any) -> KernelCase:
    pointers = ("qkv_ptr", "q_ptr")
    half = 1 << (head_dim // 2 - 1).bit_length()
    return KernelCase(
        name,
        rotary.rotary_kernel,
        {
            **dict.fromkeys(pointers, "*bf16"),
            **dict.fromkeys(("cos_sin_ptr", "q_norm_ptr", "k_norm_ptr", "scales_ptr"), "*fp32"),
            "cache_ptr": f"*{cache}",
            **dict.fromkeys(("positions_ptr", "slots_ptr"), "*i64"),
            "eps": "fp32",
        },
        {
            "NUM_HEADS": heads,
            "NUM_KV_HEADS": kv_heads,
            "HALF": head_dim // 2,
            "BLOCK_SIZE": 16,
            "HAS_NORM": False,
            "FP8_KV": cache == "fp8e4nv",
            "FP8_LARGEST": FP8_LARGEST,
            "HEADS": min(1024 // half, 1 << (heads + 2 * kv_heads - 1).bit_length()),
            "HALF_PADDED": half,
            **changes,
        },
        max_registers=128,
        max_shared_bytes=4096,
        architectures=("sm_90", "sm_100") if cache == "fp8e4nv" else ARCHITECTURES,
    )


def _packed(name: str, heads: int, head_dim: int, has_bias: bool) -> KernelCase:
    pointers = {**dict.fromkeys(("qkv_ptr", "out_ptr"), "*bf16"), "bias_ptr": "*fp32", "reach": "i32"}
    constants = {"HEADS": heads, "HEAD_DIM": head_dim, "DIM": head_dim, "WINDOW": 0, "HAS_BIAS": has_bias}
    return KernelCase(
        f"packed attention {name}",
        packed_attention.packed_attention_kernel,
        {**pointers, "starts_ptr": "*i32", "num_seqs": "i32", "scale_log2": "fp32"},
        {**constants, "ROWS": 64, "KEYS": 32, "STAGES": 3},
        max_registers=255,
        max_shared_bytes=64 * 2**10,
        matrix=True,
    )


def kernel_cases() -> list[KernelCase]:
    """Every kernel, the shapes that matter first."""
    norms = dict.fromkeys(("residual_ptr", "weight_ptr", "bias_ptr"), "*fp32")
    return [
        *_attention("d128 g4", 128, 32, 8),
        *_attention("d64 g3", 64, 9, 3),
        *_attention("d128 g4 fp8", 128, 32, 8, kv="fp8e4nv"),
        *_attention("d64 g3 fp8", 64, 9, 3, kv="fp8e4nv"),
        *_attention("d96 g1 fp8", 96, 32, 32, kv="fp8e4nv"),
        *_attention("d256 g2 window fp8", 256, 8, 4, kv="fp8e4nv", WINDOW=4096, SOFT_CAP=True),
        *_attention("d128 g4 fp16", 128, 32, 8, "fp16"),
        *_attention("d80 g1", 80, 32, 32),
        *_attention("d96 g1", 96, 32, 32),
        *_attention("d256 g2 window", 256, 8, 4, WINDOW=4096, SOFT_CAP=True),
        *_attention("d64 g16", 64, 16, 1),
        *_attention("d64 g4 fp32", 64, 32, 8, "fp32"),
        *_attention("d64 g8 window sinks", 64, 64, 8, WINDOW=128, HAS_SINKS=True),
        KernelCase(
            "attention merge d128",
            split_attention.merge_kernel,
            {
                **dict.fromkeys(("parts_ptr", "stats_ptr", "sinks_ptr"), "*fp32"),
                "out_ptr": "*bf16",
                "positions_ptr": "*i64",
                "num_partitions": "i32",
            },
            {
                "NUM_HEADS": 32,
                "HEAD_DIM": 128,
                "DIM": 128,
                "WINDOW": 0,
                "HAS_SINKS": False,
                "PARTITION": 512,
                "AT_ONCE": 8,
            },
            num_warps=1,
            max_registers=96,
            max_shared_bytes=512,
        ),
        _norm("add_rms_norm 4096", 4096, True),
        _norm("rms_norm 576", 576, False),
        _norm("add_rms_norm 8192", 8192, True),
        _rotary("rotary d128", 128, 32, 8, "bf16"),
        _rotary("rotary d128 norm", 128, 32, 8, "bf16", HAS_NORM=True),
        _rotary("rotary d128 fp8", 128, 32, 8, "fp8e4nv"),
        *sampling_kernel_cases(128256),
        *product_cases(),
        _packed("d64", 12, 64, False),
        _packed("d64 relative", 12, 64, True),
        KernelCase(
            "post_layer_norm 768",
            layer_norm.layer_norm_kernel,
            {**dict.fromkeys(("x_ptr", "out_ptr"), "*bf16"), **norms, "eps": "fp32"},
            {"SIZE": 768, "BLOCK": 1024, "HAS_RESIDUAL": True, "HAS_BIAS": True, "POST": True},
            num_warps=2,
            max_registers=128,
            max_shared_bytes=8192,
        ),
        KernelCase(
            "segment_sum",
            segment_sum.segment_sum_kernel,
            {"x_ptr": "*bf16", "weights_ptr": "*fp32", "starts_ptr": "*i32", "out_ptr": "*fp32"},
            {"SIZE": 768, "ROWS": 16, "BLOCK": 128},
            max_registers=64,
            max_shared_bytes=8192,
        ),
        KernelCase(
            "silu_and_mul",
            activation.gate_and_mul_kernel,
            {"gate_up_ptr": "*bf16", "out_ptr": "*bf16"},
            {"SIZE": 14336, "BLOCK": 1024, "KIND": "silu"},
            max_registers=64,
        ),
        KernelCase(
            "embedding",
            embedding.embedding_kernel,
            {"ids_ptr": "*i64", "table_ptr": "*bf16", "out_ptr": "*bf16", "vocab_size": "i32"},
            {"SIZE": 4096, "BLOCK": 1024},
            max_registers=64,
        ),
        KernelCase(
            "step inputs",
            step_inputs.expand_kernel,
            {
                **dict.fromkeys(
                    (
                        *("rows_ptr", "null_row_ptr", "seq_rows_ptr", "num_computed_ptr", "query_start_ptr"),
                        *("draw_tokens_ptr", "given_ptr", "seq_lens_ptr"),
                    ),
                    "*i32",
                ),
                **dict.fromkeys(("token_ids_ptr", "positions_ptr", "slots_ptr", "draw_positions_ptr"), "*i64"),
                **dict.fromkeys(("num_tokens", "num_seqs", "num_draws"), "i32"),
            },
            {"WIDTH": 520, "BLOCK_SIZE": 16, "FIRST_BLOCK": 8, "LAST": 0, "STEPS": 9, "LANES": 128},
            max_registers=64,
            wide_loads=False,  # a lane a token: bound by its chain of loads
        ),
        KernelCase(
            "copy_blocks",
            block_copier.copy_blocks_kernel,
            {"sources_ptr": "*i64", "targets_ptr": "*i64", "pairs_ptr": "*i64"},
            {"SIZE": 16384, "WORDS": 4096},
            num_warps=8,
            max_registers=64,
        ),
    ]
