"""Whatever our own OpenAPI document allows, and what it does not: no 500 of ours, no crash, an error that is JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from llmserve.api.v2_openapi import v2_paths
from llmserve.api.v2_settings import V2HttpSettings
from llmserve.repository.settings import ModelControlMode, RepositorySettings
from tests.v2.v2_fake_model import FakeModel
from tests.v2.v2_server import V2Server, serve_v2

CONFIG = """backend: "python"
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] optional: true } ]
input [ { name: "INPUT1" data_type: TYPE_STRING dims: [ -1 ] optional: true } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "OUTPUT1" data_type: TYPE_STRING dims: [ -1 ] } ]
"""
schema = schemathesis.openapi.from_dict(
    {"openapi": "3.1.0", "info": {"title": "v2", "version": "0"}, "paths": v2_paths()}
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[V2Server]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "echo" / "1").mkdir(parents=True)
    (folder / "echo" / "config.pbtxt").write_text(CONFIG)
    repository = RepositorySettings(
        model_repository=(str(folder),), model_control_mode=ModelControlMode.EXPLICIT, load_model=("*",)
    )
    with serve_v2(repository, FakeModel, V2HttpSettings(triton_error_statuses=False)) as running:
        yield running


@schema.parametrize()
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
)
def test_no_request_breaks_it(case: schemathesis.Case, server: V2Server) -> None:
    if "model" in (case.path_parameters or {}) and len(str(case.path_parameters["model"])) < 3:
        case.path_parameters["model"] = "echo"  # or hardly a request would find its model
    check(case.call(base_url=f"http://{server.http}"))
    assert server.plane.server_live()


def check(response: Any) -> None:
    """A success, or an error of the request's own that says what it is."""
    assert response.status_code != 500 or b"failed to load" in response.content  # Triton's own answer to that
    assert response.status_code in (200, 400, 404, 405, 413, 500, 501, 503), response.content
    assert b"The server failed" not in response.content
    if response.status_code != 200 and response.content:
        assert json.loads(response.content.removeprefix(b"data: "))["error"]


def test_the_model_still_answers(server: V2Server) -> None:
    server.call(server.plane.load("echo"))
    assert server.plane.model_ready("echo")
    assert Path(server.repository.settings.model_repository[0], "echo").is_dir()
