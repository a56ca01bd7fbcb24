"""One anchor eliminated: the form that is left of what stands before it, its gradient, and a form that is proved to be above it.

With H a form of anchors (r, v), `v = C q + R w`, `q = A (r, ...)` and multipliers L, the maximum over w is, where R > 0 and `K = C / R`,
`H_rr + D* S^-1 D + A* L (1 - K^2) A` with `S = L - R H_vv R` and `D = R H_vr + L K A`. docs/network.md#elimination, theorem N26.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramlip.network.coupling.linear_forms import Anchor, sizes_of
from gramlip.numerics import rounding as rd

LIFTS = (1.0, 1.0 + 1e-9, 1.0 + 1e-6, 1.001, 1.03, 1.3, 2.0, 5.0)  # multipliers that a proof refuses are raised by these
OFF = 1e-3  # and a proof is refused that would lose more, relatively


class _Eliminated(torch.autograd.Function):
    """What is left of a form, in plain floating point, and whether S was positive definite; its gradient costs three products."""

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


def eliminated(matrix: Tensor, weights: Tensor, anchor: Anchor) -> Tensor | None:
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


def inverse(own: Tensor, weights: Tensor) -> Inverse | None:
    """A proved upper bound of `S^-1 = (L - own)^-1`, for L at least these multipliers; None where there is no proof. Theorem N27."""
    unit, n = rd.gamma(32.0 * (own.shape[-1] + 8)), len(weights)
    eye = torch.eye(n, dtype=own.dtype)
    for lift in LIFTS:
        lifted = weights * lift
        roots = lifted.rsqrt()
        if not bool(lifted.isfinite().all() and roots.isfinite().all()):
            return None
        part = roots[:, None] * own * roots
        inner = eye - part
        factor, info = torch.linalg.cholesky_ex(inner)
        if bool(info.any()):
            continue
        root = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
        test = root @ inner @ root.mH
        test.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        wide = sizes_of(root)
        off = (sizes_of(test) + unit * (wide.square() * (n**0.5 + sizes_of(part)) + 1.0)) * (1 + 1e-9)
        if bool((off < OFF).all()):
            return Inverse(lifted, roots, root, off / (1.0 - off) * (1 + 1e-9), wide)
    return None


def bounded(matrix: Tensor, anchor: Anchor, error: float, found: Inverse) -> tuple[Tensor, Tensor]:
    """The matrix of a form, and by how much (in norm) the one that is left may exceed it; rows are right up to `error`."""
    weights, ratio, rows = found.weights, anchor.ratio, anchor.rows
    steepest, wide = float((weights.sqrt() * ratio.abs()).max()), sizes_of(rows)
    kept, across = sizes_of(matrix[:, : anchor.before, : anchor.before]), sizes_of(matrix[:, anchor.before :, : anchor.before])
    reach = float((found.roots * anchor.radius).max()) * across + steepest * wide
    off = (rd.gamma(32.0) * reach + steepest * error) * (1 + 1e-9)
    left, noise = found.gram(found.roots[:, None] * anchor.right(matrix, weights), off)
    unit = rd.gamma(32.0 * (matrix.shape[-1] + rows.shape[-1] + 8))
    rest = anchor.rest(weights)
    most, thickest = float(rest.abs().max()), float((weights * (1.0 + ratio.square())).max())
    noise = noise + unit * (kept + sizes_of(left) + thickest * wide.square()) + most * error * (2.0 * wide + error)
    if most > 1e-14 * float(weights.max()):
        left = left + rows.mH @ (rest[:, None] * rows)
    else:
        noise = noise + most * wide.square()
    return anchor.whole(matrix, left), noise * (1 + 1e-9)
