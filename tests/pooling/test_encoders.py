"""Every encoder says what transformers says: hidden states, token types, classification heads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmserve.errors import ConfigError, ModelLoadError


@torch.no_grad()
def expected_hidden(model, texts, types=None) -> list[np.ndarray]:
    """A text at a time: no padding, no mask."""
    found = []
    for index, text in enumerate(texts):
        options = {} if types is None else {"token_type_ids": torch.tensor([types[index]])}
        found.append(model(input_ids=torch.tensor([text]), **options).last_hidden_state[0].numpy())
    return found


@torch.no_grad()
def expected_logits(model, texts) -> np.ndarray:
    return np.concatenate([model(input_ids=torch.tensor([text])).logits.numpy() for text in texts])


def test_hidden_states(tiny_encoder, texts, load, run) -> None:
    model, folder = tiny_encoder
    actual = run(load(folder), texts, "token_embed")
    expected = np.concatenate(expected_hidden(model, texts))
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


def test_token_types(build, tmp_path: Path, texts, load, run) -> None:
    options = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    model = build("Bert", "Model", options | {"num_hidden_layers": 1, "type_vocab_size": 2})
    model.save_pretrained(tmp_path)
    types = [[0] * (len(text) // 2) + [1] * (len(text) - len(text) // 2) for text in texts]
    runner = load(tmp_path)
    actual = run(runner, texts, "token_embed", types)
    assert np.abs(actual - np.concatenate(expected_hidden(model, texts, types))).max() < 1e-4
    zeros = [[0] * len(text) for text in texts]
    assert np.array_equal(run(runner, texts, "token_embed", zeros), run(runner, texts, "token_embed"))


def test_classifiers(tiny_classifier, texts, load, run) -> None:
    model, folder = tiny_classifier
    runner = load(folder)
    assert runner.config.kind == "classify"
    actual, expected = run(runner, texts, "classify"), expected_logits(model, texts)
    assert actual.shape == (len(texts), 3)
    assert np.abs(actual - expected).max() < 1e-4 * max(1.0, np.abs(expected).max())


def test_a_classifier_also_embeds(tiny_classifier, texts, load, run) -> None:
    """By its base model: the mean, as sentence-transformers takes it."""
    model, folder = tiny_classifier
    hidden = expected_hidden(model.base_model, texts)
    expected = np.stack([each.mean(0) for each in hidden])
    actual = run(load(folder), texts, "embed")
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_masked_language_model_embeds(build, tmp_path: Path, texts, load, run) -> None:
    """Its head stays unread."""
    options = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    model = build("Bert", "ForMaskedLM", options | {"num_hidden_layers": 1})
    model.save_pretrained(tmp_path)
    expected = np.concatenate(expected_hidden(model.bert, texts))
    assert np.abs(run(load(tmp_path), texts, "token_embed") - expected).max() < 1e-4


def change_weights(source: Path, target: Path, change) -> Path:
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors")
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def test_an_old_checkpoint(tiny_bert: Path, tmp_path: Path, texts, load, run) -> None:
    """LayerNorms by their old names, a prefix, and position ids among the weights."""

    def grow_old(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            weights[f"bert.{old}"] = weights.pop(name)
        weights["bert.embeddings.position_ids"] = torch.arange(160)[None]

    folder = change_weights(tiny_bert, tmp_path, grow_old)
    assert np.array_equal(run(load(folder), texts, "embed"), run(load(tiny_bert), texts, "embed"))


def test_damaged_weights_are_named(tiny_bert: Path, tmp_path: Path, load) -> None:
    name = "encoder.layer.1.output.dense.weight"
    missing = change_weights(tiny_bert, tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(ModelLoadError, match=f"'{name}' is missing"):
        load(missing)
    short = change_weights(tiny_bert, tmp_path, lambda weights: weights.update({name: torch.zeros(64, 95)}))
    with pytest.raises(ModelLoadError, match=rf"'{name}' has the shape \[64, 95\].*\[64, 96\]"):
        load(short)
    extra = "encoder.layer.1.adapter.weight"
    strange = change_weights(tiny_bert, tmp_path, lambda weights: weights.update({extra: torch.zeros(2)}))
    with pytest.raises(ModelLoadError, match=f"'{extra}' is not known"):
        load(strange)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"hidden_act": "quick_gelu"}, "hidden_act"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
)
def test_what_is_not_supported_is_named(tiny_bert: Path, tmp_path: Path, load, change, complaint: str) -> None:
    values = json.loads((tiny_bert / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").write_bytes((tiny_bert / "model.safetensors").read_bytes())
    with pytest.raises(ModelLoadError, match=complaint):
        load(tmp_path)


def test_weight_formats_are_checked(tiny_bert: Path, load) -> None:
    with pytest.raises(ConfigError, match=r"'q2_k'.*q8_0"):
        load(tiny_bert, "q2_k")


def test_heads_that_no_kernel_computes(build, tmp_path: Path, texts, load, run) -> None:
    """Of 8 elements: plain torch runs, and says which formats it has."""
    options = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = build("Bert", "Model", options | {"num_hidden_layers": 1})
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="'q8_0' is not computed by the reference kernels"):
        load(tmp_path, "q8_0")
    runner = load(tmp_path, "auto")
    assert runner.weight_format == "float32"
    actual = run(runner, texts, "token_embed")
    assert np.abs(actual - np.concatenate(expected_hidden(model, texts))).max() < 1e-4
