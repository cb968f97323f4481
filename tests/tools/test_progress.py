"""The line that says what a server serves."""

from __future__ import annotations

import io

from rich.console import Console

from llmserve.tools.progress import StartupDisplay


def said(names: list[str], only_v2: list[str], failed: list[str]) -> str:
    output = io.StringIO()
    StartupDisplay(Console(file=output)).ready("http://here", None, names, only_v2, failed, 2.41)
    return output.getvalue()


def test_a_server_without_language_models_has_none_to_wait_for() -> None:
    line = "Ready in 2.4 s: http://here/v1 serves no model; /v2 also a, b. Docs: http://here/docs\n"
    assert said([], ["a", "b"], []) == line


def test_a_server_that_is_not_ready_does_not_say_it_is() -> None:
    line = said(["llm"], ["a"], ["bad", "worse"])
    assert line.startswith("Serving in 2.4 s, but not ready, as bad, worse could not be loaded (see above; ")
    assert line.endswith(": http://here/v1 serves llm; /v2 also a. Docs: http://here/docs\n")
