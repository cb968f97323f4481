"""Requests against a configuration: Triton's texts, and which requests may share a batch."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from llmserve.backends.validation import OutputReshaper, RequestValidator
from llmserve.errors import InvalidRequestError
from llmserve.inference import InferRequest, RequestedOutput, Tensor

PLAIN = """
name: "m"
input [ { name: "A" data_type: TYPE_FP32 dims: [ -1 ] } ]
input [ { name: "B" data_type: TYPE_STRING dims: [ 2 ] optional: true } ]
output [ { name: "Y" data_type: TYPE_FP32 dims: [ -1 ] } ]
"""
BATCHED = """
name: "m" max_batch_size: 8
input [ { name: "A" data_type: TYPE_FP32 dims: [ 2 ] }, { name: "B" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "Y" data_type: TYPE_FP32 dims: [ -1 ] } ]
"""


def validator(config: str) -> RequestValidator:
    return RequestValidator(text_format.Parse(config, ModelConfig()))


def fp32(name: str, *shape: int, num_bytes: int | None = None) -> Tensor:
    size = 4
    for dim in shape:
        size *= dim
    return Tensor(name, "FP32", shape, bytes(size if num_bytes is None else num_bytes))


def strings(*elements: bytes) -> Tensor:
    return Tensor("B", "BYTES", (2,), b"".join(len(e).to_bytes(4, "little") + e for e in elements))


@pytest.mark.parametrize(
    ("config", "inputs", "text"),
    [
        (PLAIN, [fp32("X", 1)], "unexpected inference input 'X' for model 'm'"),
        (PLAIN, [], "expected number of inputs between 1 and 2 but got 0 inputs for model 'm'"),
        (PLAIN, [strings(b"", b"")], "but missing required input(s) ['A']"),
        (PLAIN, [fp32("A", 1), fp32("A", 1)], "input 'A' already exists in request"),
        (
            BATCHED,
            [fp32("A", 1, 2)],
            "2 inputs but got 1 inputs for model 'm'. Got input(s) ['A'], but missing required input(s) ['B']. Please",
        ),
        (
            PLAIN,
            [Tensor("A", "INT32", (1,), bytes(4))],
            "inference input 'A' data-type is 'INT32', but model 'm' expects 'FP32'",
        ),
        (PLAIN, [fp32("A", 2, 2)], "unexpected shape for input 'A' for model 'm'. Expected [-1], got [2,2]. "),
        (
            BATCHED,
            [fp32("A", 1, 3), fp32("B", 1, 1)],
            "Expected [-1,2], got [1,3]. NOTE: Setting a non-zero max_batch_size",
        ),
        (BATCHED, [fp32("A", 9, 2), fp32("B", 9, 1)], "inference request batch-size must be <= 8 for 'm'"),
        (BATCHED, [fp32("A", 2, 2), fp32("B", 1, 1)], "input 'A' batch size does not match other inputs for 'm'"),
        (BATCHED, [fp32("A"), fp32("B")], "has no shape but model requires batch dimension"),
        (
            BATCHED,
            [fp32("A", 0, 2), fp32("B", 0, 4)],
            "input byte size mismatch for input 'B' for model 'm'. Expected 16, got 0",
        ),
        (
            PLAIN,
            [fp32("A", 5, num_bytes=16)],
            "input byte size mismatch for input 'A' for model 'm'. Expected 20, got 16",
        ),
        (
            PLAIN,
            [fp32("A", 1), Tensor("B", "BYTES", (2,), b"\2\0\0\0a")],
            "incomplete string data for inference input 'B', expecting string of length 2 but only 1 bytes available",
        ),
        (
            PLAIN,
            [fp32("A", 1), strings(b"a", b"b", b"c")],
            "unexpected number of string elements 3 for inference input 'B', expecting 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_tritons_words(config: str, inputs: list[Tensor], text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validator(config).check(InferRequest("m", inputs))
    assert text in caught.value.message


def test_an_unknown_output_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="unexpected inference output 'ZZ' for model 'm'"):
        validator(PLAIN).check(InferRequest("m", [fp32("A", 1)], outputs=[RequestedOutput("ZZ")]))


def test_a_number_without_a_place_in_64_bits_is_refused() -> None:
    for fields in ({"parameters": {"n": 1 << 64}}, {"timeout_us": 1 << 70}):
        with pytest.raises(InvalidRequestError, match="does not fit into 64 bits"):
            validator(PLAIN).check(InferRequest("m", [fp32("A", 1)], **fields))  # type: ignore[arg-type]


def test_the_message_names_the_request() -> None:
    with pytest.raises(InvalidRequestError, match=r"^\[request id: q1\] unexpected shape"):
        validator(PLAIN).check(InferRequest("m", [fp32("A", 2, 2)], id="q1"))


def test_requests_share_a_batch_if_their_rows_have_the_same_shapes() -> None:
    check = validator(BATCHED).check
    first = check(InferRequest("m", [fp32("A", 1, 2), fp32("B", 1, 5)]))
    assert first.rows == 1
    assert check(InferRequest("m", [fp32("B", 3, 5), fp32("A", 3, 2)])).shape_key == first.shape_key
    assert check(InferRequest("m", [fp32("A", 1, 2), fp32("B", 1, 4)])).shape_key != first.shape_key
    ragged = validator(BATCHED.replace("dims: [ -1 ] }", "dims: [ -1 ] allow_ragged_batch: true }", 1)).check
    keys = {ragged(InferRequest("m", [fp32("A", 1, 2), fp32("B", 1, n)])).shape_key for n in (3, 4)}
    assert len(keys) == 1


def test_reshape_is_for_the_model_alone() -> None:
    config = """
    name: "m" max_batch_size: 4
    input [ { name: "A" data_type: TYPE_FP32 dims: [ 1, -1 ] reshape: { shape: [ -1 ] } } ]
    output [ { name: "Y" data_type: TYPE_FP32 dims: [ 1, -1, 1 ] reshape: { shape: [ -1 ] } } ]
    """
    (tensor,) = validator(config).check(InferRequest("m", [fp32("A", 2, 1, 7)])).inputs
    assert tensor.shape == (2, 7)
    assert OutputReshaper(text_format.Parse(config, ModelConfig()))("Y", [2, 7]) == (2, 1, 7, 1)
