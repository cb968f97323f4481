"""What a model folder says: read without torch, every mistake named with its file and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmserve.errors import ModelLoadError
from llmserve.pooling_config import QWEN3_RERANKER_PROMPT, is_pooling_folder, read_pooling_config

BERT = {"architectures": ["BertModel"], "hidden_size": 8, "max_position_embeddings": 512, "type_vocab_size": 2}
MODULES = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]


def write(folder: Path, files: dict[str, object]) -> Path:
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def listed(modules: list[tuple[str, str]]) -> list[dict[str, object]]:
    return [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules]


DENSE = {"in_features": 16, "out_features": 4, "bias": True, "activation_function": "torch.nn.modules.linear.Identity"}
FULL: dict[str, object] = {
    "config.json": BERT,
    "modules.json": listed(MODULES),
    "1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_lasttoken": True, "include_prompt": False},
    "2_Dense/config.json": DENSE,
    "sentence_bert_config.json": {"max_seq_length": 300, "do_lower_case": True},
    "tokenizer_config.json": {"model_max_length": 128},
    "config_sentence_transformers.json": {
        "prompts": {"query": "q: ", "document": None},
        "default_prompt_name": "query",
        "similarity_fn_name": "dot",
    },
}


def test_everything_said(tmp_path: Path) -> None:
    config = read_pooling_config(write(tmp_path, FULL))
    assert (config.kind, config.architecture, config.hidden_size, config.dimension) == ("embed", "BertModel", 8, 4)
    assert (config.max_model_len, config.num_token_types, config.do_lower_case) == (128, 2, True)
    assert (config.pooling, config.include_prompt, config.normalize) == (("cls", "last"), False, True)
    assert (config.prompts, config.default_prompt_name) == ({"query": "q: "}, "query")
    assert config.similarity == "dot"
    assert config.dense[0].activation == "identity"


def test_nothing_said(tmp_path: Path) -> None:
    config = read_pooling_config(write(tmp_path, {"config.json": BERT}))
    assert (config.pooling, config.normalize, config.dimension, config.dense) == (("mean",), True, 8, ())
    assert (config.max_model_len, config.prompts, config.similarity) == (512, {}, "cosine")


def test_modules_without_normalize(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": BERT, "modules.json": listed(MODULES[:2]), "1_Pooling/config.json": {}})
    config = read_pooling_config(tmp_path)
    assert (config.pooling, config.normalize) == (("mean",), False)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("RobertaModel", {"max_position_embeddings": 514, "pad_token_id": 1}, (512, 2)),
        ("XLMRobertaModel", {"max_position_embeddings": 8194, "pad_token_id": 1, "type_vocab_size": 1}, (8192, 1)),
        ("MPNetForMaskedLM", {"max_position_embeddings": 514}, (512, 0)),
        ("ModernBertModel", {"max_position_embeddings": 8192}, (8192, 0)),
        ("DistilBertModel", {"hidden_size": None, "dim": 8}, (512, 0)),
        ("Qwen3ForCausalLM", {"max_position_embeddings": 32768}, (32768, 0)),
    ],
)
def test_lengths_and_token_types(
    tmp_path: Path, name: str, values: dict[str, object], expected: tuple[int, int]
) -> None:
    values = BERT | {"architectures": [name]} | values
    config = read_pooling_config(write(tmp_path, {"config.json": values}))
    assert (config.max_model_len, config.num_token_types) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"id2label": {"0": "relevant"}}, ("score", ("relevant",), "sigmoid")),
        ({"num_labels": 1}, ("score", ("LABEL_0",), "sigmoid")),
        ({}, ("classify", ("LABEL_0", "LABEL_1"), "softmax")),
        ({"id2label": {"1": "b", "0": "a", "2": "c"}}, ("classify", ("a", "b", "c"), "softmax")),
        ({"problem_type": "multi_label_classification"}, ("classify", ("LABEL_0", "LABEL_1"), "sigmoid")),
        (
            {"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
            ("score", ("LABEL_0",), "identity"),
        ),
        (
            {"num_labels": 1, "sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"},
            ("score", ("LABEL_0",), "sigmoid"),
        ),
    ],
)
def test_classifiers(tmp_path: Path, changes: dict[str, object], expected: tuple[str, tuple[str, ...], str]) -> None:
    values = BERT | {"architectures": ["BertForSequenceClassification"]} | changes
    config = read_pooling_config(write(tmp_path, {"config.json": values}))
    assert (config.kind, config.labels, config.activation) == expected


def test_words_that_judge(tmp_path: Path) -> None:
    """vLLM's key, the words looked up in the tokenizer."""
    values = BERT | {"architectures": ["Qwen3ForCausalLM"], "classifier_from_token": ["no", "yes"]}
    write(tmp_path, {"config.json": values, "tokenizer.json": {"model": {"vocab": {"yes": 7, "no": 5}}}})
    config = read_pooling_config(tmp_path)
    assert (config.kind, config.judging_token_ids, config.activation) == ("score", (7, 5), "sigmoid")
    assert is_pooling_folder(tmp_path)
    prompt = config.pair_prompt
    assert prompt is QWEN3_RERANKER_PROMPT
    body = prompt.render_body("{q}", "d {0}")
    assert body.endswith("<Query>: {q}\n<Document>: d {0}")
    assert prompt.render_body("q", "d", "Judge").startswith("<Instruct>: Judge\n")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": BERT}, True),
        ({"config.json": {"architectures": ["XLMRobertaForSequenceClassification"]}}, True),
        ({"config.json": {"architectures": ["LlamaForCausalLM"]}}, False),
        ({"config.json": {"architectures": ["LlamaForCausalLM"]}, "modules.json": []}, True),
        ({"config.json": {"architectures": ["Qwen3Model"]}}, True),
        ({}, False),
    ],
)
def test_is_pooling_folder(tmp_path: Path, files: dict[str, object], expected: bool) -> None:
    assert is_pooling_folder(write(tmp_path, files)) is expected


@pytest.mark.parametrize(
    ("file", "value", "complaint"),
    [
        ("config.json", "{", r"config\.json cannot be read"),
        ("config.json", {"architectures": []}, r"config\.json: 'architectures'"),
        ("config.json", BERT | {"hidden_size": "8"}, r"config\.json: 'hidden_size'.*'8'"),
        ("modules.json", {}, r"modules\.json must hold a JSON list"),
        ("modules.json", [{"path": "", "type": "x.WordWeights"}], r"modules\.json: \[0\]: 'type'.*WordWeights"),
        ("modules.json", [{"path": "../x", "type": "x.Pooling"}], r"'path' must be a folder within"),
        ("modules.json", listed([MODULES[3], MODULES[2]]), r"order \['Normalize', 'Dense'\]"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, r"1_Pooling/config\.json: 'pooling_mode'.*'median'"),
        ("2_Dense/config.json", DENSE | {"in_features": 9}, r"2_Dense/config\.json: 'in_features' must be 16"),
        ("2_Dense/config.json", DENSE | {"activation_function": "os.system"}, "activation_function"),
        ("2_Dense/config.json", DENSE | {"use_residual": True}, "use_residual"),
        ("tokenizer_config.json", {"model_max_length": "long"}, r"tokenizer_config\.json: 'model_max_length'"),
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "default_prompt_name"),
        ("config_sentence_transformers.json", {"prompts": {"a": 1}}, "prompts"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "jaccard"}, "similarity_fn_name"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, file: str, value: object, complaint: str) -> None:
    with pytest.raises(ModelLoadError, match=complaint):
        read_pooling_config(write(tmp_path, FULL | {file: value}))
