"""Products with weights of 16, 8 and 4 bits, of one matrix and of experts: against exact sums, and row by row."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmserve.kernels.reference import DenseLinearWeight
from llmserve.kernels.triton import gemm, products
from llmserve.kernels.triton.products import choose_tiles, multiply, partition_of
from llmserve.kernels.triton.quantize import quantize
from llmserve.kernels.triton.tables import GemmTiles, gemm_tiles
from llmserve.kernels.triton.weights import (
    BYTE_DTYPES,
    PackedWeight,
    pack_byte_rows,
    pack_bytes,
    pack_group_rows,
    pack_mxfp4_rows,
    stack_experts,
)
from llmserve.kernels.weight_formats import W4A16_GROUPS, row_bytes
from tests.kernels.cpu_cases import relative_error
from tests.kernels.triton.interpreter import KernelFault
from tests.kernels.triton.triton_cases import DEVICE, IS_INTERPRETED, triton_ops
from tests.models import checkpoint_packers as packers

NEVER, ALWAYS = 0, 10**9  # share partitions out
SMALL = (GemmTiles(16, 16, 4, 2), GemmTiles(32, 64, 4, 2))
BYTE_FORMATS = ["int8", "fp8"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def needs_fp8(fmt: str) -> None:
    if fmt.startswith("fp8") and fmt not in triton_ops().weight_formats:
        pytest.skip("this GPU has no fp8")


def random_rows(fmt: str, n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 4 bits as in a file, and the float64 [n, k] they are: every number and zero point there is."""
    generator = torch.Generator().manual_seed(seed)
    group = W4A16_GROUPS[fmt] or k
    numbers = torch.randint(0, 16, (n, k), generator=generator)
    zeros = torch.randint(0, 16, (n, k // group), generator=generator)
    scales = (torch.rand(n, k // group, generator=generator) * 0.1 + 0.01).half()
    pairs = (numbers[:, 0::2] | numbers[:, 1::2] << 4).to(torch.uint8)
    raw = torch.cat((pairs, scales.view(torch.uint8), zeros.to(torch.uint8)), dim=1)
    assert raw.shape == (n, row_bytes(fmt, k))
    meaning = (numbers - zeros.repeat_interleave(group, 1)).double() * scales.double().repeat_interleave(group, 1)
    return raw.to(DEVICE), meaning


def exact_bytes(fmt: str, n: int, k: int) -> tuple[PackedWeight, torch.Tensor]:
    """Small integers with the largest value present are their own quantisation."""
    weight = torch.randint(-8, 9, (n, k)).float()
    weight[:, 0] = 127 if fmt == "int8" else 448
    return pack_bytes(weight.to(DEVICE), None, fmt), weight.double()


class TestBytes:
    @pytest.mark.parametrize(("n", "k"), [(1, 1), (40, 96), (130, 1100)])
    @pytest.mark.parametrize("fmt", BYTE_FORMATS)
    def test_any_weights(self, fmt: str, n: int, k: int) -> None:
        needs_fp8(fmt)
        ops = triton_ops()
        weight, bias = torch.randn(n, k), torch.randn(n)
        for offset in (None, bias):
            packed = ops.pack_linear(weight.to(DEVICE), None if offset is None else offset.to(DEVICE), fmt)
            assert packed.nbytes == ops.linear_bytes(fmt, n, k, torch.float32, offset is not None)
            for m in (0, 1, 17):
                x = torch.randn(m, k)
                expected = x.double() @ weight.double().T + (0 if offset is None else offset.double())
                actual = ops.linear(x.to(DEVICE), packed)
                assert actual.shape == (m, n)
                if m:
                    assert relative_error(actual.cpu(), expected) < 6e-2, m

    @pytest.mark.parametrize("fmt", BYTE_FORMATS)
    @pytest.mark.parametrize("descriptors", [False, True])
    def test_exact_where_quantisation_is(self, fmt: str, descriptors: bool) -> None:
        """Bit by bit, split or not, by pointers or descriptors, whatever the tile."""
        needs_fp8(fmt)
        weight, meaning = exact_bytes(fmt, 70, 1104)
        x = torch.randint(-8, 9, (20, 1104)).float()
        x[:, 0] = meaning[0, 0]
        tiles = [replace(tile, descriptors=descriptors) for tile in SMALL]
        for how in (NEVER, ALWAYS):
            for tile in tiles:
                found = multiply(x.to(DEVICE), weight, torch.float32, (tile,), how)
                assert torch.equal(found.cpu(), (x.double() @ meaning.T).float())

    @pytest.mark.parametrize("fmt", BYTE_FORMATS)
    def test_rows_as_they_lie_in_a_file(self, fmt: str) -> None:
        needs_fp8(fmt)
        scale, data = torch.rand(24, 1) + 0.5, torch.randint(-8, 9, (24, 96)).to(BYTE_DTYPES[fmt])
        raw = torch.cat((scale.view(torch.uint8), data.view(torch.uint8)), dim=1).to(DEVICE)
        packed = triton_ops().pack_quantized(raw, fmt)
        assert torch.equal(packed.data.cpu().view(torch.uint8), data.view(torch.uint8))  # type: ignore[attr-defined]
        x = torch.randn(3, 96)
        expected = x.double() @ (data.double() * scale.double()).T
        assert relative_error(triton_ops().linear(x.to(DEVICE), packed).cpu(), expected) < 4e-2

    @pytest.mark.parametrize("fmt", BYTE_FORMATS)
    def test_quantisation_is_per_token_and_extremes_stay_in_their_row(self, fmt: str) -> None:
        needs_fp8(fmt)
        x = torch.randn(5, 300)
        x[1, 7], x[2, 9], x[3] = float("nan"), float("inf"), 0.0
        rows = quantize(x.to(DEVICE), BYTE_DTYPES[fmt])
        quantised, scale = rows.values.cpu(), rows.scales.cpu()
        assert scale[1].isnan()
        assert not scale[2].isfinite()
        assert (quantised[3].float() == 0).all()
        back = quantised[[0, 4]].float() * scale[[0, 4], None]
        assert relative_error(back, x[[0, 4]]) < (0.005 if fmt == "int8" else 0.04)


def random_tiles(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of fp8 with a scale, a power of two, for each 128 inputs; and the float64 [n, k] they are."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([0.5, 1.0, 2.0])[torch.randint(0, 3, (n, k // 128), generator=generator)]
    numbers = torch.randint(-8, 9, (n, k), generator=generator).to(torch.float8_e4m3fn)
    raw = torch.cat((scales.view(torch.uint8), numbers.view(torch.uint8)), dim=1)
    assert raw.shape == (n, row_bytes("fp8_g128", k))
    return raw.to(DEVICE), numbers.double() * scales.double().repeat_interleave(128, 1)


@pytest.mark.parametrize("descriptors", [False, True])
def test_fp8_in_groups(descriptors: bool) -> None:
    """Exact, as the numbers are; split or not."""
    needs_fp8("fp8")
    raw, meaning = random_tiles(40, 1280)
    weight = triton_ops().pack_quantized(raw, "fp8_g128")
    assert weight.nbytes == triton_ops().linear_bytes("fp8_g128", 40, 1280, torch.bfloat16, False)
    assert isinstance(weight, PackedWeight)
    x = torch.randint(-8, 9, (20, 1280)).float()
    x[:, 0] = 448
    for how in (NEVER, ALWAYS):
        tile = replace(SMALL[0], descriptors=descriptors)
        found = multiply(x.to(DEVICE), weight, torch.float32, (tile,), how)
        assert torch.equal(found.cpu(), (x.double() @ meaning.T).float())


class TestFourBits:
    @pytest.mark.parametrize(
        ("fmt", "n", "k", "dtype"),
        [("w4a16_g32", 1, 32, torch.float32), ("w4a16_g32", 70, 96, torch.bfloat16),
         ("w4a16_g64", 33, 192, torch.float16), ("w4a16_g128", 70, 640, torch.bfloat16),
         ("w4a16_g128", 33, 640, torch.float16), ("w4a16_g128", 33, 128, torch.float32),
         ("w4a16", 40, 96, torch.bfloat16), ("w4a16", 17, 256, torch.float16), ("w4a16", 17, 64, torch.float32)],
    )  # fmt: skip
    def test_any_group(self, fmt: str, n: int, k: int, dtype: torch.dtype) -> None:
        ops = triton_ops()
        raw, meaning = random_rows(fmt, n, k)
        bias = torch.randn(n).to(dtype)
        packed = ops.pack_quantized(raw, fmt, bias.to(DEVICE))
        assert packed.nbytes == ops.linear_bytes(fmt, n, k, dtype, True)
        assert (packed.out_features, packed.in_features, packed.format) == (n, k, fmt)
        for m in (1, 19):
            x = torch.randn(m, k).to(dtype)
            wide = ops.linear(x.to(DEVICE), packed, torch.float32)
            expected = x.double() @ meaning.T + bias.double()
            assert relative_error(wide.cpu(), expected) < 1e-5  # x is the only thing that was rounded
            assert torch.equal(ops.linear(x.to(DEVICE), packed), wide.to(dtype))

    def test_every_number_is_in_its_place(self) -> None:
        """Each row of the unit matrix picks a column: bit by bit."""
        raw, meaning = random_rows("w4a16_g64", 20, 256)
        found = multiply(
            torch.eye(256, device=DEVICE), pack_group_rows(raw, None, "w4a16_g64"), torch.float32, SMALL, 0
        )
        assert torch.equal(found.cpu(), meaning.T.float())

    def test_extremes_stay_in_their_row(self) -> None:
        raw, meaning = random_rows("w4a16_g32", 20, 64)
        x = torch.randn(5, 64)
        x[1, 7], x[2, 9], x[3] = float("nan"), float("inf"), 0.0
        found = triton_ops().linear(x.to(DEVICE), pack_group_rows(raw, None, "w4a16_g32")).cpu()
        assert found[1].isnan().all()
        assert not found[2].isfinite().all()
        assert (found[3] == 0).all()
        assert relative_error(found[[0, 4]], x[[0, 4]].double() @ meaning.T) < 1e-5

    def test_a_format_that_is_not_known_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"know int8, fp8, fp8_g128, mxfp4, w4a16.* not 'q4_1'"):
            triton_ops().pack_quantized(torch.zeros(1, 20, dtype=torch.uint8), "q4_1")
        with pytest.raises(ValueError, match="know dense, int8, fp8 here, not 'w4a16'"):
            triton_ops().pack_linear(torch.zeros(1, 32), None, "w4a16")


def random_mxfp4(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of E2M1 and exponents as they are published, and the float64 [n, k] they are."""
    blocks, exponents, meaning = packers.mxfp4((n, k), seed)
    raw = torch.cat((blocks.flatten(1), exponents), dim=1)
    assert raw.shape == (n, row_bytes("mxfp4", k))
    return raw.to(DEVICE), meaning.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(1, 64), (40, 192), (70, 704)])
def test_mxfp4(n: int, k: int, dtype: torch.dtype) -> None:
    ops = triton_ops()
    raw, meaning = random_mxfp4(n, k)
    packed = ops.pack_quantized(raw, "mxfp4", torch.ones(n, device=DEVICE))
    assert packed.nbytes == ops.linear_bytes("mxfp4", n, k, torch.float32, True)
    x = torch.randn(19, k).to(dtype)
    found = ops.linear(x.to(DEVICE), packed, torch.float32).cpu()
    assert relative_error(found, x.double() @ meaning.T + 1) < 1e-5  # the weights are exact in bfloat16


def test_every_number_of_mxfp4_and_the_ends_of_its_exponents() -> None:
    codes, exponents = torch.arange(16).repeat(4).view(1, 64), torch.tensor([[2, 200]])
    raw = torch.cat((codes[:, 0::2] + 16 * codes[:, 1::2], exponents), dim=1).to(torch.uint8)
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    meaning = numbers.repeat(4) * 2.0 ** (exponents - 127).double().repeat_interleave(32)
    weight = pack_mxfp4_rows(raw.to(DEVICE), None)
    found = multiply(torch.eye(64, device=DEVICE), weight, torch.float32, SMALL, NEVER)[:, 0]
    assert torch.equal(found.cpu(), meaning.float())


def weight_of(kind: str, n: int, k: int, seed: int = 0) -> PackedWeight:
    if kind.startswith("w4"):
        return pack_group_rows(random_rows(kind, n, k, seed)[0], None, kind)
    if kind == "mxfp4":
        return pack_mxfp4_rows(random_mxfp4(n, k, seed)[0], None)
    if kind == "fp8_g128":
        return pack_byte_rows(random_tiles(n, k, seed)[0], None, kind)
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return pack_bytes(dense, torch.randn(n).to(DEVICE), kind)


@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8_g128", "mxfp4", "w4a16_g128"])
def test_rows_do_not_depend_on_the_batch(kind: str) -> None:
    """Whatever the tile, and whether partitions are shared out."""
    needs_fp8(kind)
    weight = weight_of(kind, 40, 640)
    x = torch.randn(40, 640).to(DEVICE, torch.bfloat16)
    whole = multiply(x, weight, x.dtype, SMALL, NEVER)
    for first, end in ((0, 1), (3, 9), (20, 40)):
        some = multiply(x[first:end].clone(), weight, x.dtype, SMALL, ALWAYS)
        assert torch.equal(some, whole[first:end]), (first, end)


class TestExperts:
    """Rows sorted by expert; experts with no row, with one and with more than a tile."""

    COUNTS = (0, 3, 0, 20, 1, 0)

    def offsets(self) -> torch.Tensor:
        return torch.tensor([0, *self.COUNTS]).cumsum(0).int().to(DEVICE)

    @pytest.mark.parametrize("kind", ["dense", "int8", "fp8", "fp8_g128", "mxfp4", "w4a16_g32"])
    @pytest.mark.parametrize("how", [NEVER, ALWAYS])
    def test_each_row_meets_its_expert(self, kind: str, how: int) -> None:
        """To the same bits as that expert's matrix alone."""
        needs_fp8(kind)
        n, k = 40, 640
        if kind == "dense":
            dense = [DenseLinearWeight(torch.randn(n, k).to(DEVICE), torch.randn(n).to(DEVICE)) for _ in self.COUNTS]
            alone = [stack_experts([weight], 1) for weight in dense]
            stacked = stack_experts(dense, len(dense))
        else:
            alone = [weight_of(kind, n, k, seed) for seed in range(len(self.COUNTS))]
            stacked = stack_experts(alone, len(alone))
        assert stacked.nbytes == sum(weight.nbytes for weight in alone)
        x = torch.randn(sum(self.COUNTS), k).to(DEVICE)
        found = multiply(x, stacked, torch.float32, SMALL, how, self.offsets())
        first = 0
        for expert, count in enumerate(self.COUNTS):
            some = x[first : first + count].clone()
            only = self.offsets()[[0, 0]].clone()
            only[1] = count
            if count:
                mine = alone[expert]
                expected = multiply(some, mine, torch.float32, SMALL, how, only if mine.num_experts else None)
                assert torch.equal(found[first : first + count], expected), expert
            first += count

    def test_descriptors_read_no_further_than_the_last_expert(self) -> None:
        dense = [DenseLinearWeight(torch.randn(40, 64).to(DEVICE), None) for _ in self.COUNTS]
        stacked, x = stack_experts(dense, len(dense)), torch.randn(sum(self.COUNTS), 64).to(DEVICE)
        tiles = tuple(replace(tile, descriptors=True) for tile in SMALL)
        found = multiply(x, stacked, torch.float32, tiles, NEVER, self.offsets())
        assert torch.equal(found, multiply(x, stacked, torch.float32, SMALL, NEVER, self.offsets()))

    def test_experts_packed_in_different_ways_are_refused(self) -> None:
        with pytest.raises(ValueError, match="int8 beside dense"):
            stack_experts(
                [DenseLinearWeight(torch.randn(8, 32), None), pack_bytes(torch.randn(8, 32), None, "int8")], 2
            )


def test_partitions_follow_from_the_weight() -> None:
    assert partition_of(4096, 4096) == 512  # 32 tiles of columns x 8 partitions
    assert partition_of(128256, 4096) == 4096  # columns enough
    assert partition_of(10, 100) == 128


def test_tiles_follow_from_the_rows() -> None:
    tiles = gemm_tiles("sm_90", 8)
    assert [choose_tiles(tiles, rows).rows for rows in (1, 16, 17, 64, 65, 9999)] == [16, 16, 64, 64, 128, 128]
    assert gemm_tiles("sm_86", 4) == gemm_tiles("sm_80", 4)
    for architecture in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for bits in (4, 8, 16, 32):
            assert all(products._DEPTH % 16 == 0 and tile.rows >= 16 for tile in gemm_tiles(architecture, bits))


def test_a_row_of_a_file_is_kept_as_it_is() -> None:
    raw = torch.randint(0, 255, (5, row_bytes("int8", 33)), dtype=torch.uint8)
    packed = pack_byte_rows(raw, None, "int8")
    assert torch.equal(packed.data, raw[:, 4:].view(torch.int8))


# Changes to `gemm.py` that a person could make by mistake: (what stands there, what would, the kind that shows it).
PLANTED = [
    ("(row < end_row)[None, :], (line < end_line)[:, None]", "(row < 99)[None, :], (line < end_line)[:, None]", "int8"),
    ("& (at < K)[None, :]", "& (at < K + 1)[None, :]", "int8"),
    ("_inside = row < end_row, line < end_line", "_inside = row == row, line < end_line", "int8"),
    ("_inside = row < end_row, line < end_line", "_inside = row < end_row, line == line", "w4a16_g32"),
    ("(pair & 15).to(tl.int8) - zero[:, None]", "(pair & 15).to(tl.int8) - 8", "w4a16_g32"),
    ("group = group_at + (first // GROUP) * N", "group = group_at + (first // DEPTH) * N", "w4a16_g128"),
    ("x_at + first + DEPTH // 2", "x_at + first + 1", "w4a16_g32"),
    ("(line - column).to(tl.int64) * (K // GROUP)", "(line - column).to(tl.int64)", "w4a16_g32"),
    ("mine = tl.sum((end_tile <= tile)", "mine = tl.sum((end_tile < tile)", "int8"),
    ("start + (tile - end_tile + tiles) * ROWS", "start", "int8"),
    ("tl.where(code >= 8, -amount, amount)", "amount", "mxfp4"),
    ("(2 + half) << tl.maximum(exponent - 1, 0)", "(2 + half) << exponent", "mxfp4"),
    ("tl.load(exponent_at + N, mask", "tl.load(exponent_at, mask", "mxfp4"),
    ("(line - expert * N)[:, None]", "line[:, None]", "int8"),
    ("part * PARTITION, tl.minimum(part * PARTITION + PARTITION, K)", "part * PARTITION, K", "int8"),
]


@pytest.mark.skipif(not IS_INTERPRETED, reason="the faults are found by the interpreter")
@pytest.mark.parametrize(("stands", "planted", "kind"), PLANTED)
def test_planted_faults_are_caught(stands: str, planted: str, kind: str, tmp_path: Path, monkeypatch) -> None:
    """By another result than the intact kernel's or by the sanitiser."""
    source = Path(gemm.__file__).read_text()
    assert stands in source
    changed = tmp_path / "changed_gemm.py"
    changed.write_text(source.replace(stands, planted))
    spec = importlib.util.spec_from_file_location("changed_gemm", changed)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    n, k, counts = 24, {"w4a16_g32": 96, "w4a16_g128": 256, "mxfp4": 128}.get(kind, 608), (0, 3, 19)
    weights = stack_experts([weight_of(kind, n, k, seed) for seed in range(3)], 3)
    if kind == "w4a16_g128":
        weights = replace(weights, depth=32)  # less than a group
    offsets, x = torch.tensor([0, *counts]).cumsum(0).int(), torch.randn(22, k)

    expected = multiply(x, weights, torch.float32, SMALL[:1], NEVER, offsets)
    monkeypatch.setattr(products, "gemm_kernel", module.gemm_kernel)
    try:
        found = multiply(x, weights, torch.float32, SMALL[:1], NEVER, offsets)
    except KernelFault:
        return
    assert not torch.equal(found, expected)
