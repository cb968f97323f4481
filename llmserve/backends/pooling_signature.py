"""A pooling model's configuration as v2 shows it: what its folder says of inputs, outputs and limits, filled in.

What a `config.pbtxt` says already stays as it is.
"""

from __future__ import annotations

from tritonclient.grpc.model_config_pb2 import ModelConfig

from llmserve.backends.model_config import complete
from llmserve.backends.model_messages import Signature, TensorSpec
from llmserve.errors import ModelLoadError
from llmserve.pooling_config import PoolingConfig

MAX_TEXTS = 2048  # in one request, as OpenAI's limit
_MAX_QUEUED_TEXTS = 8192
# Tokens of a batch. On a CPU a few hundred are as fast a token as any more, and a text that has just come waits for the
# batch that runs: benchmarks/bench_embedding_server.py.
_MAX_BATCH_TOKENS = {"CPU": 2048, "GPU": 16384}

TEXT, TEXT_PAIR, INPUT_IDS, ATTENTION_MASK = "text", "text_pair", "input_ids", "attention_mask"


def output_name(config: PoolingConfig) -> str:
    """`embedding` or `scores`."""
    return "embedding" if config.kind == "embed" else "scores"


def complete_pooling_config(config: ModelConfig, pooling: PoolingConfig) -> ModelConfig:
    """A complete copy. Texts come as BYTES, alone or in pairs, or as token ids with a mask, as exported encoders take
    them. Raises ModelLoadError."""
    inputs = [
        TensorSpec(TEXT, "BYTES", [1], optional=True),
        TensorSpec(INPUT_IDS, "INT64", [-1], optional=True),
        TensorSpec(ATTENTION_MASK, "INT64", [-1], optional=True),
    ]
    if pooling.kind != "embed":
        inputs.insert(1, TensorSpec(TEXT_PAIR, "BYTES", [1], optional=True))
    width = pooling.dimension if pooling.kind == "embed" else max(1, len(pooling.labels))
    outputs = [TensorSpec(output_name(pooling), "FP32", [width])]
    signature = Signature(
        inputs=inputs,
        outputs=outputs,
        max_batch_size=config.max_batch_size or MAX_TEXTS,
        dynamic_batching={"default_queue_policy": {"max_queue_size": _MAX_QUEUED_TEXTS}},
    )
    done = complete(config, signature)
    if config.input or config.output:
        raise ModelLoadError(
            f"Model {config.name!r}: a pooling model's inputs and outputs follow from its folder. Remove 'input' and "
            "'output' from its configuration."
        )
    return done


def max_batch_tokens(config: ModelConfig, kind: str) -> int:
    """`parameters.max_batch_tokens`, or what is right for a device of that kind. Raises ModelLoadError."""
    if "max_batch_tokens" not in config.parameters:
        return _MAX_BATCH_TOKENS.get(kind, _MAX_BATCH_TOKENS["CPU"])
    text = config.parameters["max_batch_tokens"].string_value
    if not text.isdecimal() or not int(text):
        raise ModelLoadError(
            f"Model {config.name!r}: parameters.max_batch_tokens is {text!r}; it must be a positive number."
        )
    return int(text)
