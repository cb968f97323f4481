"""What a user may call a model, and what they are told when there is none of that name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmserve.errors import ModelLoadError
from llmserve.repository import embedded
from llmserve.repository.sources import ModelSource, list_models, resolve_model
from tests.repository.fake_hub import COMMIT, REPOSITORY, fake_hub

HUB_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(300_000),
    "tokenizer.json": b"{}",
    "q4.gguf": b"GGUF" + bytes(50_000),
    "pytorch_model.bin": b"the weights again",
    "onnx/model.onnx": b"and again",
    "original/params.json": b"{}",
}
IN_ANOTHER_PROCESS = """
import json, sys
from llmserve.errors import ModelLoadError
from llmserve.repository.sources import list_models, resolve_model
news = []
try:
    source = resolve_model(sys.argv[1], lambda *counts: news.append(counts))
    answer = {"kind": source.kind, "path": str(source.path), "name": source.name, "root": source.root}
except ModelLoadError as error:
    answer = {"error": error.message}
listings = [model for model in list_models() if model.kind == "hub"]
answer["listed"] = [model.name for model in listings]
answer["quantizations"] = [model.quantizations for model in listings]
answer["last_news"] = news[-1] if news else None
print(json.dumps(answer))
"""


@pytest.fixture
def resolve_from_hub(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Resolves a name with an empty hub cache of its own; in another process, for the hub's library reads the
    environment when it is imported."""

    def resolve(name: str, endpoint: str, offline: bool = False) -> dict[str, Any]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        if offline:
            environment["HF_HUB_OFFLINE"] = "1"
        command = [sys.executable, "-c", IN_ANOTHER_PROCESS, name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        assert "%|" not in done.stderr, "no bars but ours"
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return resolve


def test_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert resolve_model(str(folder)) == ModelSource("folder", folder, "my-model", str(folder))


def test_a_gguf_file(tmp_path: Path, write_llama: Callable[..., None]) -> None:
    path = tmp_path / "my-model.Q4_1.gguf"
    write_llama(path)
    assert resolve_model(str(path)) == ModelSource("gguf", path, "my-model.Q4_1", str(path))


def test_an_embedded_model_by_any_name(smollm2_path: Path) -> None:
    for name in ("smollm2-135m-instruct", "SmolLM2", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert resolve_model(name) == ModelSource("embedded", smollm2_path, "smollm2-135m-instruct", name)


def test_a_path_wins_over_an_embedded_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{}")
    assert resolve_model("smollm2").kind == "folder"


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK")
    for path, message in ((tmp_path, "holds no config.json.*a.gguf: name one"), (tmp_path / "a.gguf", "nor a GGUF")):
        with pytest.raises(ModelLoadError, match=message):
            resolve_model(str(path))


@pytest.mark.parametrize(
    "name", ["nothing", "./nothing", "/no/where", "~/nothing", "x.gguf", "a/b/c", "a/b.gguf", "a//b", ""]
)
def test_what_can_be_no_hub_name_is_an_error_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match=r"smollm2-135m-instruct|holds no config\.json"):
        resolve_model(name)


def test_a_model_of_the_hub(resolve_from_hub: Callable[..., dict[str, Any]]) -> None:
    """What serving needs is fetched and nothing twice; then it is there without the network."""
    with fake_hub(HUB_FILES) as endpoint:
        answer = resolve_from_hub(REPOSITORY, endpoint)
    folder = Path(answer["path"])
    assert (answer["kind"], answer["name"], answer["root"]) == ("hub", REPOSITORY, REPOSITORY)
    assert folder.name == COMMIT
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (folder / "model.safetensors").read_bytes() == HUB_FILES["model.safetensors"]
    assert answer["listed"] == [REPOSITORY]
    assert answer["quantizations"] == [["none", "q8_0", "int8"]]
    stage, done, total = answer["last_news"]
    assert (stage, done) == ("downloading", total)
    assert total >= 300_000
    again = resolve_from_hub(REPOSITORY, "http://127.0.0.1:9", offline=True)
    assert again["path"] == answer["path"]


def test_a_gguf_file_of_the_hub(resolve_from_hub: Callable[..., dict[str, Any]]) -> None:
    with fake_hub(HUB_FILES) as endpoint:
        answer = resolve_from_hub(f"{REPOSITORY}/q4.gguf", endpoint)
    assert (answer["kind"], answer["name"]) == ("hub", "q4")
    assert Path(answer["path"]).read_bytes() == HUB_FILES["q4.gguf"]
    assert answer["listed"] == [f"{REPOSITORY}/q4.gguf"]
    assert answer["quantizations"] == [[]]  # its header is damaged


def test_what_the_hub_does_not_have(resolve_from_hub: Callable[..., dict[str, Any]]) -> None:
    with fake_hub({"README.md": b"nothing to serve", "q4.gguf": b"GGUF"}) as endpoint:
        assert "holds no config.json" in resolve_from_hub(REPOSITORY, endpoint)["error"]
        missing = resolve_from_hub("someone/nothing", endpoint)
    assert "no file, folder or embedded model here" in missing["error"]
    assert endpoint in missing["error"]
    offline = resolve_from_hub("someone/nothing", "http://127.0.0.1:9", offline=True)
    assert "HF_HUB_OFFLINE is set" in offline["error"]


def test_listing(smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, vectors = [model for model in list_models() if model.kind == "embedded"]
    assert vectors.name == "all-minilm-l6-v2"
    assert (row.name, row.path) == ("smollm2-135m-instruct", smollm2_path)
    assert row.size_bytes > 350_000_000
    assert "Apache-2.0" in row.description
    assert row.quantizations == ("none", "q8_0", "int8")
    monkeypatch.setenv("LLMSERVE_CACHE", str(tmp_path))
    row, vectors = [model for model in list_models() if model.kind == "embedded"]
    assert vectors.path is None
    assert (row.path, row.size_bytes) == (None, embedded.CATALOGUE[0].download_bytes)
