"""Tiny random models of every architecture that embeds, scores or classifies, and how to run one of our own."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from llmserve.pooling_config import read_pooling_config
from llmserve.worker.pooling_runner import PoolingRunner

VOCAB = 101
_BERT = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
_BERT |= {"num_hidden_layers": 3, "max_position_embeddings": 160, "pad_token_id": 1}
_MODERN = _BERT | {"local_attention": 16, "num_attention_heads": 2, "num_hidden_layers": 4, "eos_token_id": 2}
_MODERN |= {"bos_token_id": 0, "cls_token_id": 0, "sep_token_id": 2}
# name -> (family, what its configuration holds); every switch that a checkpoint may turn stands in one of them
ENCODERS: dict[str, tuple[str, dict[str, object]]] = {
    "bert": ("Bert", _BERT),
    "bert-odd": ("Bert", _BERT | {"num_attention_heads": 2, "hidden_act": "gelu_new", "type_vocab_size": 3}),
    "roberta": ("Roberta", _BERT | {"layer_norm_eps": 1e-5, "type_vocab_size": 1}),
    "xlm-r": ("XLMRoberta", _BERT | {"pad_token_id": 3}),
    "distilbert": (
        "DistilBert",
        {"vocab_size": VOCAB, "dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 96, "max_position_embeddings": 160},
    ),
    "distilbert-relu": (
        "DistilBert",
        {"vocab_size": VOCAB, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48, "activation": "relu"},
    ),
    "mpnet": ("MPNet", _BERT | {"relative_attention_num_buckets": 32}),
    "modernbert": ("ModernBert", _MODERN),
    "modernbert-biases": (
        "ModernBert",
        _MODERN
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "classifier_bias": True,
            "classifier_pooling": "mean",
            "classifier_activation": "relu",
            "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        },
    ),
}
DECODER = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
DECODER |= {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3, "max_position_embeddings": 160}


def random_model(family: str, suffix: str, options: dict[str, object]) -> transformers.PreTrainedModel:
    """In float32; norms and biases are random too, so that none can be forgotten unseen."""
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}{suffix}")._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        spread = 0.5 if parameter.dim() == 1 else 0.3
        parameter.data = spread * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def random_texts(lengths: list[int]) -> list[list[int]]:
    """Token ids; none is one of the special ones that change positions."""
    rng = random.Random(3)
    return [[rng.randrange(5, VOCAB) for _ in range(length)] for length in lengths]


def load_runner(folder: Path, weight_format: str = "float32", num_threads: int = 1) -> PoolingRunner:
    return PoolingRunner.load(folder, read_pooling_config(folder), weight_format, num_threads, device="cpu")


def run_packed(
    runner: PoolingRunner, texts: list[list[int]], task: str, types: list[list[int]] | None = None
) -> np.ndarray:
    """The texts as one batch."""
    ids = np.array([token for text in texts for token in text], np.int32)
    bounds = np.cumsum([0] + [len(text) for text in texts]).astype(np.int32)
    packed_types = None if types is None else np.array([kind for text in types for kind in text], np.uint8)
    return runner.run(ids, packed_types, bounds, task)  # type: ignore[arg-type]


@pytest.fixture(scope="session", params=list(ENCODERS))
def tiny_encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(model, folder) of transformers' base class."""
    family, options = ENCODERS[request.param]
    model = random_model(family, "Model", options)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="session", params=list(ENCODERS))
def tiny_classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(model, folder) with a head of three labels."""
    family, options = ENCODERS[request.param]
    model = random_model(family, "ForSequenceClassification", options | {"num_labels": 3})
    folder = tmp_path_factory.mktemp(f"{request.param}-classifier")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT whose matrices every weight format takes."""
    folder = tmp_path_factory.mktemp("bert")
    random_model("Bert", "Model", _BERT).save_pretrained(folder)
    return folder


@pytest.fixture
def build() -> Callable[..., transformers.PreTrainedModel]:
    return random_model


@pytest.fixture
def texts() -> list[list[int]]:
    """Shorter and longer than a tile of keys, a window and a group of rows."""
    return random_texts([7, 1, 130, 64, 19, 2, 33, 65])


@pytest.fixture
def load() -> Callable[..., PoolingRunner]:
    return load_runner


@pytest.fixture
def run() -> Callable[..., np.ndarray]:
    return run_packed


@pytest.fixture
def decoder_options() -> dict[str, object]:
    return dict(DECODER)
