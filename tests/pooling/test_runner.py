"""The runner: poolings and dense layers as sentence-transformers', decoders, and the same bits in any batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sentence_transformers
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer import modules
from tokenizers import Tokenizer

from llmserve.kernels.cpu.build import find_compiler
from llmserve.pooling_config import read_pooling_config
from llmserve.repository import embedded
from llmserve.worker.pooling_runner import PoolingRunner

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")
MODES = ["cls", "mean", "mean_sqrt_len_tokens", "weightedmean", "max", "lasttoken"]


def write_modules(folder: Path, **configs: dict[str, object]) -> None:
    """modules.json with a module of each kind; a folder of its own for each that has a configuration."""
    entries = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for index, (kind, config) in enumerate(configs.items(), 1):
        path = folder / f"{index}_{kind}"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(config))
        entries.append({"idx": index, "name": str(index), "path": path.name, "type": f"x.models.{kind}"})
    (folder / "modules.json").write_text(json.dumps(entries))


def copy_model(source: Path, target: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (target / name).write_bytes((source / name).read_bytes())
    return target


@pytest.mark.parametrize("mode", [*MODES, ["cls", "mean"]])
def test_poolings(tiny_bert: Path, tmp_path: Path, texts, load, run, mode: str | list[str]) -> None:
    folder = copy_model(tiny_bert, tmp_path)
    config = {"embedding_dimension": 64, "pooling_mode": mode}
    write_modules(folder, Pooling=config)
    runner = load(folder)
    hidden = np.split(run(runner, texts, "token_embed"), np.cumsum([len(text) for text in texts])[:-1])
    actual = run(runner, texts, "embed")
    theirs = modules.Pooling(**config)
    for row, states in zip(actual, hidden, strict=True):
        features = {"token_embeddings": torch.from_numpy(states)[None]}
        features["attention_mask"] = torch.ones(1, len(states), dtype=torch.long)
        expected = theirs(features)["sentence_embedding"][0].numpy()
        assert row.shape == expected.shape
        assert np.abs(row - expected).max() < 1e-4


def test_dense_layers(tiny_bert: Path, tmp_path: Path, texts, load, run) -> None:
    folder = copy_model(tiny_bert, tmp_path)
    layers = [modules.Dense(64, 48, bias=False), modules.Dense(48, 8, activation_function=torch.nn.GELU())]
    write_modules(folder, Pooling={"pooling_mode": "mean"})
    entries = json.loads((folder / "modules.json").read_text())
    for index, layer in enumerate(layers, 2):
        (folder / f"{index}_Dense").mkdir()
        layer.save(str(folder / f"{index}_Dense"))
        entries.append({"idx": index, "name": str(index), "path": f"{index}_Dense", "type": "x.Dense"})
    plain = run(load(folder), texts, "embed")
    (folder / "modules.json").write_text(json.dumps(entries))
    runner = load(folder)
    assert runner.config.dimension == 8
    features = {"sentence_embedding": torch.from_numpy(plain)}
    with torch.no_grad():
        for layer in layers:
            features = layer(features)
    assert np.abs(run(runner, texts, "embed") - features["sentence_embedding"].numpy()).max() < 1e-5


@needs_compiler
@pytest.mark.parametrize("weight_format", ["float32", "bfloat16", "q8_0", "int8"])
def test_a_text_has_the_same_bits_in_any_batch(tiny_encoder, texts, load, run, weight_format: str) -> None:
    """Alone and in a crowd, with one thread and with two, and where the crowd is cut into several passes."""
    _, folder = tiny_encoder
    one, two = load(folder, weight_format), load(folder, weight_format, 2)
    crowd = texts * 5  # more tokens than one pass takes
    assert sum(map(len, crowd)) > 1024
    for task in ("embed", "token_embed"):
        whole = run(two, crowd, task)
        parts = list(whole) if task == "embed" else np.split(whole, np.cumsum([len(text) for text in crowd])[:-1])
        for index in (0, 1, 2, 12, 29, 39):
            alone = run(one, [crowd[index]], task)
            assert np.array_equal(alone[0] if task == "embed" else alone, parts[index])


@needs_compiler
@pytest.mark.parametrize("weight_format", ["float32", "bfloat16", "q8_0", "int8"])
def test_a_class_has_the_same_bits_in_any_batch(tiny_classifier, texts, load, run, weight_format: str) -> None:
    _, folder = tiny_classifier
    runner = load(folder, weight_format)
    whole = run(runner, texts, "classify")
    for text, row in zip(texts, whole, strict=True):
        assert np.array_equal(run(runner, [text], "classify")[0], row)


@torch.no_grad()
def last_hidden(model, texts) -> np.ndarray:
    return np.stack([model(torch.tensor([text])).last_hidden_state[0, -1].numpy() for text in texts])


@pytest.mark.parametrize(("family", "suffix"), [("Qwen3", "Model"), ("Qwen3", "ForCausalLM"), ("Mistral", "Model")])
def test_decoders_embed(build, decoder_options, tmp_path: Path, texts, load, run, family: str, suffix: str) -> None:
    """Saved with and without the language model's head; as Qwen3-Embedding, by the last token."""
    model = build(family, suffix, decoder_options | {"tie_word_embeddings": suffix == "Model"})
    model.save_pretrained(tmp_path)
    write_modules(tmp_path, Pooling={"pooling_mode_lasttoken": True}, Normalize={})
    runner = load(tmp_path)
    assert (runner.config.kind, runner.config.pooling, runner.config.normalize) == ("embed", ("last",), True)
    expected = last_hidden(model.base_model, texts)
    actual = run(runner, texts, "embed")
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()
    crowd = run(runner, texts * 5, "embed")
    assert np.array_equal(crowd[-1], run(runner, texts[-1:], "embed")[0])


def test_a_decoder_classifies(build, decoder_options, tmp_path: Path, texts, load, run) -> None:
    model = build("Qwen3", "ForSequenceClassification", decoder_options | {"num_labels": 2, "pad_token_id": 0})
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = np.concatenate([model(torch.tensor([text])).logits.numpy() for text in texts])
    runner = load(tmp_path)
    assert runner.config.kind == "classify"
    assert np.abs(run(runner, texts, "classify") - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("judging", [[7, 9], [7]])
def test_a_decoder_judges(
    build, decoder_options, tmp_path: Path, texts, load, run, tied: bool, judging: list[int]
) -> None:
    """As Qwen3-Reranker: the logit of yes less that of no, behind the last token."""
    model = build("Qwen3", "ForCausalLM", decoder_options | {"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    keys = ("true_token_id", "false_token_id")
    write_modules(tmp_path, LogitScore=dict(zip(keys, judging, strict=False)))
    runner = load(tmp_path)
    assert runner.config.kind == "score"
    assert runner.config.pair_prompt is not None
    with torch.no_grad():
        logits = np.stack([model(torch.tensor([text])).logits[0, -1].numpy() for text in texts])
    expected = logits[:, judging[0]] - (logits[:, judging[1]] if len(judging) == 2 else 0)
    actual = run(runner, texts, "classify")
    assert actual.shape == (len(texts), 1)
    assert np.abs(actual[:, 0] - expected).max() < 1e-4 * np.abs(logits).max()


@pytest.fixture(scope="module")
def minilm() -> Path:
    return embedded.fetch(embedded.DEFAULT_EMBEDDING)


TEXTS = [
    "The cat sits on the mat.",
    "A feline rests on a rug.",
    "Stocks fell sharply today.",
    "?",
    "naïve café 你好 " * 9,
]
TEXTS += ["What is the capital of France?", "Paris is the capital and largest city of France. " * 30]


def encode(folder: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


@needs_compiler
@pytest.mark.parametrize(
    ("weight_format", "distance"), [("float32", 1e-6), ("bfloat16", 2e-4), ("q8_0", 3e-3), ("int8", 2e-2)]
)
def test_the_embedded_model_agrees_with_sentence_transformers(
    minilm: Path, load, run, weight_format: str, distance: float
) -> None:
    theirs = sentence_transformers.SentenceTransformer(str(minilm), device="cpu").encode(TEXTS)
    runner = load(minilm, weight_format, 2)
    assert (runner.config.max_model_len, runner.config.normalize, runner.config.dimension) == (256, True, 384)
    mine = run(runner, encode(minilm, TEXTS), "embed")
    mine /= np.linalg.norm(mine, axis=1, keepdims=True)
    cosines = (mine * theirs).sum(axis=1)
    assert cosines.min() > 1 - distance
    assert np.abs(mine @ mine.T - theirs @ theirs.T).max() < 10 * distance


@needs_compiler
def test_a_cross_encoder_scores_as_sentence_transformers(minilm: Path, tmp_path: Path, run) -> None:
    """The embedded model's weights under a random head of one label: the form of ms-marco-MiniLM-L-6-v2."""
    weights = {f"bert.{name}": tensor for name, tensor in load_file(minilm / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    weights |= {"classifier.weight": torch.randn(1, 384, generator=generator), "classifier.bias": torch.tensor([0.1])}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    values = json.loads((minilm / "config.json").read_text())
    values |= {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((minilm / name).read_bytes())
    pairs = [(TEXTS[5], text) for text in TEXTS]
    theirs = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu").predict(pairs)
    config = read_pooling_config(tmp_path)
    assert (config.kind, config.labels, config.activation) == ("score", ("LABEL_0",), "sigmoid")
    runner = PoolingRunner.load(tmp_path, config, "float32", 1, device="cpu")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(config.max_model_len)
    encodings = tokenizer.encode_batch(pairs)
    logits = run(runner, [each.ids for each in encodings], "classify", [each.type_ids for each in encodings])
    assert np.abs(1 / (1 + np.exp(-logits[:, 0])) - theirs).max() < 1e-5
