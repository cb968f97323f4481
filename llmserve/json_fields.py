"""Typed access to a model folder's JSON files: every mistake names file and key. Knows not what the keys mean."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from llmserve.errors import ModelLoadError


class JsonFields:
    """One JSON object with typed access: what is missing or of a wrong type is an error naming file and key."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self.where = where
        self.values = values

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.error(key, f"an integer from {minimum} to {maximum}", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.error(key, "a number", value)
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def string(self, key: str, default: str) -> str:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.error(key, "a string", value)
        return value

    def child(self, key: str) -> JsonFields:
        """A nested object; absent or null is an empty one."""
        value = self.values.get(key)
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise self.error(key, "an object", value)
        return JsonFields(f"{self.where}: {key}", value)

    def error(self, key: str, wanted: str, got: object) -> ModelLoadError:
        found = "it is missing" if got is None else f"it is {got!r}"
        return ModelLoadError(f"{self.where}: {key!r} must be {wanted}; {found}.")


def read_json(path: Path) -> JsonFields:
    """The object in a JSON file. Raises ModelLoadError if there is none."""
    values = _load(path)
    if not isinstance(values, dict):
        raise ModelLoadError(f"{path} must hold a JSON object.")
    return JsonFields(str(path), values)


def read_json_list(path: Path) -> list[JsonFields]:
    """The list of objects in a JSON file. Raises ModelLoadError if there is none."""
    values = _load(path)
    if not isinstance(values, list) or not all(isinstance(entry, dict) for entry in values):
        raise ModelLoadError(f"{path} must hold a JSON list of objects.")
    return [JsonFields(f"{path}: [{index}]", entry) for index, entry in enumerate(values)]


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{path} is missing.") from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}.") from error
