"""Tests for any library's norm of a layer: an oracle, a case table with named adversaries, a conformance run.

`conformance(fn)` runs `fn(module, input_size)` over the table and reports the cases in which the result is below the true norm. It
needs no test framework. docs/conformance.md has documentation and results.
"""

from __future__ import annotations

from gramlip.testing.cases import KERNELS, TRAPS, Case, Conformance, Row, cases, conformance, weight
from gramlip.testing.oracle import as_module, matrix, norm, oracle, torch_layer

__all__ = [
    "KERNELS",
    "TRAPS",
    "Case",
    "Conformance",
    "Row",
    "as_module",
    "cases",
    "conformance",
    "matrix",
    "norm",
    "oracle",
    "torch_layer",
    "weight",
]
