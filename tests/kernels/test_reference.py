"""The reference ops against formulas written out naively in float64, and their invariance to the batch, to the bit."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

from llmserve.kernels.cpu_linear import OneDnnLinearWeight, can_pack
from llmserve.kernels.ops import AttentionMetadata, KVCacheSpec
from llmserve.kernels.reference import ReferenceOps

OPS = ReferenceOps()
CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestLinear:
    @pytest.mark.parametrize("num_threads", [1, 2])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("in_features", "out_features"),
        [(64, 101), (576, 960), (576, 3072), (1536, 576), (2048, 2048), (96, 1), (577, 33)],
    )
    def test_a_row_is_the_same_bits_in_any_batch(self, num_threads, dtype, in_features, out_features):
        if not can_pack(torch.empty(1, dtype=dtype)):
            pytest.skip(f"oneDNN has no {dtype} on this CPU")
        weight = OPS.pack_linear(randn(out_features, in_features, seed=1, dtype=dtype) * 0.05, None)
        assert isinstance(weight, OneDnnLinearWeight)
        x = randn(100, in_features, seed=2, dtype=dtype)
        torch.set_num_threads(num_threads)
        try:
            whole = OPS.linear(x, weight)
            parts = {(i, n): OPS.linear(x[i : i + n], weight) for n in (1, 2, 7, 32) for i in (0, 5, 64)}
        finally:
            torch.set_num_threads(1)
        for (start, size), part in parts.items():
            assert torch.equal(part, whole[start : start + size]), (start, size)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("has_bias", [False, True])
    @pytest.mark.parametrize("num_rows", [0, 1, 2, 9])
    def test_equals_the_formula(self, dtype, has_bias, num_rows):
        matrix, bias = randn(40, 24, seed=1, dtype=dtype), randn(40, seed=2, dtype=dtype) if has_bias else None
        x = randn(num_rows, 24, seed=3, dtype=dtype)
        expected = x.double() @ matrix.double().T + (bias.double() if bias is not None else 0.0)
        weight = OPS.pack_linear(matrix, bias)
        y = OPS.linear(x, weight)
        assert (y.shape, y.dtype) == ((num_rows, 40), dtype)
        torch.testing.assert_close(y.double(), expected, atol=4 * torch.finfo(dtype).eps * 8, rtol=0.01)
        assert (weight.out_features, weight.in_features, weight.format) == (40, 24, "dense")
        assert weight.nbytes == (40 * 24 + (40 if has_bias else 0)) * dtype.itemsize

    def test_the_unpacked_matrix_is_released(self):
        matrix = randn(64, 64)
        watched = weakref.ref(matrix)
        packed = OPS.pack_linear(matrix)
        del matrix
        assert isinstance(packed, OneDnnLinearWeight)
        assert watched() is None

    def test_unknown_format(self):
        with pytest.raises(ValueError, match="int3"):
            OPS.pack_linear(randn(4, 4), None, "int3")


class TestNorms:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_equals_the_formula(self, dtype):
        x, weight = randn(5, 37, dtype=dtype), randn(37, seed=1)
        expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        y = OPS.rms_norm(x, weight, 1e-5)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, atol=1e-6, rtol=torch.finfo(dtype).eps * 2)

    def test_add_is_in_place(self):
        x, residual, weight = randn(5, 16), randn(5, 16, seed=1), randn(16, seed=2)
        total = x + residual
        y = OPS.add_rms_norm(x, residual, weight, 1e-6)
        assert torch.equal(residual, total)
        assert torch.equal(y, OPS.rms_norm(total, weight, 1e-6))

    def test_a_row_is_the_same_bits_in_any_batch(self):
        x, weight = randn(100, 4096), randn(4096, seed=1)
        whole = OPS.rms_norm(x, weight, 1e-6)
        assert all(torch.equal(OPS.rms_norm(x[i : i + 1], weight, 1e-6), whole[i : i + 1]) for i in range(100))


def test_embedding_and_gates():
    table, ids = randn(9, 4), torch.tensor([8, 0, 8])
    assert torch.equal(OPS.embedding(ids, table), torch.stack([table[8], table[0], table[8]]))
    gate_up = randn(3, 10, seed=4).double()
    gate, up = gate_up[:, :5], gate_up[:, 5:]
    torch.testing.assert_close(OPS.silu_and_mul(gate_up), gate / (1 + (-gate).exp()) * up)
    gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    torch.testing.assert_close(OPS.gelu_and_mul(gate_up), gelu * up)


def build_meta(query_lens: list[int], seq_lens: list[int], block_size: int, seed: int = 0) -> AttentionMetadata:
    """A ragged batch whose blocks are scattered; unused table entries point nowhere."""
    width = -(-max(seq_lens) // block_size)
    order = iter(torch.randperm(width * len(seq_lens), generator=torch.Generator().manual_seed(seed)).tolist())
    table = torch.full((len(seq_lens), width), -1, dtype=torch.int32)
    positions, slots, starts = [], [], [0]
    for seq, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        for column in range(-(-seq_len // block_size)):
            table[seq, column] = next(order)
        for position in range(seq_len - query_len, seq_len):
            positions.append(position)
            slots.append(int(table[seq, position // block_size]) * block_size + position % block_size)
        starts.append(starts[-1] + query_len)
    return AttentionMetadata(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.tensor(slots),
        positions=torch.tensor(positions),
        max_seq_len=max(seq_lens),
    )


class TestRotaryAndCache:
    @pytest.mark.parametrize("has_norms", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_rotation_of_each_pair(self, has_norms, dtype):
        heads, kv_heads, d, block_size = 3, 1, 8, 4
        meta = build_meta([5, 1], [5, 7], block_size)
        cache = OPS.allocate_kv_cache(KVCacheSpec(kv_heads, d, block_size, dtype), 8, CPU)
        qkv = randn(6, (heads + 2 * kv_heads) * d, dtype=dtype)
        angles = torch.outer(torch.arange(16.0), torch.tensor([1.0, 0.5, 0.1, 0.01]))
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
        q_norm, k_norm = (randn(d, seed=1), randn(d, seed=2)) if has_norms else (None, None)

        q = OPS.rotary_and_cache(qkv, cos_sin, cache, meta, heads, q_norm, k_norm, 1e-6)

        assert (q.shape, q.dtype) == ((6, heads, d), dtype)
        vectors = qkv.view(6, heads + 2 * kv_heads, d)
        tolerance = {"atol": 4 * torch.finfo(dtype).eps, "rtol": 4 * torch.finfo(dtype).eps}
        for row, (position, slot) in enumerate(zip(meta.positions.tolist(), meta.slot_mapping.tolist(), strict=True)):
            for head in range(heads + kv_heads):
                x = vectors[row, head]
                norm = q_norm if head < heads else k_norm
                if norm is not None:
                    x = OPS.rms_norm(x, norm, 1e-6)
                pairs = torch.complex(x[: d // 2].double(), x[d // 2 :].double())
                turned = pairs * torch.polar(torch.ones(d // 2).double(), angles[position].double())
                expected = torch.cat((turned.real, turned.imag)).to(dtype)
                found = q[row, head] if head < heads else cache.k.flatten(0, 1)[slot, head - heads]
                torch.testing.assert_close(found, expected, **tolerance)
            assert torch.equal(cache.v.flatten(0, 1)[slot, 0], vectors[row, -1])


class TestPagedAttention:
    def naive(self, q, cache, meta, scale, window, cap):
        """One query, one head at a time, in float64."""
        heads, block_size, kv_heads = q.shape[1], cache.k.shape[1], cache.k.shape[2]
        out = torch.zeros(q.shape, dtype=torch.float64)
        for seq in range(len(meta.seq_lens)):
            for row in range(meta.query_start_loc[seq], meta.query_start_loc[seq + 1]):
                position = int(meta.positions[row])
                first = max(0, position - window + 1) if window else 0
                slots = [
                    int(meta.block_table[seq, p // block_size]) * block_size + p % block_size
                    for p in range(first, position + 1)
                ]
                for head in range(heads):
                    k = cache.k.flatten(0, 1)[slots, head * kv_heads // heads].double()
                    v = cache.v.flatten(0, 1)[slots, head * kv_heads // heads].double()
                    scores = k @ q[row, head].double() * scale
                    scores = cap * torch.tanh(scores / cap) if cap else scores
                    out[row, head] = scores.softmax(0) @ v
        return out.flatten(1)

    @pytest.mark.parametrize(("heads", "kv_heads", "d", "block_size"), [(4, 2, 16, 4), (3, 1, 24, 16), (2, 2, 64, 3)])
    @pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (5, 0.0), (140, 3.0), (0, 2.0)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_the_formula(self, heads, kv_heads, d, block_size, window, cap, dtype):
        meta = build_meta([1, 7, 1, 140, 1, 3], [1, 7, 130, 300, 299, 129], block_size)
        cache = OPS.allocate_kv_cache(KVCacheSpec(kv_heads, d, block_size, dtype), 1024, CPU)
        cache.k.copy_(randn(*cache.k.shape, seed=1))
        cache.v.copy_(randn(*cache.v.shape, seed=2))
        q = randn(153, heads, d, seed=3, dtype=dtype)
        found = OPS.paged_attention(q, cache, meta, 0.3, window, cap)
        assert (found.shape, found.dtype) == ((153, heads * d), dtype)
        expected = self.naive(q, cache, meta, 0.3, window, cap)
        tolerance = 2e-6 if dtype == torch.float32 else 0.01
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (9, 3)])
    @pytest.mark.parametrize("window", [0, 50])
    def test_a_row_is_the_same_bits_however_the_prompt_is_cut(self, heads, kv_heads, window):
        length, d, block_size = 400, 64, 16
        cache = OPS.allocate_kv_cache(KVCacheSpec(kv_heads, d, block_size, torch.float32), 64, CPU)
        cache.k.copy_(randn(*cache.k.shape, seed=1))
        cache.v.copy_(randn(*cache.v.shape, seed=2))
        q = randn(length, heads, d, seed=3)
        table = build_meta([length], [length], block_size).block_table

        def attend(cuts: list[tuple[int, int]]) -> torch.Tensor:
            """The sequence's rows first..end of each cut, as if each cut were a sequence of the batch."""
            rows = torch.cat([torch.arange(first, end) for first, end in cuts])
            lengths = [end - first for first, end in cuts]
            meta = AttentionMetadata(
                query_start_loc=torch.tensor([0, *lengths]).cumsum(0).int(),
                seq_lens=torch.tensor([end for _, end in cuts], dtype=torch.int32),
                block_table=table.expand(len(cuts), -1),
                slot_mapping=torch.zeros(len(rows), dtype=torch.int64),
                positions=rows,
                max_seq_len=max(end for _, end in cuts),
            )
            return OPS.paged_attention(q[rows], cache, meta, 0.125, window)

        whole = attend([(0, length)])
        assert torch.equal(attend([(i, i + 1) for i in range(length)]), whole)
        assert torch.equal(
            torch.cat([attend([(i, i + 1)]) for i in (0, 1, 127, 128, 255, 399)]), whole[[0, 1, 127, 128, 255, 399]]
        )
        assert torch.equal(attend([(i, min(i + 7, length)) for i in range(0, length, 7)]), whole)
        assert torch.equal(attend([(0, 130), (130, 131), (131, 400)]), whole)

    def test_cache_bytes(self):
        spec = KVCacheSpec(3, 64, 16, torch.bfloat16)
        assert OPS.kv_cache_bytes_per_block(spec) == 2 * 16 * 3 * 64 * 2
        cache = OPS.allocate_kv_cache(spec, 5, CPU)
        assert cache.nbytes == 5 * OPS.kv_cache_bytes_per_block(spec)
        assert not cache.k.any()
        assert not cache.v.any()
