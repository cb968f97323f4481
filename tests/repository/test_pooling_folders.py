"""Which folders of a model repository are taken for embedding, reranker and classifier models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmserve.repository.location import NamedFolders
from llmserve.repository.model_folder import is_hugging_face_folder, is_pooling_model, read_model_folder


def write_config(folder: Path, architecture: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    return folder


def test_a_bare_encoder_folder_is_a_model_with_one_version(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "encoder", "BertModel")
    read = read_model_folder("encoder", folder, tmp_path)
    assert is_hugging_face_folder(folder)
    assert (read.config.backend, read.versions) == ("pooling", {1: folder})


def test_versions_of_an_encoder_stand_in_tritons_layout(tmp_path: Path) -> None:
    for version in ("1", "3"):
        write_config(tmp_path / "encoder" / version, "RobertaForSequenceClassification")
    read = read_model_folder("encoder", tmp_path / "encoder", tmp_path)
    assert read.config.backend == "pooling"
    assert list(read.versions) == [1, 3]
    (tmp_path / "encoder" / "config.pbtxt").write_text(
        'backend: "pooling" parameters { key: "weight_format" value { string_value: "float32" } }'
    )
    read = read_model_folder("encoder", tmp_path / "encoder", tmp_path)
    assert read.config.parameters["weight_format"].string_value == "float32"


@pytest.mark.parametrize("file", ["model.py", "model.onnx"])
def test_a_model_file_beside_the_configuration_decides(tmp_path: Path, file: str) -> None:
    version = write_config(tmp_path / "m" / "1", "BertModel")
    (version / file).touch()
    assert not is_pooling_model(tmp_path / "m")
    assert read_model_folder("m", tmp_path / "m", tmp_path).config.backend in ("python", "onnxruntime")


def test_a_chat_model_and_a_damaged_folder_are_none(tmp_path: Path) -> None:
    assert not is_pooling_model(write_config(tmp_path / "chat", "LlamaForCausalLM"))
    (damaged := tmp_path / "damaged").mkdir()
    (damaged / "config.json").write_text("{")
    assert not is_pooling_model(damaged)


def test_folders_named_on_the_command_line_are_models_whatever_the_repository_holds(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "elsewhere", "BertModel")
    named = NamedFolders({"mine": folder})
    assert (named.model_names(), named.fetch("mine")) == (["mine"], folder)
    before = named.fingerprint("mine")
    (folder / "more").write_text("x")
    assert named.fingerprint("mine") != before
