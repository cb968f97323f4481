"""A batch of texts as the message to a pooling model's process, and its answer as rows. Copies each token id once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from llmserve.backends.model_messages import BatchTensor, ExecuteBatch, RequestHeader, Results
from llmserve.backends.pooling import CU_SEQLENS, POOLED, TASK, TOKEN_IDS, TOKEN_TYPE_IDS
from llmserve.backends.pooling_job import FloatArray, PoolingTask
from llmserve.backends.pooling_tokenizer import EncodedText
from llmserve.backends.tensors import Array
from llmserve.backends.transport import Payload
from llmserve.errors import InferenceError, LLMServeError, ModelExecutionError


def pooling_batch(batch_id: int, texts: Sequence[EncodedText], task: PoolingTask) -> tuple[ExecuteBatch, Payload]:
    """One request with packed inputs: text i owns token_ids[cu_seqlens[i]:cu_seqlens[i + 1]]."""
    payload, inputs = Payload(), list[BatchTensor]()

    def add(name: str, datatype: str, array: Array) -> None:
        payload.align()
        payload.add(array.tobytes())
        inputs.append(BatchTensor(name, datatype, list(array.shape), array.nbytes))

    lengths = [len(text.token_ids) for text in texts]
    add(TOKEN_IDS, "INT32", np.concatenate([text.token_ids for text in texts]))
    add(CU_SEQLENS, "INT32", np.cumsum([0, *lengths], dtype=np.int32))
    if any(text.token_type_ids is not None for text in texts):
        types = [
            np.zeros(length, np.uint8) if text.token_type_ids is None else text.token_type_ids
            for text, length in zip(texts, lengths, strict=True)
        ]
        add(TOKEN_TYPE_IDS, "UINT8", np.concatenate(types))
    header = RequestHeader(batch_id, 1, outputs=[POOLED], parameters={TASK: task})
    return ExecuteBatch(batch_id, [header], inputs), payload


def pooled_rows(
    results: Results, payload: memoryview, texts: Sequence[EncodedText], task: PoolingTask
) -> list[FloatArray] | LLMServeError:
    """What the model made of each text: [width], or for `token_embed` [tokens, width]; or why it failed."""
    (entry,) = results.responses
    if entry.error is not None:
        code, message = entry.error
        return InferenceError(message, code) if code else ModelExecutionError(message)
    (output,) = entry.outputs
    array = np.frombuffer(payload[: output.num_bytes], np.float32).reshape(output.shape)
    bounds = list(range(len(texts) + 1))
    if task == "token_embed":
        bounds = np.cumsum([0, *(len(text.token_ids) for text in texts)]).tolist()
        return [array[begin:end] for begin, end in pairwise(bounds)]
    if len(array) != len(texts):
        return ModelExecutionError(f"The model answered {len(array)} rows for {len(texts)} texts.")
    return list(array)
