"""A language model that has started is ready for its first request."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.backends.test_reload import make_llm


def test_the_first_request_does_not_wait_for_the_table_of_tokens(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes tens of milliseconds, on the event loop, while every stream stands still."""

    async def scenario() -> str:
        llm = make_llm(smollm2_path)
        await llm.start()
        monkeypatch.delattr("llmserve.tokenizer.build_byte_table")
        shown = llm.tokenizer.detokenizer().push(llm.tokenizer.encode("hello"))
        await llm.shutdown(5.0)
        return shown

    assert asyncio.run(scenario()) == "hello"
