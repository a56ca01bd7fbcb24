"""Known mistakes of the field, each as a small patch of the real code, with a judge and the cases that must notice it.

A judge raises AssertionError. `test_mutants.py` asserts that the judge is content with the code as it is, and that it is not
with the mutant in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gramlip as gl
from cases import TRAPS, Case, cases, check, theorem
from gramlip import blocks, boundary, certificates, certify, conv_gram, finite, fixed, gram, lattice, layers, methods, norm, padding, search
from gramlip import rounding as rd
from gramlip.padding import PADDING, Axis, Circle
from test_rounding import assert_exactly_between, exceeds, test_thousands_of_outputs_that_read_one_input_exactly

Patch = Callable[[pytest.MonkeyPatch], None]
NAMED = {case.name: case for case in cases()} | TRAPS


@dataclass(frozen=True)
class Mutant:
    """A mistake: how to make it, and the check that must go red."""

    patch: Patch
    judge: Callable[[], None]


def _rule(mode: str, wrong: Callable[[Axis, Callable[[Axis], Circle]], Circle]) -> Patch:
    """Replace a padding theorem by a function of the axis and of the right theorem."""
    right = PADDING[mode]
    return lambda patch: patch.setitem(PADDING, mode, lambda axis: wrong(axis, right))


def _on(judge: Callable[[Case], None], *names: str) -> Callable[[], None]:
    """A judgement of cases of the table, by name."""

    def run() -> None:
        for name in names:
            judge(NAMED[name])

    return run


# ---- the wrong grid ------------------------------------------------------------------------------------------------------


def grid_n_for_zeros(axis: Axis, right: Callable[[Axis], Circle]) -> Circle:
    """Zero padding on the circular grid of the input's size."""
    circle = right(axis)
    return circle if axis.size is None else replace(circle, points=max(1, axis.size // math.lcm(axis.stride, axis.dilation)))


def size_taken_as_k(axis: Axis, right: Callable[[Axis], Circle]) -> Circle:
    """An unknown size taken as the kernel's."""
    return right(axis) if axis.size is not None else replace(right(axis), points=axis.kernel)


def dilation_ignored(axis: Axis, right: Callable[[Axis], Circle]) -> Circle:
    """The grid of a layer without dilation."""
    return right(replace(axis, dilation=1))


def multiplicity_dropped(axis: Axis, right: Callable[[Axis], Circle]) -> Circle:
    """Outputs, or inputs, that are repeated by the padding counted once."""
    return replace(right(axis), square=1)


def polyphase_where_the_stride_does_not_divide(axis: Axis, right: Callable[[Axis], Circle]) -> Circle:
    """The polyphase grid of a circular layer whose stride does not divide its size."""
    circle = right(axis)
    return circle if axis.size is None else replace(circle, points=max(1, axis.size // axis.stride), stride=axis.stride)


def stride_ignored(axis: Axis, right: Callable[[Axis], Circle]) -> Circle:
    """The stride-1 layer in place of the strided one: true, but loose."""
    return right(replace(axis, stride=1, outputs=axis.outputs and (axis.size or 0) + axis.before + axis.after - axis.span + 1))


def padding_of_the_last_axis(patch: pytest.MonkeyPatch) -> None:
    """One axis's padding used on all of them."""
    right = blocks.axes

    def wrong(op: gl.Conv) -> list[Axis]:
        found = right(op)
        lo, hi = found[-1].before, found[-1].after
        outputs = [a.outputs and max(1, ((a.size or 0) + lo + hi - a.span) // a.stride + 1) for a in found]
        return [replace(a, before=lo, after=hi, outputs=out) for a, out in zip(found, outputs, strict=True)]

    patch.setattr(blocks, "axes", wrong)


def wrong_side_of_transposed(patch: pytest.MonkeyPatch) -> None:
    """Input and output sizes not exchanged."""
    right = blocks.axes

    def wrong(op: gl.Conv) -> list[Axis]:
        return [replace(a, size=a.outputs, outputs=a.size) if op.transposed else a for a in right(op)]

    patch.setattr(blocks, "axes", wrong)


def cropped_kernel(patch: pytest.MonkeyPatch) -> None:
    """Taps beyond the grid's size dropped, as `fft(s=n)` does, and not added to their aliases."""
    patch.setattr(blocks, "_wrap", lambda kernel, axis, n: kernel.narrow(axis, 0, min(n, kernel.shape[axis])))


def phases_missing(patch: pytest.MonkeyPatch) -> None:
    """Only the first phase of a strided kernel, without the alias columns."""

    def wrong(kernel: Tensor, axis: int, stride: int) -> Tensor:
        return kernel[(slice(None),) * axis + (slice(None, None, stride),)]

    patch.setattr(blocks, "polyphase", wrong)


def cosine_factor_dropped(patch: pytest.MonkeyPatch) -> None:
    """A fixed grid taken for all frequencies."""
    right = blocks.grid

    def wrong(sym: blocks.Symbol, torus: int = 32) -> tuple[list[int], float, str]:
        sides, _, because = right(sym, torus)
        return sides, math.sqrt(sym.square), because

    for module in (blocks, conv_gram):
        if hasattr(module, "grid"):
            patch.setattr(module, "grid", wrong)


# ---- the wrong aggregation -----------------------------------------------------------------------------------------------


def groups_multiplied(patch: pytest.MonkeyPatch) -> None:
    """The product of the groups' norms."""
    right = methods.certify

    def wrong(op: Any, **options: Any) -> gl.Bound:
        if getattr(op, "groups", 1) == 1:
            return right(op, **options)
        parts = [right(replace(op, weight=w, groups=1), **options) for w in op.weight.chunk(op.groups)]
        return gl.Bound(math.prod(p.lower for p in parts), math.prod(float(p.upper) for p in parts), "product over groups")

    patch.setattr(methods, "certify", wrong)


def first_group_only(patch: pytest.MonkeyPatch) -> None:
    """All but the first group forgotten."""
    right = blocks.grouped
    patch.setattr(blocks, "grouped", lambda op: right(op)[:1])


def power_iteration_as_a_bound(patch: pytest.MonkeyPatch) -> None:
    """The lower side sold as an upper bound."""
    patch.setattr(search.Search, "certify", lambda self, keys, thresholds: np.ones(len(keys), dtype=np.bool_))
    patch.setattr(search.Search, "_tau", lambda self, width: np.sqrt(self.best))


def frobenius_as_a_lower_bound(patch: pytest.MonkeyPatch) -> None:
    """An upper bound in the lower side."""
    patch.setattr(certificates, "rayleigh", lambda g, v, noise: torch.linalg.vector_norm(g, dim=(-2, -1)))


def max_pooling_as_one(patch: pytest.MonkeyPatch) -> None:
    """Overlapping windows forgotten."""
    right = norm.describe

    def wrong(x: Any, *args: Any, **options: Any) -> Any:
        return gl.Bound(1.0, 1.0, "max pooling") if isinstance(x, nn.MaxPool2d) else right(x, *args, **options)

    patch.setattr(norm, "describe", wrong)


def one_output_of_one_input(patch: pytest.MonkeyPatch) -> None:
    """A single input under replicate padding as if one output read it through one phase."""
    patch.setattr(padding, "_of_one_input", lambda axis: 1)


def batch_norm_without_eps(patch: pytest.MonkeyPatch) -> None:
    """The running variance alone, as if nothing were added to it."""
    right = layers.exact
    patch.setattr(layers, "exact", lambda x: right(x) - 1e-5)


def crops_as_one(patch: pytest.MonkeyPatch) -> None:
    """Constant padding as an isometry, whatever it cuts off."""
    patch.setattr(fixed, "_most", lambda index: 1)


def one_axis_for_an_integer(patch: pytest.MonkeyPatch) -> None:
    """An integer size taken as that of a single axis where the mode says none."""
    patch.setattr(fixed, "_resampled_axes", lambda module, input_size: 1)


def places_in_double(patch: pytest.MonkeyPatch) -> None:
    """Nearest neighbours as float64 alone rounds their places."""
    right = fixed._nearest
    patch.setattr(fixed, "_nearest", lambda sizes, run: right(sizes, lambda x, j: run(x.double().reshape(1, 1, -1), j)))


def boundary_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Reflect and replicate padding without what the boundary adds."""
    patch.setattr(boundary, "_largest", lambda *args: 0.0)


def corners_without_slack(patch: pytest.MonkeyPatch) -> None:
    """A cell judged by its corners, as if nothing happened between them."""
    patch.setattr(lattice.Lattice, "slack", lambda self, half: np.zeros(len(half)))


def mirrored_complex(patch: pytest.MonkeyPatch) -> None:
    """Half of the frequencies for a complex kernel, whose two halves differ."""
    right = lattice.Lattice.__init__
    patch.setattr(lattice.Lattice, "__init__", lambda self, span, points, groups, mirrored: right(self, span, points, groups, True))


def phases_in_quadrature(patch: pytest.MonkeyPatch) -> None:
    """Squares added over the phases of a stride, where padding lets phases read one input: a group is left out that holds the norm."""
    patch.setattr(certify._Enclosing, "_mass", lambda self, i: self.gram.mass[i * self.groups : (i + 1) * self.groups])


# ---- rounding ------------------------------------------------------------------------------------------------------------


def unshifted_cholesky(patch: pytest.MonkeyPatch) -> None:
    """A factorisation that completes taken as a proof, without Rump's shift."""
    patch.setattr(certificates, "shift", lambda side: 0.0)


def moments_without_rounding(patch: pytest.MonkeyPatch) -> None:
    """The two-moment bound as computed."""
    patch.setattr(rd, "gamma", lambda n, unit=rd.UNIT: 0.0)


def scalars_to_nearest(patch: pytest.MonkeyPatch) -> None:
    """Scalar arithmetic rounded to nearest."""
    patch.setattr(rd, "up", lambda x: x)
    patch.setattr(rd, "down", lambda x: x)


def root_that_looks_exact(patch: pytest.MonkeyPatch) -> None:
    """`root * root == x` in floating point taken for an exact root."""
    patch.setattr(rd, "sqrt_up", lambda x: math.sqrt(x) if math.sqrt(x) ** 2 == x else rd.up(math.sqrt(x)))


def epsilon_in_a_normalisation(patch: pytest.MonkeyPatch) -> None:
    """A norm with something added, against a division by zero."""

    def wrong(x: Tensor) -> tuple[Tensor, Tensor]:
        size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        return x / (size + 1e-8), size.log()

    patch.setattr(gram, "_unit", wrong)
    patch.setattr(gram, "_scaled", lambda x: (x if x.shape[-2] >= x.shape[-1] else x.mH, torch.ones_like(x[..., :1, :1].real)))


def division_by_a_zero_block(patch: pytest.MonkeyPatch) -> None:
    """No care for the zero block of a zero-mean kernel."""

    def wrong(x: Tensor) -> tuple[Tensor, Tensor]:
        size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        return x / size, size.log()

    patch.setattr(gram, "_unit", wrong)


# ---- judges that are not about one case ------------------------------------------------------------------------------------


def every_size(case: Case) -> None:
    """The bound for every size against the layer at the case's own."""
    assert float(gl.bound(case.operator(None)).upper) >= case.truth * (1 - 1e-12)


def every_size_on_blocks(case: Case) -> None:
    """The blocks for every size, by SVD, against the layer at the case's own."""
    found = blocks.blocks(case.operator(None))
    assert found.factor * float(torch.linalg.matrix_norm(found.matrices.to(torch.complex128), 2).max()) >= case.truth * (1 - 1e-6)


def on_blocks(case: Case) -> None:
    """The blocks of the padding theorem's grid, by SVD, as the published methods read them."""
    found = blocks.blocks(case.operator())
    assert found.factor * float(torch.linalg.matrix_norm(found.matrices.to(torch.complex128), 2).max()) >= case.truth * (1 - 1e-6)


def without_certificate(case: Case) -> None:
    """The interval without the finite layer's own certificate."""
    check(case, finite=False)


def not_loose(case: Case) -> None:
    """The polyphase bound is near the truth, where the stride-1 bound is a third above it."""
    assert float(gl.bound(case.operator(), finite=False).upper) <= 1.2 * case.truth


def cholesky_never_proves_what_is_false() -> None:
    """Thresholds a few units below the largest eigenvalue of small matrices, against exact arithmetic."""
    generator = torch.Generator().manual_seed(0)
    from fractions import Fraction

    for _ in range(200):
        a = torch.randint(-(2**20), 2**20, (3, 3), generator=generator, dtype=torch.int64).double()
        g = a.mT @ a  # integers below 2^53: exact
        top = float(torch.linalg.eigvalsh(g)[-1])
        thresholds = torch.tensor([top * (1 - k * 2.0**-53) for k in range(-2, 6)], dtype=torch.float64)
        proved = certificates.cholesky(g.expand(8, 3, 3).clone(), thresholds, torch.zeros(8, dtype=torch.float64))
        exact = [[Fraction(x) for x in row] for row in g.tolist()]
        for t, said in zip(thresholds.tolist(), proved.tolist(), strict=True):
            assert not (said and exceeds(exact, Fraction(t)))


def moments_never_lie() -> None:
    """The two-moment bound of 2x2 matrices, where it is exact, against exact arithmetic."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-(2**20), 2**20, (200, 2, 2), generator=generator, dtype=torch.int64).double()
    g = a.mT @ a
    for one, top in zip(g, certificates.moments(g, torch.zeros(200, dtype=torch.float64)).tolist(), strict=True):
        assert not exceeds([[Fraction(x) for x in row] for row in one.tolist()], Fraction(top))


def compositions_hold() -> None:
    """Sums and products of bounds, against exact arithmetic."""
    from fractions import Fraction

    for k in range(1, 50):
        a, b = 1 / k, math.sqrt(k)
        one, two = gl.Bound(a, a, ""), gl.Bound(b, b, "")
        assert Fraction(float((one @ two).upper)) >= Fraction(a) * Fraction(b)
        assert Fraction(float((one + two).upper)) >= Fraction(a) + Fraction(b)


def roots_hold() -> None:
    """Square roots of the integers."""
    from fractions import Fraction

    for n in range(1, 200):
        assert Fraction(rd.sqrt_up(float(n))) ** 2 >= n


def gram_norm_holds() -> None:
    """The differentiable bound of matrices of every scale, the zero matrix included."""
    for kernel, scale in (("random", 1.0), ("random", 1e-5), ("tiny", 1.0), ("rank_one", 1e-3), ("zero", 1.0)):
        case = Case(kernel, (6, 4), dtype=torch.float64)
        assert float(gl.gram_norm(case.weight() * scale, n_iter=8)) >= case.truth * scale * (1 - 1e-9)


def max_pooling_holds() -> None:
    """A single peak that all its windows see."""
    pool, x = nn.MaxPool2d(3, 2, 1), torch.zeros(1, 1, 9, 9)
    x[0, 0, 3, 3] = 1.0
    assert float(gl.bound(pool, input_size=(9, 9)).upper) >= float(pool(x).norm() / x.norm())


def single_inputs_hold() -> None:
    """Three outputs that read one input, and one output that reads it through two phases."""
    for taps, stride, pads in ((3, 1, (2, 2)), (2, 2, (1, 0))):
        theorem(Case("ones", (1, 1, taps), (1,), (stride,), (pads,), "replicate", dtype=torch.float64))


def batch_norm_holds() -> None:
    """A channel whose variance is small beside eps."""
    norm = nn.BatchNorm1d(1).eval()
    norm.running_var.fill_(2.0**-20)  # type: ignore[operator,union-attr]
    assert gl.bound(norm).lower <= 1 / math.sqrt(2.0**-20 + 1e-5)


def crops_hold() -> None:
    """Nothing is left of four entries."""
    assert gl.bound(nn.ConstantPad1d((-4, 0), 0.0), 4).lower == 0.0


def upsampling_holds() -> None:
    """Four copies of every entry."""
    up, x = nn.UpsamplingNearest2d(scale_factor=2), torch.ones(1, 1, 4, 4)
    assert float(gl.bound(up, 4).upper) >= float(up(x).norm() / x.norm())


def nearest_neighbours_hold() -> None:
    """Two points to 82, in float32: 42 copies of the first."""
    up, x = nn.Upsample(size=82), torch.tensor([[[1.0, 0.0]]])
    assert float(gl.bound(up, (2,)).upper) >= float(up(x).double().norm())


def matrices_hold() -> None:
    """Small matrices against exact arithmetic."""
    for seed in range(20):
        matrix = Case("random", (3, 3), seed=seed).weight()
        assert_exactly_between(matrix, gl.bound(matrix))


def errors_of_one_product(patch: pytest.MonkeyPatch) -> None:
    """The error of a finite layer's Gram matrix for one inner product, however many of them an entry adds up."""
    right = finite.Certificate.noise

    def noise(self: finite.Certificate, mass: float) -> float:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self, "pairs", {key: [(0, 0)] for key in self.pairs})
            return right(self, mass)

    patch.setattr(finite.Certificate, "noise", noise)


def sums_of_products_hold() -> None:
    """A quarter of a million equal products in one entry, against exact arithmetic."""
    test_thousands_of_outputs_that_read_one_input_exactly(1e-13, True)


MUTANTS: dict[str, Mutant] = {
    "grid n for zero padding": Mutant(_rule("zeros", grid_n_for_zeros), _on(theorem, "circular-grid-n7-for-zeros")),
    "unknown size taken as k": Mutant(_rule("zeros", size_taken_as_k), _on(every_size, "circular-grid-n7-for-zeros")),
    "crop where the grid is smaller than the kernel": Mutant(cropped_kernel, _on(on_blocks, "input-smaller-than-kernel-circular")),
    "padding read from the last axis": Mutant(padding_of_the_last_axis, _on(theorem, "tall-kernel-7x1-odd")),
    "dilation ignored with stride, zero padding": Mutant(_rule("zeros", dilation_ignored), _on(theorem, "dilation-with-stride")),
    "dilation ignored with stride, circular": Mutant(_rule("circular", dilation_ignored), _on(theorem, "dilation-with-stride-circular")),
    "circular multiplicity dropped": Mutant(
        _rule("circular", multiplicity_dropped), _on(theorem, "circular-padding-2-for-k3", "even-kernel-2")
    ),
    "reflect taken as an isometry": Mutant(_rule("reflect", multiplicity_dropped), _on(theorem, "reflect-ones", "reflect-corner")),
    "replicate taken as an isometry": Mutant(_rule("replicate", multiplicity_dropped), _on(theorem, "replicate-corner")),
    "boundary of reflect forgotten": Mutant(boundary_forgotten, _on(without_certificate, "reflect-ones", "reflect-corner")),
    "polyphase where the stride does not divide": Mutant(
        _rule("circular", polyphase_where_the_stride_does_not_divide), _on(theorem, "stride-does-not-divide")
    ),
    "phases of a stride missing": Mutant(phases_missing, _on(theorem, "stride-ignored", "output-padding")),
    "phases of repeated inputs in quadrature": Mutant(phases_in_quadrature, _on(check, "phases-read-one-input", "groups-and-phases")),
    "stride ignored": Mutant(_rule("zeros", stride_ignored), _on(not_loose, "stride-ignored")),
    "wrong side of transposed": Mutant(wrong_side_of_transposed, _on(theorem, "wrong-side-of-transposed")),
    "groups multiplied": Mutant(groups_multiplied, _on(check, "groups-multiplied")),
    "first group only": Mutant(first_group_only, _on(theorem, "orthogonal 4x1x3x3 n=4x4 p=1.1,1.1 g=4 fp32")),
    "grid taken for the torus": Mutant(cosine_factor_dropped, _on(every_size_on_blocks, "between-grid-points")),
    "cells judged by their corners alone": Mutant(corners_without_slack, _on(every_size, "random 2x2x3x3 n=5x5 p=1.1,1.1 circular c64")),
    "complex kernels mirrored": Mutant(mirrored_complex, _on(check, "near_orthogonal 2x2x3x3 n=5x5 p=1.1,1.1 circular c64")),
    "power iteration as an upper bound": Mutant(power_iteration_as_a_bound, matrices_hold),
    "upper bound in the lower side": Mutant(frobenius_as_a_lower_bound, _on(check, "fp32-rounding")),
    "a single input read once": Mutant(one_output_of_one_input, single_inputs_hold),
    "batch norm without eps": Mutant(batch_norm_without_eps, batch_norm_holds),
    "crops taken as isometries": Mutant(crops_as_one, crops_hold),
    "one axis for an integer size": Mutant(one_axis_for_an_integer, upsampling_holds),
    "places of nearest neighbours in float64 alone": Mutant(places_in_double, nearest_neighbours_hold),
    "max pooling as 1": Mutant(max_pooling_as_one, max_pooling_holds),
    "unshifted Cholesky": Mutant(unshifted_cholesky, cholesky_never_proves_what_is_false),
    "no rounding in the Gram step": Mutant(moments_without_rounding, moments_never_lie),
    "rounding of one product of many": Mutant(errors_of_one_product, sums_of_products_hold),
    "no rounding in the scalars": Mutant(scalars_to_nearest, compositions_hold),
    "a root that looks exact": Mutant(root_that_looks_exact, roots_hold),
    "epsilon in a normalisation": Mutant(epsilon_in_a_normalisation, gram_norm_holds),
    "division by the norm of a zero block": Mutant(division_by_a_zero_block, gram_norm_holds),
}
