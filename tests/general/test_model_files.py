"""ONNX, TorchScript and torch.export files, with and without a configuration; custom backends; imports."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from llmserve.errors import InferenceError, ModelExecutionError, ModelLoadError
from tests.general.general_models import IDENTITY, Array, infer, infer_all, request, running

ONNX = 'backend: "onnxruntime"\n'
TORCH = 'backend: "pytorch"\n'
WEIGHTS = np.random.default_rng(0).standard_normal((4, 3), np.float32)
X = np.random.default_rng(1).standard_normal((5, 4), np.float32)


def onnx_model(nodes: list[Any], inputs: list[Any], outputs: list[Any], *weights: Any) -> bytes:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return data


def value(name: str, datatype: int, shape: list[int | str]) -> Any:
    return helper.make_tensor_value_info(name, datatype, shape)


def linear(batch: int | str = "batch") -> bytes:
    return onnx_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Neg", ["y"], ["z"])],
        [value("x", TensorProto.FLOAT, [batch, 4])],
        [value("y", TensorProto.FLOAT, [batch, 3]), value("z", TensorProto.FLOAT, [batch, 3])],
        numpy_helper.from_array(WEIGHTS, "w"),
    )


def saved(module: Any) -> bytes:
    data = io.BytesIO()
    torch.jit.save(module, data)
    return data.getvalue()


class Linear(torch.nn.Module):
    """X times WEIGHTS, and its negative."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.from_numpy(WEIGHTS))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x @ self.weight
        return y, -y


def exported() -> bytes:
    data = io.BytesIO()
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(Linear(), (torch.zeros(2, 4),), dynamic_shapes=({0: batch},)), data)
    return data.getvalue()


def check_serves(folder: Path, files: dict[str, str | bytes], config: str, names: tuple[str, str, str]) -> None:
    """The model is served in batches as X times WEIGHTS, whole and in parts."""

    async def scenario() -> None:
        async with running(folder, files, config) as model:
            assert [tensor.name for tensor in model.config.input] == [names[0]]
            assert [tensor.name for tensor in model.config.output] == list(names[1:])
            assert list(model.config.input[0].dims) == [4]
            assert model.config.max_batch_size == 4
            got = await asyncio.gather(*(infer(model, **{names[0]: X[i : i + 2]}) for i in range(4)))
            for i, outputs in enumerate(got):
                np.testing.assert_allclose(outputs[names[1]], X[i : i + 2] @ WEIGHTS, rtol=1e-5)
                np.testing.assert_allclose(outputs[names[2]], -(X[i : i + 2] @ WEIGHTS), rtol=1e-5)
            assert max(batch["requests"] for batch in model.explain()["batches"]) == 2
            (response,) = await infer_all(model, request({names[0]: X[:1]}, outputs=(names[2],)))
            assert [tensor.name for tensor in response.outputs] == [names[2]]

    asyncio.run(scenario())


def test_an_onnx_file_needs_no_configuration(tmp_path: Path) -> None:
    check_serves(tmp_path, {"model.onnx": linear()}, ONNX, ("x", "y", "z"))


def test_a_traced_file_needs_no_configuration(tmp_path: Path) -> None:
    traced = torch.jit.trace(Linear(), torch.zeros(1, 4))
    check_serves(tmp_path, {"model.pt": saved(traced)}, TORCH, ("x", "OUTPUT__0", "OUTPUT__1"))


def test_an_exported_program_needs_no_configuration(tmp_path: Path) -> None:
    check_serves(tmp_path, {"model.pt2": exported()}, TORCH, ("x", "OUTPUT__0", "OUTPUT__1"))


def test_a_batch_that_cannot_vary_is_part_of_the_shape(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.onnx": linear(batch=5)}, ONNX) as model:
            assert model.config.max_batch_size == 0
            assert list(model.config.input[0].dims) == [5, 4]
            np.testing.assert_allclose((await infer(model, x=X))["y"], X @ WEIGHTS, rtol=1e-5)

    asyncio.run(scenario())


def io_config(*, x: str = "x", datatype: str = "FP32", dims: str = "4", y: str = "y") -> str:
    return f"""
input [ {{ name: "{x}" data_type: TYPE_{datatype} dims: [ {dims} ] }} ]
output [ {{ name: "{y}" data_type: TYPE_FP32 dims: [ 3 ] }} ]
"""


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (io_config(x="q"), "unexpected inference input 'q' in the configuration of model 'm'; the model file has x"),
        (io_config(y="q"), "unexpected inference output 'q'"),
        (io_config(datatype="INT32"), "expects datatype TYPE_INT32 for input 'x', model provides TYPE_FP32"),
        (io_config(dims="5"), r"expects 2 dimensions \(shape \[-1,4\]\) .* specifies 2 dimensions \(shape \[-1,5\]\)"),
        (io_config() + "instance_group [ { kind: KIND_GPU } ]", "CUDAExecutionProvider"),
        ('output [ { name: "y" data_type: TYPE_FP32 dims: [ 3 ] } ] default_model_filename: "other"', "no other"),
    ],
)  # fmt: skip
def test_a_configuration_that_contradicts_the_file_is_refused(tmp_path: Path, config: str, text: str) -> None:
    async def scenario() -> None:
        with pytest.raises(ModelLoadError, match=text):
            async with running(tmp_path, {"model.onnx": linear()}, ONNX + "max_batch_size: 8\n" + config):
                pass

    asyncio.run(scenario())


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    for config, file in ((ONNX, "model.onnx"), (TORCH, "model.pt"), (TORCH, "model.pt2")):
        folder = tmp_path / file

        async def scenario(folder: Path = folder, config: str = config, file: str = file) -> None:
            with pytest.raises(ModelLoadError, match=rf"m/1/{file} cannot be loaded"):
                async with running(folder, {file: b"not a model"}, config):
                    pass

        asyncio.run(scenario())


def test_strings_pass_through_onnx(tmp_path: Path) -> None:
    labels = helper.make_node(
        "LabelEncoder", ["x"], ["y"], domain="ai.onnx.ml", keys_strings=["ä", "b"], values_strings=["one", "two"],
        default_string="none",
    )  # fmt: skip
    data = onnx_model([labels], [value("x", TensorProto.STRING, ["n"])], [value("y", TensorProto.STRING, ["n"])])

    async def scenario() -> None:
        async with running(tmp_path, {"model.onnx": data}, ONNX + "max_batch_size: 0") as model:
            words = np.array([["ä".encode()], [b"b"], [b"?"]], object)
            got = await asyncio.gather(*(infer(model, x=word) for word in words))
            assert [outputs["y"][0] for outputs in got] == [b"one", b"two", b"none"]
            with pytest.raises(InferenceError, match="'x' holds a string that is not UTF-8") as caught:
                await infer(model, x=np.array([b"\xff"], object))
            assert caught.value.code == InferenceError.INVALID_ARG

    asyncio.run(scenario())


def test_an_output_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    zipmap = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    output = helper.make_value_info(
        "y",
        helper.make_sequence_type_proto(
            helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(1, []))
        ),
    )
    data = onnx_model([zipmap], [value("x", TensorProto.FLOAT, ["n", 2])], [output])

    async def scenario() -> None:
        with pytest.raises(ModelLoadError, match=r"The output 'y' is a seq.map.* export the model without ZipMap"):
            async with running(tmp_path, {"model.onnx": data}, ONNX):
                pass

    asyncio.run(scenario())


class TwoInputs(torch.nn.Module):
    """Tells which argument was which."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left - 10 * right


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("right", "left"), 1 * 1 - 10 * 2), (("B__1", "A__0"), 1 - 20), (("first", "second"), 2 - 10)],
)
def test_torch_inputs_are_matched_by_tritons_rules(tmp_path: Path, names: tuple[str, str], expected: float) -> None:
    """The first name gets 2, the second 1."""
    config = TORCH + "".join(f'input [ {{ name: "{name}" data_type: TYPE_FP32 dims: [ 1 ] }} ]\n' for name in names)
    config += 'output [ { name: "OUTPUT__0" data_type: TYPE_FP32 dims: [ 1 ] } ]'

    async def scenario() -> None:
        async with running(tmp_path, {"model.pt": saved(torch.jit.script(TwoInputs()))}, config) as model:
            inputs: dict[str, Array] = {names[0]: np.full(1, 2, np.float32), names[1]: np.ones(1, np.float32)}
            assert (await infer(model, **inputs))["OUTPUT__0"] == expected

    asyncio.run(scenario())


def test_a_scripted_file_without_configuration_says_what_is_missing(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(ModelLoadError, match=r"does not record what its inputs are .* Write a config.pbtxt"):
            async with running(tmp_path, {"model.pt": saved(torch.jit.script(TwoInputs()))}, TORCH):
                pass

    asyncio.run(scenario())


def test_an_error_inside_torch_is_the_requests_own(tmp_path: Path) -> None:
    config = TORCH + io_config(dims="-1", y="OUTPUT__0").replace("[ 3 ]", "[ -1, 3 ]")
    config = config.replace("dims: [ -1 ]", "dims: [ -1, -1 ]")

    async def scenario() -> None:
        async with running(tmp_path, {"model.pt": saved(torch.jit.script(Linear()))}, config) as model:
            with pytest.raises(ModelExecutionError, match="shapes cannot be multiplied"):
                await infer(model, x=np.ones((2, 9), np.float32))
            np.testing.assert_allclose((await infer(model, x=X))["OUTPUT__0"], X @ WEIGHTS, rtol=1e-5)

    asyncio.run(scenario())


def test_a_custom_backend_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shouting.py").write_text(
        """
from llmserve.backends.base import Backend, Response
from llmserve.backends.model_messages import Signature, TensorSpec

class Shouting(Backend):
    def auto_complete(self, model):
        return Signature(inputs=[TensorSpec("IN", "BYTES", [1])], outputs=[TensorSpec("OUT", "BYTES", [1])])
    def load(self, model):
        self.suffix = model.file("suffix.txt").read_text()
    def execute(self, batch):
        return [Response({"OUT": request.input("IN") + self.suffix.encode()}) for request in batch.requests]
"""
    )
    info = tmp_path / "shouting-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[llmserve.backends]\nshouting = shouting:Shouting\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def scenario() -> None:
        async with running(tmp_path, {"suffix.txt": "!"}, 'backend: "shouting"') as model:
            assert (await infer(model, IN=np.array([b"hey"], object)))["OUT"][0] == b"hey!"

    asyncio.run(scenario())


def test_a_process_imports_only_what_its_model_needs(tmp_path: Path) -> None:
    def libraries(pid: int) -> str:
        return Path(f"/proc/{pid}/maps").read_text()

    async def scenario() -> None:
        async with running(tmp_path / "a", {"model.onnx": linear()}, ONNX) as model:
            assert "onnxruntime" in libraries(model.pids[0])
            assert "libtorch" not in libraries(model.pids[0])
        async with running(tmp_path / "b", {"model.py": IDENTITY}) as model:
            assert "onnxruntime" not in libraries(model.pids[0])
            assert "libtorch" not in libraries(model.pids[0])

    asyncio.run(scenario())
    code = "import sys, llmserve.backends.general; sys.exit(bool({'torch', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
