"""The fuzzing campaign, short: no damaged or made-up request to any route of a real server breaks anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_is_found(smollm2_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.fuzz", "--seconds", "2", "--examples", "1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(ended.stdout)
    assert report["mutated"] > 100
    assert report["made_up"] >= report["routes"] > 40
    assert report["statuses"]["200"] > 10
