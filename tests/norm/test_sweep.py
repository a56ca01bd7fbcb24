"""The way that a GPU goes, on the CPU: all blocks at once, and factorisations that are measured on their result."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import gramlip as gl
from cases import Case, cases, check, closes
from gramlip.lab.bench.contenders import he
from gramlip.norm import gram_symbol
from gramlip.norm.branch_and_bound import BranchAndBound
from gramlip.norm.certify import certify_all
from gramlip.norm.frequency_cells import Lattice
from gramlip.norm.lower_bound import LowerBounds
from gramlip.numerics import eigenvalues, precision


@pytest.fixture(autouse=True)
def _parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "parallel", lambda device: True)
    monkeypatch.setattr(gram_symbol, "SWEPT_OPERATIONS", 1e9)  # a GPU has time for more


@pytest.mark.parametrize("case", cases()[::5], ids=lambda case: case.name)
def test_interval_holds_the_truth(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", [case for case in cases() if case.dims][::9], ids=lambda case: case.name)
def test_interval_without_the_finite_layers_own_certificate(case: Case) -> None:
    check(case, finite=False)


CIRCULAR = [
    Case(kernel, (16, 12, 3, 3), (9, 10), padding=((1, 1), (1, 1)), padding_mode="circular", groups=groups)
    for kernel in ("random", "wave", "orthogonal", "near_orthogonal", "ones", "rank_one")
    for groups in (1, 2)
]


@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("case", CIRCULAR, ids=lambda case: case.name)
def test_circular_layer_closes(case: Case, rtol: float) -> None:
    closes(case, rtol)


def test_one_pass_is_enough_and_layers_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BranchAndBound, "prove_blocks", None)  # the search itself is not needed
    ops = [gl.Conv(he((8, 8, 3, 3), seed)) for seed in range(3)] + [gl.Conv(he((8, 8, 3, 3), 3), 16, padding=1, padding_mode="circular")]
    for op, together in zip(ops, certify_all(ops), strict=True):
        alone = gl.bound(op)
        assert alone.rtol <= 1e-2
        assert together.rtol <= 1e-2
        assert max(alone.lower, together.lower) <= min(alone.upper, together.upper)


def test_a_peak_that_was_missed_is_found_by_the_corners_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    op = gl.Conv(he((6, 6, 3, 3), 0))
    truth = gl.bound(op, rtol=1e-6)
    sweep = LowerBounds._sweep

    def worse(self: LowerBounds, fine: float) -> None:
        sweep(self, fine)
        self.best *= 0.5

    monkeypatch.setattr(LowerBounds, "_sweep", worse)
    found = gl.bound(op)
    assert found.rtol <= 1e-2
    assert found.lower <= truth.upper
    assert found.upper >= truth.lower


@pytest.mark.parametrize("side", [3, 40])
def test_a_factorisation_that_is_wrong_proves_nothing(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.eye(side, dtype=torch.complex128)[None] * torch.linspace(0.5, 1, side)[:, None]
    t, noise = torch.tensor([1.001], dtype=torch.float64), torch.tensor([1e-13], dtype=torch.float64)
    assert bool(eigenvalues.cholesky(g, t, noise))
    factorise = torch.linalg.cholesky_ex

    def sloppy(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        factor, info = factorise(matrix)
        return factor * (1 + 1e-9), info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", sloppy)
    assert not bool(eigenvalues.cholesky(g, t, noise))


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("rtol", [1.0, 0.2, 1e-2])
@pytest.mark.parametrize("size", range(4, 14))
def test_axes_that_the_spread_omits_are_visited_point_by_point(size: int, rtol: float, complex_: bool) -> None:
    """Wide intervals took cells of several steps on grids whose points were all taken to be corners."""
    kernel = torch.ones(1, 2, 2, 4, dtype=torch.complex64 if complex_ else torch.float32)
    gram = gram_symbol.GramSymbol(kernel, rtol=rtol, frequencies=size)
    grid = Lattice(gram.span, (size,), 1, not complex_)
    cells = grid.cells(gram.fine or 0.0, np.zeros(1, dtype=np.int64), least=True)
    passed_over = bool((grid.half_widths(cells) > 0).any())
    assert gram.fine is not None
    assert grid.spread < math.cos(1.5 * math.pi / size) * (1 + 1e-12) or not passed_over
