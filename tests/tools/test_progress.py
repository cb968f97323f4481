"""The line that says a server is ready."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from llmserve.tools.progress import StartupDisplay


@pytest.mark.parametrize(("has_docs", "end"), [(True, " gRPC: h:1. Docs: http://h/docs\n"), (False, " gRPC: h:1.\n")])
def test_a_page_that_a_browser_may_not_read_is_not_offered(has_docs: bool, end: str) -> None:
    console = Console(file=StringIO(), force_terminal=False)
    StartupDisplay(console).ready("http://h", "h:1", ["chat"], ["add_sub"], 1.5, has_docs)
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue() == "Ready in 1.5 s: http://h/v1 serves chat; /v2 also add_sub." + end
