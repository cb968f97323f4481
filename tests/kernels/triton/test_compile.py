"""A part of the table in docs/kernels.md, compiled anew; and that the rest of llmserve does without Triton.

In processes of their own: a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compile_kernels import Report, select_cases
from benchmarks.kernel_case import KernelCase
from benchmarks.kernel_cases import kernel_cases

ROOT = Path(__file__).parents[3]


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )


def test_kernels_compile_for_an_h200_and_keep_their_ceilings() -> None:
    names = (
        "attention d128 g4",
        "draw",
        "add_rms_norm 4096",
        "add_rms_norm quantize fp8 4096",
        "silu_and_mul quantize fp8 14336",
        "rotary d128 fp8",
        "gemm fp8",
        "gemm experts w4",
        "experts s",
        "copy_blocks",
    )
    done = run("-m", "benchmarks.compile_kernels", "--arch", "sm_90", *(word for n in names for word in ("--only", n)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every ceiling kept" in done.stdout


def test_a_kernel_that_is_not_there_is_no_success() -> None:
    with pytest.raises(SystemExit, match="no kernel's name contains 'gemm of old'"):
        select_cases(["draw", "gemm of old"])


def test_tiles_are_tuned_from_end_to_end_without_a_gpu() -> None:
    """Dry: each kind of product once, and a row for each line of the table, which says that nothing was measured."""
    done = run("-m", "benchmarks.tune_kernels", "--only", "products", interpret=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("    (")]
    assert [row.split("):")[0] for row in rows] == [f'    ("sm_90", {bits}' for bits in (4, 8, 16)]
    assert all(row.endswith("# NOT MEASURED: interpreted") for row in rows)


def test_broken_ceilings_are_told() -> None:
    case = KernelCase("k", None, {}, {"ROWS": 64}, max_registers=32, max_shared_bytes=64, matrix=True)
    good = Report(case, "sm_90", 32, 0, 64, 8, 2, "wgmma 4", 0.1)
    assert good.broken() == []
    bad = Report(case, "sm_90", 33, 8, 65, 8, 0, "mma 4", 0.1)
    assert [line.partition(": ")[2] for line in bad.broken()] == [
        "8 bytes of registers spilt",
        "33 registers, at most 32",
        "65 bytes of shared memory, at most 64",
        "no load of 16 bytes",
        "no wgmma, but mma 4",
    ]
    assert len(Report(case, "sm_80", 32, 0, 64, 8, 2, "", 0.1).broken()) == 1


def test_the_table_holds_every_kernel_and_no_spill() -> None:
    rows = re.findall(r"^\| (.+?) \| (\w+) \| \d+ \| \d+ \| (\d+) \|", (ROOT / "docs/kernels.md").read_text(), re.M)
    expected = {(case.name, architecture) for case in kernel_cases() for architecture in case.architectures}
    assert {(name, architecture) for name, architecture, _ in rows} == expected
    assert {spilt for _, _, spilt in rows} == {"0"}


def test_without_a_gpu_the_measurements_say_so() -> None:
    done = run("-m", "benchmarks.gpu")
    assert done.returncode == 1
    assert "finds no GPU: nothing was run" in done.stdout


def test_llmserve_does_without_triton() -> None:
    code = """
        import sys
        sys.modules["triton"] = None  # as if it were not installed
        import torch
        from llmserve.kernels.select import select_ops
        import llmserve.worker.loader
        assert select_ops(torch.device("cpu"), torch.float32, 64).name in ("cpu", "reference")
    """
    done = run("-c", "\n".join(line.strip() for line in code.splitlines()))
    assert done.returncode == 0, done.stderr
