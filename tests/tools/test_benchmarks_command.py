"""`python -m benchmarks`: what it runs, and what it says where a package is missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.__main__ import APART, MODULES, main


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    modules: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        modules.append(command[-1].removeprefix("benchmarks."))
        return subprocess.CompletedProcess(command, len(modules) == 2)

    monkeypatch.setattr("benchmarks.__main__.subprocess.run", run)
    return modules


@pytest.mark.parametrize(("flag", "status"), [("--help", 0), ("--hepl", 2), ("bench_nothing", 2)])
def test_nothing_runs_that_was_not_asked_for(ran: list[str], flag: str, status: int) -> None:
    with pytest.raises(SystemExit) as ended:
        main([flag])
    assert ended.value.code == status
    assert ran == []


@pytest.mark.parametrize("flag", ["--help", "bench_nothing"])
def test_those_run_by_themselves_are_named(ran: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([flag])
    said = "".join(capsys.readouterr()).replace("\n", " ")
    assert "python -m benchmarks.NAME: peers, triton, chaos" in said
    for name in APART:
        assert importlib.util.find_spec(f"benchmarks.{name}") is not None


def test_all_or_those_named_are_run_and_failures_counted(ran: list[str]) -> None:
    assert main(["bench_decode", "bench_server", "bench_general"]) == 1
    assert ran == ["bench_decode", "bench_server", "bench_general"]
    ran.clear()
    main([])
    assert ran == list(MODULES)


def test_a_benchmark_without_psutil_says_what_to_install() -> None:
    code = "import sys; sys.modules['psutil'] = None; import benchmarks.bench_server"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "This benchmark needs psutil. Run: make install-dev\n")
