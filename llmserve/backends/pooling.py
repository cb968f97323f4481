"""The backend of embedding, reranker and classifier models, in their own process. Knows no text and no batcher.

A batch is one request: packed token ids, where each text begins and ends, and the task. The server process has made it
(`pooling_model.py`), and takes the rows apart again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from llmserve.backends.base import Backend, Batch, ModelContext, Response
from llmserve.backends.pooling_job import PoolingTask
from llmserve.errors import ModelLoadError
from llmserve.pooling_config import read_pooling_config

# Names of the tensors between the two processes.
TOKEN_IDS, TOKEN_TYPE_IDS, CU_SEQLENS, POOLED = "token_ids", "token_type_ids", "cu_seqlens", "pooled"
TASK = "task"

# The share of a core beside a process of niceness 0 that wants it too: 110 / (1024 + 110), by Linux's weights, about a
# tenth. A stream of tokens keeps its pace beside a batch of texts, and an idle machine gives the batch everything.
DEFAULT_NICENESS = 10
_MAX_NICENESS = 19
_TASKS: dict[str, PoolingTask] = {"embed": "embed", "token_embed": "token_embed", "classify": "classify"}


class PoolingBackend(Backend):
    """Runs packed texts. `parameters`: `weight_format`, and `niceness` of the process."""

    def load(self, model: ModelContext) -> None:
        """Reads the Hugging Face folder that the version is. Raises ModelLoadError."""
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as an engine's: read when torch is imported
        import torch

        from llmserve.backends.torch_device import torch_device
        from llmserve.worker.pooling_runner import PoolingRunner

        config = read_pooling_config(model.version_path)
        weight_format = model.parameter("weight_format", "auto")
        niceness = _niceness(model)
        if model.kind == "GPU":
            torch.cuda.set_device(torch_device(model))  # this process has one: the runner takes it
        device = "cpu" if model.kind == "CPU" else "auto"
        self._runner = PoolingRunner.load(model.version_path, config, weight_format, model.num_threads, device)
        self.device = str(self._runner.device)
        _step_back(niceness)

    def execute(self, batch: Batch) -> Sequence[Response]:
        """One row a text, or for `token_embed` one a token."""
        (request,) = batch.requests
        token_ids, cu_seqlens = batch.arrays[TOKEN_IDS], batch.arrays[CU_SEQLENS]
        token_type_ids = batch.arrays.get(TOKEN_TYPE_IDS)
        task = _TASKS[str(request.header.parameters[TASK])]
        return [Response({POOLED: self._runner.run(token_ids, token_type_ids, cu_seqlens, task)})]


def _niceness(model: ModelContext) -> int:
    text = model.parameter("niceness", str(DEFAULT_NICENESS))
    if not text.isdecimal() or int(text) > _MAX_NICENESS:
        raise ModelLoadError(f"Model {model.name!r}: parameters.niceness is {text!r}; it must be 0 to {_MAX_NICENESS}.")
    return int(text)


def _step_back(niceness: int) -> None:
    """All threads, and those they will start, leave the cores to others. Loading was as urgent as anything."""
    for thread in os.listdir("/proc/self/task") if Path("/proc/self/task").is_dir() else ():
        with contextlib.suppress(OSError):  # it has just ended
            os.setpriority(os.PRIO_PROCESS, int(thread), niceness)
    with contextlib.suppress(OSError):  # where the system shares the cores among sessions first, the session too
        Path("/proc/self/autogroup").write_text(str(niceness))
