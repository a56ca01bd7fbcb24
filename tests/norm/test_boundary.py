"""Reflect and replicate padding by theorem 12: never below the truth, never above the padding's norm times the layer's supremum."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import mpmath
import pytest
import torch
from torch import Tensor

import gramlip as gl
from cases import ROUNDING, Case
from gramlip.norm import boundary_terms
from gramlip.norm.boundary_terms import _boundary, _components, _ends, _largest
from gramlip.norm.polyphase import PADDING, symbol
from gramlip.operators.linear_maps import Axis, axes, index_map
from oracle import oracle

MODES = ("reflect", "replicate")
GEOMETRIES = [  # kernel, input size, stride, padding, dilation: taps that meet the padding on one axis, on none, on one side
    ((3, 1), (7, 5), (1, 1), ((1, 1), (0, 0)), (1, 1)),
    ((1, 4), (4, 9), (1, 2), ((0, 0), (3, 2)), (1, 1)),
    ((1, 3), (6, 8), (1, 1), ((2, 2), (1, 1)), (1, 1)),
    ((2, 3), (9, 8), (2, 1), ((1, 0), (0, 2)), (1, 2)),
    ((5, 2), (6, 12), (3, 2), ((0, 4), (1, 0)), (1, 3)),
    ((1, 1), (5, 6), (2, 1), ((3, 0), (0, 2)), (1, 1)),
    ((3, 1, 2), (4, 3, 6), (1, 2, 1), ((1, 2), (0, 0), (0, 1)), (1, 1, 1)),
    ((3,), (40,), (2,), ((1, 1),), (3,)),
    ((7,), (11,), (1,), ((10, 3),), (1,)),
]
KERNELS = ("random", "ones", "corner", "laplacian", "alternating", "ill_scaled", "one side")


def layer(kernel: str, geometry: tuple, mode: str, channels: int = 2) -> gl.Conv:
    taps, size, stride, padding, dilation = geometry
    weight = Case("ones" if kernel == "one side" else kernel, (channels, channels, *taps), dtype=torch.float64).weight()
    if kernel == "one side":  # only the last tap of the first axis is left
        weight[:, :, :-1] = 0.0
    return gl.Conv(weight, input_size=size, stride=stride, padding=padding, padding_mode=mode, dilation=dilation)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_bound_holds_at_the_size_and_for_every_size(geometry: tuple, mode: str) -> None:
    for kernel in KERNELS:
        op = layer(kernel, geometry, mode)
        truth = oracle(op)
        every = gl.Conv(op.weight, stride=op.stride, padding=op.padding, padding_mode=mode, dilation=op.dilation)
        for found in (gl.bound(op, finite=False), gl.bound(every)):
            assert float(found.upper) >= truth * (1 - ROUNDING), (kernel, found)
        zero = gl.Conv(op.weight, stride=op.stride, padding=op.padding, dilation=op.dilation)
        product = math.sqrt(symbol(op).padding_norm_squared) * float(gl.bound(zero).upper)
        assert float(gl.bound(op, finite=False).upper) <= product * 1.02


@pytest.mark.parametrize("size", [1002, None])
def test_a_stride_that_steps_over_the_padding_costs_nothing(size: int | None) -> None:
    """No input is read twice: the layer is a part of the one without padding."""
    kernel = Case("random", (6, 6, 1), dtype=torch.float64).weight()
    op = gl.Conv(kernel, input_size=size, padding=2, stride=5, padding_mode="reflect")
    found = gl.bound(op, finite=False)
    assert found.rtol <= 1e-2
    assert float(found.upper) >= float(torch.linalg.matrix_norm(kernel[..., 0], 2)) * (1 - ROUNDING)
    assert "theorem 12)" in found.because
    assert "boundary" not in found.because


def contracted(kernel: Tensor, ends: tuple[Tensor, ...]) -> Tensor:
    """The boundary term of all axes by its definition, one entry of every F at a time."""
    m, _, *taps = kernel.shape
    total = torch.zeros(())
    for p in itertools.product(*map(range, taps)):
        for q in itertools.product(*map(range, taps)):
            term = kernel[(slice(None), slice(None), *p)] @ kernel[(slice(None), slice(None), *q)].mT
            for a, b, f in zip(p, q, ends, strict=True):
                term = torch.kron(term, f[a, b])
            total = total + term
    assert total.shape == (m * math.prod(f.shape[-1] for f in ends),) * 2
    return total


@pytest.mark.parametrize("taps", [(4,), (3, 2), (2, 3, 2)], ids=str)
def test_boundary_term_by_its_definition(taps: tuple[int, ...]) -> None:
    """Axes contracted one after the other give the term; the bound of its largest eigenvalue is close above."""
    weight = Case("random", (2, 3, *taps), dtype=torch.float64).weight()
    op = gl.Conv(weight, input_size=(9,) * len(taps), padding=1, padding_mode="reflect")
    geometry = axes(op)
    mass = float(torch.linalg.vector_norm(weight.flatten(2), dim=(0, 1)).sum()) * (1 + 1e-9)
    for ends in itertools.product(*(_ends(axis, "reflect") for axis in geometry)):
        top = max(0.0, float(torch.linalg.eigvalsh(contracted(weight, ends)).max()))
        assert top <= _largest(weight, geometry, tuple(range(len(taps))), ends, mass) <= top * (1 + 1e-6) + 1e-6 * mass**2


@pytest.mark.parametrize("mode", MODES)
def test_groups_of_no_weight_or_next_to_none(mode: str) -> None:
    """Their boundary terms are no reason to go on for ever, whether or not denormals are flushed."""
    weight = torch.randn(6, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[:2] = 0.0
    weight[2:4] *= 1e-280
    for flushed in (False, True):
        torch.set_flush_denormal(flushed)
        try:
            found = gl.bound(gl.Conv(weight, groups=3, padding=1, padding_mode=mode))
        finally:
            torch.set_flush_denormal(False)
        assert float(found.upper) >= oracle(gl.Conv(weight, groups=3, padding=1, padding_mode=mode, input_size=30))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("channels", "taps"), [(4, 3), (16, 3), (8, 5)])
def test_dense_kernels_stay_far_below_the_product(channels: int, taps: int, mode: str) -> None:
    """Random kernels, as docs/theory.md says."""
    weight = torch.randn(channels, channels, taps, taps, generator=torch.Generator().manual_seed(channels))
    op = gl.Conv(weight, 10, 1, taps // 2, mode)
    found, supremum = gl.bound(op, finite=False), float(gl.bound(gl.Conv(weight, None, 1, taps // 2)).upper)
    assert found.lower <= oracle(op) <= float(found.upper) <= 1.65 * supremum
    assert math.sqrt(symbol(op).padding_norm_squared) >= 2.0
    assert "theorem 12" in found.because


def test_one_axis_by_the_norm_of_its_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the matrix of a corner is too large, one axis adds its boundary term and the other is multiplied."""
    line = torch.tensor([1.0, -2.0, 1.0])
    op = gl.Conv((line[:, None] * line)[None, None], 9, 1, 1, "reflect")
    both = gl.bound(op, finite=False)
    monkeypatch.setattr(boundary_terms, "LARGEST", 3)
    one = gl.bound(op, finite=False)
    monkeypatch.setattr(boundary_terms, "LARGEST", 0)
    none = gl.bound(op, finite=False)
    assert oracle(op) <= float(both.upper) <= float(one.upper) < float(none.upper)
    assert "on axes (0,)" in one.because or "on axes (1,)" in one.because
    assert "boundary's share" not in none.because


def test_phases_of_long_kernels_are_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two taps 400 apart, whose product is known: the error of its phase grew with their distance, which nothing allowed for."""
    weight = torch.zeros(1, 1, 1, 401, dtype=torch.float64)
    weight[..., 0] = weight[..., -1] = 1.0
    found: list[Tensor] = []
    positive = boundary_terms._positive
    monkeypatch.setattr(boundary_terms, "_positive", lambda e, noise, size: found.append(e) or positive(e, noise, size))
    geometry = axes(gl.Conv(weight, (5, 500), padding=((1, 1), (0, 0)), padding_mode="reflect"))
    ends = (_ends(geometry[0], "reflect")[0],)
    _largest(weight, geometry, (0,), ends, 2.0)
    e = torch.cat(found[::2])
    count = 48 * 400
    with mpmath.workdps(30):
        for i in range(7, len(e), 97):
            exact = 2 + 2 * mpmath.cos(2 * mpmath.pi * (400 * i % count) / count)
            errors = [abs(mpmath.mpf(x) - exact * f) for x, f in zip(e[i].real.flatten().tolist(), ends[0].flatten().tolist(), strict=True)]
            assert max(errors) <= 4 * 200 * 2.0**-53


AXES = [  # kernel, stride, dilation, before, after
    (3, 1, 1, 1, 1),
    (4, 3, 1, 2, 0),
    (3, 2, 3, 3, 2),
    (2, 5, 1, 1, 4),
    (1, 2, 1, 3, 3),
    (5, 1, 2, 0, 4),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axis", AXES, ids=str)
def test_the_ends_of_every_size_are_among_those_that_are_formed(axis: tuple[int, ...], mode: str) -> None:
    """And no size repeats an input more often than the closed form says."""
    _, stride, _, before, after = axis
    every = Axis(None, None, *axis)
    formed = _ends(every, mode) or []
    square = PADDING[mode](every).norm_squared
    least = max(before, after) + 1 if mode == "reflect" else 1
    for n in range(max(least, every.span - before - after), 5 * (before + after + every.span + stride)):
        outputs = (n + before + after - every.span) // stride + 1
        for piece in _components(_boundary(Axis(n, outputs, *axis), mode)):
            assert any(torch.equal(piece.to(torch.float64), f) for f in formed), n
        sized = _ends(Axis(n, outputs, *axis), mode) or []
        assert all(any(torch.equal(f, g) for g in formed) for f in sized)
    counts = [
        int(index_map(Axis(n, n + before + after, 1, 1, 1, before, after), mode).flatten().bincount().max())
        for n in range(max(least, 2), 30)  # a single input has its own factor
    ]
    assert max(counts) <= square


LONG = {
    "dilation": gl.Conv(torch.ones(1, 1, 3), padding="same", dilation=64, padding_mode="reflect"),
    "long kernel": gl.Conv(torch.ones(1, 1, 101), padding=50, padding_mode="reflect"),
    "long padding": gl.Conv(torch.ones(1, 1, 3), padding=10**6, padding_mode="replicate"),
    "wide kernel": gl.Conv(torch.ones(2, 1, 13, 13), padding=6, padding_mode="replicate", groups=2),
}


@pytest.mark.parametrize("name", LONG)
def test_long_padding_of_every_size_ends(name: str) -> None:
    """By the factor of the padding where the boundary would be too much to form."""
    op = LONG[name]
    found = gl.bound(op)
    if name == "long padding":
        assert found.because.count("factor of the padding on axes (0,)") == 1
        return
    sizes = (65, 130) if name == "dilation" else (51, 60) if name == "long kernel" else (1, 3)
    truths = [oracle(gl.Conv(op.weight, n, 1, op.padding, op.padding_mode, op.dilation, op.groups)) for n in sizes]
    assert found.lower <= float(found.upper)
    assert float(found.upper) >= max(truths) * (1 - ROUNDING)


def test_dear_boundaries_take_fewer_frequencies_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    line = torch.tensor([1.0, -2.0, 1.0])
    op = gl.Conv((line[:, None] * line)[None, None], 9, 1, 1, "reflect")
    uppers = []
    for operations in (math.inf, 3e6, 0.0):
        monkeypatch.setattr(boundary_terms, "OPERATIONS", operations)
        uppers.append(float(gl.bound(op, finite=False).upper))
    assert oracle(op) <= uppers[0] < uppers[1] < uppers[2]


def test_a_single_input_under_replicate_padding() -> None:
    """Its factor times the supremum of the symbol is never below the norm, and is the norm where all taps are alike."""
    met = 0
    for taps, stride, dilation, before, after in itertools.product((1, 2, 3), (1, 2, 3), (1, 2, 3), (0, 1, 4), (0, 2, 3)):
        span = dilation * (taps - 1) + 1
        if 1 + before + after < span:
            continue
        for kernel in ("ones", "random"):
            weight = Case(kernel, (2, 2, taps), dtype=torch.float64).weight()
            op = gl.Conv(weight, 1, stride, ((before, after),), "replicate", dilation)
            sym, truth = symbol(op), oracle(op)
            factor = math.sqrt(sym.padding_norm_squared)
            still = replace(op, padding_mode="zeros", input_size=None)
            assert truth <= factor * float(gl.bound(still).upper) * (1 + ROUNDING)
            assert float(gl.bound(replace(op, input_size=None)).upper) >= truth * (1 - ROUNDING)
            met += kernel == "ones" and truth >= factor * gl.bound(still).lower * (1 - 1e-2)
    assert met > 40


@pytest.mark.parametrize("sizes", [(1, 1), (1, 5), (5, 1), (3, 3), (4, 7)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
def test_every_size_holds_where_its_boundary_is_not_formed(sizes: tuple[int, int], dilation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With boundary terms on no axis, on one and on both, beside axes of a single input."""
    for kernel in ("random", "ones", "corner", "laplacian"):
        weight = Case(kernel, (2, 2, 3, 3), dtype=torch.float64).weight()
        op = gl.Conv(weight, sizes, 1, dilation, "replicate", dilation)
        truth = oracle(op)
        for largest in (0, 20, 1536):
            monkeypatch.setattr(boundary_terms, "LARGEST", largest)
            assert float(gl.bound(replace(op, input_size=None)).upper) >= truth * (1 - ROUNDING)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("taps", "stride", "dilation", "padding"), [((3, 3), 1, 1, 1), ((5,), 1, 3, 6), ((3, 3), 2, 1, 1), ((3, 3), 1, 1, (1, 0))]
)
def test_lower_side_of_every_size_is_that_of_a_size(
    taps: tuple[int, ...], stride: int, dilation: int, padding: int | tuple[int, int], mode: str
) -> None:
    """The layer attains it, and more than the supremum of the symbol where the padding adds to it."""
    weight = torch.rand(2, 2, *taps, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    op = gl.Conv(weight, None, stride, padding, mode, dilation)
    found, supremum = gl.bound(op), gl.bound(replace(op, padding_mode="zeros"))
    assert supremum.lower * (1 - 1e-9) <= found.lower <= float(found.upper)
    size = re.search(r"lower side: the layer itself at size ([0-9x]+)", found.because)
    if size is None:
        assert found.lower <= float(supremum.upper)
        return
    assert found.lower <= oracle(replace(op, input_size=tuple(map(int, size[1].split("x"))))) * (1 + ROUNDING)


def test_dilated_replicate_padding_of_every_size_is_narrow() -> None:
    """The interval was 47 times as wide as its lower end, against a norm at n = 7 of at least four times the supremum."""
    weight = torch.randn(16, 16, 5, 5, 5, generator=torch.Generator().manual_seed(0))
    found = gl.bound(gl.Conv(weight, None, 1, 6, "replicate", 3))
    assert found.rtol <= 3.5
