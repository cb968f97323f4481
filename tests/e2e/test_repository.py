"""One model repository with a Python model, an LLM, an encoder and a model of an installed package's own backend."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import transformers

from tests.pooling_server.conftest import VOCABULARY, write_bert, write_tokenizer

SIGNATURE = """
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
"""
MODEL = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        arrays = [request.inputs()[0].as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", array * 2)]) for array in arrays]
"""


def write_package(folder: Path) -> None:
    """The example of the documentation, as pip installs it: a module, and beside it the entry point that names it."""
    text = (Path(__file__).parents[2] / "docs" / "backends.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (toml,) = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ((name, target),) = tomllib.loads(toml)["project"]["entry-points"]["llmserve.backends"].items()
    information = folder / "power_backend-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / f"{target.partition(':')[0]}.py").write_text(code)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: power-backend\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[llmserve.backends]\n{name} = {target}\n")


def write_model(folder: Path, backend: str, file: str, content: str) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "1" / file).write_text(content)
    (folder / "config.pbtxt").write_text(f'backend: "{backend}"\n{SIGNATURE}')


def write_llama(folder: Path) -> None:
    """Random weights over the encoder's words: what it says means nothing."""
    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)


@pytest.fixture(scope="module")
def served(start_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("repository")
    (folder / "temporary").mkdir()
    write_package(folder / "packages")
    write_model(folder / "models" / "double", "python", "model.py", MODEL)
    write_model(folder / "models" / "cube", "power", "exponent.txt", "3")
    write_model(folder / "models" / "nothing", "no-such-backend", "x", "")
    write_bert(folder / "models" / "encoder")
    write_llama(folder / "models" / "talker")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(folder / "packages"), os.environ.get("PYTHONPATH", ""))))
        patch.setenv("TMPDIR", str(folder / "temporary"))
        server = start_server("--model-repository", str(folder / "models"), "--kv-cache-memory", "64MiB")
    assert server.url, server.output
    return server, folder


def infer(url: str, model: str, *values: float) -> httpx.Response:
    tensor = {"name": "INPUT0", "datatype": "FP32", "shape": [len(values)], "data": values}
    return httpx.post(f"{url}/v2/models/{model}/infer", json={"inputs": [tensor]})


def test_all_stand_in_one_index_and_answer(served: tuple[Any, Path]) -> None:
    server, _ = served
    index = {entry["name"]: entry for entry in httpx.post(f"{server.url}/v2/repository/index").json()}
    assert index.keys() == {"double", "cube", "nothing", "encoder", "talker"}
    assert {name for name, entry in index.items() if entry.get("state") == "READY"} == index.keys() - {"nothing"}
    assert "backend 'no-such-backend', which is not installed. Known: " in index["nothing"]["reason"]
    assert "power" in index["nothing"]["reason"]
    assert infer(server.url, "double", 1, 2).json()["outputs"][0]["data"] == [2, 4]
    assert infer(server.url, "cube", 2, 3).json()["outputs"][0]["data"] == [8, 27]
    client = server.client()
    assert {model.id for model in client.models.list()} >= {"talker", "encoder"}
    said = client.completions.create(model="talker", prompt="the cat", max_tokens=4, extra_body={"ignore_eos": True})
    assert said.usage.completion_tokens == 4
    generated = httpx.post(
        f"{server.url}/v2/models/talker/generate", json={"text_input": "the cat", "max_tokens": 3}
    ).json()
    assert (generated["model_name"], "text_output" in generated) == ("talker", True)
    vector = client.embeddings.create(model="encoder", input="the cat sat", encoding_format="float").data[0].embedding
    assert len(vector) == 32
    assert httpx.get(f"{server.url}/v2/models/encoder").json()["name"] == "encoder"


def test_a_model_that_cannot_be_loaded_is_named_in_the_line_that_says_the_server_serves(
    served: tuple[Any, Path],
) -> None:
    server, _ = served
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert "Ready in" not in server.output
    assert re.search(r"Serving in \S+ s, but not ready, as nothing could not be loaded \(.*--no-strict-", server.output)


def test_who_asks_at_the_wrong_door_is_shown_the_right_one(served: tuple[Any, Path]) -> None:
    server, _ = served
    asked: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.BadRequestError, match=r"no language model\. Ask it by POST /v2/models/double/infer"):
        server.client().chat.completions.create(model="double", messages=asked)
    refused = infer(server.url, "talker", 1)
    assert refused.status_code == 501
    assert "'talker' is a language model" in refused.json()["error"]
    assert "/v1/chat/completions" in refused.json()["error"]
    refused = httpx.post(f"{server.url}/v2/repository/models/double/load", json={})
    assert refused.status_code == 503
    assert "--model-control-mode=explicit" in refused.json()["error"]


def test_a_backend_of_a_package_is_unloaded_with_the_server(served: tuple[Any, Path]) -> None:
    server, folder = served
    (temporary,) = folder.glob("temporary/llmserve-server-*")
    assert list(temporary.iterdir())  # the sockets of the language model
    assert server.stop() == 0
    assert not temporary.exists()
    assert (folder / "models" / "cube" / "1" / "unloaded").exists()


def test_who_is_interrupted_while_it_loads_says_so_in_a_line(start_server: Callable[..., Any], tmp_path: Path) -> None:
    code = "import os, signal\n\nos.kill(os.getppid(), signal.SIGINT)\nsignal.pause()\n"
    write_model(tmp_path / "endless", "python", "model.py", code)
    server = start_server("--model-repository", str(tmp_path))
    assert server.process.wait(60) == 0
    server.join()
    assert "Stopping before every model is loaded" in server.output
    assert "Draining" not in server.output
    assert "Traceback" not in server.output
