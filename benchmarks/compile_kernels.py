"""Compiles every Triton kernel without a GPU, and holds what comes out to what its design allows.

    python -m benchmarks.compile_kernels [--arch sm_90] [--only attention] [--write docs/kernels.md]

Triton brings the assemblers and disassemblers of both vendors. Registers, shared memory and spills are what they say;
instructions are counted in the machine code. Exit status: the number of ceilings that were broken.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernel_case import ARCHITECTURES, NVIDIA, KernelCase
from benchmarks.kernel_cases import kernel_cases

_TOOLS = Path(next(iter(triton.backends.nvidia.__path__))) / "bin"
# Of one multiprocessor: registers, shared memory a program may use, threads; gfx942: a compute unit, with LDS
_LIMITS = {
    "sm_80": (65536, 163 * 1024, 2048),
    "sm_90": (65536, 227 * 1024, 2048),
    "sm_100": (65536, 227 * 1024, 2048),
    "gfx942": (131072, 64 * 1024, 2048),
}
_MATRIX = {"wgmma": r"\b[HQI]GMMA", "tcgen05": r"\bUTC\w*MMA", "mma": r"\b[HQI]MMA", "mfma": r"\bv_mfma"}
# 16 bytes a thread, or a whole tile by the tensor memory accelerator
_WIDE_LOAD = r"\bLDG\.[\w.]*128|\bLDGSTS\.[\w.]*128|\bUTMALDG|(?:buffer|global)_load_(?:dwordx4|b128)"


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case for one architecture."""

    case: KernelCase
    architecture: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    programs: int  # that fit a multiprocessor at once
    wide_loads: int
    matrix: str  # "wgmma 16"
    seconds: float

    def broken(self) -> list[str]:
        """The ceilings this exceeds."""
        case, found = self.case, []
        if self.spill_bytes:
            found.append(f"{self.spill_bytes} bytes of registers spilt")
        if self.registers > case.max_registers and self.architecture in NVIDIA:
            found.append(f"{self.registers} registers, at most {case.max_registers}")
        most = min(case.max_shared_bytes, _LIMITS[self.architecture][1])
        if self.shared_bytes > most:
            found.append(f"{self.shared_bytes} bytes of shared memory, at most {most}")
        if case.wide_loads and not self.wide_loads and self.architecture in NVIDIA:
            found.append("no load of 16 bytes")
        if case.matrix and not self.matrix:
            found.append("no matrix instruction")
        if case.matrix and self.architecture == "sm_90" and case.takes_wgmma:
            found += [] if "wgmma" in self.matrix else [f"no wgmma, but {self.matrix}"]
        return [f"{case.name} on {self.architecture}: {what}" for what in found]


def compile_case(case: KernelCase, architecture: str) -> Report:
    """Compiles, disassembles and counts."""
    names = case.kernel.arg_names
    types = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or name in case.divisible]
    hints = {(index,): [["tt.divisibility", 16]] for index in aligned}
    is_amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if is_amd else GPUTarget("cuda", int(architecture[3:]), 32)
    started = time.perf_counter()
    source = ASTSource(fn=case.kernel, signature=types, constexprs=constants, attrs=hints)
    compiled = triton.compile(source, target=target, options={"num_warps": case.num_warps})
    seconds = time.perf_counter() - started
    shared = compiled.metadata.shared
    if is_amd:
        code = compiled.asm["amdgcn"]
        registers = int(_first(r"\.vgpr_count:\s+(\d+)", code))
        spills = 4 * int(_first(r"\.vgpr_spill_count:\s+(\d+)", code))
    else:
        registers, spills, code = _inspect(compiled.asm["cubin"], compiled.asm["ptx"], architecture)
    matrix = {name: len(re.findall(pattern, code)) for name, pattern in _MATRIX.items()}
    return Report(
        case,
        architecture,
        registers,
        spills,
        shared,
        _programs(architecture, registers, shared, case.num_warps),
        len(re.findall(_WIDE_LOAD, code)),
        ", ".join(f"{name} {count}" for name, count in matrix.items() if count),
        seconds,
    )


def _inspect(cubin: bytes, ptx: str, architecture: str) -> tuple[int, int, str]:
    """Registers, bytes spilt and machine code, as NVIDIA's tools say."""
    with tempfile.TemporaryDirectory() as folder:
        binary, text = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        binary.write_bytes(cubin)
        text.write_text(ptx)
        usage = _run("cuobjdump", "-res-usage", str(binary))
        code = _run("cuobjdump", "-sass", str(binary))
        assembler = "ptxas-blackwell" if architecture == "sm_100" else "ptxas"
        target = _first(r"\.target (sm_\w+)", ptx)
        said = _run(assembler, "-v", f"--gpu-name={target}", str(text), "-o", "/dev/null")
    spilt = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert spilt, said
    return int(_first(r"REG:(\d+)", usage)), sum(map(int, spilt)), code


def _run(tool: str, *arguments: str) -> str:
    command = [str(_TOOLS / tool), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": f"{_TOOLS}:/usr/bin:/bin"})
    return done.stdout + done.stderr


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, pattern
    return match[1]


def _programs(architecture: str, registers: int, shared: int, num_warps: int) -> int:
    total, memory, threads = _LIMITS[architecture]
    width = 64 if architecture.startswith("gfx") else 32
    by_registers = total // (-(-registers // 8) * 8 * num_warps * width)
    return min(by_registers, memory // (shared + 1024), threads // (num_warps * width), 32)


def compile_all(cases: Sequence[KernelCase], architectures: Iterable[str]) -> list[Report]:
    """A line to standard error for each."""
    reports = []
    for case in cases:
        for architecture in architectures:
            if architecture in case.architectures:
                reports.append(compile_case(case, architecture))
                print(_row(reports[-1]), file=sys.stderr, flush=True)
    return reports


def _row(report: Report) -> str:
    return (
        f"| {report.case.name} | {report.architecture} | {report.case.num_warps} | {report.registers} | "
        f"{report.spill_bytes} | {report.shared_bytes} | {report.programs} | {report.wide_loads} | {report.matrix} |"
    )


def table(reports: Sequence[Report]) -> str:
    """The whole of docs/kernels.md."""
    head = Path(__file__).with_name("kernels_head.md").read_text()
    columns = "| kernel | architecture | warps | registers | spilt | shared B | programs | 16 B loads | matrix |"
    lines = [columns, "|---|---|---|---|---|---|---|---|---|", *map(_row, reports)]
    return head + "\n".join(lines) + "\n"


def select_cases(names: Sequence[str]) -> list[KernelCase]:
    """Those whose name contains one of these; exits where one finds none, for nothing was shown then."""
    cases = kernel_cases()
    for name in names:
        if not any(name in case.name for case in cases):
            raise SystemExit(f"no kernel's name contains {name!r}")
    return [case for case in cases if any(name in case.name for name in names)]


def main() -> int:
    """The number of broken ceilings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="repeatable; by default all")
    parser.add_argument("--only", action="append", help="kernels whose name contains this; repeatable")
    parser.add_argument("--write", type=Path, help="the table goes there")
    args = parser.parse_args()
    cases = select_cases(args.only or [""])
    reports = compile_all(cases, args.arch or ARCHITECTURES)
    broken = [line for report in reports for line in report.broken()]
    if args.write:
        args.write.write_text(table(reports))
    print("\n".join(broken) or f"{len(reports)} kernels compiled, every ceiling kept")
    return len(broken)


if __name__ == "__main__":
    sys.exit(main())
