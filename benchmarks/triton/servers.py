"""The two servers: how Triton is got and started, and how we are. Measures nothing.

Triton Inference Server 2.51 lies in the wheel of nvidia-pytriton, with its Python backend and without the other parts
of its image. Its stub process is linked to the system's libpython3.11, so it needs a Python 3.11 where the distribution
puts it (Debian 12: the package libpython3.11).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.needs import psutil

PYTRITON = "nvidia-pytriton==0.7.0"
START_TIMEOUT_S, STOP_TIMEOUT_S = 60.0, 20.0


@dataclass(frozen=True)
class Server:
    """A command; `{http}` and `{grpc}` in it are ports."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    name: str
    process: psutil.Process
    port: int
    grpc_port: int

    def cpu_seconds(self) -> float:
        """Of the server and all the processes it has, by the kernel's account."""
        times = [process.cpu_times() for process in (self.process, *self.process.children(recursive=True))]
        return sum(t.user + t.system for t in times)


def install(folder: Path) -> None:
    """Triton into an environment of its own. Raises CalledProcessError after the tool's own output."""
    venv = folder / "venv"
    if (folder / ".installed").exists():
        return
    print(f"installing {PYTRITON} into {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
    subprocess.run([str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", PYTRITON], check=True)
    shutil.rmtree(folder / "backends", ignore_errors=True)
    bundle = site_packages(folder) / "pytriton" / "tritonserver"
    shutil.copytree(bundle / "backends", folder / "backends")
    backend = folder / "backends" / "python"
    shutil.copytree(bundle / "python_backend_stubs" / "3.11", backend, dirs_exist_ok=True)
    for name in ("numpy", "numpy.libs"):  # beside the backend's own module, where the stub's interpreter looks
        (backend / name).symlink_to(site_packages(folder) / name)
    (folder / ".installed").touch()


def triton(folder: Path, repository: Path) -> Server:
    """The real one. `folder` is where `install` has put it. Raises SystemExit if it has not."""
    if not (folder / ".installed").exists():
        raise SystemExit(f"Triton is not installed in {folder}: run `python -m benchmarks.triton setup` first.")
    packages = site_packages(folder)
    command = [str(packages / "pytriton" / "tritonserver" / "bin" / "tritonserver")]
    command += [f"--model-repository={repository}", f"--backend-directory={folder / 'backends'}"]
    command += ["--http-port={http}", "--grpc-port={grpc}", "--allow-metrics=false", "--log-info=false"]
    env = {
        "PYTHONHOME": "/usr",
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
        "OPENBLAS_NUM_THREADS": "1",
    }
    return Server("triton", command, env)


def llmserve(repository: Path) -> Server:
    """Ours, with its defaults."""
    command = [sys.executable, "-m", "llmserve.cli", "serve", "--port", "{http}", "--grpc-port", "{grpc}"]
    return Server("llmserve", [*command, "--model-repository", str(repository), "--log-level", "warning"])


@contextmanager
def running(server: Server, log: Path) -> Iterator[Running]:
    """The server, ready. It and all its children have ended afterwards. Raises RuntimeError if it does not start."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        http, grpc = first.getsockname()[1], second.getsockname()[1]
    command = [part.replace("{http}", str(http)).replace("{grpc}", str(grpc)) for part in server.command]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | server.env, start_new_session=True
        )
        try:
            _wait_until_ready(http, process, log)
            yield Running(server.name, psutil.Process(process.pid), http, grpc)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def site_packages(folder: Path) -> Path:
    """Of Triton's environment."""
    return next((folder / "venv" / "lib").glob("python3*")) / "site-packages"


def _wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5).is_success:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start; its output is in {log}:\n{log.read_text()[-2000:]}")
