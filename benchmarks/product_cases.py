"""The product kernel and those of mixtures as they are compiled for docs/kernels.md: every tile of `tables.py`."""

from __future__ import annotations

from benchmarks.kernel_case import ARCHITECTURES, KernelCase
from llmserve.kernels.triton import fused_linear, gemm, moe, routing
from llmserve.kernels.triton.norm import num_warps
from llmserve.kernels.triton.products import partition_of
from llmserve.kernels.triton.quantize import quantize_kernel
from llmserve.kernels.triton.tables import GemmTiles, gemm_tiles

# Triton's names of the activations' types, and the bits of a weight
_X = {"int8": "i8", "fp8": "fp8e4nv", "fp8 groups": "fp8e4nv", "w4": "bf16", "mxfp4": "bf16", "dense": "bf16"}
_BITS = {"int8": 8, "fp8": 8, "fp8 groups": 8, "w4": 4, "mxfp4": 4, "dense": 16}
_PRODUCT_KB = 136  # of shared memory: four stages of the largest tile


def _architectures(kind: str) -> tuple[str, ...]:
    return ("sm_90", "sm_100") if kind.startswith("fp8") else ARCHITECTURES


def _types(kind: str) -> dict[str, str]:
    return {
        "x_ptr": f"*{_X[kind]}",
        "w_ptr": "*u8" if kind in ("w4", "mxfp4") else f"*{_X[kind]}",
        **dict.fromkeys(("x_scale_ptr", "parts_ptr"), "*fp32"),
        "w_scale_ptr": {"w4": "*fp16", "mxfp4": "*u8"}.get(kind, "*fp32"),
        "zeros_ptr": "*u8",
        "bias_ptr": "*bf16",
        "offsets_ptr": "*i32",
        "out_ptr": "*bf16",
        "num_rows": "i32",
    }


def _case(
    name: str, kind: str, architecture: str, tile: GemmTiles, n: int, k: int, experts: int, split: bool, group: int
) -> KernelCase:
    types, depth = _types(kind), min(group, 128) if group else 128 // (_BITS[kind] // 8)
    if tile.descriptors:
        types["x_ptr"] = f"tensordesc<{_X[kind]}[{tile.rows},{depth}]>"
        types["w_ptr"] = f"tensordesc<{_X[kind]}[{tile.columns},{depth}]>"
    constants = {
        "N": n,
        "K": k,
        "KIND": kind,
        "GROUP": group or k,
        "HAS_BIAS": False,
        "NUM_EXPERTS": experts,
        "EXPERTS": max(experts, 1),
        "PARTITION": partition_of(n, k),
        "SPLIT": split,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": depth,
        "TOGETHER": 8,
        "STAGES": tile.num_stages,
        "DESCRIPTORS": tile.descriptors,
    }
    return KernelCase(
        f"gemm {name} {tile.rows}x{tile.columns}{' split' if split else ''}",
        gemm.gemm_kernel,
        types,
        constants,
        num_warps=tile.num_warps,
        max_registers=128 if tile.rows == 16 else 255,  # few rows: three programs at least, to keep loads on their way
        max_shared_bytes=_PRODUCT_KB * 2**10,
        wide_loads=group not in (32, 64),  # such a tile's lines are 16 or 32 bytes, of which a thread takes 8
        matrix=True,
        architectures=(architecture,),
    )


def _product(name: str, kind: str, n: int, k: int, experts: int = 0, group: int = 0) -> list[KernelCase]:
    """With each architecture's tiles; the first, for few rows, also with partitions shared out."""
    return [
        _case(name, kind, architecture, tile, n, k, experts, split, group)
        for architecture in _architectures(kind)
        for index, tile in enumerate(gemm_tiles(architecture, _BITS[kind]))
        for split in ((False, True) if index == 0 else (False,))
    ]


def _quantize(kind: str, k: int) -> KernelCase:
    return KernelCase(
        f"quantize {kind}",
        quantize_kernel,
        {"x_ptr": "*bf16", "out_ptr": f"*{_X[kind]}", "scale_ptr": "*fp32"},
        {"SIZE": k, "BLOCK": 1 << (k - 1).bit_length(), "LARGEST": 127.0 if kind == "int8" else 448.0},
        num_warps=8,
        max_registers=64,
        max_shared_bytes=16 * 2**10,
        architectures=_architectures(kind),
    )


def _quantize_with(kind: str, hidden: int, intermediate: int) -> list[KernelCase]:
    """A row is held in registers: 16 numbers a thread of a norm, up to 32 of a gate; 64 of the longest gate."""
    floats = dict.fromkeys(("residual_ptr", "weight_ptr", "scale_ptr"), "*fp32")
    types = {"x_ptr": "*bf16", "gate_up_ptr": "*bf16", "out_ptr": f"*{_X[kind]}", "eps": "fp32", **floats}
    cases = []
    for name, kernel, size, more in (
        ("add_rms_norm", fused_linear.add_rms_norm_quantize_kernel, hidden, {}),
        ("silu_and_mul", fused_linear.gate_quantize_kernel, intermediate, {"KIND": "silu"}),
    ):
        block = 1 << (size - 1).bit_length()
        cases.append(
            KernelCase(
                f"{name} quantize {kind} {size}",
                kernel,
                types,
                {"SIZE": size, "BLOCK": block, "LARGEST": 127.0 if kind == "int8" else 448.0, **more},
                num_warps=num_warps(block),
                max_registers=64 if block <= 16384 else 128,
                max_shared_bytes=64 * 2**10,
                architectures=_architectures(kind),
            )
        )
    return cases


def _add_parts(name: str, n: int, k: int, experts: int) -> KernelCase:
    parts = k // partition_of(n, k)
    constants = {"N": n, "NUM_PARTS": parts, "KIND": "int8", "HAS_BIAS": False, "BLOCK": 256}
    return KernelCase(
        name,
        gemm.add_parts_kernel,
        _types("int8"),
        constants | {"NUM_EXPERTS": experts, "EXPERTS": max(experts, 1)},
        num_warps=2,
        max_registers=128,
        max_shared_bytes=8192,
    )


def _mixture(experts: int, top_k: int, hidden: int) -> list[KernelCase]:
    """What stands around a mixture's products."""
    floats = dict.fromkeys(("logits_ptr", "bias_ptr", "weights_ptr", "gate_ptr", "scale", "alpha", "limit"), "fp32")
    types = {name: kind if name in ("scale", "alpha", "limit") else f"*{kind}" for name, kind in floats.items()}
    types |= dict.fromkeys(("y_ptr", "shared_ptr", "out_ptr", "gate_up_ptr"), "*bf16")
    types |= dict.fromkeys(("order_ptr", "source_ptr", "places_ptr", "offsets_ptr"), "*i64")
    types |= {"ids_ptr": "*i32", "num_assignments": "i32"}
    choose = {"NUM_EXPERTS": experts, "EXPERTS": experts, "TOP_K": top_k, "LANES": top_k}
    choose |= {"SIGMOID": False, "RENORMALIZE": True, "HAS_BIAS": False}
    combine = {"SIZE": hidden, "TOP_K": top_k, "HAS_SHARED": True, "HAS_GATE": True, "BLOCK": 1024}
    sort = {"NUM_EXPERTS": experts, "TOP_K": top_k, "BLOCK": 1024}
    swiglu = {"SIZE": hidden, "BLOCK": 1024}
    return [
        KernelCase("experts choose", routing.choose_kernel, types, choose, 1, 64, 1024, wide_loads=False),
        KernelCase("experts sort", routing.sort_kernel, types, sort, 4, 96, 8192, wide_loads=False),
        KernelCase("experts combine", moe.combine_kernel, types, combine, 4, 96, 1024),
        KernelCase("experts clamped swiglu", moe.clamped_swiglu_kernel, types, swiglu, 4, 64, 1024),
    ]


def product_cases() -> list[KernelCase]:
    """Llama-3.1-8B's output projection; a mixture's in the shapes of Qwen3-30B-A3B, in mxfp4 of gpt-oss-120b."""
    return [
        *_product("int8", "int8", 4096, 4096),
        *_product("fp8", "fp8", 4096, 4096),
        *_product("fp8 g128", "fp8 groups", 4096, 4096, group=128),
        *_product("w4 g128", "w4", 4096, 4096, group=128),
        *_product("w4 g32", "w4", 4096, 4096, group=32),
        *_product("experts mxfp4", "mxfp4", 5760, 2880, experts=128, group=64),
        *_product("experts bf16", "dense", 1536, 2048, experts=128),
        *_product("experts fp8", "fp8", 1536, 2048, experts=128),
        *_product("experts w4 g128", "w4", 1536, 2048, experts=128, group=128),
        _quantize("int8", 4096),
        _quantize("fp8", 4096),
        *_quantize_with("int8", 4096, 14336),
        *_quantize_with("fp8", 4096, 14336),
        *_quantize_with("fp8", 8192, 28672),
        _add_parts("gemm add parts", 4096, 4096, 0),
        _add_parts("gemm add parts experts", 1536, 2048, 128),
        *_mixture(128, 8, 2048),
    ]
