"""The torch device that a model's `instance_group` asks for. Knows no backend."""

from __future__ import annotations

import torch

from llmserve.backends.base import ModelContext
from llmserve.errors import ModelLoadError


def torch_device(model: ModelContext) -> torch.device:
    """Raises ModelLoadError if the configuration asks for a GPU and there is none."""
    has_cuda = torch.cuda.is_available()
    if model.kind == "GPU" and not has_cuda:
        raise ModelLoadError(
            f"Model {model.name!r} asks for a GPU (instance_group.kind KIND_GPU), and torch sees none. Set KIND_CPU."
        )
    return torch.device("cpu") if model.kind == "CPU" or not has_cuda else torch.device("cuda", model.device_id)
