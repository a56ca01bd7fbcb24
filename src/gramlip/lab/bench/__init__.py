"""The benchmark: contenders timed against each other in one run. `gramlip bench`; docs/performance.md."""

from __future__ import annotations

from gramlip.lab.bench.result import Options, Result
from gramlip.lab.bench.run import ROWS, bench

__all__ = ["ROWS", "Options", "Result", "bench"]
