"""Sparse matrices of torch and SciPy, and SciPy's linear operators: every way to their interval, in exact arithmetic and against LAPACK."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor

import gramlip as gl
from gramlip.norm import certify
from gramlip.operators.linear_maps import SPARSE
from test_rounding import assert_exactly_between

WAYS = {"whole": {}, "gram": {"ENTRIES": 0}, "schur": {"ENTRIES": 0, "SIDE": 0}}
"""The three ways, and the limits that leave nothing but them."""


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, limit in WAYS[request.param].items():
        monkeypatch.setattr(certify, name, limit)
    return request.param


def holed(m: int, n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(m, n, generator=generator) < 0.4
    kept[seed % m, seed % n] = True
    return torch.randn(m, n, dtype=torch.complex128 if dtype.is_complex else torch.float64, generator=generator).to(dtype) * kept


def stored(dense: Tensor, layout: torch.layout = torch.sparse_coo) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that a layout is in beta
        block = (1, 1) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
        return dense.to_sparse(layout=layout, blocksize=block)


@pytest.mark.parametrize("sign", ["signed", "positive"])
def test_exactly(way: str, sign: str) -> None:
    for seed in range(60):
        dense = holed(2 + seed % 4, 2 + seed % 3, seed, torch.float32)
        dense = dense.abs() if sign == "positive" else dense
        for scale in (1.0, 2.0**-140):  # the second makes denormal numbers of them
            assert_exactly_between(dense * scale, gl.bound(stored(dense * scale), rtol=1e-12))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("layout", SPARSE, ids=str)
def test_every_layout_and_dtype(way: str, layout: torch.layout, dtype: torch.dtype) -> None:
    dense = holed(12, 9, 3, dtype)
    found = gl.bound(stored(dense, layout))
    truth = float(torch.linalg.matrix_norm(dense.to(torch.complex128), 2))
    assert found.lower <= truth * (1 + 1e-12)
    assert truth <= float(found.upper) * (1 + 1e-12)
    assert found.lower >= truth * 0.97
    assert "a sparse matrix 12x9" in found.because
    assert float(found.upper) <= truth * 1.02 if way != "schur" else "Schur" in found.because


@pytest.mark.parametrize("kind", ["coo", "csr", "csc", "bsr", "dia", "dok", "lil"])
@pytest.mark.parametrize("holder", [sp.coo_matrix, sp.coo_array], ids=lambda holder: holder.__name__)
def test_every_format_of_scipy(kind: str, holder: Any) -> None:
    dense = holed(7, 9, 1)
    assert gl.bound(holder(dense.numpy()).asformat(kind)) == gl.bound(stored(dense))


def test_what_is_known_exactly(way: str) -> None:
    n = 60
    path = sp.diags([np.ones(n - 1), np.ones(n - 1)], [1, -1])
    truth = 2 * np.cos(np.pi / (n + 1))
    found = gl.bound(path)
    assert found.lower <= truth <= float(found.upper) <= truth * 1.02
    assert 3.0 <= gl.bound(3 * sp.identity(50), rtol=1e-6).upper <= 3.0 * (1 + 1e-6)
    signed = sp.csr_matrix(np.array([[1.0, 1.0], [1.0, -1.0]]))
    assert gl.bound(signed).lower <= 2**0.5 <= float(gl.bound(signed).upper)


def test_zero_and_far_from_one(way: str) -> None:
    for empty in (sp.csr_matrix((4, 5)), stored(torch.zeros(4, 5)), sp.csr_matrix(([0.0, -0.0], ([0, 1], [1, 1])), (4, 5))):
        assert (gl.bound(empty).lower, gl.bound(empty).upper) == (0.0, 0.0)
    dense = holed(6, 5, 2)
    for exponent in (-1000, 1000):
        found = gl.bound(sp.csr_matrix(dense.numpy() * 2.0**exponent))
        assert found.lower > 0
        assert found.upper < float("inf")
        assert_exactly_between(dense * 2.0**exponent, found)


def test_large_ones_are_never_formed() -> None:
    n = 30_000
    generator = np.random.default_rng(0)
    graph = sp.coo_matrix((np.ones(4 * n), generator.integers(0, n, (2, 4 * n))), (n, n)).tocsr()
    found = gl.bound(graph)
    assert "Schur" in found.because
    assert found.rtol <= 1e-2
    graph.data *= generator.choice([-1.0, 1.0], len(graph.data))
    signed = gl.bound(graph)
    assert float(signed.upper) == float(found.upper)
    assert "wider than asked for" in signed.because


REFUSED: dict[str, tuple[Any, str]] = {
    "integers": (sp.csr_matrix(np.eye(3, dtype=np.int64)), r"array of int64; expected floating"),
    "truth values": (sp.csr_matrix(np.eye(3, dtype=bool)), r"array of bool; expected floating"),
    "integers of torch": (stored(torch.eye(3, dtype=torch.int64)), r"dtype torch\.int64"),
    "zeros of integers": (stored(torch.zeros(3, 3, dtype=torch.int64)), r"dtype torch\.int64"),
    "NaN": (sp.csr_matrix(np.array([[np.nan, 1.0]])), "NaN or infinite"),
    "infinity": (stored(torch.tensor([[0.0, float("inf")]])), "NaN or infinite"),
    "no rows": (sp.csr_matrix((0, 3)), r"shape \(0, 3\)"),
    "one axis": (sp.coo_array(np.ones(3)), r"shape \(3,\); expected a matrix"),
    "three axes": (torch.ones(2, 2, 2).to_sparse(), r"shape \(2, 2, 2\); expected a matrix"),
    "rows of vectors": (torch.ones(2, 2).to_sparse(1), "single entries"),
    "twice": (sp.coo_matrix(([1.0, 1.0], ([0, 0], [1, 1])), (2, 2)), r"stores an entry twice.*sum_duplicates"),
    "twice in torch": (
        torch.sparse_coo_tensor(torch.zeros(2, 2, dtype=torch.int64), [1.0, -1.0], (2, 2), check_invariants=False),
        r"stores an entry twice.*coalesce",
    ),
    "beyond": (
        torch.sparse_coo_tensor(torch.full((2, 1), 5), [1.0], (2, 2), check_invariants=False, is_coalesced=True),
        r"places outside of it",
    ),
    "meta": (torch.empty(2, 2, layout=torch.sparse_coo, device="meta"), "meta device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    given, says = REFUSED[name]
    with pytest.raises(gl.InputError, match=says) as error:
        gl.bound(given)
    assert "\n" not in str(error.value)


def test_dense_operators_refuse_sparse_weights() -> None:
    with pytest.raises(gl.InputError, match=r"type weight\.toarray\(\), or gramlip\.bound"):
        gl.Dense(sp.identity(2))  # type: ignore[arg-type]
    with pytest.raises(gl.InputError, match="type method='certify'"):
        gl.bound(sp.identity(2), method="frobenius")


def operator(matrix: np.ndarray, adjoint: bool = True) -> LinearOperator:
    """A linear operator that shows its products alone."""
    back = {"rmatvec": lambda y: matrix.conj().T @ y} if adjoint else {}
    return LinearOperator(matrix.shape, matvec=lambda x: matrix @ x, dtype=matrix.dtype, **back)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_a_linear_operator_is_formed_where_one_side_is_small(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for shape in ((40, 300), (300, 40)):
        matrix = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex128)
        matrix = (matrix if dtype is np.complex128 else matrix.real).astype(dtype)
        expected = gl.bound(matrix)
        found = gl.bound(operator(matrix))
        assert (found.lower, found.upper) == (expected.lower, expected.upper)
        assert "LinearOperator, of what it returns for unit vectors (assumed linear)" in found.because
        with monkeypatch.context() as patch:
            patch.setattr("gramlip.operators.given.SIDE", 50)
            found = gl.bound(operator(matrix))
            assert (found.lower, found.upper) == (expected.lower, expected.upper)


def test_the_matrix_that_a_linear_operator_holds() -> None:
    dense = holed(7, 9, 1).numpy()
    assert gl.bound(aslinearoperator(dense)) == gl.bound(dense)
    assert gl.bound(aslinearoperator(sp.csr_matrix(dense))) == gl.bound(sp.csr_matrix(dense))
    assert gl.bound(2 * aslinearoperator(dense)).upper >= 2 * gl.bound(dense).lower


def test_linear_operators_that_nothing_bounds_from_above(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = LinearOperator((10**6, 10**6), matvec=lambda x: x, dtype=np.float64)
    with pytest.raises(gl.InputError, match=r"shows no entries.*type its matrix"):
        gl.bound(endless)
    monkeypatch.setattr("gramlip.operators.given.SIDE", 5)
    with pytest.raises(gl.InputError, match="without an adjoint"):
        gl.bound(operator(np.ones((3, 9)), adjoint=False))
    with pytest.raises(gl.InputError, match="NaN or infinite"):
        gl.bound(operator(np.full((2, 2), np.nan)))
