"""Known mistakes of the field, each as a small patch of the real code, with a judge and the cases that must notice it.

A judge raises AssertionError. `test_mutants.py` asserts that the judge is content with the code as it is, and that it is not
with the mutant in place.
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gramlip as gl
from cases import TRAPS, Case, cases, check, theorem
from gramlip.network import (
    compose,
    coupling,
    execution,
    execution_rules,
    fold,
    in_place,
    linear_stretches,
    lower_bound,
    ranges,
    running_errors,
)
from gramlip.network.coupling import elimination, linear_forms
from gramlip.network.local import columns, intervals, jacobians, regions, relaxations
from gramlip.network.rules import activations, enclosures, fourier, patterns
from gramlip.network.rules import shapes as joins
from gramlip.network.steps import Linear, Pad, Slope
from gramlip.nn import parametrize, tracker
from gramlip.norm import (
    boundary_terms,
    branch_and_bound,
    certify,
    finite_layer,
    formulas,
    frequency_cells,
    gram_symbol,
    methods,
    polyphase,
)
from gramlip.norm.polyphase import PADDING, Circle
from gramlip.numerics import eigenvalues, precision
from gramlip.numerics import rounding as rd
from gramlip.operators import describe, given, linear_maps
from gramlip.operators.linear_maps import Axis, Scale
from gramlip.reports import checkpoint, formats
from gramlip.reports.readers import Entry, Ranks, Stored
from gramlip.robust import margins
from gramlip.rules import Call, Var
from rule_cases import Map
from test_around import test_no_radius_is_beyond_where_a_margin_is_used_up_on_a_ray
from test_elimination import check_inverses, check_proved_forms
from test_enclosures import (
    test_functions_of_one_value_have_the_constant_that_their_derivatives_show,
    test_functions_that_jump_have_no_constant_however_flat_they_are,
    test_radial_maps_have_their_exact_constant,
    test_response_normalisation_is_bounded_and_nearly_attained,
    test_what_is_known_without_an_end_holds_far_out,
)
from test_execution import test_the_worst_order_of_a_sum_is_covered, test_weights_that_the_format_does_not_hold_count
from test_formats import test_products_of_two_vectors_exactly, test_ranks_of_zero_are_put_together
from test_fourier import test_a_spectrum_of_an_even_signal_read_as_another_length
from test_linear_stretches import exact as affine_norm
from test_local import (
    test_a_local_constant_is_never_below_what_points_of_the_ball_show_and_falls_with_the_radius,
    test_an_activation_stays_within_its_line,
    test_every_entry_of_the_result_stays_in_its_interval,
    test_slopes_and_values_on_random_intervals,
    test_the_derivative_stays_near_its_line_and_values_near_theirs,
    test_the_middle_and_what_moves_are_bounded_together,
)
from test_local_columns import (
    GEOMETRY,
    test_a_convolution_of_a_box_is_that_of_all_entries,
    test_chords_from_the_centre,
    test_columns_are_never_below_points_of_the_ball,
    test_norms_of_the_activations_that_a_value_reads,
    test_slopes_that_the_places_of_a_channel_share_hold_those_of_each,
    test_values_of_folded_networks_are_in_their_intervals,
)
from test_local_regions import (
    test_around_points_the_network_is_the_linear_function_that_is_followed,
    test_it_is_never_below_the_jacobians_of_the_set_and_reached_by_them,
)
from test_network_multipliers import check_slopes_at_their_ends, network_of, steepest, upper_of
from test_network_steps import (
    test_a_choice_between_branches_has_no_lower_side,
    test_a_coupled_transposed_convolution_keeps_the_side_that_is_not_padded,
    test_replicate_padding_by_50_repeats_the_error_51_times,
)
from test_network_weights import check_cancelling, check_shifts
from test_parts import check as check_parts
from test_placements import over_what_is_read, test_an_audit_is_not_below_the_matrix_and_not_far_above
from test_rounding import assert_exactly_between, exceeds, test_thousands_of_outputs_that_read_one_input_exactly
from test_rules import test_maps_are_bounded_above_their_jacobians_and_tightly
from test_search import test_a_layer_that_is_given_up_leaves_the_others_in_the_search
from test_sums import test_norms_of_many_equal_entries, test_products_of_many_rows
from test_tracked import test_gradient_is_that_of_the_value, test_weights_that_are_replaced_are_noticed
from test_unpickle import test_a_tensor_that_a_function_was_to_change_is_left_out

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
    return replace(right(axis), norm_squared=1)


def polyphase_where_the_stride_does_not_divide(axis: Axis, right: Callable[[Axis], Circle]) -> Circle:
    """The polyphase grid of a circular layer whose stride does not divide its size."""
    circle = right(axis)
    return circle if axis.size is None else replace(circle, points=max(1, axis.size // axis.stride), stride=axis.stride)


def stride_ignored(axis: Axis, right: Callable[[Axis], Circle]) -> Circle:
    """The stride-1 layer in place of the strided one: true, but loose."""
    return right(replace(axis, stride=1, outputs=axis.outputs and (axis.size or 0) + axis.before + axis.after - axis.span + 1))


def padding_of_the_last_axis(patch: pytest.MonkeyPatch) -> None:
    """One axis's padding used on all of them."""
    right = linear_maps.axes

    def wrong(op: gl.Conv) -> list[Axis]:
        found = right(op)
        lo, hi = found[-1].before, found[-1].after
        outputs = [a.outputs and max(1, ((a.size or 0) + lo + hi - a.span) // a.stride + 1) for a in found]
        return [replace(a, before=lo, after=hi, outputs=out) for a, out in zip(found, outputs, strict=True)]

    patch.setattr(polyphase, "axes", wrong)


def wrong_side_of_transposed(patch: pytest.MonkeyPatch) -> None:
    """Input and output sizes not exchanged."""
    right = linear_maps.axes

    def wrong(op: gl.Conv) -> list[Axis]:
        return [replace(a, size=a.outputs, outputs=a.size) if op.transposed else a for a in right(op)]

    patch.setattr(polyphase, "axes", wrong)


def cropped_kernel(patch: pytest.MonkeyPatch) -> None:
    """Taps beyond the grid's size dropped, as `fft(s=n)` does, and not added to their aliases."""
    patch.setattr(polyphase, "_wrap", lambda kernel, axis, n: kernel.narrow(axis, 0, min(n, kernel.shape[axis])))


def phases_missing(patch: pytest.MonkeyPatch) -> None:
    """Only the first phase of a strided kernel, without the alias columns."""

    def wrong(kernel: Tensor, axis: int, stride: int) -> Tensor:
        return kernel[(slice(None),) * axis + (slice(None, None, stride),)]

    patch.setattr(polyphase, "polyphase", wrong)


def cosine_factor_dropped(patch: pytest.MonkeyPatch) -> None:
    """A fixed grid taken for all frequencies."""
    right = polyphase.grid

    def wrong(sym: polyphase.Symbol, torus: int = 32) -> tuple[list[int], float, str]:
        sides, _, because = right(sym, torus)
        return sides, math.sqrt(sym.padding_norm_squared), because

    for module in (polyphase, formulas):
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
    right = polyphase.grouped
    patch.setattr(polyphase, "grouped", lambda op: right(op)[:1])


def power_iteration_as_a_bound(patch: pytest.MonkeyPatch) -> None:
    """The lower side sold as an upper bound."""
    patch.setattr(branch_and_bound.BranchAndBound, "prove_blocks", lambda self, keys, thresholds: np.ones(len(keys), dtype=np.bool_))
    patch.setattr(branch_and_bound.Targets, "at_asked_width", lambda self: np.sqrt(self._lower.best))


def frobenius_as_a_lower_bound(patch: pytest.MonkeyPatch) -> None:
    """An upper bound in the lower side."""
    patch.setattr(eigenvalues, "rayleigh", lambda g, v, noise: torch.linalg.vector_norm(g, dim=(-2, -1)))


def max_pooling_as_one(patch: pytest.MonkeyPatch) -> None:
    """Overlapping windows forgotten."""
    right = methods.describe

    def wrong(x: Any, *args: Any, **options: Any) -> Any:
        return gl.Bound(1.0, 1.0, "max pooling") if isinstance(x, nn.MaxPool2d) else right(x, *args, **options)

    patch.setattr(methods, "describe", wrong)


def one_output_of_one_input(patch: pytest.MonkeyPatch) -> None:
    """A single input under replicate padding as if one output read it through one phase."""
    patch.setattr(polyphase, "_of_one_input", lambda axis: 1)


def batch_norm_without_eps(patch: pytest.MonkeyPatch) -> None:
    """The running variance alone, as if nothing were added to it."""
    right = describe.to_float64
    patch.setattr(describe, "to_float64", lambda x: right(x) - 1e-5)


def crops_as_one(patch: pytest.MonkeyPatch) -> None:
    """Constant padding as an isometry, whatever it cuts off."""
    patch.setattr(describe, "_most", lambda index: 1)


def one_axis_for_an_integer(patch: pytest.MonkeyPatch) -> None:
    """An integer size taken as that of a single axis where the mode says none."""
    patch.setattr(describe, "_resampled_axes", lambda module, input_size: 1)


def places_in_double(patch: pytest.MonkeyPatch) -> None:
    """Nearest neighbours as float64 alone rounds their places."""
    right = describe._nearest
    patch.setattr(describe, "_nearest", lambda sizes, run: right(sizes, lambda x, j: run(x.double().reshape(1, 1, -1), j)))


def boundary_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Reflect and replicate padding without what the boundary adds."""
    patch.setattr(boundary_terms, "_largest", lambda *args: 0.0)


def corners_without_slack(patch: pytest.MonkeyPatch) -> None:
    """A cell judged by its corners, as if nothing happened between them."""
    patch.setattr(frequency_cells.Lattice, "slack", lambda self, half: np.zeros(len(half)))


def one_layer_ends_all(patch: pytest.MonkeyPatch) -> None:
    """A layer that is given up ends the search of those beside it, which keep targets that nothing proved."""
    right = branch_and_bound.BranchAndBound._without_given_up

    def wrong(
        self: branch_and_bound.BranchAndBound, cells: frequency_cells.Cells, targets: branch_and_bound.Targets
    ) -> frequency_cells.Cells:
        left = right(self, cells, targets)
        return left if len(left[0]) == len(cells[0]) else frequency_cells.select(left, slice(0))

    patch.setattr(branch_and_bound.BranchAndBound, "_without_given_up", wrong)


def mirrored_complex(patch: pytest.MonkeyPatch) -> None:
    """Half of the frequencies for a complex kernel, whose two halves differ."""
    right = frequency_cells.Lattice.__init__
    patch.setattr(frequency_cells.Lattice, "__init__", lambda self, span, points, groups, mirrored: right(self, span, points, groups, True))


def phases_in_quadrature(patch: pytest.MonkeyPatch) -> None:
    """Squares added over the phases of a stride, where padding lets phases read one input: a group is left out that holds the norm."""
    patch.setattr(certify, "layer_norm_sums", lambda sym, tap_norm_sums: list(tap_norm_sums))


# ---- rounding ------------------------------------------------------------------------------------------------------------


def unshifted_cholesky(patch: pytest.MonkeyPatch) -> None:
    """A factorisation that completes taken as a proof, without Rump's shift."""
    patch.setattr(eigenvalues, "shift", lambda side: 0.0)


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

    patch.setattr(eigenvalues, "_unit_power", wrong)
    patch.setattr(eigenvalues, "_scaled", lambda x: (x if x.shape[-2] >= x.shape[-1] else x.mH, torch.ones_like(x[..., :1, :1].real)))


def division_by_a_zero_block(patch: pytest.MonkeyPatch) -> None:
    """No care for the zero block of a zero-mean kernel."""

    def wrong(x: Tensor) -> tuple[Tensor, Tensor]:
        size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        return x / size, size.log()

    patch.setattr(eigenvalues, "_unit_power", wrong)


# ---- judges that are not about one case ------------------------------------------------------------------------------------


def every_size(case: Case) -> None:
    """The bound for every size against the layer at the case's own."""
    assert float(gl.bound(case.operator(None)).upper) >= case.truth * (1 - 1e-12)


def every_size_on_blocks(case: Case) -> None:
    """The blocks for every size, by SVD, against the layer at the case's own."""
    found = polyphase.blocks(case.operator(None))
    assert found.factor * float(torch.linalg.matrix_norm(found.matrices.to(torch.complex128), 2).max()) >= case.truth * (1 - 1e-6)


def on_blocks(case: Case) -> None:
    """The blocks of the padding theorem's grid, by SVD, as the published methods read them."""
    found = polyphase.blocks(case.operator())
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
        proved = eigenvalues.cholesky(g.expand(8, 3, 3).clone(), thresholds, torch.zeros(8, dtype=torch.float64))
        exact = [[Fraction(x) for x in row] for row in g.tolist()]
        for t, said in zip(thresholds.tolist(), proved.tolist(), strict=True):
            assert not (said and exceeds(exact, Fraction(t)))


def moments_never_lie() -> None:
    """The two-moment bound of 2x2 matrices, where it is exact, against exact arithmetic."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-(2**20), 2**20, (200, 2, 2), generator=generator, dtype=torch.int64).double()
    g = a.mT @ a
    for one, top in zip(g, eigenvalues.moments(g, torch.zeros(200, dtype=torch.float64)).tolist(), strict=True):
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
    right = finite_layer.Certificate.noise

    def noise(self: finite_layer.Certificate, tap_norm_sum: float) -> float:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self, "pairs", {key: [(0, 0)] for key in self.pairs})
            return right(self, tap_norm_sum)

    patch.setattr(finite_layer.Certificate, "noise", noise)


def sums_of_products_hold() -> None:
    """A quarter of a million equal products in one entry, against exact arithmetic."""
    test_thousands_of_outputs_that_read_one_input_exactly(1e-13, True)


# ---- networks ------------------------------------------------------------------------------------------------------------


def error_behind_a_padding(patch: pytest.MonkeyPatch) -> None:
    """The error of a step taken over as it is where a padding that repeats entries is folded in."""
    patch.setattr(Pad, "repeats", lambda self, shape: 1)


def paddings_on_the_other_sides(patch: pytest.MonkeyPatch) -> None:
    """A transposed convolution cropped on each side by the other's padding."""
    right = linear_maps._transposed
    patch.setattr(linear_maps, "_transposed", lambda op, w, x: right(replace(op, padding=[(hi, lo) for lo, hi in op.padding]), w, x))


def branches_as_blocks(patch: pytest.MonkeyPatch) -> None:
    """The lower side of maps side by side for a choice between maps."""
    patch.setattr(gl.Bound, "max", gl.Bound.block_diagonal)


def slopes_of_a_range_as_attained(patch: pytest.MonkeyPatch) -> None:
    """A lower side from slopes on an interval that is larger than what the argument takes."""
    right = compose._fixed
    patch.setattr(compose, "_fixed", lambda what, shapes: right(replace(what, sharp=True) if isinstance(what, Slope) else what, shapes))


def errors_of_weights_dropped(patch: pytest.MonkeyPatch) -> None:
    """Computed weights taken as exact by the rules."""
    patch.setattr(Call, "error_of", lambda self, name: None)


def errors_of_differences_relative_to_them(patch: pytest.MonkeyPatch) -> None:
    """A difference that cancels taken to be as good as its last rounding."""
    right = running_errors._safe
    patch.setattr(running_errors, "_safe", lambda error, *read, **given: right(torch.minimum(error, 1e-15 * read[0].abs()), *read, **given))


def first_order_forgotten(patch: pytest.MonkeyPatch) -> None:
    """The lower side less what draws of the weights' errors do, all signs at random."""
    patch.setattr(lower_bound, "sway", lambda *given: 0.0)


def first_order_alone(patch: pytest.MonkeyPatch) -> None:
    """The lower side less the derivatives by weights, which see no kink that the weights' errors move."""
    right = lower_bound.noise
    patch.setattr(lower_bound, "noise", lambda run, x, value, signs, weights: right(run, x, value, signs, {}))


def copies_of_a_part_counted_once(patch: pytest.MonkeyPatch) -> None:
    """Theorem N10 without the number of copies of an entry."""
    right = compose._sizes
    patch.setattr(compose, "_sizes", lambda *given: {j: np.minimum(m, 1.0) for j, m in right(*given).items()})


def parts_that_never_meet(patch: pytest.MonkeyPatch) -> None:
    """Theorem N10 (d) with the largest entry of the diagonal: what is added as if it were joined."""
    patch.setattr(compose, "perron_bound", lambda form: float(np.diag(form).max()))


def any_two_functions_as_a_pair(patch: pytest.MonkeyPatch) -> None:
    """Theorem N11 for any two functions of the same values."""
    patch.setattr(joins, "_mates", lambda one, other: sorted(one.sources) == sorted(other.sources))


def steepest_of_the_curves(patch: pytest.MonkeyPatch) -> None:
    """Theorem N12 with the largest slope of all curves, for the root of the sum of squares."""
    patch.setattr(joins, "steepness", lambda values: max(abs(v.step().high) for v in values))


def mirrors_of_another_length(patch: pytest.MonkeyPatch) -> None:
    """Theorem N15 where the last frequency of an even signal is one of a pair in the result."""
    patch.setattr(fourier, "_meets_itself", lambda half, size, points: False)


def views_left_as_they_were(patch: pytest.MonkeyPatch) -> None:
    """A view that is read after its memory has changed, with what it held before."""
    patch.setattr(in_place._Functional, "_present", lambda self, node: self._now[node])


def sums_as_means(patch: pytest.MonkeyPatch) -> None:
    """Theorem N13 (a) for a value less its sum."""
    right = patterns._reduces
    patch.setattr(patterns, "_reduces", lambda call, y, name, x: any(right(call, y, kind, x) for kind in ("mean", "sum")))


def lengths_of_anything(patch: pytest.MonkeyPatch) -> None:
    """Theorem N13 (b) for a value over the length of other groups than its own."""
    right = patterns._divided
    patch.setattr(patterns, "_divided", lambda call, x, divisor: right(call, Var(divisor.radius.of, x.shape), divisor))


def steepest_of_the_parts(patch: pytest.MonkeyPatch) -> None:
    """Theorem N28 for functions side by side with the largest of their slopes in place of the root of the sum of squares."""
    patch.setattr(joins, "tied", _with(joins.tied, enclosures, "steepness", lambda known, _: known[0].slope.abs().amax(-1)))


def _with(call: Callable[..., Any], module: Any, name: str, other: Any) -> Callable[..., Any]:
    """A call with another function in a module meanwhile."""

    def run(*args: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, other)
            return call(*args, **options)

    return run


def products_of_slopes(patch: pytest.MonkeyPatch) -> None:
    """Theorem N28 for products that move by the one factor alone."""
    right = enclosures.Pieces.product

    def product(self: Any, f: Any, g: Any, square: bool) -> Any:
        still = g._replace(slope=rd.interval(0.0), grown=rd.interval(0.0), rate=rd.interval(0.0))
        return right(self, f, still, square)

    patch.setattr(enclosures.Pieces, "product", product)


def sums_that_grow_like_their_last_term(patch: pytest.MonkeyPatch) -> None:
    """Theorem N32 for a sum with the rate of one term in place of a mean of both."""
    patch.setattr(rd.Pieces, "_mean_rates", lambda self, f, g: (g.rate, g.q, g.pace))


def one_power_more_than_it_falls(patch: pytest.MonkeyPatch) -> None:
    """Theorem N32 with a power of t more than the rate allows."""
    right = rd.Pieces._falling
    patch.setattr(rd.Pieces, "_falling", lambda self, f, rate: right(self, f, rate - 1.0))


def slopes_across_jumps(patch: pytest.MonkeyPatch) -> None:
    """Theorem N28 for functions that jump between flat pieces."""
    patch.setattr(enclosures.Pieces, "joined", lambda self, f: f)


def radial_maps_along_spheres(patch: pytest.MonkeyPatch) -> None:
    """Theorem N29 without the slope along the length."""
    patch.setattr(patterns, "_stretch", lambda signs, known, pieces: patterns._profile(signs, known, pieces).value.abs().amax(-1))


def responses_of_one_channel(patch: pytest.MonkeyPatch) -> None:
    """Theorem N30 with the number of channels in place of its power 3/2: means that stand still."""
    then = Call.then

    def call(self: Call, what: Any, *sources: Var, shape: Any = None) -> Var:
        if "response" in getattr(what, "because", ""):
            what = replace(what, upper=what.upper ** (2 / 3))
        return then(self, what, *sources, shape=shape)

    patch.setattr(Call, "then", call)


def half_lines_turned_over(patch: pytest.MonkeyPatch) -> None:
    """The range of `2 x` for x above 0 taken for that of `-2 x`."""
    right = ranges._half_line
    patch.setattr(ranges, "_half_line", lambda what, r: right(replace(what, op=Scale(-what.op.weight)), r))


def _stretches(call: Callable[[Tensor], Tensor], least: float, size: int = 4) -> Callable[[], None]:
    """The audit of a function is not below a stretch that it has."""

    def run() -> None:
        assert gl.audit(Map(call), (size,)).upper >= least * (1 - 1e-12)

    return run


def a_range_claims_nothing_below() -> None:
    """`exp((a - b)(a + b))` for a, b in [-1, 1] has slopes of at most e, its range as intervals know it promises e^4."""

    def call(x: Tensor) -> Tensor:
        a, b = x.tanh(), x.flip(-1).tanh()
        return torch.exp((a - b) * (a + b))

    report = gl.audit(Map(call), (2,), domain=(-4.0, 4.0))
    assert report.layers[-1].bound.lower <= 2.719


def squares_one_after_the_other(patch: pytest.MonkeyPatch) -> None:
    """Sums of squares of any number of entries in float32."""
    patch.setattr(precision, "PIECE", 2**62)


def products_one_after_the_other(patch: pytest.MonkeyPatch) -> None:
    """Inner products of any length in float32."""
    patch.setattr(precision, "ROWS", 2**62)


def layers_together_hold() -> None:
    """Three layers in one search, of which the first has no target left."""
    with pytest.MonkeyPatch.context() as patch:
        test_a_layer_that_is_given_up_leaves_the_others_in_the_search((0,), patch)


def signs_in_schurs_test(patch: pytest.MonkeyPatch) -> None:
    """Schur's test on the entries, in place of their moduli."""
    patch.setattr(certify, "ENTRIES", 0)
    patch.setattr(certify, "SIDE", 0)
    patch.setattr(certify.Entries, "moduli", lambda self: self)


def schurs_test_without_rounding(patch: pytest.MonkeyPatch) -> None:
    """The quotients of Schur's test as floating point gives them."""
    patch.setattr(certify, "ENTRIES", 0)
    patch.setattr(certify, "SIDE", 0)
    patch.setattr(certify.rd, "gamma", lambda n, unit=rd.UNIT: 0.0)
    patch.setattr(certify.rd, "up", lambda x: x)
    patch.setattr(certify.rd, "mul_up", lambda a, b: a * b)
    patch.setattr(certify.rd, "sqrt_up", math.sqrt)


def sparse_matrices_hold() -> None:
    """Small sparse matrices, with signs that cancel and without any, against exact arithmetic."""
    for seed in range(40):
        for matrix in (torch.tensor([[1.0, -1.0]]), Case("random", (3, 3), seed=seed).weight().abs()):
            assert_exactly_between(matrix, gl.bound(matrix.to_sparse(), rtol=1e-13))


def own_scale_of_each_rank(patch: pytest.MonkeyPatch) -> None:
    """Each rank divides its rows by the power of two of its own largest entry."""
    gram = gram_symbol.Part.gram
    patch.setattr(gram_symbol.Part, "gram", lambda part, exponent: gram(part, part.exponent() or 0))


def lists_rounded(patch: pytest.MonkeyPatch) -> None:
    """Integers in a list rounded to float64."""
    patch.setattr(given, "_numbers", lambda cells, name: cells.astype(np.float64))


def lists_are_exact() -> None:
    """An integer between two floats has no bound, or one that holds it."""
    try:
        found = gl.bound(gl.Diagonal([2**53 + 1]))  # type: ignore[arg-type]
    except gl.InputError:
        return
    assert int(found.upper) >= 2**53 + 1


def scales_taken_for_layers(patch: pytest.MonkeyPatch) -> None:
    """The block scales of an 8-bit weight bounded as a matrix of their own."""
    patch.setattr(checkpoint, "_scales", lambda name, entries: [])


def scales_are_no_layers() -> None:
    """A file that holds an 8-bit weight, its block scales and a matrix."""
    narrow = torch.ones(4, 4).to(torch.float8_e4m3fn)
    held = {"a.weight": narrow, "a.weight_scale_inv": torch.ones(2, 2), "b.weight": torch.eye(2)}
    kept, _ = checkpoint.Weights("x", Stored({name: Entry.of(tensor) for name, tensor in held.items()})).sort()
    assert kept == ["b.weight"]


def codes_without_their_scale(patch: pytest.MonkeyPatch) -> None:
    """The codes of an 8-bit weight bounded as the weight."""
    right = checkpoint._rescaled
    patch.setattr(checkpoint, "_rescaled", lambda name, entries: replace(right(name, entries), load=entries[name].load))


def codes_have_a_scale() -> None:
    """The identity in codes, times three."""
    held = {"a.weight": torch.eye(4).to(torch.float8_e4m3fn), "a.weight_scale": torch.tensor(3.0)}
    report = checkpoint.Weights("x", Stored({name: Entry.of(tensor) for name, tensor in held.items()})).audit()
    assert report.layers[0].upper >= 3.0


def factors_without_rounding(patch: pytest.MonkeyPatch) -> None:
    """Triangular factors taken as if they had been computed exactly."""
    right = checkpoint._triangular
    patch.setattr(checkpoint, "_triangular", lambda tall: (right(tall)[0], 0.0, 0.0))


def products_by_factors_that_are_off() -> None:
    """The products of two vectors where the triangular factors have errors of a few units more: how far off they are differs by machine."""
    right = torch.linalg.qr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "qr", lambda tall: (lambda q, r: (q, r * (1 + 2.0**-48)))(*right(tall)))
        test_products_of_two_vectors_exactly()


def arguments_taken_for_weights(patch: pytest.MonkeyPatch) -> None:
    """A tensor that a function of the file was to change bounded as it was before."""
    right = formats._parts
    patch.setattr(formats, "_parts", lambda value: ((key, item, "") for key, item, _ in right(value)))


def arguments_are_no_weights() -> None:
    """A checkpoint in which a function of the user's makes the weight of two tensors."""
    with tempfile.TemporaryDirectory() as folder:
        test_a_tensor_that_a_function_was_to_change_is_left_out(Path(folder))


def slices_without_padding(patch: pytest.MonkeyPatch) -> None:
    """Ranks of ZeRO 3 whose slices follow one another as if each parameter were cut without padding: n // ranks entries each."""
    right = Ranks.placed

    def mutated(self, shapes, counts, ranks, totals):
        below = [math.prod(shape) // len(ranks) for shape in shapes.values()] if self.stage == 3 else counts
        return right(self, shapes, below, ranks, range(10**9))

    patch.setattr(Ranks, "placed", mutated)


def ranks_are_put_together() -> None:
    """A network of odd sizes on 4 ranks of ZeRO 3."""
    with tempfile.TemporaryDirectory() as folder:
        test_ranks_of_zero_are_put_together(Path(folder), 3, 4)


def hooks_of_wrappers_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A wrapper taken off with the hook that doubles what it returns."""
    patch.setattr(given, "hooks", lambda module: [])


def hooks_of_wrappers_count() -> None:
    """The identity in a wrapper whose hook doubles its output."""
    layer = nn.Linear(2, 2, bias=False)
    torch.nn.init.eye_(layer.weight)
    module = nn.DataParallel(layer)
    module.register_forward_hook(lambda module, args, out: 2 * out)
    assert gl.audit(module.eval(), (2,)).upper >= 2.0


def shapes_in_the_default_dtype(patch: pytest.MonkeyPatch) -> None:
    """A shape taken as an example of float32, whatever the model computes in."""
    patch.setattr(given, "_like", lambda model: torch.empty(0))


def shapes_take_the_dtype_of_the_model() -> None:
    """An example made of a shape, for models and exported programs of three dtypes."""
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = nn.Linear(3, 2).to(dtype)
        program = torch.export.export(model, (torch.zeros(1, 3, dtype=dtype),))
        for source in (model, program):
            assert given.example_inputs(source, (3,))[0].dtype == dtype


def no_jump_is_noticed(patch: pytest.MonkeyPatch) -> None:
    """Vectors of the last weight for another one."""
    patch.setattr(tracker, "JUMP", float("inf"))


def other_weights_are_noticed() -> None:
    test_weights_that_are_replaced_are_noticed("conv", training=False)


def norms_without_a_gradient(patch: pytest.MonkeyPatch) -> None:
    """The norm that a weight is divided by taken for a constant, as by hands that divide by `sigma.detach()`."""
    right = tracker._Divided.apply
    patch.setattr(tracker._Divided, "apply", lambda weight, left, probes, scale, slope: right(weight, left, probes, scale, 0 * slope))


def gradients_of_divided_weights() -> None:
    test_gradient_is_that_of_the_value("conv", soft=False)


def samples_taken_for_apart(patch: pytest.MonkeyPatch) -> None:
    """A batch is certified by the constant of one sample without asking whether the logits depend on the others."""
    patch.setattr(gl.robust, "_check_apart", lambda *_: None)


def coupled_samples_have_no_radius() -> None:
    """`x - x.mean(0)` is constant for a single sample; the labels of a batch of two change within 1 all the same."""

    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    try:
        proved = gl.robust.certify(Centred(), [(torch.eye(2), torch.tensor([0, 1]))])
    except gl.InputError:
        return
    assert float(proved.radii.max()) <= 2.0


def caps_by_estimates(patch: pytest.MonkeyPatch) -> None:
    """`cap_` by the lower side of the interval."""
    right = parametrize.bound
    patch.setattr(parametrize, "bound", lambda op, **options: (lambda b: gl.Bound(b.lower, b.lower, b.because))(right(op, **options)))


def caps_are_certified() -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        layer = nn.Conv2d(4, 4, 3, padding=1)
        gl.nn.cap_(layer, 0.1)
        assert gl.bound(layer).upper <= 0.1


def errors_pass_through_functions() -> None:
    """A steep function after a layer whose sum errs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 1, bias=False), nn.ReLU())
    nn.init.constant_(model[0].weight, 1.0)
    found = gl.execution_error(model, (64,), dtype=torch.bfloat16, domain=(0.5, 1.0))
    x = torch.rand(64, 64).to(torch.bfloat16) / 2 + 0.5
    off = (copy.deepcopy(model).to(torch.bfloat16)(x).double() - model.double()(x.double())).detach().abs().max()
    assert float(off) <= found.largest


def weights_of_the_program_as_they_are(patch: pytest.MonkeyPatch) -> None:
    """The program's weights taken for those of the function."""
    right = execution_rules.constant

    def wrong(value: Any, arithmetic: Any) -> execution_rules.Operand:
        made = right(value, arithmetic)
        return replace(made, error=torch.zeros_like(made.error))

    patch.setattr(execution, "constant", wrong)


def sums_rounded_once(patch: pytest.MonkeyPatch) -> None:
    """A sum of many products that costs one rounding of its result."""
    patch.setattr(execution_rules.Arithmetic, "gamma", lambda self, terms: 0.0)


def errors_end_at_functions(patch: pytest.MonkeyPatch) -> None:
    """Errors that no function passes on."""
    right = execution._Propagation._by_step
    patch.setattr(execution._Propagation, "_by_step", lambda self, i, errors: right(self, i, errors).nan_to_num(0.0, 0.0) * 0.0)
    patch.setattr(execution._Propagation, "_by_rows", lambda self: (None, ()))


def half_of_a_result_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Every other entry of a linear stretch taken for one that reads nothing."""
    right = linear_stretches.Matrices._parts

    def parts(self: linear_stretches.Matrices) -> tuple[Tensor, Tensor]:
        source, target = right(self)
        return source, torch.where(torch.arange(len(target)) % 2 == 0, target, -1)

    patch.setattr(linear_stretches.Matrices, "_parts", parts)


def affine_models_hold() -> None:
    """Channels that a convolution mixes."""
    torch.manual_seed(0)
    mixing = nn.Sequential(nn.Conv1d(2, 2, 3, padding=1), nn.AvgPool1d(2))
    assert gl.audit(mixing.eval(), (2, 8), effort=-1).upper >= affine_norm(mixing, (2, 8)) * (1 - 1e-12)


def slopes_of_the_first_term(patch: pytest.MonkeyPatch) -> None:
    """A sum of entrywise functions with the slopes of one of them."""
    patch.setattr(fold, "_added_up", lambda terms, sign: terms[0])


def slopes_from_zero(patch: pytest.MonkeyPatch) -> None:
    """Slopes in [low, high] with low < 0 taken for those in [0, high]."""
    right = linear_forms.Slopes.between
    patch.setattr(linear_forms.Slopes, "between", staticmethod(lambda low, high: right(low.clamp_min(0.0), high.clamp_min(0.0))))


def slopes_in_their_old_order(patch: pytest.MonkeyPatch) -> None:
    """The adjoint has its anchors in the opposite order, and here not their slopes: entries of other layers lend theirs."""
    right = coupling.transposed

    def wrong(one: linear_forms.System) -> linear_forms.System | None:
        other = right(one)
        if other is None or [len(s.centre) for s in other.slopes[1:]] != [len(s.centre) for s in one.slopes[1:]]:
            return other
        return replace(other, slopes=[other.slopes[0], *one.slopes[1:]])

    patch.setattr(coupling, "transposed", wrong)


def slopes_of_each_layer_count() -> None:
    """What the first entry of the input takes is passed on by the first layer's first entry and by the second layer's second."""
    first, last = (torch.tensor(entries, dtype=torch.float64).diag() for entries in ((1.0, 0.1), (0.1, 1.0)))
    weights = [first, torch.eye(2, dtype=torch.float64).flip(0), last]
    zero, high = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 0.01], dtype=torch.float64)
    ends = [(zero, high), (zero, high.flip(0))]
    assert steepest(weights, ends) * (1 - 1e-12) <= upper_of(network_of(weights, ends), 0.0)


def steep_slopes_forgotten(patch: pytest.MonkeyPatch) -> None:
    """What is left of slopes in [-b, b] or [a, b] with 0 < a taken for what is left of those in [0, b]."""
    patch.setattr(linear_forms.Anchor, "rest", lambda self, weights: torch.zeros_like(weights))


def inverses_as_computed(patch: pytest.MonkeyPatch) -> None:
    """The inverse of a computed factor taken for that of the exact one."""
    right = elimination.inverse

    def wrong(own: Tensor, weights: Tensor) -> elimination.Inverse | None:
        found = right(own, weights)
        return None if found is None else replace(found, growth=torch.zeros_like(found.growth))

    patch.setattr(elimination, "inverse", wrong)


def errors_of_wide_matrices_dropped(patch: pytest.MonkeyPatch) -> None:
    """R R* >= W W* for the weight as computed, whatever its error."""
    right = elimination.narrowed_matrix
    patch.setattr(elimination, "narrowed_matrix", lambda weight, _: right(weight, 0.0))


def narrow_matrices() -> None:
    for error in (0.1, 3.0):
        weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        narrow = elimination.narrowed_matrix(weight, error)
        assert narrow is not None
        size = torch.linalg.matrix_norm(weight, 2)
        assert torch.linalg.matrix_norm(weight * (1 + error / size), 2) <= torch.linalg.matrix_norm(narrow, 2)


# ---- constants around an input -------------------------------------------------------------------------------------------


def slopes_on_a_set_from_zero(patch: pytest.MonkeyPatch) -> None:
    """Values from the value at 0 by slopes that are those of the set."""
    right = intervals.range_of

    def wrong(step: Any, sources: Any, shapes: Any) -> Any:
        if isinstance(step.what, Slope) and step.what.within is not None and math.isfinite(sources[0].size):
            on = step.what.within(*(torch.tensor(end, dtype=torch.float64) for end in (sources[0].low, sources[0].high)))
            step = replace(step, what=replace(step.what, low=on.low, high=on.high))
        return right(step, sources, shapes)

    patch.setattr(intervals, "range_of", wrong)


def slopes_at_one_end(patch: pytest.MonkeyPatch) -> None:
    """The slope at the lower end of each interval for all of it."""
    right = intervals._restricted_slope
    patch.setattr(intervals, "_restricted_slope", lambda what, low, high: right(what, low, low))


def lines_at_the_ends_alone(patch: pytest.MonkeyPatch) -> None:
    """An activation between two lines through the ends of its interval."""
    patch.setattr(relaxations, "CELLS", 1)
    patch.setattr(relaxations, "_between", lambda least, most, *_: (least[[0, -1]].amin(0), most[[0, -1]].amax(0)))


def middle_slopes_alone(patch: pytest.MonkeyPatch) -> None:
    """The Jacobian's norm at the middle slopes."""
    patch.setattr(jacobians.Derivative, "entries", lambda self, area: torch.zeros_like(self.spread))


def weights_that_are_not_shared(patch: pytest.MonkeyPatch) -> None:
    """The norm of the middle beside what moves: the root of both squares, at one and the same direction."""

    def beside(middle: Tensor, third: Tensor, far: float) -> float:
        return float(torch.linalg.matrix_norm(torch.cat([middle, far * third.flatten(1)], 1), 2))

    patch.setattr(jacobians, "together", beside)


def slopes_on_their_lines(patch: pytest.MonkeyPatch) -> None:
    """What slopes deviate from a linear function of the input adds nothing."""
    patch.setattr(jacobians.Inner, "parts", lambda self, rows, gamma: [])


def values_on_their_lines(patch: pytest.MonkeyPatch) -> None:
    """A value is that at the centre plus the middle derivative times the way."""
    patch.setattr(jacobians.Derivative, "stray", lambda self, area: torch.zeros(len(self.centre), dtype=torch.float64))


def regions_around_the_centre_alone(patch: pytest.MonkeyPatch) -> None:
    """A region is empty where the centre of the set, moved half way, does not reach it."""
    right = regions.Constraints.refuted
    patch.setattr(regions.Constraints, "refuted", lambda self, gaps, area: right(self, gaps, replace(area, radius=area.radius / 2)))


def regions_that_pass_through_the_centre(patch: pytest.MonkeyPatch) -> None:
    """The linear map of a region has the network's own value at the centre, as if that were in it."""
    right = regions.Splitting._activate

    def through(self: regions.Splitting, i: int, parts: regions.Regions, slopes: Tensor) -> None:
        right(self, i, parts, slopes)
        parts.values[i][:, -1] = 0.0

    patch.setattr(regions.Splitting, "_activate", through)


def nearer_halves_alone(patch: pytest.MonkeyPatch) -> None:
    """Of each region that an activation cuts, the half that a point is known in."""
    patch.setattr(regions, "separated", lambda constraints, points, area: (torch.ones(len(points), dtype=torch.bool), points))


def switches_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Columns of middle slopes alone: what switches adds nothing."""
    right = columns.Columns._activated

    def middles(self: columns.Columns, i: int, what: Slope, form: columns.Form, source: intervals.Value | None) -> columns.Form | None:
        low, high = (torch.as_tensor(end, dtype=torch.float64) for end in (what.low, what.high))
        return right(self, i, replace(what, low=(low + high) / 2, high=(low + high) / 2), form, source)

    patch.setattr(columns.Columns, "_activated", middles)


def mean_of_what_switches(patch: pytest.MonkeyPatch) -> None:
    """What switches in many places is on the average what it is in one, not in norm."""
    right = columns.Columns._norm_of_switches

    def mean(self: columns.Columns, i: int, form: columns.Form, places: Tensor) -> float:
        return right(self, i, form, places) / len(places)

    patch.setattr(columns.Columns, "_norm_of_switches", mean)


def first_tile_alone(patch: pytest.MonkeyPatch) -> None:
    """Of a value that reads several tiles the switches of the first one count."""
    right = columns.Near._norm
    patch.setattr(columns.Near, "_norm", lambda self, keys, most: right(self, keys[:1], most))


def order_at_the_middle(patch: pytest.MonkeyPatch) -> None:
    """Of two entries that may change places the one that is larger in the middle of the interval counts."""
    right = relaxations._excess

    def excess(*signs: Tensor) -> Slope:
        what = right(*signs)
        assert what.within is not None
        within = what.within

        def middle(low: Tensor, high: Tensor) -> Any:
            on, at = within(low, high), (low + high) / 2
            return on._replace(low=within(at, at).low, high=within(at, at).high)

        return replace(what, within=middle)

    patch.setattr(relaxations, "_excess", excess)


def larger_sets_lose(patch: pytest.MonkeyPatch) -> None:
    """The largest of a set is at most that of a smaller one."""
    right = relaxations._excess
    patch.setattr(relaxations, "_excess", lambda never=None, always=None: right(always, never))


def averages_of_the_lower_end(patch: pytest.MonkeyPatch) -> None:
    """A mean of entries in intervals is that of their lower ends."""
    right = intervals._averages
    patch.setattr(intervals, "_averages", lambda linear, sources: right(linear, [(low, low) for low, _ in sources]))


def chords_upwards(patch: pytest.MonkeyPatch) -> None:
    """Chords from the centre to the upper end alone."""
    right = intervals._means
    patch.setattr(intervals, "_means", lambda what, one, other, end, width: right(what, one, other, torch.maximum(one, end), width))


def slopes_of_the_first_place(patch: pytest.MonkeyPatch) -> None:
    """The slopes at one place of a channel for all of them."""

    def first(step: Any) -> Any:
        if not isinstance(step.what, Slope) or not isinstance(step.what.low, Tensor):
            return step
        return replace(step, what=replace(step.what, low=step.what.low[..., :1, :1], high=step.what.high[..., :1, :1]))

    patch.setattr(sys.modules["gramlip.network.coupling.circulant"], "_of_channel", first)


def boxes_that_do_not_grow(patch: pytest.MonkeyPatch) -> None:
    """A convolution's result in the box of what it reads."""
    patch.setattr(columns, "_seen", lambda op, box: box)


def constants_of_the_outer_map_alone(patch: pytest.MonkeyPatch) -> None:
    """The constant of a folded map is that of the second one."""
    patch.setattr(Linear, "_image", lambda self, given, stray: (torch.as_tensor(self.bias, dtype=torch.float64), self.bias_error))


def around(name: str) -> Callable[[], None]:
    """What holds of constants, and of intervals of values, around an input."""

    def run() -> None:
        test_every_entry_of_the_result_stays_in_its_interval(name)
        test_a_local_constant_is_never_below_what_points_of_the_ball_show_and_falls_with_the_radius(name)

    return run


def inner_balls_for_outer_ones(patch: pytest.MonkeyPatch) -> None:
    """What holds on a ball is taken to hold on every larger one."""

    def falling(inner: Sequence[Tensor], outer: Tensor) -> list[Tensor]:
        known = [inner[0] if inner else outer]
        for bound in (*inner[1:], outer):
            known.append(torch.minimum(bound, known[-1]))
        return known if inner else [outer]

    patch.setattr(margins, "_rising", falling)


def stretches_from_the_centre(patch: pytest.MonkeyPatch) -> None:
    """Each stretch of the way out begins with the whole margin."""
    patch.setattr(margins, "_ends", lambda begin, further, whole: begin + torch.maximum(further, whole))


def radii_on_rays_hold() -> None:
    for seed in range(40):
        test_no_radius_is_beyond_where_a_margin_is_used_up_on_a_ray(seed)


def gates_by_their_function_alone(patch: pytest.MonkeyPatch) -> None:
    """A gate's constants forgotten: twice a GELU as a GELU."""
    right = activations._gate
    patch.setattr(activations, "_gate", lambda name, scale, *others, **options: right(name, 1 + 0 * scale, *others, **options))


def gates_on_an_interval_unscaled(patch: pytest.MonkeyPatch) -> None:
    """The slopes of a gate of `b x` on an interval of x, not of `b x`."""
    patch.setattr(activations, "_rescaled", lambda within, b, scale, room: within)


def regions_reach(name: str) -> None:
    test_it_is_never_below_the_jacobians_of_the_set_and_reached_by_them(name, ball=True)


MUTANTS: dict[str, Mutant] = {
    "N1: gates on an interval unscaled": Mutant(
        gates_on_an_interval_unscaled, lambda: test_slopes_and_values_on_random_intervals("quick gelu")
    ),
    "N1: gates by their function alone": Mutant(
        gates_by_their_function_alone, lambda: test_maps_are_bounded_above_their_jacobians_and_tightly("gelu without half")
    ),
    "execution: weights as they are": Mutant(weights_of_the_program_as_they_are, test_weights_that_the_format_does_not_hold_count),
    "execution: sums rounded once": Mutant(sums_rounded_once, test_the_worst_order_of_a_sum_is_covered),
    "execution: errors end at functions": Mutant(errors_end_at_functions, errors_pass_through_functions),
    "L1: slopes on a set, from 0": Mutant(slopes_on_a_set_from_zero, around("split")),
    "L1: slopes at one end": Mutant(slopes_at_one_end, around("sigmoid")),
    "L2: lines at the ends": Mutant(lines_at_the_ends_alone, lambda: test_an_activation_stays_within_its_line("softplus")),
    "L8: middle slopes": Mutant(switches_forgotten, around("residual of relus")),
    "L10: mean of switches": Mutant(mean_of_what_switches, lambda: test_columns_are_never_below_points_of_the_ball("relu images")),
    "L10: switches of the first tile": Mutant(first_tile_alone, test_norms_of_the_activations_that_a_value_reads),
    "L1: averages of lower ends": Mutant(
        averages_of_the_lower_end, lambda: test_every_entry_of_the_result_stays_in_its_interval("wide mean")
    ),
    "L16: order at the middle": Mutant(order_at_the_middle, around("maxmin")),
    "L16: larger sets lose": Mutant(larger_sets_lose, around("pooled")),
    "L11: chords upwards": Mutant(chords_upwards, lambda: test_chords_from_the_centre("relu")),
    "coupling: slopes of one place": Mutant(slopes_of_the_first_place, test_slopes_that_the_places_of_a_channel_share_hold_those_of_each),
    "L12: boxes": Mutant(boxes_that_do_not_grow, lambda: test_a_convolution_of_a_box_is_that_of_all_entries(GEOMETRY[0])),
    "folding: constants": Mutant(constants_of_the_outer_map_alone, lambda: test_values_of_folded_networks_are_in_their_intervals("zeros")),
    "L7: inner balls": Mutant(inner_balls_for_outer_ones, radii_on_rays_hold),
    "L7: stretches": Mutant(stretches_from_the_centre, radii_on_rays_hold),
    "L17: nearer halves": Mutant(nearer_halves_alone, lambda: regions_reach("relu")),
    "L17: through the centre": Mutant(
        regions_that_pass_through_the_centre, lambda: test_around_points_the_network_is_the_linear_function_that_is_followed("relu")
    ),
    "L18: half of the set": Mutant(regions_around_the_centre_alone, lambda: regions_reach("one layer")),
    "L5: middle slopes": Mutant(middle_slopes_alone, around("tanh")),
    "L13: weights": Mutant(weights_that_are_not_shared, lambda: test_the_middle_and_what_moves_are_bounded_together((3, 6), 1.0)),
    "L14: first order": Mutant(slopes_on_their_lines, lambda: test_the_derivative_stays_near_its_line_and_values_near_theirs("tanh", 0.3)),
    "L15: values on lines": Mutant(
        values_on_their_lines, lambda: test_the_derivative_stays_near_its_line_and_values_near_theirs("tanh", 0.3)
    ),
    "N18: half of a result": Mutant(half_of_a_result_forgotten, affine_models_hold),
    "N13: lengths of anything": Mutant(
        lengths_of_anything, _stretches(lambda x: 1e6 * x / (torch.linalg.vector_norm(x.flip(1), dim=1, keepdim=True) + 0.1), 1e8)
    ),
    "N28: the steepest part": Mutant(
        steepest_of_the_parts, lambda: test_functions_of_one_value_have_the_constant_that_their_derivatives_show("silu of both signs")
    ),
    "N28: one factor": Mutant(
        products_of_slopes, lambda: test_functions_of_one_value_have_the_constant_that_their_derivatives_show("a gate that is shifted")
    ),
    "N28: jumps": Mutant(slopes_across_jumps, lambda: test_functions_that_jump_have_no_constant_however_flat_they_are("at zero")),
    "N32: the last term": Mutant(
        sums_that_grow_like_their_last_term,
        lambda: test_functions_of_one_value_have_the_constant_that_their_derivatives_show("softplus with another number"),
    ),
    "N32: one power more": Mutant(one_power_more_than_it_falls, lambda: test_what_is_known_without_an_end_holds_far_out(1.0, 3.0)),
    "N29: along spheres": Mutant(radial_maps_along_spheres, lambda: test_radial_maps_have_their_exact_constant("squash in one")),
    "N30: means that stand still": Mutant(responses_of_one_channel, lambda: test_response_normalisation_is_bounded_and_nearly_attained(5)),
    "half lines turned over": Mutant(half_lines_turned_over, _stretches(lambda x: torch.exp(2 * torch.relu(x)), 1e300)),
    "slopes of the first term of a sum": Mutant(slopes_of_the_first_term, _stretches(lambda x: x + torch.tanh(x), 1.99)),
    "N6: slopes from zero": Mutant(slopes_from_zero, check_slopes_at_their_ends),
    "N24: slopes in their old order": Mutant(slopes_in_their_old_order, slopes_of_each_layer_count),
    "N26: slopes of other centres": Mutant(steep_slopes_forgotten, check_proved_forms),
    "N27: inverses as computed": Mutant(inverses_as_computed, check_inverses),
    "N25: errors of wide matrices dropped": Mutant(errors_of_wide_matrices_dropped, narrow_matrices),
    "squares one after the other": Mutant(squares_one_after_the_other, test_norms_of_many_equal_entries),
    "products one after the other": Mutant(products_one_after_the_other, test_products_of_many_rows),
    "error behind a padding": Mutant(error_behind_a_padding, test_replicate_padding_by_50_repeats_the_error_51_times),
    "paddings of a transposed layer on the other sides": Mutant(
        paddings_on_the_other_sides, test_a_coupled_transposed_convolution_keeps_the_side_that_is_not_padded
    ),
    "branches as blocks": Mutant(branches_as_blocks, test_a_choice_between_branches_has_no_lower_side),
    "slopes of a range as attained": Mutant(slopes_of_a_range_as_attained, a_range_claims_nothing_below),
    "errors of computed weights dropped": Mutant(errors_of_weights_dropped, check_cancelling),
    "errors of differences": Mutant(errors_of_differences_relative_to_them, check_cancelling),
    "lower side: first order forgotten": Mutant(first_order_forgotten, check_cancelling),
    "lower side: first order alone": Mutant(first_order_alone, check_shifts),
    "N10: copies counted once": Mutant(
        copies_of_a_part_counted_once, _stretches(lambda x: torch.cat([x[:, [0, 0, 1]], x[:, [2, 3]]], 1), math.sqrt(2))
    ),
    "N10: parts that never meet": Mutant(parts_that_never_meet, _stretches(lambda x: x[:, :2] + x[:, 2:], math.sqrt(2))),
    "N11: any two functions": Mutant(
        any_two_functions_as_a_pair, _stretches(lambda x: torch.cat([torch.sin(x), torch.tanh(x)], 1), math.sqrt(2) * (1 - 1e-9))
    ),
    "N12: the steepest curve": Mutant(steepest_of_the_curves, _stretches(lambda x: torch.cat([x, torch.relu(x)], 1), math.sqrt(2))),
    "N15: a mirror in a pair": Mutant(mirrors_of_another_length, lambda: test_a_spectrum_of_an_even_signal_read_as_another_length(8)),
    "a view of what was": Mutant(
        views_left_as_they_were, lambda: test_an_audit_is_not_below_the_matrix_and_not_far_above(over_what_is_read)
    ),
    "N13: a sum for a mean": Mutant(sums_as_means, _stretches(lambda x: x - x.sum(1, keepdim=True), 3.0)),
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
    "a layer that is given up ends the search of all": Mutant(one_layer_ends_all, layers_together_hold),
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
    "signs in Schur's test": Mutant(signs_in_schurs_test, sparse_matrices_hold),
    "no rounding in Schur's test": Mutant(schurs_test_without_rounding, sparse_matrices_hold),
    "numbers of a list rounded": Mutant(lists_rounded, lists_are_exact),
    "scales taken for layers": Mutant(scales_taken_for_layers, scales_are_no_layers),
    "codes without their scale": Mutant(codes_without_their_scale, codes_have_a_scale),
    "no rounding in the factors of a product": Mutant(factors_without_rounding, products_by_factors_that_are_off),
    "arguments taken for weights": Mutant(arguments_taken_for_weights, arguments_are_no_weights),
    "slices of ZeRO without padding": Mutant(slices_without_padding, ranks_are_put_together),
    "a hook lost with its wrapper": Mutant(hooks_of_wrappers_forgotten, hooks_of_wrappers_count),
    "a shape in the default dtype": Mutant(shapes_in_the_default_dtype, shapes_take_the_dtype_of_the_model),
    "vectors of the last weight for another": Mutant(no_jump_is_noticed, other_weights_are_noticed),
    "norms without a gradient": Mutant(norms_without_a_gradient, gradients_of_divided_weights),
    "each rank on its own scale": Mutant(own_scale_of_each_rank, check_parts),
    "samples taken for apart": Mutant(samples_taken_for_apart, coupled_samples_have_no_radius),
    "caps by the lower side": Mutant(caps_by_estimates, caps_are_certified),
    "division by the norm of a zero block": Mutant(division_by_a_zero_block, gram_norm_holds),
}
