"""Everything that needs a GPU, in one go: `make gpu`. Tests on the device first, then measurements, then a table.

    python -m benchmarks.gpu [--write FILE] [--skip-tests] [--only kernels|models] [--dry-run]

Under 9 minutes on one H200, without a network. Predictions were written before the first run; a part that fails says so
in its row, and the others run. Without a GPU it says that there is none and exits with 1; a dry run takes the models'
part through its paces on the CPU, on a fake device and in tiny shapes: it measures nothing.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
logger = logging.getLogger(__name__)
TESTS_TIMEOUT_S = 240


def missing() -> str:
    """Why nothing can be measured here; "" if it can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU: nothing was run. `make test` shows what can be shown without."
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'llmserve[gpu]'."
    return ""


def run_tests() -> str:
    """The tests marked gpu: the last line pytest wrote."""
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels/triton", "tests/gpu"]
    if importlib.util.find_spec("hypothesis") is None:
        command.append("--ignore=tests/kernels/triton/test_triton_ragged.py")
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TESTS_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"not finished after {TESTS_TIMEOUT_S} s"
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else f"exit status {done.returncode}"


def kernel_part() -> Iterator[object]:
    """Imported here, so that what is not installed fails one part of the table, not all."""
    from benchmarks.gpu_kernels import kernel_rows

    yield from kernel_rows()


def model_parts(is_dry: bool) -> Iterator[tuple[str, Callable[[], Iterator[object]]]]:
    """As above, for each part."""
    from benchmarks.gpu_engine import PARTS, Machine

    machine = Machine.dry() if is_dry else Machine.gpu()
    for name, rows in PARTS.items():
        yield name, functools.partial(rows, machine)


def collect(name: str, rows: Callable[[], Iterator[object]]) -> Iterator[str]:
    """Lines of the table; a failure is one."""
    try:
        for row in rows():
            line = "| {name} | {unit} | {target} | {predicted} | {result} |".format(**vars(row))
            print(line, flush=True)
            yield line
    except Exception as error:
        logger.exception("%s failed", name)
        yield f"| {name} | | | | failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} |"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def dry_run() -> int:
    """The number of parts that failed."""
    lines = [line for name, rows in model_parts(is_dry=True) for line in collect(name, rows)]
    return sum("| failed: " in line for line in lines)


def main() -> int:
    """0 if the measurements were made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the table goes there too")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--only", choices=("kernels", "models"))
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        return dry_run()
    if reason := missing():
        print(reason)
        return 1
    started = time.perf_counter()
    properties = torch.cuda.get_device_properties(0)
    lines = [f"{properties.name}, torch {torch.__version__}, CUDA {torch.version.cuda}", ""]
    if not args.skip_tests:
        lines += [f"Tests on the device: {run_tests()}", ""]
    lines += ["| what | measure | target | predicted | result |", "|---|---|---|---|---|"]
    if args.only != "models":
        lines += collect("kernels", kernel_part)
    if args.only != "kernels":
        for name, rows in model_parts(is_dry=False):
            lines += collect(name, rows)
    lines.append(f"\n{time.perf_counter() - started:.0f} s in all.")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        args.write.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
