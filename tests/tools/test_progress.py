"""The line that says what a server serves."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from llmserve.tools.progress import Served, StartupDisplay


def said(served: Served) -> str:
    output = StringIO()
    StartupDisplay(Console(file=output)).ready(served, 2.41)
    return output.getvalue()


def test_a_server_without_language_models_has_none_to_wait_for() -> None:
    line = "Ready in 2.4 s: http://h/v1 serves no model; /v2 also a, b. Docs: http://h/docs\n"
    assert said(Served(url="http://h", only_v2=["a", "b"])) == line


def test_a_server_that_is_not_ready_does_not_say_it_is() -> None:
    line = said(Served(url="http://h", names=["llm"], only_v2=["a"], failed=["bad", "worse"]))
    assert line.startswith("Serving in 2.4 s, but not ready, as bad, worse could not be loaded (see above; ")
    assert line.endswith(": http://h/v1 serves llm; /v2 also a. Docs: http://h/docs\n")


@pytest.mark.parametrize(("has_docs", "end"), [(True, " gRPC: h:1. Docs: http://h/docs\n"), (False, " gRPC: h:1.\n")])
def test_a_page_that_a_browser_may_not_read_is_not_offered(has_docs: bool, end: str) -> None:
    served = Served(url="http://h", grpc="h:1", names=["chat"], only_v2=["add_sub"], has_docs=has_docs)
    assert said(served) == "Ready in 2.4 s: http://h/v1 serves chat; /v2 also add_sub." + end
