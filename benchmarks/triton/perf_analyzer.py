"""Triton's own load generator, `perf_analyzer`, against both servers over HTTP and gRPC. Knows no other figure.

The binary lies in the wheel of tritonclient 2.51; of the two libraries it wants, pytriton's wheel has copies.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tempfile
import zipfile
from pathlib import Path

from benchmarks.triton.servers import Running, site_packages

TRITONCLIENT = "tritonclient==2.51.0"
_BINARY = "data/bin/perf_analyzer"
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
_FIGURES = re.compile(r"throughput: ([\d.]+) infer/sec, latency (\d+) usec")


def install(folder: Path) -> None:
    """Beside Triton, which must be there. Raises CalledProcessError after pip's own output."""
    tools = folder / "perf_analyzer"
    if (tools / "perf_analyzer").exists():
        return
    tools.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as downloads:
        pip = [str(folder / "venv" / "bin" / "python"), "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--only-binary", ":all:", "--dest", downloads, TRITONCLIENT], check=True)
        (wheel,) = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(_BINARY))
            binary = tools / "perf_analyzer.partial"
            binary.write_bytes(archive.read(name))
    for name, pattern in _LIBRARIES.items():
        (tools / name).unlink(missing_ok=True)
        (tools / name).symlink_to(next((site_packages(folder) / "nvidia_pytriton.libs").glob(pattern)))
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    binary.rename(tools / "perf_analyzer")


def run(folder: Path, server: Running, protocol: str, model: str, concurrency: int) -> str:
    """One line of what it measured. Raises RuntimeError with its output if it failed."""
    tools = folder / "perf_analyzer"
    port = server.port if protocol == "http" else server.grpc_port
    command = [str(tools / "perf_analyzer"), "-m", model, "-u", f"127.0.0.1:{port}", "-i", protocol]
    command += ["--concurrency-range", str(concurrency), "--measurement-mode", "count_windows"]
    command += ["--measurement-request-count", "3000", "--stability-percentage", "80", "--max-trials", "5"]
    done = subprocess.run(
        command, env=os.environ | {"LD_LIBRARY_PATH": str(tools)}, capture_output=True, text=True, timeout=120
    )
    found = _FIGURES.findall(done.stdout)
    if done.returncode or not found:
        raise RuntimeError(f"perf_analyzer ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    rate, latency_us = found[-1]
    figures = f"{float(rate):>9.0f} infer/s {latency_us:>8} us mean"
    return f"{server.name:<10}{protocol:<6}{model:<10}c={concurrency:<4}{figures}"
