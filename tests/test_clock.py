"""A wall clock may jump: time is kept by the monotonic one, and a date is only ever written down or shown."""

from __future__ import annotations

import ast
import asyncio
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.test_supervisor import House, run

ROOT = Path(__file__).resolve().parent.parent
# Who may ask for the date, and what for. Nobody here compares two of them.
ASK_FOR_THE_DATE = {
    "llmserve/api/chat.py": "`created`",
    "llmserve/api/completions.py": "`created`",
    "llmserve/api/journal.py": "the time of a line",
    "llmserve/api/tracing.py": "the time of a span",
    "llmserve/backends/batch_log.py": "the time of a batch, to be shown",
    "llmserve/backends/llm.py": "`created`",
    "llmserve/backends/pooling_model.py": "`created`",
    "llmserve/backends/pooling_texts.py": "the time of a batch, to be shown",
    "llmserve/chat_template.py": "`strftime_now` of chat templates",
    "llmserve/general_metrics.py": "the `last_inference` of Triton's statistics",
    "llmserve/tools/bench/cli.py": "the time of a report",
}
WALL_CLOCK = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("date", "today")}


def reads_of_the_wall_clock(source: str) -> Iterator[int]:
    """Lines that use it, called or handed on."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in WALL_CLOCK:
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            yield from (node.lineno for name in node.names if name.name in ("time", "time_ns"))


def test_nobody_else_asks_for_the_date() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("llmserve", "kernels", "kv_cache", "scheduler")
        for path in (ROOT / folder).rglob("*.py")
        if list(reads_of_the_wall_clock(path.read_text("utf-8")))
    }
    assert found == set(ASK_FOR_THE_DATE)


@pytest.mark.parametrize("source", ["import time\nx = time.time()", "from time import time", "f(clock=time.time)"])
def test_the_check_finds_what_it_looks_for(source: str) -> None:
    assert list(reads_of_the_wall_clock(source))


def test_a_clock_that_jumps_neither_kills_an_engine_nor_ends_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = itertools.cycle((-1e9, 1e9, 86_400.0, -86_400.0))
    now_s = time.time()

    async def use(house: House) -> None:
        pid = house.supervisor.pid
        monkeypatch.setattr(time, "time", lambda: now_s + next(jumps))
        house.ask("a", 200)
        await house.clients.until(lambda: house.clients.finished)
        await asyncio.sleep(0)
        house.check("a", 200)
        assert house.supervisor.pid == pid
        assert house.metrics.engine_stalls == 0
        monkeypatch.undo()

    run(use)
