"""Tile sizes by architecture. Knows no kernels.

None of these rows was measured: they are chosen by what compiles without spilling, with enough programs on a
multiprocessor. `benchmarks/tune_kernels.py` prints rows measured on a GPU. Nothing is
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
    ("sm_90", 256, 1): AttentionTiles(64, 16, 512, 8, 2),
    ("sm_90", 256, 2): AttentionTiles(64, 32, 512, 8, 2),
    ("sm_100", 64, 1): AttentionTiles(64, 64, 512, 8, 3),
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


@dataclass(frozen=True, slots=True)
class GemmTiles:
    """Of `gemm_kernel`. What is summed in which order does not depend on them."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # tiles are fetched by the tensor memory accelerator


# (architecture, bits of a weight) -> from few rows to many. 16 rows are the least a matrix instruction takes; 64 and
# more weights on its other side are wgmma's least. On gfx942 the instruction itself would follow from a tile's
# rows, and with it the order of sums: there is one size only.
_GEMM = {
    ("sm_80", 16): (GemmTiles(16, 128, 4, 4), GemmTiles(64, 128, 4, 3), GemmTiles(128, 128, 8, 3)),
    ("sm_90", 16): (GemmTiles(16, 128, 4, 4), GemmTiles(64, 128, 4, 4, True), GemmTiles(128, 128, 8, 4, True)),
    ("sm_100", 16): (GemmTiles(16, 128, 4, 4), GemmTiles(64, 128, 4, 4, True), GemmTiles(128, 128, 8, 4, True)),
    ("gfx942", 16): (GemmTiles(64, 128, 4, 2),),
    ("sm_80", 4): (GemmTiles(16, 64, 4, 4), GemmTiles(64, 128, 8, 3)),
    ("sm_90", 4): (GemmTiles(16, 64, 4, 4), GemmTiles(64, 128, 8, 3)),
    ("sm_100", 4): (GemmTiles(16, 64, 4, 4), GemmTiles(64, 128, 8, 3)),
    ("gfx942", 4): (GemmTiles(64, 128, 8, 2),),
}
_GEMM_FLOAT32 = (GemmTiles(16, 32, 4, 2),)


def gemm_tiles(architecture: str, bits: int) -> tuple[GemmTiles, ...]:
    """From few rows to many, for weights of so many bits; those of 8 bits take the tiles of 16."""
    if bits == 32:
        return _GEMM_FLOAT32
    family = _family(architecture)
    return _GEMM.get((family, bits)) or _GEMM[family, 16]


def has_fp8(architecture: str) -> bool:
    """Whether it converts e4m3: Ada, Hopper and later. AMD's type of that name has another bias."""
    return architecture.startswith("sm_") and int(architecture[3:]) >= 89


def _family(architecture: str) -> str:
    if architecture.startswith("gfx"):
        return "gfx942"
    return {"sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100"}.get(architecture, "sm_80")
