"""Every entry of a registry has a case: whoever adds one is told here what is missing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gramlip as gl
from cases import LAYERS, TRAPS, cases
from gramlip.network.audit import audit
from gramlip.norm.polyphase import PADDING
from gramlip.rules import RULES
from gramlip.testing import KERNELS, conformance
from rule_cases import CASES, OVERLOADS
from test_rules import Map

ABSTRACT = (object, Tensor, gl.Conv, gl.Dense, gl.Diagonal, gl.Separable, gl.operators.linear_maps.Sparse)  # operators are cases themselves


@pytest.mark.parametrize("mode", PADDING)
def test_padding_mode_has_cases(mode: str) -> None:
    assert len(cases(mode)) >= 100
    assert any(case.padding_mode == mode for case in TRAPS.values())


def test_every_mode_that_an_operator_takes_has_a_theorem() -> None:
    assert set(gl.operators.linear_maps.MODES) == set(PADDING)


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
    assert 0.0 <= interval.lower <= interval.upper < float("inf")


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


def test_rules_and_their_cases_are_the_same() -> None:
    missing, unknown = sorted(set(RULES) - set(CASES)), sorted(set(CASES) - set(RULES))
    assert not missing, f"{missing} have a rule; expected a row each in tests/rule_cases.py"
    assert not unknown, f"{unknown} have a row in tests/rule_cases.py; expected a rule each"


@pytest.mark.parametrize("op", [op for op in RULES if op.startswith("aten.")])
def test_every_overload_that_falls_to_a_rule_was_read_against_it(op: str) -> None:
    """`view.dtype` once fell to the rule of `view`, a rearrangement."""
    name = op.removeprefix("aten.")
    for packet in (getattr(torch.ops.aten, name, None), getattr(torch.ops.aten, f"{name}_", None)):
        for overload in packet.overloads() if packet is not None else ():
            arguments = getattr(packet, overload)._schema.arguments
            traced = any("Tensor" in str(a.type) for a in arguments) and not any(a.is_out for a in arguments)
            known = overload == "default" or name in OVERLOADS.get(overload, "").split()
            assert known or not traced, f"{op} has the overload {overload}; expected it in tests/rule_cases.py: OVERLOADS, once it was read"


NOT_TRACED = {"aten.lift_fresh"}  # torch.export takes it out of the graph


@pytest.mark.parametrize("op", CASES)
def test_rule_is_used_and_holds(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is asked, and its constant is not below the Jacobian at a point of the domain."""
    call, shape = CASES[op]
    asked, right = [], RULES[op]
    monkeypatch.setitem(RULES, op, lambda found: asked.append(found.op) or right(found))
    upper = audit(Map(call).eval(), shape, effort=-1, domain=(0.25, 3.0)).upper
    x = torch.rand(1, *shape) * 2 + 0.5
    jacobian = torch.autograd.functional.jacobian(call, x).reshape(-1, x.numel()).double()
    assert float(torch.linalg.matrix_norm(jacobian, 2)) <= upper * (1 + 1e-5)
    assert asked or op in NOT_TRACED
