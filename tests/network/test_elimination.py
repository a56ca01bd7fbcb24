"""One anchor eliminated, against its definition in 60 digits: the maximum over all w, and a proof that is above it."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch
from torch import Tensor

from gramlip.network.coupling import elimination
from gramlip.network.coupling.linear_forms import Anchor

DIGITS = 60
KINDS = ["relu", "wide", "narrow", "mixed"]


def ends(kind: str, n: int) -> tuple[Tensor, Tensor]:
    """Centres and radii of slopes."""
    steps = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
    centre, radius = {
        "relu": (0.5 + 0 * steps, 0.5 + 0 * steps),
        "wide": (0.2 + 0 * steps, 0.9 + steps),
        "narrow": (1.0 + steps, 0.3 + 0 * steps),
        "mixed": (2 * steps - 1, 0.4 + 0.3 * steps),
    }[kind]
    return centre, radius


def example(kind: str, old: int, n: int, seed: int, *, real: bool = False) -> tuple[Tensor, Tensor, Anchor, Tensor]:
    """A form of `old + n` entries, multipliers that are large enough, an anchor, and its centres."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if real else torch.complex128
    root = torch.randn(2, old + n, old + n, generator=generator, dtype=dtype)
    matrix = root.mH @ root
    matrix = 0.5 * (matrix + matrix.mH)
    centre, radius = ends(kind, n)
    at = torch.arange(1, old + 1)  # the query's own anchor stands around the others
    rows = torch.randn(2, n, old + 3, generator=generator, dtype=dtype)
    weights = radius.square() * (1.1 + torch.rand(n, generator=generator, dtype=torch.float64))
    weights = weights * float(torch.linalg.eigvalsh(matrix[:, old:, old:])[:, -1].max())
    return matrix, weights, Anchor(radius, centre / radius, rows, at), centre


def exact(t: Tensor) -> mpmath.matrix:
    return mpmath.matrix([[mpmath.mpmathify(complex(x)) for x in row] for row in t.tolist()])


def definition(matrix: Tensor, weights: Tensor, anchor: Anchor, centre: Tensor, f: int) -> mpmath.matrix:
    """Theorem N6 as it stands: `H'(r, C q) + q* L q`, `H' = H + H R S^-1 R H`."""
    n, columns = len(weights), anchor.rows.shape[-1]
    h, a = exact(matrix[f]), exact(anchor.rows[f])
    load, c, r = (mpmath.diag([mpmath.mpf(float(x)) for x in t]) for t in (weights, centre, anchor.radius))
    old = anchor.before
    right = r * h[old:, :]
    inner = load - right[:, old:] * r
    whole = h + right.H * mpmath.inverse(inner) * right
    place = mpmath.zeros(old + n, columns)
    for i, j in enumerate(anchor.at.tolist()):
        place[i, j] = 1
    query = c * a
    for i, j in itertools.product(range(n), range(columns)):
        place[old + i, j] = query[i, j]
    return place.H * whole * place + a.H * load * a


def least_eigenvalue(m: mpmath.matrix) -> float:
    return float(min(mpmath.eigh((m + m.H) / 2, eigvals_only=True)))


def size(m: mpmath.matrix) -> float:
    return float(mpmath.mnorm(m, "f"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("old", [0, 2])
def test_what_is_left_is_the_maximum(kind: str, old: int) -> None:
    matrix, weights, anchor, centre = example(kind, old, 3, 0)
    left = elimination.schur_complement(matrix, weights, anchor)
    assert left is not None
    with mpmath.workdps(DIGITS):
        for f in range(2):
            right = definition(matrix, weights, anchor, centre, f)
            assert size(exact(left[f]) - right) <= 1e-12 * size(right)


def check_proved_forms() -> None:
    """The proved form is above the maximum, for rows that are known up to an error too, and hardly more than it."""
    for kind, old, real, error in itertools.product(KINDS, (0, 2), (False, True), (0.0, 1e-3)):
        matrix, weights, anchor, centre = example(kind, old, 3, 1, real=real)
        own = anchor.radius[:, None] * matrix[:, old:, old:] * anchor.radius
        found = elimination.inverse(own, weights)
        assert found is not None
        left, noise = elimination.bounded(matrix, anchor, error, found)
        moved = torch.randn(anchor.rows.shape, dtype=anchor.rows.dtype, generator=torch.Generator().manual_seed(2))
        moved = anchor.rows + error * moved / torch.linalg.matrix_norm(moved, 2)[:, None, None]
        true = Anchor(anchor.radius, anchor.ratio, moved, anchor.at)
        with mpmath.workdps(DIGITS):
            for f in range(2):
                right = definition(matrix, found.weights, true, centre, f)
                gap = exact(left[f]) + float(noise[f]) * mpmath.eye(right.rows) - right
                assert least_eigenvalue(gap) >= 0.0
                assert size(gap) <= (1e-9 + 200 * error) * size(right)


def test_proved_forms_are_above_the_maximum() -> None:
    check_proved_forms()


@pytest.mark.parametrize("old", [0, 2])
def test_parts_of_the_frequencies_prove_what_all_of_them_do_with_multipliers_raised_alike(
    old: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, weights, anchor, _ = example("mixed", old, 3, 5)
    own = anchor.radius[:, None] * matrix[:, old:, old:] * anchor.radius
    scaled = weights.rsqrt()[:, None] * own * weights.rsqrt()
    tops = torch.linalg.eigvalsh(scaled)[:, -1]
    matrix = matrix.index_select(0, tops.argsort())  # the frequency that needs the largest multipliers comes last
    anchor = Anchor(anchor.radius, anchor.ratio, anchor.rows.index_select(0, tops.argsort()), anchor.at)
    own, weights = own.index_select(0, tops.argsort()), weights * (float(tops.min()) * 0.5 + float(tops.max()) * 0.5)
    found = elimination.inverse(own, weights)
    assert found is not None
    assert bool((found.weights > weights).all())
    whole, noise = elimination.bounded(matrix, anchor, 1e-9, found)
    whole = elimination.raised(elimination.Quadratic([], whole), noise).matrix
    for size in (1, 10**6):
        monkeypatch.setattr(elimination, "PART", size)
        parts = elimination._bounded_in_parts(matrix, own, weights, anchor, 1e-9)
        assert parts is not None
        assert torch.allclose(parts, whole, rtol=1e-7, atol=0.0)


def check_inverses(condition: float = 1e9) -> None:
    """`S^-1 <= (1 + growth) L^-1/2 G* G L^-1/2` in exact arithmetic, for a system that is nearly singular."""
    proofs = 0
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        turn = torch.linalg.qr(torch.randn(1, 4, 4, generator=generator, dtype=torch.complex128))[0]
        values = torch.tensor([1.0, 0.5, 0.1, 0.0], dtype=torch.float64) + 1.0 / condition
        own = torch.eye(4) - turn @ torch.diag(values).to(turn.dtype) @ turn.mH
        own = 0.5 * (own + own.mH)
        weights = torch.ones(4, dtype=torch.float64)
        found = elimination.inverse(own, weights)
        if found is None:
            continue
        proofs += 1
        with mpmath.workdps(DIGITS):
            scaled = mpmath.diag([1 / mpmath.sqrt(mpmath.mpf(float(x))) for x in found.weights])
            inner = scaled * (mpmath.diag([mpmath.mpf(float(x)) for x in found.weights]) - exact(own[0])) * scaled
            above = exact(found.matrix[0].mH) * exact(found.matrix[0]) * (1 + mpmath.mpf(float(found.growth[0])))
            assert least_eigenvalue(above - mpmath.inverse(inner)) >= 0.0
    assert proofs


@pytest.mark.parametrize("condition", [1e1, 1e5, 1e9])
def test_inverses_are_proved(condition: float) -> None:
    check_inverses(condition)


def test_what_is_no_positive_definite_system_proves_nothing() -> None:
    own = torch.eye(3, dtype=torch.complex128)[None]
    assert elimination.inverse(own, torch.tensor([1e-3, 1.0, 1.0], dtype=torch.float64)) is None
    assert elimination.inverse(own, torch.tensor([math.inf, 1.0, 1.0], dtype=torch.float64)) is None
    assert elimination.inverse(own, torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("real", [False, True])
def test_the_gradient_is_that_of_the_value(kind: str, *, real: bool) -> None:
    matrix, weights, anchor, _ = example(kind, 2, 3, 4, real=real)

    def left(given: Tensor, logarithms: Tensor) -> Tensor:
        found = elimination.schur_complement(0.5 * (given + given.mH), logarithms.exp(), anchor)
        assert found is not None
        return found.real if real else torch.view_as_real(found)

    assert torch.autograd.gradcheck(left, (matrix.requires_grad_(), weights.log().requires_grad_()))
