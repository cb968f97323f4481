"""Which shapes get graphs, which graph a step takes, and when graphs are captured."""

from __future__ import annotations

from itertools import pairwise

import pytest

from llmserve.worker.cuda_graphs import CudaGraphs, decode_sizes, smallest_fitting, step_shapes
from llmserve.worker.device_rows import StepShape
from tests.worker.fake_device import FakeDevice


@pytest.mark.parametrize(
    ("max_num_seqs", "max_size", "sizes"),
    [
        (1, 512, [1]),
        (3, 512, [1, 2, 3]),
        (8, 512, [1, 2, 4, 8]),
        (20, 512, [1, 2, 4, 8, 16, 20]),
        (64, 24, [1, 2, 4, 8, 16, 24]),
        (64, 0, []),
    ],
)
def test_a_ladder_ends_with_the_largest_batch(max_num_seqs: int, max_size: int, sizes: list[int]) -> None:
    assert decode_sizes(max_num_seqs, max_size) == sizes


def test_large_ladders_have_wider_steps() -> None:
    sizes = decode_sizes(512, 512)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == 512
    assert 40 < len(sizes) < 50
    assert all(after <= max(before * 2, before + 32) for before, after in pairwise(sizes))


@pytest.mark.parametrize(("max_num_seqs", "max_num_tokens"), [(1, 1), (8, 64), (256, 8192), (300, 300)])
def test_no_shape_is_larger_than_a_step_may_be(max_num_seqs: int, max_num_tokens: int) -> None:
    shapes = step_shapes(max_num_seqs, max_num_tokens, 512)
    assert shapes == sorted(set(shapes))
    assert max(shape.num_tokens for shape in shapes) <= max_num_tokens
    assert max(shape.num_seqs for shape in shapes) <= max_num_seqs
    assert max(shape.num_draws for shape in shapes) <= max_num_seqs + 32
    for num_seqs in range(1, max_num_seqs + 1):
        fitting = smallest_fitting(shapes, StepShape(num_seqs, num_seqs, num_seqs))
        assert fitting is not None
        assert fitting.num_tokens <= max(2 * num_seqs, num_seqs + 32)


def test_a_mixed_step_takes_a_graph_of_few_sequences() -> None:
    shapes = step_shapes(256, 8192, 512)
    assert smallest_fitting(shapes, StepShape(500, 3, 2)) == StepShape(512, 16, 48)
    assert smallest_fitting(shapes, StepShape(9, 1, 9)) == StepShape(16, 16, 16)
    assert smallest_fitting(shapes, StepShape(513, 1, 1)) is None
    assert smallest_fitting([], StepShape(1, 1, 1)) is None


def test_a_graph_is_captured_once_after_its_work_was_done_once() -> None:
    device = FakeDevice()
    done: list[int] = []
    graphs: CudaGraphs[int] = CudaGraphs(device, done.append)
    graphs.capture(4)
    device.synchronize()
    assert (done, len(graphs)) == ([4], 1)
    graphs.run(4)
    graphs.run(2)
    device.synchronize()
    assert done == [4, 4, 2]  # what is drawn is counted: not twice
    assert (len(graphs), device.counts["captures"], device.counts["replays"]) == (2, 2, 1)
