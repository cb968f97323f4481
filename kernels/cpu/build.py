"""Builds the C kernels with the system's compiler, once per source, flags and compiler. Knows no op and no tensor.

The shared library lands in `$LLMSERVE_CACHE`, else `$XDG_CACHE_HOME/llmserve`, else `~/.cache/llmserve`, in a folder
named by a hash of everything it was made from. It is built beside and renamed into place, so that two processes may
build at once.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SOURCE_DIR = Path(__file__).resolve().parent
# No -ffast-math: NaN and infinities keep their meaning. Contraction to fused multiply-add is decided per instruction
# by the source alone, so it cannot differ between a row computed alone and one in a batch.
_FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-strict-aliasing"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-warning-option"),
)


@dataclass(frozen=True, slots=True)
class ISA:
    """An instruction set the kernels know: the CPU flags (as in /proc/cpuinfo) it needs, and how to compile for it."""

    name: str
    cpu_flags: frozenset[str]
    cc_flags: tuple[str, ...]


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
ISAS = (  # best first
    ISA(
        "avx512_bf16",
        frozenset(("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "fma", "f16c")),
        (*_AVX2, *_AVX512, "-mavx512vnni", "-mavx512bf16"),
    ),
    ISA(
        "avx512_vnni",
        frozenset(("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma", "f16c")),
        (*_AVX2, *_AVX512, "-mavx512vnni"),
    ),
    ISA("avx2_vnni", frozenset(("avx2", "fma", "f16c", "avx_vnni")), (*_AVX2, "-mavxvnni")),
    ISA("avx2", frozenset(("avx2", "fma", "f16c")), _AVX2),
    ISA("generic", frozenset(), ()),
)


class BuildError(Exception):
    """The compiler is missing or refused; the message is what it said."""


def host_isas() -> list[ISA]:
    """The instruction sets this machine runs, best first; "generic" always."""
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() in ("x86_64", "AMD64") and cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("flags"):
                flags = set(line.partition(":")[2].split())
                break
    return [isa for isa in ISAS if isa.cpu_flags <= flags]


def cache_dir() -> Path:
    """Where this user's built libraries live."""
    if root := os.environ.get("LLMSERVE_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmserve"


def find_compiler() -> list[str] | None:
    """`$CC`, else cc, gcc or clang from the path, as a command; None if there is none."""
    if chosen := os.environ.get("CC"):
        return shlex.split(chosen)
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    return None


def build_library(isa: ISA, extra_flags: tuple[str, ...] = ()) -> Path:
    """The shared library for `isa`, built now if it is not in the cache. Raises BuildError."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C compiler (cc, gcc or clang) on this machine")
    flags = (*_FLAGS, *isa.cc_flags, *extra_flags)
    target = cache_dir() / "kernels" / f"{isa.name}-{_fingerprint(compiler, flags)}" / "libllmserve_cpu.so"
    if not target.exists():
        _compile(compiler, flags, target)
    return target


def _fingerprint(compiler: list[str], flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    digest.update(_run([*compiler, "--version"]).encode())
    digest.update("\0".join((platform.machine(), *flags)).encode())
    for source in sorted(_SOURCE_DIR.glob("*.[ch]")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def _compile(compiler: list[str], flags: tuple[str, ...], target: Path) -> None:
    """Compiles every source at once, links, and renames the result into place."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects, running = [], []
        for source in sorted(_SOURCE_DIR.glob("*.c")):
            objects.append(f"{scratch}/{source.stem}.o")
            command = [*compiler, *flags, "-c", str(source), "-o", objects[-1]]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        said = [(process.communicate()[0], process.returncode) for process in running]
        for output, code in said:
            if code:
                raise BuildError(output.strip())
        library = f"{scratch}/{target.name}"
        _run([*compiler, *flags, "-shared", *objects, "-o", library, "-lm"])
        os.replace(library, target)


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except BlockingIOError:
        raise  # no process to be had just now: that says nothing about the compiler
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from error
    if result.returncode:
        raise BuildError(result.stdout.strip())
    return result.stdout
