"""Every benchmark of this machine, one after the other: `make bench`. Each can be run by itself too."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

MODULES = (
    "bench_scheduler",  # host cost of a step
    "bench_overlap",  # host cost of a step launched ahead
    "bench_server",  # server process, a streamed token
    "bench_overload",  # ten times the capacity
    "bench_fairness",  # a flood beside a quiet tenant
    "bench_deadline",  # how late who runs out of time is told so
    "bench_idle_connections",  # ten thousand of them
    "bench_general",  # general models, a request
    "bench_cpu_kernels",  # kernels against the machine's limits
    "bench_decode",  # weight formats, tokens a second
    "bench_speculation",  # drafts on and off
    "bench_embeddings",  # texts to vectors, beside sentence-transformers
    "bench_embedding_quality",  # what a weight format costs in retrieval
    "bench_end_to_end",  # the whole server
    "bench_long_prompt",  # the longest prompt beside streams
    "bench_embedding_server",  # embeddings, beside sentence-transformers
    "bench_embeddings_beside_llm",  # what they cost a chat stream
)
# Not in a run of all: each takes long, needs another server or a GPU, or breaks the one it measures.
APART = ("peers", "triton", "chaos", "fuzz", "gpu")
APART += ("bench_quality", "bench_recovery", "bench_reload", "bench_step_profile")


def main(argv: Sequence[str] | None = None) -> int:
    """The number of benchmarks that failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which; by default all of them: {', '.join(MODULES)}")
    apart = f"Run by themselves, python -m benchmarks.NAME: {', '.join(APART)}."
    parser.epilog = apart
    names = parser.parse_args(argv).names
    if unknown := sorted(set(names) - set(MODULES)):
        parser.error(f"there is no benchmark {unknown[0]!r} here. Choose of {', '.join(MODULES)}. {apart}")
    failed = 0
    for module in names or MODULES:
        print(f"\n== {module}", flush=True)
        failed += subprocess.run([sys.executable, "-m", f"benchmarks.{module}"], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
