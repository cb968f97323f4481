"""Models written for Triton's Python backend, in their own process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from llmserve.errors import InferenceError, InvalidRequestError, ModelExecutionError, ModelLoadError
from tests.general.general_models import IDENTITY, PYTHON, Array, arrays, fp32, infer, infer_all, request, running

HEAD = "import json, threading, numpy as np, triton_python_backend_utils as pb_utils\nclass TritonPythonModel:\n"
DECOUPLED = PYTHON + "model_transaction_policy { decoupled: true }"

DATATYPES: dict[str, Array] = {
    "TYPE_BOOL": np.array([True, False]),
    "TYPE_UINT8": np.array([0, 255], np.uint8),
    "TYPE_UINT16": np.array([0, 65535], np.uint16),
    "TYPE_UINT32": np.array([0, 2**32 - 1], np.uint32),
    "TYPE_UINT64": np.array([0, 2**64 - 1], np.uint64),
    "TYPE_INT8": np.array([-128, 127], np.int8),
    "TYPE_INT16": np.array([-(2**15), 1], np.int16),
    "TYPE_INT32": np.array([-(2**31), 1], np.int32),
    "TYPE_INT64": np.array([-(2**63), 1], np.int64),
    "TYPE_FP16": np.array([0.5, np.inf], np.float16),
    "TYPE_FP32": np.array([0.1, np.nan], np.float32),
    "TYPE_FP64": np.array([0.1, -0.0]),
    "TYPE_STRING": np.array([b"", "ü".encode()], object),
}


def test_every_datatype_passes_through_one_process(tmp_path: Path) -> None:
    inputs = " ".join(
        f'input [ {{ name: "INPUT_{d}" data_type: {d} dims: [ -1 ] optional: true }} ]' for d in DATATYPES
    )
    outputs = inputs.replace("input", "output").replace("INPUT", "OUTPUT").replace(" optional: true", "")

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": IDENTITY}, f'backend: "python" {inputs} {outputs}') as model:
            got = await infer(model, **{f"INPUT_{d}": array for d, array in DATATYPES.items()})
            for datatype, array in DATATYPES.items():
                np.testing.assert_array_equal(got[f"OUTPUT_{datatype}"], array)
            wanted = request({"INPUT_TYPE_FP32": fp32(1), "INPUT_TYPE_FP64": np.ones(1)}, outputs=("OUTPUT_TYPE_FP64",))
            (response,) = await infer_all(model, wanted)
            assert [tensor.name for tensor in response.outputs] == ["OUTPUT_TYPE_FP64"]

    asyncio.run(scenario())


@pytest.mark.parametrize("size", [0, 16, 300_000, 5_000_000])
def test_tensors_of_any_size_pass(tmp_path: Path, size: int) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": IDENTITY}) as model:
            array = np.random.default_rng(0).random(size, np.float32)
            for _ in range(3):
                np.testing.assert_array_equal((await infer(model, INPUT0=array))["OUTPUT0"], array)

    asyncio.run(scenario())


def test_initialize_gets_tritons_arguments_and_finalize_is_called(tmp_path: Path) -> None:
    source = f"""{HEAD}
    def initialize(self, args):
        self.args = args
        config = json.loads(args["model_config"])
        assert config["input"][0]["dims"] == [-1]
        assert config["parameters"]["k"]["string_value"] == "v"
        assert pb_utils.get_output_config_by_name(config, "OUTPUT0")["data_type"] == "TYPE_FP32"
        assert pb_utils.triton_string_to_numpy("TYPE_FP32") == np.float32
        assert not pb_utils.using_decoupled_model_transaction_policy(config)
    def execute(self, requests):
        self.args.pop("model_config")
        text = np.frombuffer(json.dumps(self.args, sort_keys=True).encode(), np.uint8).astype(np.float32)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", text)]) for _ in requests]
    def finalize(self):
        open({str(tmp_path / "finalized")!r}, "w").close()
"""

    async def scenario() -> None:
        config = PYTHON + 'parameters { key: "k" value { string_value: "v" } } instance_group [ { kind: KIND_CPU } ]'
        async with running(tmp_path, {"model.py": source}, config) as model:
            text = (await infer(model, INPUT0=fp32(1)))["OUTPUT0"].astype(np.uint8).tobytes()
            assert json.loads(text) == {
                "model_instance_device_id": "0",
                "model_instance_kind": "CPU",
                "model_instance_name": "m_0_0",
                "model_name": "m",
                "model_repository": str(tmp_path / "m"),
                "model_version": "1",
            }

    asyncio.run(scenario())
    assert (tmp_path / "finalized").exists()


def test_a_request_tells_the_model_what_the_client_said(tmp_path: Path) -> None:
    source = f"""{HEAD}
    def execute(self, requests):
        said = [[r.request_id(), r.correlation_id(), r.flags(), r.timeout(), json.loads(r.parameters()),
                 r.requested_output_names(), r.model_name()] for r in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", np.zeros(1, np.float32))],
                parameters={{"said": json.dumps(s), "n": 1, "b": True}}) for s in said]
"""

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": source}) as model:
            asked = request(
                {"INPUT0": fp32(1)},
                id="q",
                parameters={"a": 1, "b": 1.5, "c": True, "d": "s"},
                sequence_id=5,
                sequence_start=True,
                sequence_end=True,
                timeout_us=7,
            )
            (response,) = await infer_all(model, asked)
            assert response.id == "q"
            assert (response.model_name, response.model_version) == ("m", "1")
            assert json.loads(str(response.parameters.pop("said"))) == [
                "q", 5, 3, 7, {"a": 1, "b": 1.5, "c": True, "d": "s"}, ["OUTPUT0"], "m",
            ]  # fmt: skip
            assert response.parameters == {"n": 1, "b": True}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("INVALID_ARG", InferenceError.INVALID_ARG),
        ("NOT_FOUND", InferenceError.NOT_FOUND),
        ("UNAVAILABLE", InferenceError.UNAVAILABLE),
        ("UNSUPPORTED", InferenceError.UNSUPPORTED),
        ("ALREADY_EXISTS", InferenceError.ALREADY_EXISTS),
        ("CANCELLED", InferenceError.CANCELLED),
        ("UNKNOWN", InferenceError.UNKNOWN),
        ("INTERNAL", InferenceError.INTERNAL),
    ],
)
def test_a_triton_error_keeps_its_code_and_text(tmp_path: Path, code: str, expected: str) -> None:
    source = f"""{HEAD}
    def execute(self, requests):
        error = pb_utils.TritonError("not today", pb_utils.TritonError.{code})
        return [pb_utils.InferenceResponse(error=error) for _ in requests]
"""

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": source}, inline=True) as model:
            with pytest.raises(InferenceError, match=r"^not today$") as caught:
                await infer(model, INPUT0=fp32(1))
            assert caught.value.code == expected
            assert model.statistics().fail.count == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("raise RuntimeError('boom')", r"'m_0_0', message: RuntimeError: boom\n\nAt:\n  .*model.py\(4\): execute\n"),
        ("return []", r"Number of InferenceResponse objects do not match .* size is:1, and .* size is:0"),
        ("return [pb_utils.InferenceResponse([], parameters={'p': [1]})]", "response parameter 'p' is a list"),
        ("return None", "Expected a list in the execute return"),
        ("return [None]", "Expected an 'InferenceResponse' object"),
        ("return [pb_utils.InferenceResponse([pb_utils.Tensor('OUTPUT0', 1j * a)])]", "'OUTPUT0': .*complex64"),
        ("return [pb_utils.InferenceResponse([pb_utils.Tensor('OUTPUT0', [1, 2])])]", "must be made of a numpy array"),
    ],
)  # fmt: skip
def test_a_model_that_fails_says_how_and_serves_on(tmp_path: Path, body: str, text: str) -> None:
    ok = "return [pb_utils.InferenceResponse([pb_utils.Tensor('OUTPUT0', a)])]"
    source = f"{HEAD}    def execute(self, requests):\n        " + (
        f"if (a := requests[0].inputs()[0].as_numpy())[0]: {body}\n        {ok}\n"
    )

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": source}, inline=True) as model:
            with pytest.raises(ModelExecutionError, match=text):
                await infer(model, INPUT0=fp32(1))
            assert (await infer(model, INPUT0=fp32(0)))["OUTPUT0"] == 0

    asyncio.run(scenario())


def test_decoupled_models_stream_from_execute_and_from_threads(tmp_path: Path) -> None:
    source = f"""{HEAD}
    def execute(self, requests):
        for request in requests:
            n = int(request.inputs()[0].as_numpy()[0])
            if n < 0:
                self.stream(request.get_response_sender(), -n)
            else:
                threading.Thread(target=self.stream, args=(request.get_response_sender(), n)).start()
    def stream(self, sender, n):
        for i in range(n):
            tensor = pb_utils.Tensor("OUTPUT0", np.array([i], np.float32))
            last = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if n == 2 and i == 1 else 0
            sender.send(pb_utils.InferenceResponse([tensor]), flags=last)
        if n == 2:
            try: sender.send(pb_utils.InferenceResponse([tensor]))
            except pb_utils.TritonModelException as error: pb_utils.Logger.log_info(str(error))
        else:
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": source}, DECOUPLED) as model:
            for n in (-3, 3, 2, 0):
                responses = await infer_all(model, request({"INPUT0": fp32(n)}))
                assert [float(arrays(r)["OUTPUT0"][0]) for r in responses if r.outputs] == list(range(abs(n)))
                assert [r.final for r in responses] == [False] * (len(responses) - 1) + [True]
            many = await asyncio.gather(*(infer_all(model, request({"INPUT0": fp32(20)})) for _ in range(10)))
            assert {len(responses) for responses in many} == {21}
            assert model.statistics().success.count == 14
            assert model.statistics().responses[0].success.count == 13

    asyncio.run(scenario())


def test_an_error_in_mid_stream_ends_the_stream(tmp_path: Path) -> None:
    source = f"""{HEAD}
    def execute(self, requests):
        sender = requests[0].get_response_sender()
        sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", np.zeros(1, np.float32))]))
        if requests[0].inputs()[0].as_numpy()[0]: raise ValueError("half way")
        sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("no more")))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": source}, DECOUPLED) as model:
            for value, text in ((0, "no more"), (1, "half way")):
                stream = model.infer(request({"INPUT0": fp32(value)}))
                assert arrays(await anext(stream))["OUTPUT0"] == 0
                with pytest.raises((InferenceError, ModelExecutionError), match=text):
                    await anext(stream)
                with pytest.raises(StopAsyncIteration):
                    await anext(stream)

    asyncio.run(scenario())


def test_async_execute(tmp_path: Path) -> None:
    source = f"""import asyncio
{HEAD}
    async def execute(self, requests):
        await asyncio.sleep(0)
        arrays = [request.inputs()[0].as_numpy() + 1 for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", array)]) for array in arrays]
"""
    decoupled = f"""import asyncio
{HEAD}
    async def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            await asyncio.sleep(0.01)
            if request.inputs()[0].as_numpy()[0] < 0: raise ValueError("below zero")
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", request.inputs()[0].as_numpy() + 1)]), 1)
"""

    async def scenario() -> None:
        for text, config in ((source, PYTHON), (decoupled, DECOUPLED)):
            async with running(tmp_path, {"model.py": text}, config) as model:
                got = await asyncio.gather(*(infer(model, INPUT0=fp32(i)) for i in range(5)))
                assert [float(g["OUTPUT0"][0]) for g in got] == [1, 2, 3, 4, 5]
                if config is DECOUPLED:
                    with pytest.raises(ModelExecutionError, match="below zero"):
                        await infer(model, INPUT0=fp32(-1))

    asyncio.run(scenario())


def test_auto_complete_config_makes_a_configuration(tmp_path: Path) -> None:
    source = f"""{HEAD}
    @staticmethod
    def auto_complete_config(config):
        config.add_input({{"name": "IN", "data_type": "TYPE_FP32", "dims": [-1]}})
        config.add_input({{"name": "MORE", "data_type": "TYPE_STRING", "dims": [1], "optional": True}})
        config.add_output({{"name": "OUT", "data_type": "TYPE_FP32", "dims": [-1]}})
        config.set_max_batch_size(4)
        config.set_dynamic_batching()
        return config
    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUT", r.inputs()[0].as_numpy())]) for r in requests]
"""

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": source}, 'backend: "python"') as model:
            assert [tensor.name for tensor in model.config.input] == ["IN", "MORE"]
            assert model.config.input[1].optional
            assert model.config.max_batch_size == 4
            assert model.config.HasField("dynamic_batching")
            np.testing.assert_array_equal((await infer(model, IN=fp32(1, 2)[None]))["OUT"], fp32(1, 2)[None])
        wrong = PYTHON.replace("INPUT0", "IN").replace("FP32", "INT32", 1)
        with pytest.raises(ModelLoadError, match="configuration expects data_type TYPE_INT32 for input 'IN'"):
            async with running(tmp_path, {"model.py": source}, wrong):
                pass

    asyncio.run(scenario())


def test_dlpack_carries_tensors_to_torch_and_back(tmp_path: Path) -> None:
    source = f"""import torch
from torch.utils.dlpack import from_dlpack, to_dlpack
{HEAD}
    def execute(self, requests):
        tensor = pb_utils.get_input_tensor_by_name(requests[0], "INPUT0")
        assert tensor.is_cpu()
        t = from_dlpack(tensor.to_dlpack()) * 2
        assert torch.equal(torch.from_dlpack(tensor) * 2, t)
        if t[0] < 0: out = pb_utils.Tensor.from_dlpack("OUTPUT0", to_dlpack(t))
        else: out = pb_utils.Tensor.from_dlpack("OUTPUT0", t)
        return [pb_utils.InferenceResponse([out])]
"""

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": source}) as model:
            for value in (3.0, -3.0):
                assert (await infer(model, INPUT0=fp32(value)))["OUTPUT0"] == 2 * value

    asyncio.run(scenario())


def test_metrics_of_a_model_reach_the_server(tmp_path: Path) -> None:
    source = f"""{HEAD}
    def initialize(self, args):
        family = pb_utils.MetricFamily(name="seen", description="requests", kind=pb_utils.MetricFamily.COUNTER)
        self.seen = family.Metric(labels={{"a": "b"}})
        family = pb_utils.MetricFamily(name="size", description="sizes", kind=pb_utils.MetricFamily.HISTOGRAM)
        self.size = family.Metric(buckets=[1.0, 10.0])
    def execute(self, requests):
        self.seen.increment(len(requests))
        self.size.observe(5)
        try: self.seen.set(1)
        except ValueError: pass
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", r.inputs()[0].as_numpy())]) for r in requests]
"""

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": source}) as model:
            for _ in range(3):
                await infer(model, INPUT0=fp32(1))
            seen = model.custom_metrics["seen", (("a", "b"),)]
            assert (seen.value, seen.kind, seen.description) == (3.0, "counter", "requests")
            assert model.custom_metrics["size", ()].counts == [0, 3, 0]

    asyncio.run(scenario())


def test_calling_another_model_says_that_it_is_not_served_yet(tmp_path: Path) -> None:
    source = f"""{HEAD}
    async def execute(self, requests):
        other = pb_utils.InferenceRequest(model_name="other", requested_output_names=["Y"], inputs=[])
        response = await other.async_exec()
        assert response.has_error() and other.exec().has_error()
        return [pb_utils.InferenceResponse(error=response.error())]
"""

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": source}, inline=False) as model:
            with pytest.raises(InferenceError, match=r"called model 'other'.*not served yet") as caught:
                await infer(model, INPUT0=fp32(1))
            assert caught.value.code == InferenceError.UNSUPPORTED

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("raise ImportError('no such thing')", "ImportError: no such thing"),
        ("x = 1", "neither a class TritonPythonModel nor a class Model"),
        ("class TritonPythonModel: pass", "no method 'execute'"),
        (
            f"{HEAD}    execute = None.__init__\n    def initialize(self, args): raise RuntimeError('init failed')",
            r"init failed\n\nAt:\n  .*initialize",
        ),
        ("import os; os._exit(3)", r"ended \(exit status 3\)"),
    ],
)
def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path, source: str, text: str) -> None:
    async def scenario() -> None:
        with pytest.raises(ModelLoadError, match=text):
            async with running(tmp_path, {"model.py": source}):
                pass

    asyncio.run(scenario())


def test_a_plain_class_is_a_whole_model(tmp_path: Path) -> None:
    source = """
import numpy as np
from llmserve.errors import InvalidRequestError

class Model:
    inputs = {"x": "FP32[-1]", "factor": "FP32[1]?"}
    outputs = {"y": "FP32[-1]"}
    max_batch_size = 32
    batched = True

    def load(self, model):
        self.calls = 0
        assert model.version == "1"

    def predict(self, x, factor=None):
        if x.shape[1] == 13:
            raise InvalidRequestError("13 is no good")
        self.calls += 1
        return x * (2 if factor is None else factor)
"""

    async def scenario(inline: bool) -> None:
        async with running(tmp_path, {"model.py": source}, 'backend: "python"', inline=inline) as model:
            x = np.arange(6, dtype=np.float32).reshape(2, 3)
            got = await asyncio.gather(*(infer(model, x=x * i) for i in range(8)))
            for i, outputs in enumerate(got):
                np.testing.assert_array_equal(outputs["y"], x * i * 2)
            assert (await infer(model, x=x, factor=np.full((2, 1), 5, np.float32)))["y"][1, 2] == 25
            assert max(batch["rows"] for batch in model.explain()["batches"]) == 14
            with pytest.raises(InferenceError, match="13 is no good") as caught:
                await infer(model, x=np.zeros((1, 13), np.float32))
            assert caught.value.code == InferenceError.INVALID_ARG

    asyncio.run(scenario(inline=False))
    asyncio.run(scenario(inline=True))


def test_a_plain_class_may_stream(tmp_path: Path) -> None:
    source = """
class Model:
    inputs = {"prompt": "BYTES[1]"}
    outputs = {"text": "BYTES[1]"}

    def predict(self, prompt):
        for word in prompt[0].split():
            yield {"text": [word]}
"""

    async def scenario() -> None:
        async with running(tmp_path, {"model.py": source}, 'backend: "python"') as model:
            assert model.config.model_transaction_policy.decoupled
            responses = await infer_all(model, request({"prompt": np.array([b"a bc d"], object)}))
            assert [arrays(r)["text"][0] for r in responses if r.outputs] == [b"a", b"bc", b"d"]

    asyncio.run(scenario())


def test_an_unreadable_class_attribute_is_named(tmp_path: Path) -> None:
    source = "class Model:\n    inputs = {'x': 'float[3]'}\n    outputs = {}\n    def predict(self, x): return x"

    async def scenario() -> None:
        with pytest.raises(ModelLoadError, match=r"Model.inputs\['x'\] is 'float\[3\]'"):
            async with running(tmp_path, {"model.py": source}, 'backend: "python"'):
                pass

    asyncio.run(scenario())


def test_an_invalid_request_never_reaches_the_model(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, {"model.py": IDENTITY}, inline=True) as model:
            with pytest.raises(InvalidRequestError, match="unexpected shape"):
                await infer(model, INPUT0=np.zeros((2, 2), np.float32))
            assert model.statistics().execution_count == 0

    asyncio.run(scenario())
