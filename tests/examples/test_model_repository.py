"""examples/model_repository, served by `llmserve serve` as a user would, asked by tritonclient over HTTP and gRPC.

The models are real: their weights come from the package index once, and from the user's cache from then on.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from tritonclient.utils import np_to_triton_dtype

ROOT = Path(__file__).parents[2]
MODELS = ["add_sub", "file_type", "magika", "orientation", "silero_vad", "silero_vad_torchscript"]
RATE = np.array([16000], np.int64)
FRAME, CONTEXT = 512, 64
SOURCES = {
    "python": b"import os\n\n\ndef main() -> None:\n    for name in os.listdir('.'):\n        print(name)\n",
    "json": b'{\n  "name": "llmserve",\n  "nested": {\n    "numbers": [1, 2, 3],\n    "nothing": null\n  }\n}\n',
    "c": b'#include <stdio.h>\n\nint main(void) {\n    printf("%d\\n", 1);\n    return 0;\n}\n',
}
Array = NDArray[Any]
Infer = Callable[..., dict[str, Array]]


@contextmanager
def serve(*args: str) -> Iterator[tuple[str, str, int]]:
    """Addresses of HTTP and gRPC, and the server's process. No model is named, so no LLM is served."""
    command = [sys.executable, "-m", "llmserve.cli", "serve", "--port", "0", *args]
    command += ["--model-repository", str(ROOT / "examples" / "model_repository")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if match := re.search(r"Ready in .*: http://(\S+)/v1 serves .* gRPC: (\S+)\. ", line):
                break
        else:
            pytest.fail("".join(said))
        try:
            yield match[1], match[2], process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, str, int]]:
    with serve() as running:
        yield running


@pytest.fixture(params=["http", "grpc"])
def infer(request: pytest.FixtureRequest, server: tuple[str, str, int]) -> Iterator[Infer]:
    """Calls a model with arrays by name, over each protocol."""
    module = tritonclient.http if request.param == "http" else tritonclient.grpc
    client = module.InferenceServerClient(server[0] if request.param == "http" else server[1])

    def call(model: str, classes: dict[str, int] | None = None, **arrays: Array) -> dict[str, Array]:
        inputs = []
        for name, array in arrays.items():
            tensor = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        outputs = [module.InferRequestedOutput(name, class_count=count) for name, count in (classes or {}).items()]
        result = client.infer(model, inputs, outputs=outputs or None)
        answer = result.get_response(as_json=True) if module is tritonclient.grpc else result.get_response()
        return {output["name"]: result.as_numpy(output["name"]) for output in answer["outputs"]}

    yield call
    client.close()


def by_frames(infer: Infer, sound: Array) -> Array:
    """Silero as ONNX, frame by frame, its state in the client's hands. `sound`: [rows, samples] -> [rows, frames]."""
    rows = len(sound)
    state, context = np.zeros((2, rows, 128), np.float32), np.zeros((rows, CONTEXT), np.float32)
    probabilities = []
    for frame in np.split(sound, sound.shape[1] // FRAME, axis=1):
        answer = infer("silero_vad", input=np.hstack([context, frame]), state=state, sr=RATE)
        probabilities.append(answer["output"])
        state, context = answer["stateN"], frame[:, -CONTEXT:]
    return np.hstack(probabilities)


def voices(rows: int, frames: int) -> Array:
    """Something between noise and a voice: harmonics of a wandering pitch that comes and goes. [rows, samples]"""
    random = np.random.default_rng(0)
    time = np.arange(frames * FRAME) / RATE[0]
    sound = []
    for row in range(rows):
        pitch = 120 + 40 * row + 15 * np.sin(2 * np.pi * 1.5 * time)
        phase = 2 * np.pi * np.cumsum(pitch) / RATE[0]
        voiced = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 12))
        loudness = 0.1 * np.clip(np.sin(2 * np.pi * 3 * time), 0, 1)
        sound.append(loudness * voiced + 0.003 * random.standard_normal(len(time)))
    return np.array(sound, np.float32)


def test_all_are_ready(server: tuple[str, str, int]) -> None:
    http = tritonclient.http.InferenceServerClient(server[0])
    grpc = tritonclient.grpc.InferenceServerClient(server[1])
    assert http.is_server_ready()
    index = http.get_model_repository_index()
    assert [(entry["name"], entry["state"]) for entry in index] == [(name, "READY") for name in MODELS]
    assert all(grpc.is_model_ready(name) for name in MODELS)
    with urllib.request.urlopen(f"http://{server[0]}/openapi.json") as answer:
        paths = json.load(answer)["paths"]
    assert {"/v1/chat/completions", "/v2/models/{model}/infer", "/v2/models/{model}/explain"} <= paths.keys()


@pytest.mark.parametrize("rows", [1, 3])
def test_silero_says_the_same_as_onnx_and_as_torchscript(infer: Infer, rows: int) -> None:
    sound = voices(rows, frames=24)
    whole = infer("silero_vad_torchscript", x=sound, sr=RATE)["speech"]
    assert whole.shape == (rows, 24)
    assert np.ptp(whole) > 0.1, "the sound should make a difference"
    np.testing.assert_allclose(by_frames(infer, sound), whole, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(infer("silero_vad_torchscript", x=sound, sr=RATE)["speech"], whole)  # keeps no state


def test_silero_hears_no_speech_in_silence(infer: Infer) -> None:
    silence = np.zeros((1, 16 * FRAME), np.float32)
    assert by_frames(infer, silence).max() < 0.1
    assert infer("silero_vad_torchscript", x=silence, sr=RATE)["speech"].max() < 0.1


def test_file_type_knows_sources(infer: Infer) -> None:
    content = np.array([[source] for source in SOURCES.values()], dtype=object)
    answer = infer("file_type", content=content)
    assert [label.decode() for label in answer["label"][:, 0]] == list(SOURCES)
    assert answer["score"].shape == (3, 1)
    assert answer["score"].min() > 0.5


def test_magika_is_the_network_behind_file_type(infer: Infer) -> None:
    head, tail = list(SOURCES["c"].lstrip()), list(SOURCES["c"].rstrip())
    padding = [256]
    features = np.array([head + padding * (2048 - len(head) - len(tail)) + tail], np.int32)
    score, _, label = infer("magika", {"target_label": 1}, bytes=features)["target_label"][0, 0].decode().split(":")
    answer = infer("file_type", content=np.array([[SOURCES["c"]]], dtype=object))
    assert label == answer["label"][0, 0].decode() == "c"
    assert float(score) == pytest.approx(float(answer["score"][0, 0]), abs=1e-5)


def test_orientation_gives_a_probability_for_each_quarter_turn(infer: Infer) -> None:
    picture = np.random.default_rng(0).standard_normal((3, 3, 224, 224), dtype=np.float32)
    probabilities = infer("orientation", x=picture)["fetch_name_0"]
    assert probabilities.shape == (3, 4)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-4)
    classes = infer("orientation", {"fetch_name_0": 4}, x=picture[:1])["fetch_name_0"][0]
    assert sorted(entry.decode().split(":")[2] for entry in classes) == ["0", "180", "270", "90"]


def test_a_triton_model_runs_unmodified(infer: Infer) -> None:
    left = np.arange(8, dtype=np.float32).reshape(2, 4)
    answer = infer("add_sub", INPUT0=left, INPUT1=left[::-1])
    np.testing.assert_array_equal(answer["OUTPUT0"], left + left[::-1])
    np.testing.assert_array_equal(answer["OUTPUT1"], left - left[::-1])


def test_a_model_runs_inline() -> None:
    """In the server's own process, where a debugger reaches it; the others keep theirs."""
    explicit = ("--model-control-mode", "explicit", "--load-model", "add_sub", "--load-model", "file_type")
    with serve(*explicit, "--inline", "add_sub") as (address, _, pid):
        assert len(psutil.Process(pid).children()) == 1
        ones = {"datatype": "FP32", "shape": [1, 4], "data": [1, 1, 1, 1]}
        body = json.dumps({"inputs": [{"name": "INPUT0", **ones}, {"name": "INPUT1", **ones}]}).encode()
        with urllib.request.urlopen(f"http://{address}/v2/models/add_sub/infer", body) as answer:
            outputs = {output["name"]: output["data"] for output in json.load(answer)["outputs"]}
    assert outputs == {"OUTPUT0": [2, 2, 2, 2], "OUTPUT1": [0, 0, 0, 0]}
