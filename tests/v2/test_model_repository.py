"""The repository's control modes, loads, reloads and unloads, over models without a process."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from llmserve.errors import ConfigError, InferenceError, InvalidRequestError
from llmserve.inference import InferRequest, Tensor
from llmserve.repository.location import open_repository
from llmserve.repository.model_repository import ModelRepository
from llmserve.repository.settings import ModelControlMode, RepositorySettings
from tests.v2.conftest import CONFIG, WriteModel
from tests.v2.v2_fake_model import FakeModel

EXPLICIT = ModelControlMode.EXPLICIT


def open_models(tmp_path: Path, **settings: Any) -> ModelRepository:
    repositories = settings.pop("model_repository", (str(tmp_path / "models"),))
    return ModelRepository(RepositorySettings(model_repository=repositories, **settings), FakeModel)


def request(name: str, **fields: Any) -> InferRequest:
    return InferRequest(name, [Tensor("INPUT0", "FP32", (1,), b"\0\0\0\0")], **fields)


async def tags(repository: ModelRepository, name: str, version: int | None = None) -> list[Any]:
    async with aclosing(repository.find(name).find(version).infer(request(name))) as responses:
        return [response.parameters.get("tag") async for response in responses]


async def lines(repository: ModelRepository) -> list[tuple[str, str, str]]:
    return [(entry.name, entry.version, entry.state) for entry in await repository.index()]


def test_mode_none_loads_everything_and_a_broken_model_costs_only_itself(
    tmp_path: Path, write_model: WriteModel
) -> None:
    write_model("good")
    write_model("bad", fail_load="no weights")
    write_model("unsupported", more="sequence_batching { }")
    (tmp_path / "models/empty").mkdir()

    async def run() -> None:
        repository = open_models(tmp_path)
        assert not repository.ready
        await repository.start()
        assert await lines(repository) == [
            ("bad", "1", "UNAVAILABLE"),
            ("empty", "", "UNAVAILABLE"),
            ("good", "1", "READY"),
            ("unsupported", "", "UNAVAILABLE"),
        ]
        reasons = {entry.name: entry.reason for entry in await repository.index()}
        assert reasons["bad"] == "Internal: no weights"
        assert "sets 'sequence_batching'" in reasons["unsupported"]
        assert not repository.ready  # strict: every model must serve
        with pytest.raises(InferenceError, match=r"'unsupported' has no available versions\. .*sequence_batching"):
            repository.find("unsupported").find(None)
        with pytest.raises(InferenceError, match="explicit model load / unload is not allowed"):
            await repository.load("good")
        await repository.stop()

    asyncio.run(run())


def test_readiness_need_not_be_strict(tmp_path: Path, write_model: WriteModel) -> None:
    write_model("bad", fail_load="no weights")

    async def run() -> None:
        repository = open_models(tmp_path, strict_readiness=False)
        await repository.start()
        assert repository.ready
        await repository.stop()

    asyncio.run(run())


def test_exit_on_error(tmp_path: Path, write_model: WriteModel) -> None:
    write_model("bad", fail_load="no weights")

    async def run() -> None:
        repository = open_models(tmp_path, exit_on_error=True)
        with pytest.raises(InferenceError, match="version 1 is at UNAVAILABLE state: Internal: no weights"):
            await repository.start()
        await repository.stop()

    asyncio.run(run())


def test_explicit_mode(tmp_path: Path, write_model: WriteModel) -> None:
    write_model("a", versions=(1, 2))
    write_model("b")

    async def run() -> None:
        repository = open_models(tmp_path, model_control_mode=EXPLICIT, load_model=("a",))
        await repository.start()
        assert await lines(repository) == [("a", "2", "READY"), ("b", "", "")]
        with pytest.raises(InferenceError, match="unknown model: 'b' is not found"):
            repository.find("b")
        await repository.load("b")
        await repository.unload("a")
        with pytest.raises(InferenceError, match="'a' has no available versions"):
            repository.find("a").find(None)
        with pytest.raises(InferenceError, match="'b' version 3 is not found"):
            repository.find("b").find(3)
        await repository.unload("nobody")
        with pytest.raises(InferenceError, match="failed to load 'nope', failed to poll from model repository"):
            await repository.load("nope")
        await repository.stop()
        assert await lines(repository) == [("a", "2", "UNAVAILABLE"), ("b", "1", "UNAVAILABLE")]
        assert [model.events for model in FakeModel.opened] == [["start", "stop"]] * 2

    asyncio.run(run())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"load_model": ("a",)}, "needs --model-control-mode=explicit"),
        ({"load_model": ("x",), "model_control_mode": EXPLICIT}, "no model repository holds a model of that name"),
    ],
)
def test_wrong_settings(tmp_path: Path, write_model: WriteModel, settings: dict[str, Any], complaint: str) -> None:
    write_model("a")
    with pytest.raises(ConfigError, match=complaint):
        asyncio.run(open_models(tmp_path, **settings).start())


def test_a_missing_repository(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        open_models(tmp_path)


def test_reload_swaps_and_drops_no_request(tmp_path: Path, write_model: WriteModel) -> None:
    write_model("m", tag="old", gate="1")

    async def run() -> None:
        repository = open_models(tmp_path, model_control_mode=EXPLICIT, load_model=("*",))
        await repository.start()
        in_flight = asyncio.create_task(tags(repository, "m"))
        await asyncio.sleep(0)
        write_model("m", tag="new")
        await repository.load("m")
        old, new = FakeModel.opened
        assert await tags(repository, "m") == ["new"]
        assert old.events == ["start"]  # not stopped: it still owes an answer
        old.open()
        assert await in_flight == ["old"]
        await repository.stop()
        assert old.events == new.events == ["start", "stop"]

    asyncio.run(run())


def test_a_version_that_still_answers_when_its_time_is_over_is_stopped(
    tmp_path: Path, write_model: WriteModel, caplog: pytest.LogCaptureFixture
) -> None:
    write_model("m", gate="1")

    async def run() -> None:
        repository = open_models(tmp_path, model_control_mode=EXPLICIT, load_model=("*",), exit_timeout_secs=0)
        await repository.start()
        in_flight = asyncio.create_task(tags(repository, "m"))
        await asyncio.sleep(0)
        await repository.stop()
        [model] = FakeModel.opened
        assert model.events == ["start", "stop"]
        model.open()
        await in_flight

    asyncio.run(run())
    assert "Model m version 1 still answers after 0 s: stopped." in caplog.text


def test_a_failed_reload_keeps_the_old_one_serving(tmp_path: Path, write_model: WriteModel) -> None:
    write_model("m", tag="old", versions=(1,))

    async def run() -> None:
        repository = open_models(tmp_path, model_control_mode=EXPLICIT, load_model=("*",))
        await repository.start()
        write_model("m", fail_load="oops", versions=(1, 2), more="version_policy { all { } }")
        with pytest.raises(InferenceError, match="load failed for model 'm': version 1 is at UNAVAILABLE"):
            await repository.load("m")
        assert await tags(repository, "m") == ["old"]
        write_model("m", config="nonsense")
        with pytest.raises(InferenceError, match=r"load failed for model 'm': .*config\.pbtxt:1"):
            await repository.load("m")
        assert await tags(repository, "m") == ["old"]
        assert await lines(repository) == [("m", "1", "READY")]
        await repository.stop()

    asyncio.run(run())


def test_new_versions_serve_only_when_all_have_loaded(tmp_path: Path, write_model: WriteModel) -> None:
    write_model("m", tag="old")

    async def run() -> None:
        repository = open_models(tmp_path, model_control_mode=EXPLICIT, load_model=("*",))
        await repository.start()
        write_model("m", versions=(1, 2), tag="new", hold_load="1", more="version_policy { all { } }")
        loading = asyncio.create_task(repository.load("m"))
        for _ in range(500):
            if len(FakeModel.opened) == 3:
                break
            await asyncio.sleep(0.01)
        _, first, second = FakeModel.opened
        second.open()
        await asyncio.sleep(0.01)
        assert await lines(repository) == [("m", "1", "READY"), ("m", "2", "LOADING")]
        assert await tags(repository, "m") == ["old"]
        first.open()
        await loading
        assert await tags(repository, "m", 1) == await tags(repository, "m", 2) == ["new"]
        await repository.stop()

    asyncio.run(run())


def test_version_policies_decide_what_serves(tmp_path: Path, write_model: WriteModel) -> None:
    write_model("m", versions=(1, 2, 3), more="version_policy { specific { versions: [ 1, 3 ] } }")

    async def run() -> None:
        repository = open_models(tmp_path)
        await repository.start()
        assert await lines(repository) == [("m", "1", "READY"), ("m", "3", "READY")]
        assert repository.find("m").find(None).version == 3
        with pytest.raises(InferenceError, match="version 2 is not found"):
            repository.find("m").find(2)
        await repository.stop()

    asyncio.run(run())


def test_a_dead_model_is_not_ready_and_still_found(tmp_path: Path, write_model: WriteModel) -> None:
    write_model("m")

    async def run() -> None:
        repository = open_models(tmp_path)
        await repository.start()
        assert repository.ready
        FakeModel.opened[0].die()
        assert not repository.ready
        (entry,) = await repository.index()
        assert (entry.state, entry.reason) == ("UNAVAILABLE", "its process ended")
        assert repository.find("m").find(None).version == 1  # its requests get its own error
        await repository.stop()

    asyncio.run(run())


def test_load_with_inline_configuration_and_files(tmp_path: Path, write_model: WriteModel) -> None:
    write_model("m", tag="disk")
    inline = {
        "backend": "python",
        "input": [{"name": "INPUT0", "data_type": "TYPE_FP32", "dims": [1]}],
        "output": [{"name": "OUTPUT0", "data_type": "TYPE_FP32", "dims": [1]}],
        "parameters": {"tag": {"string_value": "inline"}},
    }

    async def run() -> None:
        repository = open_models(tmp_path, model_control_mode=EXPLICIT, load_model=("m",))
        await repository.start()
        await repository.load("m", json.dumps(inline))
        assert await tags(repository, "m") == ["inline"]
        await repository.load("up", json.dumps(inline), {"file:1/model.py": b"# uploaded", "file:labels.txt": b"a"})
        uploaded = FakeModel.opened[-1]
        assert (uploaded.version_path / "model.py").read_bytes() == b"# uploaded"
        assert not uploaded.model_path.is_relative_to(tmp_path / "models")
        with pytest.raises(InferenceError, match="'config' parameter must be given"):
            await repository.load("up", None, {"file:1/model.py": b""})
        await repository.stop()
        assert not uploaded.model_path.exists()

    asyncio.run(run())


@pytest.mark.parametrize(
    "key",
    [
        *("file:../x", "file:1/../../x", "file:/etc/x", "file:", "nofile", "file:1\\..\\x", "file:1/a\nb", "file:.."),
        *(f"file:1/{'d/' * 2000}x", f"file:1/{'a' * 300}"),
    ],
)
def test_uploads_stay_inside(tmp_path: Path, write_model: WriteModel, key: str) -> None:
    async def run() -> None:
        repository = open_models(tmp_path, model_control_mode=EXPLICIT)
        await repository.start()
        with pytest.raises(InvalidRequestError, match=r"not valid|File name too long"):
            await repository.load("up", '{"backend": "python"}', {key: b""})
        assert await lines(repository) == []

    asyncio.run(run())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "..\\x", "a\0b", "x" * 300, "a\nb"])
def test_names_are_one_path_segment(tmp_path: Path, write_model: WriteModel, name: str) -> None:
    async def run() -> None:
        repository = open_models(tmp_path, model_control_mode=EXPLICIT)
        await repository.start()
        with pytest.raises(InvalidRequestError, match="not valid"):
            await repository.load(name)

    asyncio.run(run())


@pytest.mark.parametrize("link", ["models/m/1/weights.bin", "models/m/2", "models/other"])
def test_links_must_not_leave_the_repository(tmp_path: Path, write_model: WriteModel, link: str) -> None:
    write_model("m")
    outside = tmp_path / "outside"
    (outside / "1").mkdir(parents=True)
    (tmp_path / link).symlink_to(outside)

    async def run() -> None:
        repository = open_models(tmp_path)
        await repository.start()
        reasons = [entry.reason for entry in await repository.index() if entry.state == "UNAVAILABLE"]
        assert len(reasons) == 1
        assert "leaves the model repository" in reasons[0]
        await repository.stop()

    asyncio.run(run())


def test_links_within_the_repository_are_followed(tmp_path: Path, write_model: WriteModel) -> None:
    folder = write_model("m")
    (folder / "2").symlink_to(folder / "1")

    async def run() -> None:
        repository = open_models(tmp_path)
        await repository.start()
        assert await lines(repository) == [("m", "2", "READY")]
        await repository.stop()

    asyncio.run(run())


def test_polling_follows_the_disk(tmp_path: Path, write_model: WriteModel) -> None:
    write_model("kept", versions=(1,), more="version_policy { all { } }")
    write_model("gone")

    async def run() -> None:
        repository = open_models(tmp_path, model_control_mode=ModelControlMode.POLL, repository_poll_secs=3600)
        await repository.start()
        kept = next(model for model in FakeModel.opened if model.name == "kept")
        (tmp_path / "models/kept/2").mkdir()
        (tmp_path / "models/kept/2/model.py").write_text("# two")
        (tmp_path / "models/gone").rename(tmp_path / "moved")
        write_model("new")
        await repository.poll_once()
        ready = [line[:2] for line in await lines(repository) if line[2] == "READY"]
        assert ready == [("kept", "1"), ("kept", "2"), ("new", "1")]
        assert kept.events == ["start"]  # its files have not changed
        assert repository.ready  # what is gone from the disk does not count
        os.utime(tmp_path / "models/kept/1/model.py", ns=(1, 1))
        await repository.poll_once()
        await asyncio.sleep(0)
        assert kept.events == ["start", "stop"]
        opened = len(FakeModel.opened)
        await repository.poll_once()
        assert len(FakeModel.opened) == opened
        await repository.stop()

    asyncio.run(run())


def test_where_the_configuration_may_stand(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for name, file in (("toml", "1/model.onnx"), ("named", "1/model.py"), ("bare", "1/model.pt2"), ("none", "1/x.bin")):
        (models / name / "1").mkdir(parents=True)
        (models / name / file).write_text("")
    (models / "toml/model.toml").write_text("max_batch_size = 3")
    (models / "named/config.pbtxt").write_text("max_batch_size: 1")
    (models / "named/configs").mkdir()
    (models / "named/configs/big.pbtxt").write_text("max_batch_size: 9")

    async def run() -> None:
        repository = open_models(tmp_path, model_config_name="big")
        await repository.start()
        configs = {model.name: model.config for model in FakeModel.opened}
        assert (configs["toml"].backend, configs["toml"].max_batch_size) == ("onnxruntime", 3)
        assert configs["named"].max_batch_size == 9
        assert (configs["bare"].backend, configs["bare"].default_model_filename) == ("pytorch", "model.pt2")
        (entry,) = [entry for entry in await repository.index() if entry.name == "none"]
        assert "names no backend" in entry.reason
        await repository.stop()

    asyncio.run(run())


def test_several_repositories(tmp_path: Path, write_model: WriteModel) -> None:
    write_model("a")
    write_model("both")
    other = tmp_path / "other"
    (other / "c/1").mkdir(parents=True)
    (other / "c/config.pbtxt").write_text(CONFIG)
    (other / "both/1").mkdir(parents=True)

    async def run() -> None:
        repository = open_models(tmp_path, model_repository=(str(tmp_path / "models"), f"file://{other}"))
        await repository.start()
        entries = {entry.name: entry for entry in await repository.index()}
        assert (entries["a"].state, entries["c"].state) == ("READY", "READY")
        assert "stands in several repositories" in entries["both"].reason
        await repository.stop()

    asyncio.run(run())


def test_a_remote_repository_is_copied(tmp_path: Path, write_model: WriteModel) -> None:
    fsspec = pytest.importorskip("fsspec")
    folder = write_model("far", tag="remote")
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/bucket/far", recursive=True)

    async def run() -> None:
        repository = open_models(tmp_path, model_repository=("memory://bucket",), model_control_mode=EXPLICIT)
        await repository.start()
        await repository.load("far")
        assert await tags(repository, "far") == ["remote"]
        copy = FakeModel.opened[0].model_path
        assert (copy / "1/model.py").exists()
        await repository.stop()
        assert not copy.exists()

    try:
        asyncio.run(run())
    finally:
        store.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("url", "driver"),
    [("s3://models", "s3fs"), ("gs://models", "gcsfs"), ("az://models", "adlfs")],
)
def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch, url: str, driver: str) -> None:
    def refuse(_: str) -> None:
        raise ImportError("no such driver here")

    monkeypatch.setattr("fsspec.core.url_to_fs", refuse)
    with pytest.raises(ConfigError, match=rf"pip install {driver}$"):
        open_repository(url)
    with pytest.raises(ConfigError, match=r"^The model repository nope://x cannot be opened: no such driver here\.$"):
        open_repository("nope://x")


def test_hugging_face_folders_are_left_to_others(tmp_path: Path, write_model: WriteModel) -> None:
    write_model("m")
    (tmp_path / "models/bert").mkdir()
    (tmp_path / "models/bert/config.json").write_text("{}")

    async def run() -> None:
        repository = open_models(tmp_path)
        await repository.start()
        assert await lines(repository) == [("m", "1", "READY")]
        assert repository.hugging_face_folders == [tmp_path / "models/bert"]
        await repository.stop()

    asyncio.run(run())


def test_warm_up_and_labels(tmp_path: Path, write_model: WriteModel) -> None:
    config = """
    backend: "python" max_batch_size: 4
    input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ 2 ] } ]
    output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 2 ] label_filename: "labels.txt" } ]
    model_warmup { name: "w" batch_size: 3 count: 2 inputs { key: "INPUT0" value {
      data_type: TYPE_FP32 dims: [ 2 ] random_data: true } } }
    """
    (write_model("m", config=config) / "labels.txt").write_text("cat\ndog\n")

    async def run() -> None:
        repository = open_models(tmp_path)
        await repository.start()
        served = repository.find("m").find(None)
        assert served.labels == {"OUTPUT0": ["cat", "dog"]}
        assert served.model.statistics().success.count == 2
        await repository.stop()

    asyncio.run(run())


def test_missing_labels_fail_the_load(tmp_path: Path, write_model: WriteModel) -> None:
    write_model("m", more='output { name: "X" data_type: TYPE_FP32 dims: 1 label_filename: "../../etc/passwd" }')

    async def run() -> None:
        repository = open_models(tmp_path)
        await repository.start()
        (entry,) = await repository.index()
        assert "leaves its folder" in entry.reason
        assert FakeModel.opened[0].events == ["start", "stop"]
        await repository.stop()

    asyncio.run(run())


def test_an_abandoned_load_request_loads_all_the_same(tmp_path: Path, write_model: WriteModel) -> None:
    write_model("m")

    async def run() -> None:
        repository = open_models(tmp_path, model_control_mode=EXPLICIT)
        await repository.start()
        asking = asyncio.create_task(repository.load("m"))
        await asyncio.sleep(0)
        asking.cancel()
        for _ in range(200):
            if [line for line in await lines(repository) if line[2] == "READY"]:
                break
            await asyncio.sleep(0.01)
        assert await lines(repository) == [("m", "1", "READY")]
        await repository.stop()

    asyncio.run(run())
