"""Everything that needs a GPU, in one go: `make gpu`. Tests on the device first, then measurements, then a table.

    python -m benchmarks.gpu [--write FILE] [--skip-tests] [--only kernels|models] [--dry-run]

Under 9 minutes on one H200, without a network: no longer, each part runs in a process of its own and is ended when its
time is up. Predictions were written before the first run; a part that fails says so in its row, and the others run,
whatever became of its CUDA context. Without a GPU it says that there is none and exits with 1; a dry run takes the
models' part through its paces on the CPU, on a fake device and in tiny shapes: it measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu_tests import run_tests

ROOT = Path(__file__).parents[1]
logger = logging.getLogger(__name__)
LIMIT_S = 530  # of all together
TESTS_LIMIT_S = 180
PART_LIMIT_S = 120
KERNELS = "kernels"
# `PARTS` of gpu_engine.py, which only the process that measures one imports: what is missing fails a part, not all.
MODEL_PARTS = ("small model", "large model", "fp8", "w4a16", "mixture of experts", "transformers")


def missing() -> str:
    """Why nothing can be measured here; "" if it can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU: nothing was run. `make test` shows what can be shown without."
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return ""


def rows_of(part: str, is_dry: bool) -> Iterator[object]:
    """What is measured."""
    if part == KERNELS:
        from benchmarks.gpu_kernels import kernel_rows

        return kernel_rows()
    from benchmarks.gpu_engine import PARTS, Machine

    return PARTS[part](Machine.dry() if is_dry else Machine.gpu())


def collect(name: str, is_dry: bool = False) -> Iterator[str]:
    """Lines of the table; a failure is one."""
    try:
        for row in rows_of(name, is_dry):
            line = "| {name} | {unit} | {target} | {predicted} | {result} |".format(**vars(row))
            print(line, flush=True)
            yield line
    except Exception as error:
        logger.exception("%s failed", name)
        line = f"| {name} | | | | failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} |"
        print(line, flush=True)
        yield line
    gc.collect()


def run_apart(name: str, limit_s: float) -> Iterator[str]:
    """Lines of one part's table: of a process that has the GPU to itself and ends after so many seconds."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        alarm = threading.Timer(limit_s, process.kill)
        alarm.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("| "):
                yield line.rstrip("\n")
        status = process.wait()
        alarm.cancel()
    if status:
        why = f"stopped after {limit_s:.0f} s" if status == -signal.SIGKILL else f"ended with status {status}"
        yield f"| {name} | | | | failed: {why} |"


def dry_run() -> int:
    """The number of parts that failed."""
    print("Dry: on a fake device and in tiny shapes. What follows was not measured on a GPU.", flush=True)
    lines = [line for name in MODEL_PARTS for line in collect(name, is_dry=True)]
    return sum("| failed: " in line for line in lines)


def main() -> int:
    """0 if the measurements were made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the table goes there too")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--only", choices=("kernels", "models"))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--part", choices=(KERNELS, *MODEL_PARTS), help="one part alone, in this process")
    args = parser.parse_args()
    if args.dry_run:
        return dry_run()
    if reason := missing():
        print(reason)
        return 1
    if args.part:
        for _ in collect(args.part):
            pass
        return 0
    started = time.perf_counter()
    properties = torch.cuda.get_device_properties(0)
    lines = [f"{properties.name}, torch {torch.__version__}, CUDA {torch.version.cuda}", ""]
    if not args.skip_tests:
        lines += [f"Tests on the device: {run_tests(TESTS_LIMIT_S)}", ""]
    lines += ["| what | measure | target | predicted | result |", "|---|---|---|---|---|"]
    chosen = {"kernels": (KERNELS,), "models": MODEL_PARTS}
    for name in chosen.get(args.only, (KERNELS, *MODEL_PARTS)):
        left_s = LIMIT_S - (time.perf_counter() - started)
        lines += run_apart(name, min(left_s, PART_LIMIT_S)) if left_s > 0 else [f"| {name} | | | | no time was left |"]
    lines.append(f"\n{time.perf_counter() - started:.0f} s in all.")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        args.write.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
