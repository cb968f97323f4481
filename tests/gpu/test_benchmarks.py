"""What `make gpu` measures, taken through its paces where there is nothing to measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import MODEL_PARTS, collect, run_apart
from benchmarks.gpu_engine import PARTS
from benchmarks.gpu_tests import run_tests


def test_the_parts_that_are_named_are_those_there_are() -> None:
    assert tuple(PARTS) == MODEL_PARTS


@pytest.mark.parametrize("part", [name for name in MODEL_PARTS if name != "transformers"])
def test_every_row_is_made(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = list(collect(part, is_dry=True))
    assert lines
    assert not any("failed" in line for line in lines)
    assert capsys.readouterr().out.splitlines() == lines


def test_a_process_that_dies_takes_no_other_tests_with_it(tmp_path: Path) -> None:
    """Dealt out to as many processes as there are cores, at most eight; what each said before its end counts."""
    bodies = ["pass", "pass", "raise ValueError", *["import os; os._exit(9)"] * 8]
    tests = [f"@pytest.mark.gpu\ndef test_{index}():\n    {body}\n" for index, body in enumerate(bodies)]
    (tmp_path / "test_planted.py").write_text("import pytest\n\n" + "\n".join(tests))
    found = run_tests(120.0, folders=["."], root=tmp_path)
    assert sorted(found.split(", ")) == ["1 failed", "2 passed", "8 not reached"]


def test_a_part_that_ends_its_process_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    """Here for want of a GPU."""
    assert list(run_apart("kernels", 60.0)) == ["| kernels | | | | failed: ended with status 1 |"]
    assert "finds no GPU" in capsys.readouterr().out
