"""Which format a model's matrices get: what is asked for, what the file holds, and what can be computed."""

from __future__ import annotations

import pytest

from llmserve.errors import ConfigError
from llmserve.kernels.weight_formats import CPU_FORMATS
from llmserve.models.config import read_model_config
from llmserve.models.parameters import linear_parameters
from llmserve.models.quantization import choose_formats, describe_formats, quantization_choices, resolve_quantization
from llmserve.models.weights import open_weights

PLAIN = ("dense",)  # of an implementation without quantised products


@pytest.mark.parametrize(
    ("asked", "types", "supported", "dtype_is_auto", "expected"),
    [
        ("auto", ["BF16"], CPU_FORMATS, True, "q8_0"),
        ("auto", ["Q4_1", "Q8_0"], CPU_FORMATS, True, "gguf"),
        ("auto", ["Q4_K", "Q6_K"], CPU_FORMATS, True, "gguf"),
        ("auto", ["Q6_K", "Q5_0"], CPU_FORMATS, True, "q8_0"),
        ("auto", ["BF16"], CPU_FORMATS, False, "none"),
        ("auto", ["Q4_1"], CPU_FORMATS, False, "none"),
        ("auto", ["Q4_1"], PLAIN, True, "none"),
        ("none", ["Q4_1"], CPU_FORMATS, True, "none"),
        ("int8", ["F32"], CPU_FORMATS, False, "int8"),
        ("gguf", ["Q4_1"], CPU_FORMATS, False, "gguf"),
    ],
)
def test_what_is_chosen(asked, types, supported, dtype_is_auto, expected):
    assert resolve_quantization(asked, "x", types, supported, dtype_is_auto=dtype_is_auto) == expected


@pytest.mark.parametrize(
    ("asked", "types", "supported", "words"),
    [
        ("int8", ["BF16"], PLAIN, ["int8", "compute weights as dense", "Choose one of auto, none."]),
        ("gguf", ["BF16"], CPU_FORMATS, ["here.gguf", "type BF16", "q4_k", "auto, none, q8_0, int8."]),
        ("gguf", ["Q6_K"], CPU_FORMATS, ["Q6_K", "auto, none, q8_0, int8."]),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_choices(asked, types, supported, words):
    with pytest.raises(ConfigError) as caught:
        resolve_quantization(asked, "here.gguf", types, supported, dtype_is_auto=True)
    for word in words:
        assert word in caught.value.message


def test_choices():
    assert quantization_choices(["F32"], CPU_FORMATS) == ("none", "q8_0", "int8")
    assert quantization_choices(["F32", "Q4_0"], CPU_FORMATS) == ("none", "q8_0", "int8", "gguf")
    assert quantization_choices(["Q4_0"], PLAIN) == ("none",)


def test_every_matrix_has_a_format_and_its_parts_cover_the_model(tiny):
    _, _, folder = tiny
    config = read_model_config(folder)
    matrices = list(linear_parameters(config))
    covered = [f"{part}.weight" for matrix in matrices for part in matrix.parts]
    head = "lm_head.weight" if not config.tie_word_embeddings else "model.embed_tokens.weight"
    tensors = open_weights(folder, config).shapes.items()  # where fused experts stand one by one
    theirs_2d = {name for name, shape in tensors if len(shape) == 2 and name != "model.embed_tokens.weight"}
    assert sorted(covered) == sorted(theirs_2d | {head})
    formats = choose_formats(config, {}, "int8", CPU_FORMATS)
    assert formats == {matrix.name: "dense" if matrix.is_small else "int8" for matrix in matrices}
    assert describe_formats(config, formats) == "int8"


def test_rows_that_are_no_whole_blocks_stay_dense(tmp_path, build_model, caplog):
    build_model("Llama", intermediate_size=90).save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    with caplog.at_level("INFO"):
        formats = choose_formats(config, {}, "q8_0", CPU_FORMATS)
    assert {name for name, fmt in formats.items() if fmt == "dense"} == {
        f"model.layers.{layer}.mlp.down_proj" for layer in range(3)
    }
    assert "3 of rows of 90 weights as dense" in caplog.text
    assert describe_formats(config, formats) == "q8_0, dense"
