"""The log and trace settings that clients may read and change while the server runs. Knows no protocol."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from llmserve.errors import InferenceError, InvalidRequestError

_LINE = "%(asctime)s %(levelname)s %(message)s"
_DATES = {"default": "%H:%M:%S", "ISO8601": "%Y-%m-%dT%H:%M:%S%z"}
_TRACE_LEVELS = frozenset(("OFF", "TIMESTAMPS", "TENSORS"))
_TRACE_RANGES = {"trace_rate": (0, 2**32 - 1), "trace_count": (-1, 2**31 - 1), "log_frequency": (0, 2**32 - 1)}

LogValue = bool | int | str
TraceValue = str | list[str]


class LogSettings:
    """Triton's log settings, set on the logger `llmserve`."""

    def __init__(self) -> None:
        self._values: dict[str, LogValue] = {
            "log_file": "",
            "log_info": True,
            "log_warning": True,
            "log_error": True,
            "log_verbose_level": 0,
            "log_format": "default",
        }

    def get(self) -> dict[str, LogValue]:
        """All of them, in Triton's order."""
        return dict(self._values)

    def update(self, changes: Mapping[str, LogValue]) -> dict[str, LogValue]:
        """Applies what is known of `changes`. Raises InferenceError, InvalidRequestError; then nothing has changed."""
        if "log_file" in changes:
            raise InferenceError(
                "log file location can not be updated through network protocol", InferenceError.UNSUPPORTED
            )
        log_format = changes.get("log_format", "default")
        if log_format not in _DATES:
            raise InvalidRequestError(f"invalid argument for --log_format, got: {str(log_format)[:64]}", "log_format")
        self._values.update({key: value for key, value in changes.items() if key in self._values})
        if "log_format" in changes:
            for handler in logging.getLogger().handlers:
                handler.setFormatter(logging.Formatter(_LINE, _DATES[str(log_format)]))
        if changes.keys() & {"log_verbose_level", "log_info", "log_warning", "log_error"}:
            self._set_level()
        return self.get()

    def _set_level(self) -> None:
        values = self._values
        by_level = (
            (logging.DEBUG, bool(values["log_verbose_level"])),
            (logging.INFO, values["log_info"]),
            (logging.WARNING, values["log_warning"]),
            (logging.ERROR, values["log_error"]),
        )
        lowest = next((level for level, wanted in by_level if wanted), logging.CRITICAL)
        logging.getLogger("llmserve").setLevel(lowest)


class TraceSettings:
    """Triton's trace settings, global ones and a model's own. No trace file is written (`--otel` and the request log
    tell where a request's time went), so a level cannot be switched on, as in a Triton that was given no file."""

    def __init__(self) -> None:
        self._values: dict[str, TraceValue] = {
            "trace_level": ["OFF"],
            "trace_rate": "1000",
            "trace_count": "-1",
            "log_frequency": "0",
            "trace_file": "",
            "trace_mode": "triton",
        }
        self._defaults = dict(self._values)
        self._of_models: dict[str, dict[str, TraceValue]] = {}

    def get(self, model: str = "") -> dict[str, TraceValue]:
        """Those of a model: its own over the global ones."""
        return {**self._values, **self._of_models.get(model, {})}

    def update(self, changes: Mapping[str, TraceValue | None], model: str = "") -> dict[str, TraceValue]:
        """Applies what is known of `changes`; None goes back to the level above.

        Raises InferenceError, InvalidRequestError, in Triton's words; then nothing has changed.
        """
        if "trace_file" in changes:
            raise InferenceError(
                "trace file location can not be updated through network protocol", InferenceError.UNSUPPORTED
            )
        known = {key: value for key, value in changes.items() if key in self._values and key != "trace_mode"}
        checked = {key: _trace_value(key, value) for key, value in known.items() if value is not None}
        target = self._of_models.setdefault(model, {}) if model else self._values
        for key in known.keys() - checked.keys():
            if model:
                target.pop(key, None)
            else:
                target[key] = self._defaults[key]
        target.update(checked)
        return self.get(model)

    def forget(self, model: str) -> None:
        """Drops a model's own settings."""
        self._of_models.pop(model, None)


def _trace_value(key: str, value: TraceValue) -> TraceValue:
    """A setting as it is kept. Raises InvalidRequestError."""
    if key == "trace_level":
        levels = [level for level in value if level in _TRACE_LEVELS]
        if "OFF" in levels and len(levels) > 1:
            raise InvalidRequestError("Expect only one trace level 'OFF' is specified", key)
        if levels and levels != ["OFF"]:
            raise InvalidRequestError("Attempting to set invalid trace setting :trace file name is not given", key)
        return ["OFF"]
    text = str(value)
    least, most = _TRACE_RANGES[key]
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise InvalidRequestError(f"Unable to parse '{key}', got: {text[:64]}", key)
    number = int(text)
    if key == "trace_count" and number < least:
        raise InvalidRequestError(f"Unable to parse '{key}'. Expecting value >= {least}, got:{number}", key)
    if not least <= number <= most:
        raise InvalidRequestError(
            f"Unable to parse '{key}', value is out of range [ {least}, {most} ], got: {number}", key
        )
    return str(number)
