"""On a GPU: graphs, overlap and rows say what the plain engine says on the CPU, and nothing is allocated after the
start.

Without one, the same test bodies run on the fake device: what they call exists, and holds there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.random_model import TINY, RandomWeights, prepare_random_model
from llmserve.engine.assembly import make_core
from llmserve.kernels.ops import Ops
from llmserve.kernels.select import select_ops
from llmserve.messages import EngineRequest, SamplingParams
from llmserve.worker.cuda_graphs import smallest_fitting
from llmserve.worker.device import CudaDevice
from llmserve.worker.device_rows import StepShape
from llmserve.worker.gpu_model_runner import GPUModelRunner, GraphSettings
from llmserve.worker.loader import PreparedModel
from tests.engine.overlap_harness import CONFIG, Engines, Life, live, random_life
from tests.worker.fake_device import FakeDevice

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LOADED_LATE = 2**26  # bytes: CUDA loads a library's kernels when they are first called
WEIGHTS = RandomWeights(TINY, seeded=True, scale=0.25)


def prepared_on(device: torch.device, ops: Ops, **settings: object) -> PreparedModel:
    config = replace(CONFIG, device=device.type, **settings)  # type: ignore[arg-type]
    return prepare_random_model(config, TINY, ops, device, torch.float32, WEIGHTS)


def ops_of(device: torch.device) -> Ops:
    return select_ops(device, torch.float32, TINY.head_dim)


@pytest.fixture(params=["fake", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])])
def engines(request: pytest.FixtureRequest) -> Engines:
    if request.param == "fake":
        prepared = prepared_on(CPU, ops_of(CPU))
        return Engines(prepared, prepared.load_weights(), FakeDevice)
    prepared = prepared_on(CUDA, ops_of(CUDA))
    return Engines(prepared, prepared.load_weights(), partial(CudaDevice, CUDA))


@pytest.fixture(scope="module")
def reference() -> Engines:
    """The plain engine on the CPU."""
    prepared = prepared_on(CPU, ops_of(CPU))
    return Engines(prepared, prepared.load_weights())


@pytest.mark.parametrize("graphs", [GraphSettings(), GraphSettings(max_size=0), GraphSettings(lazily=True)])
@pytest.mark.parametrize("seed", [1, 2])
def test_its_words_are_those_of_the_cpu(engines: Engines, reference: Engines, seed: int, graphs: GraphSettings) -> None:
    life = random_life(seed, num_requests=8)
    expected = live(reference.plain(life), life)
    found = live(engines.overlapped(life, graphs=graphs), life)
    assert {name: said.token_ids for name, said in found.items()} == {n: s.token_ids for n, s in expected.items()}


@pytest.mark.parametrize("seed", [1, 2])
def test_its_words_are_those_of_the_cpu_with_a_host_tier(engines: Engines, reference: Engines, seed: int) -> None:
    life = replace(random_life(seed, num_requests=12), num_blocks=14, num_host_blocks=30)
    expected = live(reference.plain(life), life)
    found = live(engines.overlapped(life), life)
    assert {name: said.token_ids for name, said in found.items()} == {n: s.token_ids for n, s in expected.items()}


@pytest.mark.parametrize("num_seqs", [1, 3, 8])
def test_a_replayed_graph_leaves_the_bits_that_its_launches_leave(engines: Engines, num_seqs: int) -> None:
    """The last step staged, done again op by op. Its tokens were staged, not taken from rows: they can be read
    twice."""
    engines.overlapped(Life())
    runner, device = engines.runner, engines.device
    config = replace(engines.prepared.config, async_scheduling=False, speculation="off")
    core = make_core(config, runner)
    for number in range(num_seqs):
        params = SamplingParams(max_tokens=50, temperature=0.0, seed=1)
        prompt = [(number + 7 * i) % 300 for i in range(10 + number)]
        core.add(EngineRequest(request_id=str(number), prompt_token_ids=prompt, params=params, arrival_s=0.0))
    while sum(len(output.token_ids) for output in core.step().outputs) < num_seqs:
        pass
    core.step()
    shape = smallest_fitting(runner._shapes, StepShape(num_seqs, num_seqs, num_seqs))
    assert shape is not None
    replayed = runner._draw_hidden[:num_seqs].clone()
    with torch.inference_mode():
        device.submit(partial(runner._forward, shape))
        device.synchronize()
    assert torch.equal(replayed, runner._draw_hidden[:num_seqs])
    assert replayed.abs().sum() > 0


def test_nothing_is_allocated_after_the_start(engines: Engines) -> None:
    """Whatever the lengths, arrivals, preemptions and ways of sampling that the device does by itself."""
    life = random_life(5)
    for _, request in life.arrivals:
        asked = request.params
        request.params = SamplingParams(
            max_tokens=asked.max_tokens, seed=asked.seed, temperature=asked.temperature, top_p=asked.top_p
        )
    core = engines.overlapped(life)
    device = engines.device.torch_device
    reserved, free = torch.cuda.memory_reserved(device), engines.device.free_bytes()
    live(core, life)
    engines.device.synchronize()
    assert torch.cuda.memory_reserved(device) <= reserved
    assert engines.device.free_bytes() >= free - LOADED_LATE


def test_the_measured_cache_fits_beside_everything_else(engines: Engines) -> None:
    prepared = replace(engines.prepared, config=replace(engines.prepared.config, gpu_memory=None))
    device = engines.open_device()
    runner = prepared.launching_runner(engines.model, lambda: device)
    assert isinstance(runner, GPUModelRunner)
    assert runner.plan.num_blocks > 0
    assert device.free_bytes() > 0
