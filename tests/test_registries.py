"""Every entry of a registry has a case: whoever adds one is told here what is missing."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

import gramlip as gl
from cases import LAYERS, TRAPS, cases
from gramlip.padding import PADDING
from gramlip.testing import KERNELS, conformance

ABSTRACT = (object, Tensor, gl.Conv, gl.Dense, gl.Diagonal, gl.Separable)  # operators are cases themselves


@pytest.mark.parametrize("mode", PADDING)
def test_padding_mode_has_cases(mode: str) -> None:
    assert len(cases(mode)) >= 100
    assert any(case.padding_mode == mode for case in TRAPS.values())


def test_every_mode_that_an_operator_takes_has_a_theorem() -> None:
    assert set(gl.operators.MODES) == set(PADDING)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_has_cases(kernel: str) -> None:
    assert sum(case.kernel == kernel for case in cases()) >= 20


def _ours(kind: type) -> bool:
    return kind.__module__.startswith(("torch", "gramlip"))


@pytest.mark.parametrize(
    "kind", [kind for kind in gl.describe.registry if _ours(kind) and kind not in ABSTRACT], ids=lambda kind: kind.__name__
)
def test_described_layer_has_a_case(kind: type) -> None:
    assert kind in LAYERS, f"{kind.__name__} has a rule; expected a row in tests/cases.py: LAYERS"
    module, shape = LAYERS[kind]
    interval = gl.bound(module) if len(shape) == 1 or kind in (nn.Identity, nn.Flatten) else gl.bound(module, input_size=shape[1:])
    assert 0.0 < interval.lower <= interval.upper


@pytest.mark.parametrize("name", gl.METHODS)
def test_method_is_on_the_side_that_it_declares(name: str) -> None:
    """On a share of the table: no method's claim is false, whatever it refuses, and it claims something somewhere."""
    table = [case for case in cases() if case.plain and case.kernel != "denormal"]
    method = gl.METHODS[name]
    found = conformance(lambda module, size: gl.bound(module, input_size=size or None, method=name), table[::61])
    assert found.sound, str(found)
    assert all(row.note.startswith(("InputError", "UnsupportedError")) for row in found.of("failed")), str(found)
    answered = [row for row in found.rows if row.verdict != "failed" and row.truth > 0.0]
    assert answered, f"{name} answered no case"
    assert any(row.upper < float("inf") for row in answered) == (method.side in ("upper", "exact", "interval"))
