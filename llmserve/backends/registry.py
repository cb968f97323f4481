"""Which class is the backend of a name: the built-in ones, and those of entry points. Imports none of them."""

from __future__ import annotations

from importlib.metadata import entry_points

from llmserve.errors import ModelLoadError

ENTRY_POINT_GROUP = "llmserve.backends"

_BUILT_IN = {
    "onnxruntime": "llmserve.backends.onnxruntime:OnnxRuntimeBackend",
    "pytorch": "llmserve.backends.torchscript:TorchBackend",
    "python": "llmserve.backends.python:PythonBackend",
    "pooling": "llmserve.backends.pooling:PoolingBackend",
}
# Triton's older `platform` names and the backends that stand for them today.
PLATFORM_BACKENDS = {"onnxruntime_onnx": "onnxruntime", "pytorch_libtorch": "pytorch"}


def find_backend(backend: str, platform: str, model: str) -> str:
    """`module:Class` of a configuration's `backend`, or of the older `platform`. Raises ModelLoadError."""
    name = backend or PLATFORM_BACKENDS.get(platform, platform)
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    found = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in found:
        known = ", ".join(sorted({*_BUILT_IN, *found}))
        raise ModelLoadError(
            f"The configuration of model {model!r} sets backend {name!r}, which is not installed. Known: {known}. "
            f"A package adds one by an entry point of the group {ENTRY_POINT_GROUP!r}."
        )
    return found[name]
