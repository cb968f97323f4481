"""Configurations: read, checked, completed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tritonclient.grpc.model_config_pb2 import ModelConfig

from llmserve.backends.model_config import to_dict
from llmserve.errors import ModelLoadError, UnsupportedConfigError
from llmserve.repository.model_config import (
    check_config,
    complete_batching,
    complete_config,
    parse_json,
    parse_pbtxt,
    parse_toml,
)
from llmserve.repository.versions import parse_version, scan_versions, select_versions

GOLDEN = Path(__file__).parent / "golden"


def recorded_configs() -> dict[str, dict[str, object]]:
    """What the real Triton shows of the configurations in its repository."""
    found = {}
    for line in (GOLDEN / "http.jsonl").read_text(encoding="utf-8").splitlines():
        exchange = json.loads(line)
        if exchange["path"].endswith("/config") and exchange["name"].startswith("GET") and exchange["status"] == 200:
            found[exchange["path"].split("/")[3]] = json.loads(exchange["body"])
    return found


@pytest.mark.parametrize(("name", "expected"), recorded_configs().items())
def test_completed_as_triton_completes_it(name: str, expected: dict[str, object]) -> None:
    file = GOLDEN / "model_repository" / name / "config.pbtxt"
    config = parse_pbtxt(file.read_text(), str(file))
    assert to_dict(complete_batching(complete_config(config, name, {"model.py"}))) == expected


def test_text_form_takes_commas_lists_and_comments() -> None:
    config = parse_pbtxt(
        """
        # a comment
        max_batch_size: 4,
        input [ { name: "A", data_type: TYPE_FP32, dims: [ 2, -1 ] }, { name: "B" data_type: TYPE_STRING dims: 1 } ]
        output: { name: "C" data_type: TYPE_INT64 dims: [ 1 ] }
        """,
        "config.pbtxt",
    )
    assert [tensor.name for tensor in config.input] == ["A", "B"]
    assert list(config.input[0].dims) == [2, -1]


def test_a_wrong_line_is_named() -> None:
    with pytest.raises(ModelLoadError, match=r"m/config.pbtxt:2:.*no_such_field"):
        parse_pbtxt("max_batch_size: 1\nno_such_field: 2\n", "m/config.pbtxt")


def test_toml_says_the_same() -> None:
    config = parse_toml(
        """
        backend = "onnxruntime"
        max_batch_size = 8
        parameters = { threads = 2, mode = "fast" }
        [[input]]
        name = "IN"
        data_type = "BYTES"
        dims = [1]
        [[output]]
        name = "OUT"
        data_type = "FP32"
        dims = [-1]
        [[instance_group]]
        kind = "cpu"
        count = 2
        [dynamic_batching]
        max_queue_delay_microseconds = 100
        """,
        "model.toml",
    )
    same = parse_pbtxt(
        """
        backend: "onnxruntime" max_batch_size: 8
        parameters { key: "threads" value { string_value: "2" } }
        parameters { key: "mode" value { string_value: "fast" } }
        input { name: "IN" data_type: TYPE_STRING dims: 1 }
        output { name: "OUT" data_type: TYPE_FP32 dims: -1 }
        instance_group { kind: KIND_CPU count: 2 }
        dynamic_batching { max_queue_delay_microseconds: 100 }
        """,
        "config.pbtxt",
    )
    assert config == same


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '"x"', '{"no_such": 1}', '{"max_batch_size": "many"}', '{"input": 5}', "[" * 5000, '{"name": 5}'],
)
def test_json_that_is_no_configuration(text: str) -> None:
    with pytest.raises(ModelLoadError, match="the load request"):
        parse_json(text, "the load request")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("sequence_batching { }", "sequence_batching"),
        ("ensemble_scheduling { }", "ensemble_scheduling"),
        ('platform: "ensemble"', "ensemble_scheduling"),
        ("response_cache { enable: true }", "response_cache.enable"),
        ('model_repository_agents { agents { name: "x" } }', "model_repository_agents"),
        ("instance_group { rate_limiter { } }", "instance_group.rate_limiter"),
        ("optimization { execution_accelerators { } }", "optimization.execution_accelerators"),
        ('input { name: "I" data_type: TYPE_FP32 dims: 1 is_shape_tensor: true }', "input.is_shape_tensor"),
    ],
)
def test_what_is_not_served_yet_is_named(text: str, field: str) -> None:
    with pytest.raises(UnsupportedConfigError, match=f"model 'm' sets '{field}'") as caught:
        check_config(parse_pbtxt(text, ""), "m")
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('name: "other"', "The folder's name is the model's"),
        ("max_batch_size: -1", "max_batch_size must not be negative"),
        ("input { data_type: TYPE_FP32 dims: 1 }", "an input has no 'name'"),
        ('input { name: "A" dims: 1 }', "input 'A' has no 'data_type'"),
        ('output { name: "A" data_type: TYPE_FP32 dims: 0 }', "output 'A' has a dimension of 0"),
        ('input { name: "A" data_type: TYPE_FP32 dims: -2 }', "input 'A' has a dimension of -2"),
        ('input { name: "A" data_type: 1 } input { name: "A" data_type: 1 }', "two inputs are named 'A'"),
        ("max_batch_size: 4 dynamic_batching { preferred_batch_size: 8 }", "8 is not within max_batch_size 4"),
        ("dynamic_batching { priority_levels: 3 default_priority_level: 4 }", "default_priority_level must be 1 to 3"),
        ("instance_group { count: -1 }", "count must not be negative"),
    ],
)
def test_contradictions_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(ModelLoadError, match=complaint):
        check_config(parse_pbtxt(text, ""), "m")


@pytest.mark.parametrize(
    ("given", "filenames", "backend", "filename"),
    [
        ("", {"model.onnx"}, "onnxruntime", "model.onnx"),
        ("", {"model.pt2"}, "pytorch", "model.pt2"),
        ("", {"model.pt"}, "pytorch", "model.pt"),
        ("", {"model.py", "weights.bin"}, "python", "model.py"),
        ('platform: "pytorch_libtorch"', set(), "pytorch", "model.pt"),
        ('default_model_filename: "net.onnx"', {"net.onnx"}, "onnxruntime", "net.onnx"),
        ('backend: "mine"', {"model.bin"}, "mine", ""),
    ],
)
def test_the_backend_is_found(given: str, filenames: set[str], backend: str, filename: str) -> None:
    config = complete_config(parse_pbtxt(given, ""), "m", filenames)
    assert (config.name, config.backend, config.default_model_filename) == ("m", backend, filename)


def test_no_backend_is_an_error() -> None:
    with pytest.raises(ModelLoadError, match="Set 'backend'"):
        complete_config(ModelConfig(), "m", {"weights.bin"})


def test_completing_leaves_the_original() -> None:
    config = parse_pbtxt('backend: "python"', "")
    complete_config(config, "m", set())
    assert config == parse_pbtxt('backend: "python"', "")


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("1", 1),
        ("20", 20),
        ("0", None),
        ("01", None),
        ("v1", None),
        ("1a", None),
        ("-1", None),
        ("²", None),
        ("", None),
    ],
)
def test_version_folders(name: str, version: int | None) -> None:
    assert parse_version(name) == version


def test_only_folders_are_versions(tmp_path: Path) -> None:
    for name in ("1", "3", "10", "02", "labels"):
        (tmp_path / name).mkdir()
    (tmp_path / "7").write_text("a file")
    assert list(scan_versions(tmp_path)) == [1, 3, 10]


@pytest.mark.parametrize(
    ("policy", "selected"),
    [
        ("", [5]),
        ("version_policy { latest { num_versions: 2 } }", [3, 5]),
        ("version_policy { latest { num_versions: 9 } }", [1, 3, 5]),
        ("version_policy { latest { } }", [5]),
        ("version_policy { all { } }", [1, 3, 5]),
        ("version_policy { specific { versions: [ 5, 1, 7 ] } }", [1, 5]),
        ("version_policy { specific { versions: [ 7 ] } }", []),
    ],
)
def test_version_policies(policy: str, selected: list[int]) -> None:
    assert select_versions(parse_pbtxt(policy, ""), [3, 1, 5]) == selected
