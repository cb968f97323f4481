"""What is measured, on a device whose every byte the test has placed; and the shares that models state."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llmserve.config import parse_memory
from llmserve.errors import ConfigError, InsufficientMemoryError
from llmserve.messages import MemoryPlan
from llmserve.worker.device import Device
from llmserve.worker.memory import MeasuredMemory, usable_bytes
from llmserve.worker.memory_profile import measure_memory
from tests.worker.fake_device import FakeDevice

MIB = 2**20
BLOCK = 3 * MIB
GPU = torch.device("cuda")
PLAN = MemoryPlan(
    device="cuda",
    dtype="bfloat16",
    weight_format="dense",
    weight_bytes=0,
    activation_bytes=0,
    kv_cache_bytes=100 * BLOCK,
    available_bytes=0,
    block_size=16,
    num_blocks=100,
    num_tokens=1600,
    max_model_len=512,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    vocab_size=320,
)


class Trial:
    """Takes 10 MiB for its buffers, 2 blocks, 50 MiB for steps; 40 MiB for the first two graphs, then 1 or 3 in
    turn."""

    num_largest_graphs = 2

    def __init__(self, plan: MemoryPlan, device: Device, num_graphs: int) -> None:
        assert isinstance(device, FakeDevice)
        assert plan.num_blocks == 1
        self.num_graph_keys = num_graphs
        self._device = device
        device.allocated += 10 * MIB + 2 * BLOCK

    def run_largest_steps(self) -> None:
        self._device.allocated += 50 * MIB
        self._device.cached += 50 * MIB

    def capture_step_by_step(self) -> Iterator[int]:
        for number in range(1, self.num_graph_keys + 1):
            self._device.allocated += (20 if number <= 2 else 1 + 2 * (number % 2)) * MIB
            yield number


@pytest.mark.parametrize(("num_graphs", "graph_mib"), [(0, 0), (2, 40), (4, 40 + 3 + 1), (42, 40 + 2 * 40)])
def test_what_a_step_and_the_graphs_take_is_seen(num_graphs: int, graph_mib: int) -> None:
    device = FakeDevice()
    free_at_start = device.free_bytes()
    device.allocated += 123 * MIB  # the weights
    measured = measure_memory(device, lambda plan, at: Trial(plan, at, num_graphs), PLAN, free_at_start)
    assert measured == MeasuredMemory(123 * MIB, 60 * MIB + BLOCK, graph_mib * MIB)


def test_a_model_takes_the_share_it_was_given_and_no_more_than_is_free() -> None:
    free, total = 60 * 2**30, 80 * 2**30
    assert usable_bytes(0.5, GPU, free, total) == 40 * 2**30
    assert usable_bytes(30.0 * 2**30, GPU, free, total) == 30 * 2**30
    assert usable_bytes(None, GPU, free, total) == int(0.9 * free)
    assert usable_bytes(0.1, torch.device("cpu"), free, total) == free
    with pytest.raises(InsufficientMemoryError, match=r"asks for 72\.00 GiB of the device's 80\.00 GiB, but only 60"):
        usable_bytes(0.9, GPU, free, total)


def test_two_models_fit_if_their_shares_do() -> None:
    total = 80 * 2**30
    first = usable_bytes(0.6, GPU, total, total)
    assert usable_bytes(0.4, GPU, total - first, total) + first <= total
    with pytest.raises(InsufficientMemoryError, match="Give each model a share"):
        usable_bytes(0.5, GPU, total - first, total)


@pytest.mark.parametrize(
    ("text", "value"), [("0.6", 0.6), ("60%", 0.6), ("1", 1.0), ("100%", 1.0), ("40GiB", 40 * 2**30), ("512M", 512e6)]
)
def test_memory_is_a_share_or_an_amount(text: str, value: float) -> None:
    assert parse_memory(text) == value


@pytest.mark.parametrize("text", ["much", "0%", "120%", "-1", "40 apples"])
def test_memory_that_is_neither_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="memory"):
        parse_memory(text)
