"""What people install: the source archive, and the wheel built from it, hold all of the package and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("llmserve", "kernels", "kv_cache", "scheduler", "tests")
FILES = ("pyproject.toml", "README.md", "LICENSE")


def package_files() -> set[str]:
    """Every file of the package as it is imported, through the links: code, C sources, data."""
    found = set()
    for folder, subfolders, files in os.walk(ROOT / "llmserve", followlinks=True):
        subfolders[:] = [name for name in subfolders if name != "__pycache__"]
        found |= {str((Path(folder) / name).relative_to(ROOT)) for name in files if not name.startswith(".")}
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, built from a copy of this tree, and the wheel, built from that archive."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(source)]
    if int(version("setuptools").partition(".")[0]) >= 77:  # else `build` fetches a newer one
        command.append("--no-isolation")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    metadata = {name for name in names if ".dist-info/" in name.partition("/")[0] + "/"}
    assert names - metadata == package_files()
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    assert any(name.startswith("llmserve/kernels/") for name in names)


def test_the_source_archive_holds_the_package(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_wheel_runs_without_the_repository(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import llmserve.kernels.ops, llmserve.kv_cache.manager, llmserve.scheduler.scheduler, llmserve.cli\n"
        "print(llmserve.kernels.ops.__file__)\n"
        "llmserve.cli.main(['--help'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first_line, _, help_text = done.stdout.partition("\n")
    assert first_line == str(tmp_path / "llmserve" / "kernels" / "ops.py")
    assert help_text.startswith("usage: llmserve")
