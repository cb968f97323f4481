"""What `make gpu` measures, taken through its paces where there is nothing to measure."""

from __future__ import annotations

import pytest

from benchmarks.gpu import collect
from benchmarks.gpu_engine import PARTS, Machine


@pytest.mark.parametrize("part", [name for name in PARTS if name != "transformers"])
def test_every_row_is_made(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = list(collect(part, lambda: PARTS[part](Machine.dry())))
    assert lines
    assert not any("failed" in line for line in lines)
    assert capsys.readouterr().out.splitlines() == lines
