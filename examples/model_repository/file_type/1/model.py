"""What kind of file some bytes are: a model as a plain Python class. All it needs to say is in the class."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime


class Model:
    inputs = {"content": "BYTES[1]"}
    outputs = {"label": "BYTES[1]", "score": "FP32[1]"}
    max_batch_size = 32
    batched = True  # predict sees the rows of several requests at once

    def load(self, model: Any) -> None:
        """Opens the network and reads how it wants its input; both came out of the package beside this file."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = model.num_threads
        self.session = onnxruntime.InferenceSession(model.version_path / "magika.onnx", options)
        self.settings = json.loads((model.version_path / "magika.json").read_text())
        self.labels = np.array([label.encode() for label in self.settings["target_labels_space"]], dtype=object)

    def predict(self, content: np.ndarray) -> dict[str, np.ndarray]:
        """`content`: bytes objects [rows, 1]."""
        features = np.stack([self.features(item) for item in content[:, 0]])  # [rows, 2048]
        scores = self.session.run(None, {"bytes": features})[0]  # [rows, labels]
        best = scores.argmax(axis=1, keepdims=True)
        return {"label": self.labels[best], "score": np.take_along_axis(scores, best, axis=1)}

    def features(self, content: bytes) -> np.ndarray:
        """The first bytes, padded behind, then the last ones, padded before; without white space at either end."""
        size, block = self.settings["beg_size"], self.settings["block_size"]
        both = np.full(2 * size, self.settings["padding_token"], np.int32)
        head = content[:block].lstrip()[:size]
        tail = content[-block:].rstrip()[-size:]
        both[: len(head)] = list(head)
        both[2 * size - len(tail) :] = list(tail)
        return both
