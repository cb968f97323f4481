"""Tile sizes by architecture. Knows no kernels.

Chosen so far by what compiles without spilling; `benchmarks/tune_kernels.py` prints rows measured on a GPU. Nothing is
tuned while serving: a launch takes the row of its architecture and shape from here. Changing a row changes
the rounding of results, never between two batches of one server.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """Of `attention_kernel`."""

    rows: int  # queries times grouped heads a program; 64 is wgmma's least
    keys: int  # keys a tile
    partition: int  # keys whose sum starts from zero, and that one program takes if partitions are shared out
    num_warps: int
    num_stages: int


# (architecture, head size padded to a power of two, bytes of a cached element): no registers spilt, as compiled for
# docs/kernels.md. 8 warps where 4 would spill.
_ATTENTION = {
    ("sm_80", 64, 2): AttentionTiles(64, 32, 512, 8, 3),
    ("sm_80", 128, 2): AttentionTiles(64, 32, 512, 8, 3),
    ("sm_80", 256, 2): AttentionTiles(32, 32, 512, 8, 2),
    ("sm_90", 64, 2): AttentionTiles(64, 64, 512, 4, 3),
    ("sm_90", 128, 2): AttentionTiles(64, 32, 512, 4, 4),
    ("sm_90", 128, 1): AttentionTiles(64, 32, 512, 8, 3),
    ("sm_90", 256, 2): AttentionTiles(64, 32, 512, 8, 2),
    ("sm_100", 64, 2): AttentionTiles(64, 64, 512, 4, 3),
    ("sm_100", 128, 2): AttentionTiles(64, 32, 512, 4, 4),
    ("sm_100", 256, 2): AttentionTiles(32, 32, 512, 8, 2),
    ("gfx942", 64, 2): AttentionTiles(64, 64, 512, 4, 2),
    ("gfx942", 128, 2): AttentionTiles(64, 32, 512, 4, 2),
    ("gfx942", 256, 2): AttentionTiles(64, 16, 512, 8, 2),
}
_FLOAT32 = AttentionTiles(16, 16, 512, 8, 2)  # no tensor cores: small tiles, for correctness rather than speed


def attention_tiles(architecture: str, head_dim: int, cache_bytes: int) -> AttentionTiles:
    """`architecture` as "sm_90" or "gfx942", `cache_bytes` of a cached element. What has no row of its
    own takes that of 16 bits; an architecture without rows, those of the nearest: it fits, tuned or not."""
    if cache_bytes == 4:
        return _FLOAT32
    dim = max(1 << (head_dim - 1).bit_length(), 64)
    family = _family(architecture)
    return _ATTENTION.get((family, dim, cache_bytes)) or _ATTENTION[family, dim, 2]


def gemm_stages(architecture: str) -> int:
    """How many tiles of `gemm_kernel` are on their way at once: AMD's shared memory holds two."""
    return 2 if architecture.startswith("gfx") else 4


def _family(architecture: str) -> str:
    if architecture.startswith("gfx"):
        return "gfx942"
    return {"sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100"}.get(architecture, "sm_80")
