"""`certify` beyond the geometry table: many layers at once, options, memory, budget, what it leaves alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import gramlip as gl
from gramlip.norm import finite_layer
from gramlip.norm.certify import certify_all
from gramlip.numerics.eigenvalues import krylov
from gramlip.operators.describe import describe
from oracle import oracle


def truth(module: nn.Module, size: tuple[int, ...]) -> float:
    """The norm of the real module: a basis pushed through it in float64."""
    module = copy.deepcopy(module).double()
    module.bias = None
    channels = module.in_channels
    count = channels * math.prod(size)
    basis = torch.eye(count, dtype=torch.float64).reshape(count, channels, *size)
    with torch.no_grad():
        return float(torch.linalg.matrix_norm(module(basis).flatten(1), 2))


def layers() -> list[tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    made: list[tuple[nn.Module, tuple[int, ...]]] = []
    for scale in (1.0, 1e-20, 1e15, 3.0):
        for mode in ("zeros", "circular", "reflect"):
            module = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)
            module.weight.data *= scale
            made.append((module, (6, 5)))
    made += [
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), (5, 5)),
        (nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1), (4, 4)),
        (nn.Conv1d(2, 3, 3), (9,)),
    ]
    return made


@pytest.mark.parametrize("finite", [True, False, "auto"])
def test_layers_together_are_as_true_as_alone(finite: bool | str) -> None:
    chosen = layers()
    bounds = certify_all([describe(m, size) for m, size in chosen], finite=finite)
    for (module, size), bound in zip(chosen, bounds, strict=True):
        exact = truth(module, size)
        assert bound.upper >= exact * (1 - 1e-12)
        assert bound.lower <= exact * (1 + 1e-12)
        if finite is True:
            assert bound.rtol <= 1e-2


@pytest.mark.parametrize("points", [None, 6])
def test_blocks_of_other_order_are_filled_up(points: int | None) -> None:
    """Layers of 1 to 18 channels, searched together, wide and tall: each by its own truth."""
    shapes = [(3, 1), (1, 5), (16, 3), (16, 16), (18, 17), (17, 30), (60, 16), (2, 70)]
    weights = [torch.randn(m, n, 3, 3, generator=torch.Generator().manual_seed(m + n)) * 10.0 ** ((m - n) / 8) for m, n in shapes]
    bounds = certify_all([gl.Conv(w, points, 1, 1, "circular") for w in weights], rtol=1e-3)
    for weight, found in zip(weights, bounds, strict=True):
        grid = torch.fft.fft2(weight.double(), s=(points or 60,) * 2).permute(2, 3, 0, 1)
        exact = float(torch.linalg.matrix_norm(grid, 2).max())
        assert found.upper >= exact * (1 - 1e-12)
        assert found.rtol <= 1e-3
        if points:
            assert found.lower <= exact * (1 + 1e-12)


def test_zero_layers_have_norm_exactly_zero() -> None:
    zero = torch.zeros(3, 3, 3, 3)
    for bound in certify_all([gl.Conv(zero), gl.Conv(torch.ones(3, 3, 3, 3)), gl.Conv(zero, input_size=5), gl.Dense(torch.zeros(2, 2))]):
        assert (bound.lower, bound.upper) == (0.0, 0.0) or bound.lower > 26.9


@pytest.mark.parametrize("rtol", [0.3, 1e-2, 1e-4, 1e-6])
def test_width_asked_for_is_kept(rtol: float) -> None:
    torch.manual_seed(1)
    for module, size in (
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), 9),
        (nn.Conv2d(8, 8, 3, padding=1), None),
        (nn.Linear(30, 20), None),
    ):
        bound = gl.bound(module, input_size=size, rtol=rtol)
        assert bound.lower * (1 - 1e-12) <= bound.upper <= bound.lower * (1 + rtol)


def test_weights_are_left_as_they_were() -> None:
    module = nn.Conv2d(4, 4, 3, padding=1)
    before = module.weight.detach().clone()
    bound = gl.bound(module, input_size=6)
    assert torch.equal(module.weight, before)
    assert module.weight.requires_grad
    assert module.weight.grad is None
    assert isinstance(bound.upper, float)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_every_dtype_and_memory_format(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(2)).to(dtype)
    plain = gl.bound(gl.Conv(weight, input_size=6, padding=1))
    other = gl.bound(gl.Conv(weight.to(memory_format=torch.channels_last), input_size=6, padding=1))
    assert (plain.lower, plain.upper) == (other.lower, other.upper)
    wide = gl.bound(gl.Conv(weight.to(torch.complex128 if dtype.is_complex else torch.float64), input_size=6, padding=1))
    assert plain.lower <= wide.upper
    assert wide.lower <= plain.upper


def test_denormal_weights_count_even_where_they_are_flushed() -> None:
    weight = torch.full((2, 2), 2.0**-140)
    exact = 2 * 2.0**-140
    assert gl.bound(weight).lower > 0.99 * exact
    flushed = torch.set_flush_denormal(True)
    try:
        bound = gl.bound(weight)
        double = gl.bound(torch.tensor([[5e-324]], dtype=torch.float64))
    finally:
        torch.set_flush_denormal(False)
    assert bound.upper >= exact
    assert double.upper > 0.0
    assert flushed in (True, False)


@pytest.mark.parametrize("finite", [True, "auto"])
def test_a_finite_layer_closes_though_its_blocks_peak_was_missed_at_first(finite: bool | str) -> None:
    """No gap was seen between a layer and blocks that were not at their peak yet, and its own certificate was not tried again."""
    weight = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    assert gl.bound(gl.Conv(weight, 40, padding=1), rtol=1e-6, finite=finite).rtol <= 1e-6


def test_finite_true_says_what_it_would_need() -> None:
    module = nn.Conv2d(64, 64, 3, padding=1)
    with pytest.raises(gl.InputError, match="finite=False"):
        gl.bound(module, input_size=56, finite=True, rtol=1e-6)


@pytest.mark.parametrize("method", gl.METHODS)
def test_default_device_and_dtype_do_not_matter(method: str) -> None:
    weight = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(4))
    op = gl.Conv(weight, 7, padding=1, padding_mode="circular")
    expected = gl.bound(op, method=method)
    value = gl.METHODS[method].value(op)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        found = gl.bound(op, method=method)
        assert gl.METHODS[method].value(op) == value
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert (found.lower, found.upper) == (expected.lower, expected.upper)


def test_because_names_theorem_and_frequency() -> None:
    bound = gl.bound(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), input_size=12)
    assert "theorem 3" in bound.because
    assert "frequency" in bound.because
    assert "blocks" in bound.because


@pytest.mark.parametrize("rank", [1, 2])
def test_steps_end_where_the_vectors_stay_in_a_small_subspace(rank: int) -> None:
    """Noise beyond an invariant subspace is no direction: Ritz values above the norm would send the search astray."""
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in (24, 40))
    gram = left @ right.mT @ right @ left.mT
    value, _ = krylov(gram[None], torch.ones(1, 24, dtype=torch.float64), 20)
    assert float(value) == pytest.approx(float(torch.linalg.eigvalsh(gram)[-1]), rel=1e-10)
    found = gl.bound(torch.ones(8, 72), rtol=1e-6)
    assert found.lower <= 24.0 <= found.upper <= 24.0 * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_steps_from_a_vector_that_misses_the_norm_stay_in_range(dtype: torch.dtype) -> None:
    """Two power steps from there say nothing of the norm; blocks of the same batch may be zero, or noise."""
    side, generator = 48, torch.Generator().manual_seed(0)
    top = torch.ones(side, dtype=dtype) / side**0.5
    small = torch.randn(side, side, generator=generator, dtype=dtype) * 1e-9
    small = small @ small.mH
    g = torch.stack([top[:, None] * top.conj() + small, torch.zeros(side, side, dtype=dtype), small * 1e-12])
    start = torch.randn(side, generator=generator, dtype=dtype)
    start = start - (top.conj() @ start) * top
    for steps in (8, 16, 40):
        values, vectors = krylov(g, start.expand(3, -1), steps)
        assert bool(torch.view_as_real(vectors).isfinite().all() if dtype.is_complex else vectors.isfinite().all())
        assert float(values[1]) == 0.0
        assert float(values[0]) <= 1.0 + 1e-5


@pytest.mark.parametrize("padding_mode", ["zeros", "replicate"])
def test_basis_of_a_block_of_rank_one(padding_mode: str) -> None:
    """All its vectors are parallel, but for rounding: what orthogonalising leaves of them must not underflow."""
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(17)
    op = gl.Conv(signs[:, None, None] * torch.ones(68, 17, 4) / 68**0.5, 17, 3, 2, padding_mode, groups=4)
    for rtol in (1e-2, 1e-6):
        found = gl.bound(op, rtol=rtol)
        assert found.lower <= oracle(op) * (1 + 1e-12)
        assert float(found.upper) >= oracle(op) * (1 - 1e-12)


TINY = {
    "reads padding alone": gl.Conv(torch.tensor([[[1.0, 0.0, 0.0]]]), 1, padding=1),
    "little beside padding": gl.Conv(torch.tensor([[[1.0, 1e-7, 0.0]]]), 1, padding=1),
    "denormal beside padding": gl.Conv(torch.tensor([[[1.0, 5e-324, 0.0]]], dtype=torch.float64), 1, padding=1),
    "cancels in a circle": gl.Conv(torch.tensor([[[1.0, 1e-7, -1.0]]]), 1, padding=1, padding_mode="circular"),
    "cancels at the edge": gl.Conv(torch.tensor([[[1.0, 1e-7, -1.0]]]), 1, padding=1, padding_mode="replicate"),
    "complex, in groups": gl.Conv(torch.tensor([1.0, 1e-7j, 2e-7, -1.0]).repeat(4, 2, 1), 2, padding=2, groups=2),
    "transposed": gl.Conv(torch.tensor([[[1.0, 1e-6, 1e-7, 1.0]]]), 2, 3, padding=1, transposed=True),
}


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_a_layer_far_smaller_than_its_taps_closes_as_a_matrix(name: str, flushed: bool) -> None:
    torch.set_flush_denormal(flushed)
    try:
        found = gl.bound(TINY[name], rtol=1e-3)
    finally:
        torch.set_flush_denormal(False)
    truth = oracle(TINY[name])
    assert found.lower <= truth * (1 + 1e-12)
    assert float(found.upper) >= truth * (1 - 1e-12)
    assert found.rtol <= 1e-3 or float(found.upper) <= 1e-300


def test_an_interval_that_stays_wider_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the factorisation of a layer's Gram matrix cannot tell from zero, where the matrix is too large to be formed."""
    weight = torch.zeros(1, 4, 6, 6)
    weight[0, :, 3, 3] = 0.5
    op = gl.Conv(weight, input_size=(2, 8), stride=(4, 5), padding=((9, 2), (2, 2)))
    assert gl.bound(op).upper == oracle(op) == 0.0
    monkeypatch.setattr(finite_layer, "ENTRIES", 0)
    for found in (gl.bound(op), gl.bound(op, finite=True), gl.bound(gl.Conv(torch.ones(1, 1, 3), 4, padding=1), finite=False)):
        assert found.because.endswith("; wider than asked for")
        assert found.lower <= oracle(op) or found.lower > 2.0
    assert 0.0 < float(gl.bound(op).upper) < 1e-4
    assert "asked for" not in gl.bound(gl.Conv(torch.ones(1, 1, 3), 4, padding=1)).because
