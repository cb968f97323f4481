"""From --quantization to weights in memory: what is planned is what is taken, and what is chosen is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file

from llmserve.config import EngineConfig
from llmserve.errors import ConfigError
from llmserve.kernels.cpu.build import find_compiler
from llmserve.kernels.reference import ReferenceOps
from llmserve.worker.loader import PreparedModel, prepare_model
from tests.models.gguf_writer import write_gguf

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that no kernel's padding divides, and biases."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=101,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("qwen2")
    transformers.Qwen2ForCausalLM(config).bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gguf_file(folder: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    path = folder.parent / "qwen2.gguf"
    exceptions = {"embed": gguf.GGMLQuantizationType.Q8_0, "v_proj": gguf.GGMLQuantizationType.Q5_0}
    write_gguf(path, model, tensors, "qwen2", gguf.GGMLQuantizationType.Q4_1, exceptions=exceptions)
    return path


@pytest.fixture
def prepare() -> Callable[..., PreparedModel]:
    def run(path: Path, quantization: str = "auto", dtype: str = "auto") -> PreparedModel:
        config = EngineConfig(
            model=str(path), quantization=quantization, dtype=dtype, device="cpu", kv_cache_memory=2**20, num_threads=1
        )
        return prepare_model(config)

    return run


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("quantization", "shown"),
    [("none", "dense"), ("int8", "int8"), ("q8_0", "q8_0"), ("gguf", "q4_1, q8_0")],
)
def test_the_plan_is_what_the_weights_take(
    folder: Path,
    gguf_file: Path,
    prepare: Callable[..., PreparedModel],
    quantization: str,
    shown: str,
    dtype: str,
) -> None:
    prepared = prepare(gguf_file if quantization == "gguf" else folder, quantization, dtype)
    assert prepared.plan.weight_format == shown
    assert prepared.load().model.nbytes == prepared.plan.weight_bytes


def test_the_plan_is_what_the_weights_take_in_plain_torch(
    folder: Path, prepare: Callable[..., PreparedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmserve.worker.loader.select_ops", lambda *_: ReferenceOps())
    prepared = prepare(folder)
    assert prepared.plan.weight_format == "dense"
    assert prepared.load().model.nbytes == prepared.plan.weight_bytes
    with pytest.raises(ConfigError, match="Choose one of auto, none"):
        prepare(folder, "int8")


@needs_compiler
def test_auto(folder: Path, gguf_file: Path, prepare: Callable[..., PreparedModel]) -> None:
    assert prepare(folder).plan.weight_format == "q8_0"
    assert prepare(gguf_file).plan.weight_format == "q4_1, q8_0"
    assert prepare(gguf_file, dtype="bfloat16").plan.weight_format == "dense"


@needs_compiler
def test_blocks_of_a_file_that_has_none(folder: Path, prepare: Callable[..., PreparedModel]) -> None:
    with pytest.raises(ConfigError, match=r"weights of type BF16.*auto, none, q8_0, int8"):
        prepare(folder, "gguf")


def test_an_unknown_format() -> None:
    with pytest.raises(ConfigError, match="quantization must be one of auto, none, q8_0, int8, fp8, gguf, not 'awq'"):
        EngineConfig(quantization="awq")
