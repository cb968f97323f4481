"""Tiny random pooling models in folders, one that runs, and a server over three of them."""

from __future__ import annotations

import json
import os
import re
import string
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, BertModel

from llmserve.backends.instance import InstanceSettings
from llmserve.backends.pooling_model import PoolingModel
from llmserve.repository.model_folder import read_model_folder

MAX_LEN = 32
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
_WORDS = ["the", "cat", "dog", "sat", "on", "mat", "stocks", "fell", "today"]
VOCABULARY = [*_SPECIAL, *_WORDS, *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase), *".,!?"]
_START_S = 120.0


def write_tokenizer(folder: Path) -> None:
    """WordPiece over a few words and the letters, with [CLS] and [SEP] around a text."""
    tokenizer = Tokenizer(WordPiece({token: i for i, token in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "BertTokenizer", "model_max_length": MAX_LEN}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def write_bert(folder: Path, labels: tuple[str, ...] = (), prompts: dict[str, str] | None = None) -> Path:
    """An embedding model, or with `labels` a classifier (with one a reranker)."""
    folder.mkdir(parents=True)
    torch.manual_seed(len(labels))
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=MAX_LEN,
        initializer_range=0.5,
        id2label=dict(enumerate(labels)) or None,
        label2id={label: i for i, label in enumerate(labels)} or None,
    )
    kind = BertForSequenceClassification if labels else BertModel
    kind(config).eval().save_pretrained(folder)
    write_tokenizer(folder)
    if prompts:
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return folder


@pytest.fixture(scope="session")
def embed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors of 32 numbers, mean pooling."""
    return write_bert(tmp_path_factory.mktemp("embed") / "tiny-embed", prompts={"query": "the ", "document": ""})


@pytest.fixture(scope="session")
def score_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder."""
    return write_bert(tmp_path_factory.mktemp("score") / "tiny-score", ("relevance",))


@pytest.fixture(scope="session")
def classify_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labels."""
    return write_bert(tmp_path_factory.mktemp("classify") / "tiny-classify", ("bad", "fair", "good"))


Running = Callable[..., AbstractAsyncContextManager[PoolingModel]]


@pytest.fixture
def running(embed_folder: Path) -> Running:
    """`async with running(**parameters) as model`: loaded, and gone afterwards."""

    @asynccontextmanager
    async def run(
        folder: Path = embed_folder, max_queue_size: int = 0, allow_timeout_override: bool = False, **parameters: str
    ) -> AsyncIterator[PoolingModel]:
        read = read_model_folder("m", folder, folder)
        for name, value in {"niceness": "0", **parameters}.items():
            read.config.parameters[name].string_value = value
        if max_queue_size or allow_timeout_override:
            policy = read.config.dynamic_batching.default_queue_policy
            policy.max_queue_size, policy.allow_timeout_override = max_queue_size, allow_timeout_override
        settings = InstanceSettings(unload_timeout_s=5.0)
        model = PoolingModel("m", "1", read.versions[1], folder, read.config, settings)
        await model.start()
        try:
            yield model
        finally:
            await model.stop()

    return run


@pytest.fixture(scope="session")
def http(embed_folder: Path, score_folder: Path, classify_folder: Path) -> Iterator[httpx.Client]:
    """A client of `llmserve serve` over the three."""
    folders = [str(folder) for folder in (embed_folder, score_folder, classify_folder)]
    command = [sys.executable, "-m", "llmserve.cli", "serve", "--port", "0", *folders]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | {"COLUMNS": "200"}, text=True)
    said: list[str] = []
    urls: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if match := re.search(r"Ready in .*: (http://\S+)/v1", line):
                urls.append(match[1])
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    ready.wait(_START_S)
    try:
        assert urls, "".join(said)
        with httpx.Client(base_url=urls[0], timeout=60) as client:
            yield client
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def post(http: httpx.Client) -> Callable[..., Any]:
    """`post(path, **body)`: the answer's JSON."""

    def send(path: str, status: int = 200, **body: Any) -> Any:
        answer = http.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    return send
