"""Building the kernels: the cache, two builders at once, no compiler, a compiler that fails, sanitizers, the pool."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llmserve.kernels.cpu import build
from llmserve.kernels.cpu.ops import create_cpu_ops
from tests.kernels.cpu_cases import ISA_NAMES, cpu_ops, needs_compiler


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMSERVE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def slow_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for a compiler: says its version, "compiles" by touching the output, counts its calls."""
    script = tmp_path / "fake-cc"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--version*) echo fake 1.0; exit 0;; esac\n'
        f'echo call >> "{tmp_path}/calls"\n'
        'while [ "$#" -gt 0 ]; do [ "$1" = -o ] && echo built > "$2"; shift; done\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    return script


def test_a_library_is_built_once_and_two_builders_do_not_collide(empty_cache: Path, slow_script: Path) -> None:
    isa = build.ISAS[-1]
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.build_library(isa), range(4)))
    assert len(paths) == 1
    (path,) = paths
    assert path.read_text() == "built\n"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no scratch is left
    calls = (slow_script.parent / "calls").read_text()
    assert build.build_library(isa) == path
    assert (slow_script.parent / "calls").read_text() == calls
    assert build.build_library(isa, ("-DOTHER",)) != path


def test_without_a_compiler_the_log_says_what_is_lost(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(empty_cache))
    with caplog.at_level(logging.WARNING):
        assert create_cpu_ops(1) is None
    assert "int8 and GGUF weights are not available" in caplog.text
    assert "no C compiler" in caplog.text


def test_a_compiler_that_fails_is_quoted(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = tmp_path / "broken-cc"
    script.write_text("#!/bin/sh\ncase $1 in --version) exit 0;; esac\necho unknown machine >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with caplog.at_level(logging.WARNING):
        assert create_cpu_ops(1) is None
    assert "unknown machine" in caplog.text
    assert not list(empty_cache.rglob("*.so"))


def test_an_instruction_set_the_cpu_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="sparc"):
        create_cpu_ops(1, "sparc")


@needs_compiler
def test_idle_threads_use_no_cpu() -> None:
    ops = create_cpu_ops(4)
    assert ops is not None
    x = torch.randn(256, 512)
    ops.linear(x, ops.pack_linear(torch.randn(512, 512)))
    threading.Event().wait(0.02)  # let the workers fall asleep
    before = time.process_time()
    threading.Event().wait(0.3)
    assert time.process_time() - before < 0.1


@needs_compiler
def test_threads_may_call_at_once() -> None:
    ops = cpu_ops(ISA_NAMES[0])
    weight = ops.pack_linear(torch.randn(512, 256), None, "int8")
    x = [torch.randn(64, 256) for _ in range(8)]
    expected = [ops.linear(rows, weight) for rows in x]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            results = list(pool.map(lambda rows: ops.linear(rows, weight), x))
            assert all(map(torch.equal, results, expected))


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer's library")
def test_kernels_are_clean_under_sanitizers() -> None:
    """Every kernel over awkward shapes in a process of its own, built with address sanitizer and UBSan."""
    compiler = build.find_compiler()
    assert compiler is not None
    asan = subprocess.run(
        [*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(asan).is_absolute():
        pytest.skip("this compiler brings no address sanitizer")
    environment = {**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("cpu_sanitized.py")
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "runtime error" not in result.stderr
