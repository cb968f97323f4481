"""The package by which benchmarks watch processes; where it is missing, the line that says how to get it."""

from __future__ import annotations

import sys

try:
    import psutil
except ImportError:
    sys.exit("This benchmark needs psutil. Run: make install-dev")

__all__ = ["psutil"]
