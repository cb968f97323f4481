"""The chaos benchmark, short: streams under an engine that is killed, stopped and reloaded get exactly their tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_no_token_is_lost_and_nothing_is_left_behind(smollm2_path: Path) -> None:
    options = ("--minutes", "0.1", "--clients", "6", "--max-tokens", "24", "--pause-s", "0.8", "1.6")
    command = [sys.executable, "-m", "benchmarks.chaos", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(ended.stdout)
    assert report["streams"] >= 3  # each client one at least, but for those that vanish
    assert report["tokens"] > 60
    assert report["restarts"]["num"] >= 1
    assert len(report["memory_mib"]) == 12
