"""The search: true against a dense grid, closed to the width asked for, with few blocks; counts instead of seconds."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import gramlip as gl
from gramlip.norm import branch_and_bound, gram_symbol
from gramlip.norm import lower_bound as ascent
from gramlip.norm.autocorrelation import Taps, tap_offsets, tap_positions, tap_runs
from gramlip.norm.branch_and_bound import BranchAndBound, Enclosure
from gramlip.norm.frequency_cells import Lattice, waves
from gramlip.norm.gram_symbol import GramSymbol
from gramlip.numerics import eigenvalues


def enclose(kernel: Tensor, points: tuple[int | None, ...], rtol: float = 1e-2) -> tuple[float, float, Enclosure]:
    gram = GramSymbol(kernel)
    alone = BranchAndBound(gram, points)
    alone.start(rtol)
    found = alone.close(rtol)[0]
    return math.ldexp(found.lower, gram.exponent), math.ldexp(found.upper, gram.exponent), found


def largest(kernel: Tensor, grid: list[int]) -> float:
    """The largest norm on a grid, by torch's own FFT and SVD."""
    dims = list(range(3, kernel.ndim))
    spectrum = torch.fft.fftn(kernel.to(torch.complex128), s=grid, dim=dims).movedim((1, 2), (-2, -1))
    return float(torch.linalg.matrix_norm(spectrum, 2).max())


KERNELS: dict[str, Tensor] = {}
for _name, _shape in {
    "1d": (1, 5, 4, 5),
    "2d": (1, 6, 6, 3, 3),
    "even": (1, 4, 6, 4, 2),
    "tall": (1, 3, 4, 7, 1),
    "groups": (3, 2, 2, 3, 3),
    "3d": (1, 4, 4, 3, 3, 3),
}.items():
    KERNELS[_name] = torch.randn(_shape, generator=torch.Generator().manual_seed(len(_name)))
KERNELS["complex"] = torch.randn(1, 4, 4, 3, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(9))
KERNELS["ones"] = torch.ones(1, 2, 2, 3, 3)
_second = torch.tensor([1.0, -2.0, 1.0])
KERNELS["laplacian"] = (_second[:, None] * _second)[None, None, None]
KERNELS["orthogonal"] = torch.zeros(1, 8, 8, 3, 3)
KERNELS["orthogonal"][0, :, :, 1, 1] = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
KERNELS["nearly orthogonal"] = KERNELS["orthogonal"] + 1e-4 * torch.randn(1, 8, 8, 3, 3, generator=torch.Generator().manual_seed(2))
KERNELS["ill scaled"] = KERNELS["2d"] * torch.logspace(0, -12, 6)[None, :, None, None, None]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("rtol", [1e-2, 1e-6])
def test_torus_is_enclosed_and_closed(name: str, rtol: float) -> None:
    kernel = KERNELS[name]
    dims = kernel.ndim - 3
    lower, upper, found = enclose(kernel, (None,) * dims, rtol)
    assert upper >= largest(kernel, [{1: 997, 2: 61, 3: 24}[dims]] * dims) * (1 - 1e-13)
    assert upper <= lower * (1 + rtol)
    assert found.finished


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 17, 40])
def test_grid_is_enclosed_and_closed(name: str, size: int) -> None:
    kernel = KERNELS[name]
    dims = kernel.ndim - 3
    if dims == 3 and size > 8:
        size = 11
    lower, upper, _ = enclose(kernel, (size,) * dims, 1e-4)
    wrapped = kernel.to(torch.complex128 if kernel.is_complex() else torch.float64)
    waves = [
        torch.polar(
            torch.ones(size, k, dtype=torch.float64), -2 * math.pi / size * torch.outer(torch.arange(size), torch.arange(k)).double()
        )
        for k in kernel.shape[3:]
    ]
    blocks = wrapped.to(torch.complex128)
    for wave in waves:  # contract the first kernel axis, append the frequency axis
        blocks = torch.tensordot(blocks, wave, dims=([3], [1]))
    exact = float(torch.linalg.matrix_norm(blocks.movedim((1, 2), (-2, -1)), 2).max())
    assert lower <= exact * (1 + 1e-13)
    assert exact * (1 - 1e-13) <= upper
    # what cancels to less than rounding can tell from zero is closed to that
    assert upper <= max(lower * (1 + 1e-4), 1e-5 * float(kernel.abs().max()))


def test_keys_of_three_axes_do_not_collide() -> None:
    """Three axes of 2^24 points once overflowed the 64-bit key: blocks were taken at other frequencies than believed."""
    lattice = Lattice((3, 3, 3), (None, None, None), 5, mirrored=False)
    index = np.random.default_rng(3).integers(lattice.sizes, size=(500, 3))
    group = np.arange(500) % 5
    back = lattice.decode(lattice.keys(group, index))
    assert np.array_equal(back[0], group)
    assert np.array_equal(back[1], index)
    assert math.prod(lattice.sizes) * 5 < 2**63


@pytest.mark.parametrize("mode", ["circular", "zeros"])
def test_products_of_frequencies_and_exponents_do_not_overflow(mode: str) -> None:
    """Sizes below 2^60 times 65 taps once overflowed 64 bits: the interval was that of other frequencies, below the truth."""
    weight = torch.cos(2.2 * torch.arange(65.0)).reshape(1, 1, 65)
    truth = largest(weight[None], [1 << 16])
    for size in (7 * 10**17 + 3, 10**18, (1 << 62) // 65 + 1):
        with pytest.raises(gl.InputError, match="input_size=None"):
            gl.bound(gl.Conv(weight, size, padding=32, padding_mode=mode))
    found = gl.bound(gl.Conv(weight, (1 << 62) // 65 - 64, padding=32, padding_mode=mode), rtol=1e-3)
    assert truth * (1 - 1e-5) <= found.upper  # the grid is so fine that it holds a frequency close to that of the truth
    assert found.lower <= truth * (1 + 1e-5)


def test_three_axes_reach_their_supremum() -> None:
    kernel = torch.randn(1, 8, 8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    lower, upper, _ = enclose(kernel, (None, None, None))
    assert lower >= 0.99 * largest(kernel, [20, 20, 20])
    assert upper >= largest(kernel, [20, 20, 20])


def test_mirrored_frequencies_share_a_key() -> None:
    lattice = Lattice((3, 5), (None, 12), 2, mirrored=True)
    index = np.array([[5, 7], [0, 3], [1, 0]])
    group = np.array([0, 1, 1])
    assert np.array_equal(lattice.keys(group, index), lattice.keys(group, -index))


@pytest.mark.parametrize("refine", [1.0, 2.5])
def test_cells_cover_the_torus_and_split_without_gaps(refine: float) -> None:
    lattice = Lattice((3, 4), (None, 37), 1, mirrored=False)
    cells = lattice.cells(refine, np.array([0]))
    for _ in range(3):
        area = ((cells[2] - cells[1]).prod(-1)).sum()
        assert int(area) == math.prod(lattice.sizes)
        cells = lattice.split(cells)


def test_layers_searched_together_keep_their_own_targets() -> None:
    kernels = torch.cat([KERNELS["2d"], 1e-3 * KERNELS["2d"].flip(-1), KERNELS["2d"] ** 2])
    gram = GramSymbol(kernels)
    together = BranchAndBound(gram, (None, None), np.arange(3))
    together.start(1e-3)
    for found, kernel in zip(together.close(1e-3), kernels, strict=True):
        lower, upper, _ = enclose(kernel[None], (None, None), 1e-3)
        assert math.ldexp(found.upper, gram.exponent) >= lower
        assert math.ldexp(found.lower, gram.exponent) <= upper
        assert found.upper <= found.lower * (1 + 1e-3)


@pytest.mark.parametrize("hopeless", [(0,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_a_layer_that_is_given_up_leaves_the_others_in_the_search(hopeless: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer without a target left once ended the search of all: the others were reported with targets that nothing had proved."""
    monkeypatch.setattr(branch_and_bound, "CELLS", 0)  # every round asks for wider targets
    kernels = torch.cat([KERNELS["2d"], KERNELS["2d"].flip(-1), KERNELS["2d"] ** 2])
    gram = GramSymbol(kernels)
    together = BranchAndBound(gram, (None, None), np.arange(3))
    together.start(1e-6)
    together.lower.best *= 0.9  # lower sides that missed the peaks
    together.lower.best[list(hopeless)] = 1e-30  # what rounding can tell from these is wider than every target
    for i, (found, kernel) in enumerate(zip(together.close(1e-6), kernels, strict=True)):
        assert math.ldexp(found.upper, gram.exponent) >= largest(kernel[None], [61, 61])
        assert not found.finished
        assert i in hopeless or found.upper <= 2 * math.sqrt(together.lower.best[i])


def test_spent_budget_is_said_and_stays_true() -> None:
    gram = GramSymbol(KERNELS["2d"])
    poor = BranchAndBound(gram, (None, None), budget=1.0)
    poor.start(1e-6)
    found = poor.close(1e-6)[0]
    assert not found.finished
    assert math.ldexp(found.upper, gram.exponent) >= largest(KERNELS["2d"], [61, 61])


@pytest.mark.parametrize(("axes", "rtol", "got"), [(2, 1e-5, 1e-5), (2, 1e-6, 1e-3), (3, 1e-4, 1e-2)])
def test_flat_layers_whose_taps_do_not_vanish_take_bounded_work(axes: int, rtol: float, got: float) -> None:
    """`D D* = [[1, e^iw], [e^-iw, 1]]`: norm sqrt(2) everywhere. Millions of tiny blocks took gigabytes before the budget ended."""
    kernel = torch.zeros(2, 3, *(3,) * axes)
    kernel[(0, 0) + (0,) * axes] = kernel[(1, 0) + (2,) * axes] = 1.0
    found = enclose(kernel[None], (None,) * axes, rtol)[2]
    assert found.lower * (1 - 1e-12) <= found.upper <= found.lower * (1 + got)
    assert found.tally.blocks < 5e6


@pytest.mark.parametrize("span", [(), (1,), (4,), (3, 3), (1, 3), (3, 1), (5, 2), (3, 1, 3), (2, 3, 4), (2, 1, 1)], ids=str)
def test_runs_are_all_pairs_of_taps_that_are_so_far_apart(span: tuple[int, ...]) -> None:
    taps, found = tap_positions(span).tolist(), tap_runs(span)
    for at, some in zip([[0] * len(span), *tap_offsets(span).tolist()], found, strict=True):
        pairs = [(i + k, j + k) for i, j, count in some for k in range(count)]
        apart = [(i, j) for i, p in enumerate(taps) for j, q in enumerate(taps) if [y - x for x, y in zip(p, q, strict=True)] == at]
        assert sorted(pairs) == apart


@pytest.mark.parametrize("of", [tap_positions, tap_offsets])
@pytest.mark.parametrize("span", [(), (1,), (4,), (3, 3), (1, 3), (3, 1), (2, 3, 4), (1, 2, 2)], ids=str)
def test_waves_are_powers_at_every_exponent(span: tuple[int, ...], of: Callable[[tuple[int, ...]], NDArray[np.int64]]) -> None:
    sizes = tuple(1 if k == 1 else 2**20 + 7 * k for k in span)
    index = np.stack([np.arange(5) * (n // 6) for n in sizes], 1) if span else np.zeros((5, 0), dtype=np.int64)
    found = waves(index, sizes, of(span))
    assert found.shape == (5, len(of(span)))
    assert np.abs(found - np.exp(-2j * np.pi * (index / np.array(sizes)) @ of(span).T)).max(initial=0.0) < 1e-12


def test_a_peak_that_rises_above_the_ceiling_is_closed_to_its_own_width() -> None:
    """The room below a layer's ceiling allowed single precision, which was kept when a higher peak left no such room."""
    low = BranchAndBound(GramSymbol(KERNELS["2d"], rtol=1e-6), (41, 41))
    low.start(1e-6)
    low.lower.best *= 0.97
    found = low.close(1e-6, ceiling=np.sqrt(low.lower.best) * 1.001)[0]
    assert found.finished
    assert found.upper <= found.lower * (1 + 1e-6)
    assert found.tally.matvecs < 1e5


@pytest.mark.parametrize("shape", [(90, 40), (40, 90)], ids=str)
def test_matrices_of_any_size_are_one_block_and_close(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the memory for taps: there is nothing to search."""
    monkeypatch.setattr(gram_symbol, "TAP_BYTES", 1)
    monkeypatch.setattr(gram_symbol, "NARROW_BYTES", 1)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    truth = float(torch.linalg.matrix_norm(weight.double(), 2))
    found = gl.bound(gl.Dense(weight))
    assert truth * (1 - 1e-12) <= found.upper <= found.lower * 1.01


def test_peaked_layers_need_few_blocks() -> None:
    """The regression guard: counts, not seconds."""
    found = enclose(KERNELS["laplacian"], (None, None))[2]
    assert found.tally.blocks <= 160
    assert enclose(KERNELS["orthogonal"], (None, None))[2].tally.factorizations == 1
    flat = torch.randn(1, 32, 32, 3, 3, generator=torch.Generator().manual_seed(5))
    assert enclose(flat, (None, None))[2].tally.factorizations <= 600
    sharp = enclose(flat, (None, None), 1e-6)[2].tally
    assert sharp.factorizations <= 1500


def test_the_lower_side_is_looked_for_among_all_candidates() -> None:
    """Sparse kernels of many taps: the highest of several peaks was not among the lowest frequencies, and no round found it."""
    generator = torch.Generator().manual_seed(3)
    kernel = torch.randn(1, 50, 100, 16, generator=generator) * (torch.rand(1, 50, 100, 16, generator=generator) < 0.1)
    _, _, found = enclose(kernel, (None,), 1e-6)
    assert found.finished
    assert found.tally.blocks < 2000


@pytest.mark.parametrize("shape", [(40, 30), (24, 24, 3)], ids=str)
def test_taps_outlive_blocks_that_are_used_up(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix is its own tap; and nothing is kept of what is used up."""
    monkeypatch.setattr(eigenvalues, "LARGE_BYTES", 0)
    monkeypatch.setattr(ascent, "KEPT_BYTES", 0)
    kernel = torch.randn(1, *shape, *(1,) * (2 - len(shape)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = GramSymbol(kernel)
    assert isinstance(gram.taps, Taps)
    gram.at(np.zeros(1, dtype=np.int64), np.zeros((1, len(gram.span)), dtype=np.int64), (1,) * len(gram.span))
    before = gram.taps.found.clone()
    alone = BranchAndBound(gram, (None,) * len(gram.span))
    alone.start(1e-4)
    assert alone.close(1e-4)[0].finished
    assert torch.equal(before, gram.taps.found)


def test_what_is_kept_of_a_geometry_cannot_be_changed() -> None:
    for kept in (tap_positions((3, 3)), tap_offsets((3, 3))):
        with pytest.raises(ValueError, match="read-only"):
            kept[0] = 7
    assert isinstance(tap_runs((3, 3))[0], tuple)
