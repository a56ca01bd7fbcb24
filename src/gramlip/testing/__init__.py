"""Tests for any library's norm of a layer: an oracle, a case table with named adversaries, a conformance run.

`conformance(fn)` runs `fn(module, input_size)` over the table and says where its answer is below the truth. Needs no test
framework. Documented with results in docs/conformance.md.
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
