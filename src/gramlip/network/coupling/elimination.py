"""Anchors eliminated one at a time: from a form of the segment's output down to a quadratic form of its input.

For `v = C q + R w` with `|w| <= |q|` entry by entry (slopes within R of C), any diagonal `L >= 0` gives `q* L q - w* L w >= 0`;
adding it and maximising over w leaves a form of q. docs/network.md#elimination, arXiv 2404.04375 for chains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gramlip.network.coupling.circulant import Link
from gramlip.network.coupling.linear_forms import Anchor, Form, Slopes, System, is_identity, size_of, sizes_of
from gramlip.numerics import rounding as rd
from gramlip.numerics.eigenvalues import cholesky, shift
from gramlip.numerics.precision import to_float64

# ---- one anchor --------------------------------------------------------------------------------------------------------
#
# The form that is left of what stands before an anchor, its gradient, and a form that is proved to be above it. With
# H a form of anchors (r, v), `v = C q + R w`, `q = A (r, ...)` and multipliers L, the maximum over w is, where R > 0
# and `K = C / R`, `H_rr + D* S^-1 D + A* L (1 - K^2) A` with `S = L - R H_vv R` and `D = R H_vr + L K A`.
# docs/network.md#elimination, theorem N26.

LIFTS = (1.0, 1.0 + 1e-9, 1.0 + 1e-6, 1.001, 1.03, 1.3, 2.0, 5.0)  # multipliers that a proof refuses are raised by these
OFF = 1e-3  # and a proof is refused that would lose more, relatively


class _Eliminated(torch.autograd.Function):
    """The form that is left, in plain floating point, and whether S was positive definite; its gradient costs three products."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, weights: Tensor, anchor: Anchor) -> tuple[Tensor, Tensor]:
        factor, info = torch.linalg.cholesky_ex(anchor.inner(matrix, weights))
        root = torch.linalg.solve_triangular(factor, anchor.right(matrix, weights).expand(len(matrix), -1, -1), upper=False)
        rest = anchor.rest(weights)
        left = root.mH @ root
        if bool((rest.abs() > 4.0 * torch.finfo(rest.dtype).eps * weights).any()):
            left = left + anchor.rows.mH @ (rest[:, None] * anchor.rows)
        ctx.anchor, ctx.count = anchor, matrix.shape[-1]
        ctx.save_for_backward(factor, root)
        ctx.mark_non_differentiable(info)
        return anchor.whole(matrix, left), info

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        anchor, (factor, root) = ctx.anchor, ctx.saved_tensors
        before, radius = anchor.before, anchor.radius
        given = 0.5 * (gradients[0] + gradients[0].mH)
        x = torch.linalg.solve_triangular(factor.mH, root, upper=True)  # S^-1 D
        y = x @ given
        inner = y @ x.mH  # of -S
        matrix = given.new_zeros(len(given), ctx.count, ctx.count)
        matrix[:, before:, before:] = radius[:, None] * inner * radius
        if before:
            matrix[:, before:, :before] = 2.0 * radius[:, None] * y[:, :, anchor.at]
            matrix[:, :before, :before] = given[:, anchor.at[:, None], anchor.at]
        weights = 2.0 * anchor.ratio * _inner(y, anchor.rows) - inner.diagonal(dim1=-2, dim2=-1).real.sum(0)
        rest = anchor.rest(torch.ones_like(anchor.ratio))
        if bool((rest.abs() > 4.0 * torch.finfo(rest.dtype).eps).any()):
            weights = weights + rest * _inner(anchor.rows @ given, anchor.rows)
        return matrix, weights, None


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The real parts of the products of the rows of two matrices, summed over the frequencies."""
    return (a * b.conj()).real.sum((0, -1))


def schur_complement(matrix: Tensor, weights: Tensor, anchor: Anchor) -> Tensor | None:
    """The matrix of the form that is left, in plain floating point; None where S is not positive definite."""
    left, info = _Eliminated.apply(matrix, weights, anchor)  # type: ignore[misc]
    return None if bool(info.any()) else left  # type: ignore[reportUnknownVariableType]


@dataclass(frozen=True)
class Inverse:
    """Multipliers L, their inverse `roots`, and G with `L^1/2 S^-1 L^1/2 <= (1 + growth) G* G`, proved; `size` of G."""

    weights: Tensor
    roots: Tensor
    matrix: Tensor
    growth: Tensor
    size: Tensor

    def gram(self, right: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
        """A matrix above `D* S^-1 D` up to the noise beside it, from `L^-1/2 D` as computed, which is `off` by so much in norm."""
        root = self.matrix @ right
        tall, unit = sizes_of(root), rd.gamma(32.0 * (right.shape[-1] + right.shape[-2] + 8))
        off = self.size * (unit * sizes_of(right) + off)
        noise = (2.0 * tall * off + off.square() + unit * tall.square()) * (1.0 + self.growth)
        root = root * (1.0 + self.growth).sqrt()[:, None, None]
        return root.mH @ root, noise


def inverse(block: Tensor, weights: Tensor) -> Inverse | None:
    """A proved upper bound of `S^-1 = (L - own)^-1`, for L at least these multipliers; None where there is no proof. Theorem N27."""
    unit, eye = rd.gamma(32.0 * (block.shape[-1] + 8)), torch.eye(len(weights), dtype=block.dtype)
    for lift in LIFTS:
        lifted = weights * lift
        roots = lifted.rsqrt()
        if not bool(lifted.isfinite().all() and roots.isfinite().all()):
            return None
        part = roots[:, None] * block * roots
        factor, info = torch.linalg.cholesky_ex(eye - part)
        if bool(info.any()):
            continue
        root = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
        off, wide = _off(root, part, eye, unit), sizes_of(root)
        if bool((off < OFF).all()):
            return Inverse(lifted, roots, root, off / (1.0 - off) * (1 + 1e-9), wide)
    return None


def _off(root: Tensor, part: Tensor, eye: Tensor, unit: float) -> Tensor:
    """A bound of `|I - G (I - part) G*|`, with its rounding, for G = `root`."""
    test = root @ (eye - part) @ root.mH
    test.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return (sizes_of(test) + unit * (sizes_of(root).square() * (len(eye) ** 0.5 + sizes_of(part)) + 1.0)) * (1 + 1e-9)


def bounded(matrix: Tensor, anchor: Anchor, error: float, approximate: Inverse) -> tuple[Tensor, Tensor]:
    """The matrix of a form, and by how much (in norm) the one that is left may exceed it; rows are right up to `error`."""
    weights, ratio, rows = approximate.weights, anchor.ratio, anchor.rows
    wide, kept = sizes_of(rows), sizes_of(matrix[:, : anchor.before, : anchor.before])
    left, noise = approximate.gram(
        approximate.roots[:, None] * anchor.right(matrix, weights), _off_right(matrix, anchor, error, approximate)
    )
    unit = rd.gamma(32.0 * (matrix.shape[-1] + rows.shape[-1] + 8))
    rest = anchor.rest(weights)
    most, thickest = float(rest.abs().max()), float((weights * (1.0 + ratio.square())).max())
    noise = noise + unit * (kept + sizes_of(left) + thickest * wide.square()) + most * error * (2.0 * wide + error)
    if most > 1e-14 * float(weights.max()):
        left = left + rows.mH @ (rest[:, None] * rows)
    else:
        noise = noise + most * wide.square()
    return anchor.whole(matrix, left), noise * (1 + 1e-9)


def _off_right(matrix: Tensor, anchor: Anchor, error: float, approximate: Inverse) -> Tensor:
    """By how much `L^-1/2 D` as computed may be off in norm."""
    steepest = float((approximate.weights.sqrt() * anchor.ratio.abs()).max())
    across = sizes_of(matrix[:, anchor.before :, : anchor.before])
    reach = float((approximate.roots * anchor.radius).max()) * across + steepest * sizes_of(anchor.rows)
    return (rd.gamma(32.0) * reach + steepest * error) * (1 + 1e-9)


# ---- all anchors -------------------------------------------------------------------------------------------------------

NORMAL = 10  # powers of 4 that the largest entry of a form may be away from 1
FLOOR = 1e-250  # forms below it are given up: underflow would be above the bounds of rounding

Weigh = Callable[[int, Tensor, int], Tensor]  # anchor, its own block (F, n, n) and the exponent of the form -> multipliers (n,)


@dataclass
class Quadratic:
    """A Hermitian form (F, n, n) over the anchors `live`, in that order: `4**exponent` times the matrix."""

    live: list[int]
    matrix: Tensor
    exponent: int = 0

    def normalised(self) -> Quadratic:
        """The same form, its largest entry between 1e-6 and 1e6: no overflow and no underflow, however long the run."""
        diagonal = self.matrix.detach().diagonal(dim1=-2, dim2=-1).real  # of a form that is at least 0 it has the largest entry
        top = float(diagonal.max()) if diagonal.numel() else 0.0
        if not FLOOR < top < math.inf:
            return self
        doublings = math.frexp(top)[1] // 2
        return self if abs(doublings) < NORMAL else replace(self, matrix=self.matrix * 4.0**-doublings, exponent=self.exponent + doublings)


def raised(form: Quadratic, noise: Tensor | float) -> Quadratic:
    """A form at least as large as any within `noise` in norm: what is known up to noise is replaced by what is above it."""
    matrix = torch.add(form.matrix, form.matrix.mH).mul_(0.5)
    if not matrix.numel():
        return form
    room = (noise + rd.gamma(8) * (sizes_of(matrix.detach()) + noise)) * (1 + 1e-9)
    matrix.diagonal(dim1=-2, dim2=-1).add_(room[:, None])
    return replace(form, matrix=matrix)


def _as(matrix: Tensor, like: Tensor) -> Tensor:
    """A matrix in the type of another; where that is real, the imaginary part is rounding."""
    return (matrix if like.is_complex() or not matrix.is_complex() else matrix.real).to(like.dtype)


def start(system: System, terminal: Quadratic | None = None, *, rounded: bool = True) -> Quadratic:
    """The form `|output|^2`, or `output* terminal output` for a positive semidefinite form (F, m, m) of the output.

    What is `rounded` is above it, whatever the rounding; else it is the form in plain floating point.
    """
    live = sorted(system.output.blocks)
    alone = system.output.blocks[live[0]] if len(live) == 1 else None
    if alone is not None and system.output.errors[live[0]] == 0.0 and is_identity(alone):
        return (
            Quadratic(live, alone.expand(system.frequencies, -1, -1))
            if terminal is None
            else replace(terminal, live=live, matrix=_as(terminal.matrix, alone))
        )
    wide = torch.cat([system.output.blocks[a].expand(system.frequencies, -1, -1) for a in live], -1)
    if not rounded:
        inner = wide if terminal is None else _as(terminal.matrix, wide) @ wide
        return Quadratic(live, wide.mH @ inner, 0 if terminal is None else terminal.exponent).normalised()
    size = size_of(wide)
    error = rd.hypot_up(system.output.errors[a] for a in live)
    unit = rd.gamma(16.0 * (wide.shape[1] + 4))
    noise = rd.add_up(
        rd.mul_up(2.0, rd.mul_up(size, error)),
        rd.mul_up(error, error),
        rd.mul_up(unit, rd.mul_up(size, size)),
    )
    if terminal is None:
        return raised(Quadratic(live, wide.mH @ wide), noise).normalised()
    form = Quadratic(live, wide.mH @ (terminal.matrix @ wide), terminal.exponent)
    return raised(form, noise * sizes_of(terminal.matrix.detach())).normalised()


def order(system: System) -> Iterator[int]:
    """The anchors from the last to the first that is not the input."""
    return iter(range(len(system.queries) - 1, 0, -1))


def own_block(system: System, form: Quadratic, k: int) -> Tensor:
    """`R H_vv R` of the last anchor's entries that are not linear."""
    slopes = system.slopes[k]
    rows = form.matrix.shape[-1] - len(slopes.centre) + slopes.on
    radius, first = slopes.radius[slopes.on], int(rows[0])
    block = form.matrix[:, first:, first:] if len(rows) == form.matrix.shape[-1] - first else form.matrix[:, rows[:, None], rows]
    return radius[:, None] * block * radius


def pulled(system: System, form: Quadratic, k: int) -> Tensor:
    """`R H_v` of the last anchor's entries that are not linear."""
    slopes = system.slopes[k]
    rows = form.matrix.shape[-1] - len(slopes.centre) + slopes.on
    return slopes.radius[slopes.on][:, None] * form.matrix[:, rows, :]


def everywhere(slopes: Slopes, weights: Tensor) -> Tensor:
    """Multipliers of all entries of an anchor: zero where it is linear."""
    return torch.zeros_like(slopes.centre).index_put((slopes.on,), weights)


def query_rows(system: System, k: int, live: list[int]) -> tuple[Tensor, float]:
    """The query of anchor k as one matrix (F, n, m) on the anchors `live`, and a bound of its error."""
    query, n = system.queries[k], len(system.channels[k])
    assert query is not None
    like = system.output.blocks[next(iter(system.output.blocks))]
    rows = [query.blocks[a] if a in query.blocks else like.new_zeros(1, n, len(system.channels[a])) for a in live]
    wide = torch.cat([r.expand(system.frequencies, -1, -1) for r in rows], -1) if rows else like.new_zeros(system.frequencies, n, 0)
    return wide, rd.hypot_up(query.errors.values())


def _left(system: System, live: list[int]) -> list[int]:
    """The anchors that are left when the last one is replaced by its query."""
    query = system.queries[live[-1]]
    assert query is not None
    return sorted({*live[:-1], *query.blocks})


def substituted(system: System, form: Quadratic, k: int, weights: Tensor) -> Quadratic:
    """`C q` in the place of the last anchor, and `q* L q` added, for multipliers of all its entries."""
    live, centre = _left(system, form.live), system.slopes[k].centre
    rows, _ = query_rows(system, k, live)
    old = form.matrix.shape[-1] - len(centre)
    middle = centre[:, None] * form.matrix[:, old:, old:] * centre + torch.diag(weights)
    matrix = rows.mH @ (middle @ rows)
    if old:
        sizes = [len(system.channels[a]) for a in live]
        at = torch.cat([torch.full((s,), a in form.live[:-1]) for a, s in zip(live, sizes, strict=True)]).nonzero()[:, 0]
        every = torch.arange(len(matrix))[:, None, None]
        cross = torch.zeros_like(matrix).index_copy(1, at, form.matrix[:, :old, old:] @ (centre[:, None] * rows))
        rest = torch.zeros_like(matrix).index_put((every, at[:, None], at), form.matrix[:, :old, :old])
        matrix = matrix + cross + cross.mH + rest
    return Quadratic(live, matrix, form.exponent)


def anchor_of(system: System, k: int, live: list[int]) -> tuple[Anchor, float]:
    """The last of some live anchors, with its query on those that are left, and the query's error."""
    anchor = system.anchors.get(k)
    if anchor is None:
        left, slopes = _left(system, live), system.slopes[k]
        rows, error = query_rows(system, k, left)
        at = torch.cat([torch.full((len(system.channels[a]),), a in live[:-1]) for a in left]) if left else torch.zeros(0)
        anchor = system.anchors[k] = Anchor(slopes.radius, slopes.centre / slopes.radius, rows, at.nonzero()[:, 0]), error
    return anchor


def eliminated(system: System, form: Quadratic, weigh: Weigh) -> Quadratic | None:
    """The form of the input alone, in plain floating point; None where a step was not positive definite."""
    for k in order(system):
        if k not in form.live:
            continue
        slopes = system.slopes[k]
        weights = torch.zeros_like(slopes.centre)
        if Anchor.fits(slopes.centre, slopes.radius):
            chosen = weigh(k, own_block(system, form, k), form.exponent)
            matrix = schur_complement(form.matrix, chosen, anchor_of(system, k, form.live)[0])
            if matrix is None:
                return None
            form = replace(form, live=_left(system, form.live), matrix=matrix).normalised()
            continue
        if len(slopes.on):
            block, b = own_block(system, form, k), pulled(system, form, k)
            chosen = weigh(k, block, form.exponent)
            factor, info = torch.linalg.cholesky_ex(torch.diag(chosen).to(block.dtype) - block)
            if bool(info.any()):
                return None
            root = torch.linalg.solve_triangular(factor, b, upper=False)
            form, weights = replace(form, matrix=form.matrix + root.mH @ root), everywhere(slopes, chosen)
        form = substituted(system, form, k, weights).normalised()
    return form


def certified(system: System, form: Quadratic, weigh: Weigh) -> Quadratic | None:
    """A form of the input that is proved to be above: every rounding is bounded. None where the proof fails.

    No factor, eigenvalue or solution of a system is trusted. docs/network.md#certificate.
    """
    for k in order(system):
        if k not in form.live:
            continue
        slopes = system.slopes[k]
        weights = torch.zeros_like(slopes.centre)
        if len(slopes.on):
            block = own_block(system, form, k)
            chosen = weigh(k, block, form.exponent)
            if Anchor.fits(slopes.centre, slopes.radius):
                matrix = _bounded_in_parts(form.matrix, block, chosen, *anchor_of(system, k, form.live))
                if matrix is None:
                    return None
                form = replace(form, live=_left(system, form.live), matrix=matrix).normalised()
                continue
            approximate = inverse(block, chosen)
            if approximate is None:
                return None
            form, weights = _maximised(form, pulled(system, form, k), approximate), everywhere(slopes, approximate.weights)
        form = _replaced(system, form, k, weights).normalised()
    return form


PART = 2**17  # entries of a matrix that are worked on at a time: what a fast memory holds


def _bounded_in_parts(matrix: Tensor, block: Tensor, weights: Tensor, anchor: Anchor, error: float) -> Tensor | None:
    """The matrices above those of the form that is left, some frequencies at a time; None where the proof fails.

    Multipliers that have to be raised at one frequency are raised at all of them.
    """
    n, columns = anchor.rows.shape[-2:]
    left, count, at = matrix.new_empty(len(matrix), columns, columns), max(1, PART // max(n, columns, 1) ** 2), 0
    while at < len(matrix):
        part = slice(at, at + count)
        approximate = inverse(block[part], weights)
        if approximate is None:
            return None
        if not torch.equal(approximate.weights, weights):
            weights, at = approximate.weights, 0
            continue
        here = anchor if len(anchor.rows) == 1 else replace(anchor, rows=anchor.rows[part])
        above, noise = bounded(matrix[part], here, error, approximate)
        left[part] = raised(Quadratic([], above), noise).matrix
        at += count
    return left


def _maximised(form: Quadratic, b: Tensor, approximate: Inverse) -> Quadratic:
    """A form above `H + B* S^-1 B`."""
    right = approximate.roots[:, None] * b
    gram, noise = approximate.gram(right, rd.gamma(16.0) * sizes_of(right))
    noise = noise + rd.gamma(8) * (sizes_of(form.matrix) + sizes_of(gram))
    return raised(replace(form, matrix=form.matrix + gram), noise * (1 + 1e-9))


def _replaced(system: System, form: Quadratic, k: int, weights: Tensor) -> Quadratic:
    """A form above `substituted`: its rounding and the query's error bounded."""
    live, centre = _left(system, form.live), float(system.slopes[k].centre.abs().max())
    rows, error = query_rows(system, k, live)
    size, most, whole = sizes_of(rows) if rows.numel() else torch.zeros(len(rows)), float(weights.max()), sizes_of(form.matrix)
    unit = rd.gamma(16.0 * (rows.shape[-1] + form.matrix.shape[-1] + 8))
    rest = 1.0 if len(form.live) > 1 else 0.0
    reach = rest + centre * size  # the norm of the map to the form's own anchors
    noise = unit * (reach.square() * whole + most * size.square())
    noise = noise + 2.0 * error * (centre * whole * reach + most * size) + error * error * (centre * centre * whole + most)
    return raised(substituted(system, form, k, weights), noise * (1 + 1e-9))


def root_of(form: Quadratic) -> float:
    """Upper bound of the root of the largest eigenvalue over all frequencies; infinite where the proof fails."""
    if not form.live:
        return 0.0
    if not bool(form.matrix.isfinite().all()):
        return math.inf
    tops = torch.linalg.eigvalsh(form.matrix)[:, -1].clamp_min(0.0)
    for slack in (1e-12 + 4 * shift(form.matrix.shape[-1]), 1e-6, 1e-3):
        threshold = tops.max() * (1 + slack)
        if bool((threshold > FLOOR) and cholesky(form.matrix.clone(), threshold.expand(len(tops)).clone(), torch.zeros_like(tops)).all()):
            root = rd.sqrt_up(rd.mul_up(float(threshold), 1 + 1e-12))
            return rd.up(math.ldexp(root, form.exponent)) if -900 < math.frexp(root)[1] + form.exponent < 900 else math.inf
    return math.inf


# ---- the same system, otherwise -------------------------------------------------------------------------------------------
#
# Two systems of the same norm: the adjoint, and one whose input is no wider than what reads it. And parts of a system.


def transposed(system: System) -> System | None:
    """The adjoint of a system, whose norm it has: docs/network.md#directions. None where no value depends on the input."""
    last = len(system.queries)
    queries: list[Form | None] = [None]
    readers = [*system.queries[1:], system.output]  # of anchors 1, 2, ..., and the output, which becomes anchor 0
    if not any(r is not None and 0 in r.blocks for r in readers):
        return None
    for k in [*order(system), 0]:
        blocks, errors = dict[int, Tensor](), dict[int, float]()
        for i, reader in enumerate(readers, start=1):
            if reader is not None and k in reader.blocks:
                blocks[last - i], errors[last - i] = reader.blocks[k].mH, reader.errors[k]
        queries.append(Form(blocks, errors, True))
    output = queries.pop()
    assert output is not None
    width = next(iter(system.output.blocks.values())).shape[-2]
    channels = [torch.arange(width), *reversed(system.channels[1:])]
    ones = torch.ones(width, dtype=torch.float64)
    return System(queries, channels, output, system.frequencies, [Slopes.between(ones, ones), *reversed(system.slopes[1:])])


def middle_of(system: System) -> int | None:
    """The anchor nearest to the middle that all before it reach what comes after through; None where there is none."""
    last = len(system.queries) - 1
    reads = [min(form.blocks, default=0) if form is not None else 0 for form in (*system.queries, system.output)]
    cuts = [k for k in range(2, last - 1) if min(reads[k + 1 :]) >= k]
    return min(cuts, key=lambda k: abs(2 * k - last), default=None)


def part_of(system: System, first: int, last: int) -> System:
    """The anchors after `first` up to `last`, the first one as input, the last one (or the system's own output) as output."""

    def shifted(form: Form | None) -> Form:
        assert form is not None
        return Form({a - first: b for a, b in form.blocks.items()}, {a - first: e for a, e in form.errors.items()}, form.clean)

    like, ones = next(iter(system.output.blocks.values())), torch.ones(len(system.channels[first]), dtype=torch.float64)
    eye = torch.eye(len(system.channels[last]), dtype=like.dtype)[None]
    output = shifted(system.output) if last == len(system.queries) - 1 else Form({last - first: eye}, {last - first: 0.0}, True)
    queries = [None, *map(shifted, system.queries[first + 1 : last + 1])]
    slopes = [Slopes.between(ones, ones), *system.slopes[first + 1 : last + 1]]
    return System(queries, system.channels[first : last + 1], output, system.frequencies, slopes)


def narrowed(system: System) -> System:
    """A system of no smaller norm whose input is no wider than what reads it: docs/network.md#wide-inputs."""
    readers = [r for r in [*system.queries[1:], system.output] if r is not None and 0 in r.blocks]
    sizes = [r.blocks[0].shape[-2] for r in readers]
    if not readers or sum(sizes) >= len(system.channels[0]):
        return system
    wide = torch.cat([r.blocks[0].expand(system.frequencies, -1, -1) for r in readers], -2)
    factor = _gram_root(wide @ wide.mH, sizes_of(wide), rd.hypot_up(r.errors[0] for r in readers), wide.shape[-1])
    if factor is None:
        return system
    parts = iter(factor.split(sizes, -2))

    def narrow(reader: Form | None) -> Form | None:
        if reader is None or 0 not in reader.blocks:
            return reader
        return Form({**reader.blocks, 0: next(parts)}, {**reader.errors, 0: 0.0}, reader.clean)

    queries, output = [narrow(q) for q in system.queries], narrow(system.output)
    assert output is not None
    return replace(system, queries=queries, output=output, channels=[torch.arange(sum(sizes)), *system.channels[1:]])


def narrowed_matrix(weight: Tensor, error: float) -> Tensor | None:
    """A square matrix R with `R R* >= W W*` for every W within `error` of a wide weight; None where that cannot be had."""
    gram = torch.zeros(len(weight), len(weight), dtype=torch.float64)
    for columns in weight.detach().split(1024, 1):  # the whole weight in double could be too much
        part = to_float64(columns)
        gram += part @ part.mT
    size = torch.sqrt(gram.trace() * (1 + rd.gamma(4.0 * weight.numel())))
    root = _gram_root(gram[None], size[None], error, weight.shape[1])
    return None if root is None else root[0]


def _gram_root(gram: Tensor, size: Tensor, error: float, columns: int) -> Tensor | None:
    """R (F, c, c) with `R R* >= Z Z*` for every Z within `error` of a matrix of that `size`, whose Gram matrix was computed."""
    c = float(gram.shape[-1])
    noise = 2.0 * error * size + error * error + rd.gamma(16.0 * (columns + 4)) * size.square()
    trace = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    room = noise + rd.gamma(32.0 * (c + 4)) * (trace + c * noise)  # what a factorisation may lose: docs/rounding.md#r3-cholesky
    gram.diagonal(dim1=-2, dim2=-1).add_(room[:, None])
    factor, info = torch.linalg.cholesky_ex(gram)
    return factor if not bool(info.any()) and bool(factor.isfinite().all()) else None


# ---- runs of pieces ------------------------------------------------------------------------------------------------------
#
# Runs: pieces of a network one after the other, each with its own forms, linked from the last to the first.


@dataclass
class Piece:
    """Forms of some steps, and how the next piece's form reaches their output; the last piece has no link."""

    system: System
    link: Link | None = None


def single(run: Sequence[Piece]) -> list[Piece]:
    """The same pieces in single precision, for searches alone; in real numbers where imaginary parts are rounding."""
    pieces = list[Piece]()
    for piece in run:
        system = piece.system
        forms = [form for form in (*system.queries, system.output) if form is not None]
        real = all(_nearly_real(block) for form in forms for block in form.blocks.values())

        def rough(form: Form | None, real: bool = real) -> Form | None:
            return None if form is None else replace(form, blocks={a: _narrow(b, real=real) for a, b in form.blocks.items()})

        output = rough(system.output)
        assert output is not None
        slopes = [Slopes(_narrow(s.centre), _narrow(s.radius)) for s in system.slopes]
        queries = [rough(q) for q in system.queries]
        pieces.append(replace(piece, system=replace(system, queries=queries, output=output, slopes=slopes)))
    return pieces


def _narrow(t: Tensor, *, real: bool = False) -> Tensor:
    if t.is_complex() and real:
        return t.real.float()
    return t.to(torch.complex64 if t.is_complex() else torch.float32)


def _nearly_real(block: Tensor) -> bool:
    """Whether imaginary parts are rounding: at frequencies that are their own negatives, as all are on a torus of two points an axis."""
    return not block.is_complex() or float(block.imag.abs().max()) <= 1e-12 * float(block.real.abs().max())


Eliminate = Callable[[System, Quadratic, Weigh], Quadratic | None]


def descend(run: Sequence[Piece], powers: Sequence[Tensor], weigh: Sequence[Weigh], eliminate: Eliminate) -> Quadratic | None:
    """The form of the run's input, by `eliminated` or by `certified`; None where it fails."""
    form: Quadratic | None = None
    proof = eliminate is not eliminated
    for piece, power, choose in zip(reversed(run), reversed(powers), reversed(weigh), strict=True):
        terminal = None
        if form is not None:
            if not form.live:
                return form
            assert piece.link is not None
            matrix, noise = piece.link(form.matrix, power)
            terminal = Quadratic([], matrix, form.exponent)
            terminal = (raised(terminal, noise) if proof else terminal).normalised()
        form = eliminate(piece.system, start(piece.system, terminal, rounded=proof), choose)
        if form is None:
            return None
    return form


def cost(run: Sequence[Piece]) -> float:
    """Multiplications of one elimination, roughly."""
    return sum(system_cost(piece.system) for piece in run)


def system_cost(system: System) -> float:
    """Multiplications of one elimination of a piece, roughly."""
    live, work = set(system.output.blocks), 0.0
    for k in order(system):
        if k in live:
            query = system.queries[k]
            assert query is not None
            n = float(len(system.channels[k]))
            old = float(sum(len(system.channels[a]) for a in live - {k}))
            live = (live - {k}) | set(query.blocks)
            new = float(sum(len(system.channels[a]) for a in live))
            work += system.frequencies * (n**3 + (n + old) ** 2 * n + n * n * new + n * new * new + n * old * new)
    return work
