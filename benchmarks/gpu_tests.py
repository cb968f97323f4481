"""The tests on the device, dealt out to processes: most of their time is compiling, on cores that one would leave idle.

A fault of one kernel ends its process's CUDA context and with it the tests behind it there, not those of the others.
What had been said when time is up is counted all the same. Measures nothing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("tests/kernels/triton", "tests/gpu")
ALONE = "tests/gpu/"  # they look at how much of the device is free
NEED_HYPOTHESIS = ("tests/kernels/triton/test_triton_ragged.py",)
_PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu")
_VERDICT = re.compile(r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
_MAX_PROCESSES = 8  # each holds a CUDA context of some hundred MB
_ALONE_S = 60.0
_REPORT_S = 5.0
_SHOWN = 4000  # characters of a process's report


def run_tests(timeout_s: float, folders: Sequence[str] = FOLDERS, root: Path = ROOT) -> str:
    """How many tests marked gpu passed, failed, and were not reached in the time; the reports of failures are
    printed."""
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed"
    end_s = time.monotonic() + timeout_s
    ignored = [] if importlib.util.find_spec("hypothesis") else [f"--ignore={path}" for path in NEED_HYPOTHESIS]
    listed = subprocess.run(
        [*_PYTEST, "--collect-only", "-q", *ignored, *folders], cwd=root, capture_output=True, text=True, check=False
    )
    names = [line for line in listed.stdout.splitlines() if "::" in line and not line.startswith("ERROR")]
    if listed.returncode:
        print(listed.stdout[-_SHOWN:], listed.stderr[-_SHOWN:], flush=True)
    if not names:
        return f"none was found: pytest ended with {listed.returncode}"
    verdicts: Counter[str] = Counter()
    alone = [name for name in names if name.startswith(ALONE)]
    together = [name for name in names if not name.startswith(ALONE)]
    reports = _reports(together, _MAX_PROCESSES, root, end_s - (_ALONE_S if alone else 0.0))
    reports += _reports(alone, 1, root, end_s)
    for report in reports:
        verdicts.update(_VERDICT.findall(report))
        if " FAILURES " in report or " ERRORS " in report:
            print(report[-_SHOWN:], flush=True)
    verdicts["not reached"] = len(names) - verdicts.total()
    found = ", ".join(f"{count} {verdict.lower()}" for verdict, count in verdicts.items() if count)
    return found + (f"; pytest found not all: it ended with {listed.returncode}" if listed.returncode else "")


def _reports(names: list[str], most: int, root: Path, end_s: float) -> list[str]:
    """What each of at most so many processes wrote, in turns of the tests, until it ended or time was up."""
    num_processes = min(most, os.cpu_count() or 1, len(names))
    with ExitStack() as stack:
        running = []
        for first in range(num_processes):
            report = stack.enter_context(tempfile.TemporaryFile(mode="w+"))
            command = [*_PYTEST, "-v", "--color=no", "--tb=short", *names[first::num_processes]]
            unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}  # what it wrote outlives it
            started = subprocess.Popen(command, cwd=root, env=unbuffered, stdout=report, stderr=subprocess.STDOUT)
            running.append((started, report))
        reports = []
        for process, report in running:
            try:
                process.wait(max(end_s - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                _end(process)
            report.seek(0)
            reports.append(report.read())
    return reports


def _end(process: subprocess.Popen[bytes]) -> None:
    """By an interrupt, upon which pytest reports what has failed so far; who waits for the device hears none."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_REPORT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
