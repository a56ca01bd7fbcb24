"""Anchors eliminated one at a time: from `|output|^2` down to a quadratic form of the segment's input.

For `u = D q` with `0 <= D <= 1` diagonal, any diagonal `L >= 0` gives `u* L (q - u) >= 0`; adding it twice and maximising
over u leaves `H + B* (2 L - H_uu)^-1 B`. docs/network.md#elimination, arXiv 2404.04375 for chains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gramlip import rounding as rd
from gramlip.certificates import cholesky
from gramlip.coupling.forms import System, size_of, sizes_of

Multipliers = dict[int, Tensor]


@dataclass
class Quadratic:
    """A Hermitian form (F, n, n) over the anchors `live`, in that order."""

    live: list[int]
    matrix: Tensor


def raised(live: list[int], matrix: Tensor, noise: Tensor | float) -> Quadratic:
    """A form at least as large as any within `noise` in norm of `matrix`: what is known up to noise is replaced by what is above it."""
    matrix = 0.5 * (matrix + matrix.mH)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    room = (noise + rd.gamma(8) * (sizes_of(matrix) + noise)) * (1 + 1e-9)
    diagonal.add_(room[:, None])
    return Quadratic(live, matrix)


def start(system: System) -> Quadratic:
    """The form of `|output|^2`."""
    live = sorted(system.output.blocks)
    wide = torch.cat([system.output.blocks[a].expand(system.frequencies, -1, -1) for a in live], -1)
    size = size_of(wide)
    error = rd.hypot_up(system.output.errors[a] for a in live)
    noise = rd.add_up(
        rd.mul_up(2.0, rd.mul_up(size, error)),
        rd.mul_up(error, error),
        rd.mul_up(rd.gamma(8.0 * (wide.shape[1] + 4)), rd.mul_up(size, size)),
    )
    return raised(live, wide.mH @ wide, noise)


def order(system: System) -> Iterator[int]:
    """The anchors from the last to the first that is not the input."""
    return iter(range(len(system.queries) - 1, 0, -1))


@dataclass
class Split:
    """A form split at its last anchor: `rest` over `live`, `pair` (n_k, rest) and `own` (n_k, n_k), with the query `rows` (n_k, rest)."""

    live: list[int]
    rest: Tensor
    pair: Tensor
    own: Tensor
    rows: Tensor
    error: float


def split(system: System, form: Quadratic, k: int) -> Split:
    """The form widened by the anchors of query k, which it may not hold yet."""
    query = system.queries[k]
    assert query is not None
    f = system.frequencies
    live = sorted({*form.live[:-1], *query.blocks})
    sizes = [len(system.channels[a]) for a in live]
    n = len(system.channels[k])
    held = (
        torch.cat([torch.full((s,), a in form.live[:-1]) for a, s in zip(live, sizes, strict=True)])
        if live
        else torch.zeros(0, dtype=torch.bool)
    )
    at = held.nonzero()[:, 0]
    total, old = sum(sizes), form.matrix.shape[-1] - n
    rest = form.matrix.new_zeros(f, total, total).index_put((torch.arange(f)[:, None, None], at[:, None], at), form.matrix[:, :old, :old])
    pair = form.matrix.new_zeros(f, n, total).index_put(
        (torch.arange(f)[:, None, None], torch.arange(n)[:, None], at), form.matrix[:, old:, :old]
    )
    rows = [
        query.blocks[a].expand(f, -1, -1) if a in query.blocks else form.matrix.new_zeros(f, n, s) for a, s in zip(live, sizes, strict=True)
    ]
    error = rd.hypot_up(query.errors.values())
    return Split(live, rest, pair, form.matrix[:, old:, old:], torch.cat(rows, -1), error)


def closed_form(system: System) -> Multipliers:
    """One multiplier an anchor, the largest eigenvalue of its own block: ECLipsE-Fast where the segment is a chain."""
    form, found = start(system), Multipliers()
    for k in order(system):
        if k not in form.live:
            continue
        parts = split(system, form, k)
        top = _largest(parts.own)
        count = int(system.channels[k].max()) + 1
        found[k] = torch.full((count,), max(top, 1e-300) * system.ratios[k] * (1 + 1e-6), dtype=torch.float64)
        form = _step(system, parts, found[k], k)[0]
    return found


def _largest(own: Tensor) -> float:
    """Nearly the largest eigenvalue over all frequencies; wide blocks by power steps. Nothing is proved here."""
    if own.shape[-1] <= 64:
        return float(torch.linalg.eigvalsh(own)[:, -1].max())
    v = own.abs().sum(-1, keepdim=True).to(own.dtype)
    for _ in range(30):
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(1e-300)
        v = own @ v
    return 1.01 * float(torch.linalg.vector_norm(v, dim=-2).max())


def _step(system: System, parts: Split, multipliers: Tensor, k: int) -> tuple[Quadratic, Tensor]:
    weights = multipliers[system.channels[k]]
    inner = torch.diag(2.0 * weights).to(parts.own.dtype) - parts.own
    factor, info = torch.linalg.cholesky_ex(inner)
    b = parts.pair + weights[:, None] * parts.rows
    root = torch.linalg.solve_triangular(factor, b, upper=False)
    return Quadratic(parts.live, parts.rest + root.mH @ root), info


def objective(system: System, multipliers: Multipliers) -> tuple[Tensor, bool]:
    """Smooth maximum over the frequencies of the largest eigenvalue's logarithm, and whether every step was positive definite."""
    form, feasible = start(system), True
    for k in order(system):
        if k in form.live:
            form, info = _step(system, split(system, form, k), multipliers[k], k)
            feasible = feasible and not bool(info.any())
            if not feasible:
                return torch.tensor(math.inf), False
    top = torch.linalg.eigvalsh(form.matrix)[:, -1].clamp_min(1e-300).log()
    return torch.logsumexp(40.0 * top, 0) / 40.0, feasible


def improve(system: System, multipliers: Multipliers, steps: int, rate: float = 0.1) -> Multipliers:
    """Multipliers after gradient steps on their logarithms, the best met; never worse than those given."""
    best = {k: m.clone() for k, m in multipliers.items()}
    logs = {k: m.log().requires_grad_() for k, m in multipliers.items()}
    optimiser = torch.optim.Adam(list(logs.values()), lr=rate)
    least = math.inf
    for i in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1.0 - i / steps)
        value, feasible = objective(system, {k: t.exp() for k, t in logs.items()})
        if not feasible:
            with torch.no_grad():
                for k, t in logs.items():
                    t.copy_(best[k].log() + 0.1)  # back to the best, a little inside
            rate *= 0.5
            optimiser = torch.optim.Adam(list(logs.values()), lr=rate)
            continue
        reached = float(value.detach())
        if reached < least:
            least, best = reached, {k: t.detach().exp() for k, t in logs.items()}
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    return best


def certificate(system: System, multipliers: Multipliers) -> float:
    """A proved upper bound of the segment's Lipschitz constant for these multipliers; infinite where the proof fails.

    Every rounding is bounded a posteriori; no eigenvalue or solution of a system is trusted. docs/network.md#certificate.
    """
    form = start(system)
    for k in order(system):
        if k not in form.live:
            continue
        parts = split(system, form, k)
        weights = multipliers[k][system.channels[k]]
        n = len(weights)
        inner = torch.diag(2.0 * weights).to(parts.own.dtype) - parts.own
        least = _least_eigenvalue(inner)
        if least is None:
            return math.inf
        b = parts.pair + weights[:, None] * parts.rows
        x = torch.linalg.solve(inner, b)
        cross = x.mH @ b
        matrix = parts.rest + cross + cross.mH - x.mH @ (inner @ x)
        sizes = [sizes_of(t) for t in (x, b, inner, parts.rows)]
        unit = rd.gamma(16.0 * (n + matrix.shape[-1] + 8))
        off = float(weights.max()) * parts.error + unit * (sizes[1] + float(weights.max()) * sizes[3])
        residual = sizes_of(b - inner @ x) + unit * (sizes[1] + sizes[2] * sizes[0]) + off
        slack = unit * (2 * sizes[0] * sizes[1] + sizes[0].square() * sizes[2] + sizes_of(parts.rest))
        form = raised(parts.live, matrix, (2 * sizes[0] * off + slack + residual.square() / least) * (1 + 1e-9))
    if not form.live:
        return 0.0
    return _root(form)


def _least_eigenvalue(matrix: Tensor) -> Tensor | None:
    """A proved positive lower bound of the least eigenvalue of each matrix; None where there is none."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        return None
    guess = 0.5 / sizes_of(torch.cholesky_inverse(factor))
    top = sizes_of(matrix)
    # lambda_1(top I - M) <= top - guess proves that M >= guess.
    turned = torch.diag_embed(top[:, None].expand(-1, matrix.shape[-1])).to(matrix.dtype) - matrix
    return guess if bool(cholesky(turned, top - guess, rd.gamma(4) * top).all()) else None


def _root(form: Quadratic) -> float:
    """Upper bound of the root of the largest eigenvalue over all frequencies."""
    tops = torch.linalg.eigvalsh(form.matrix)[:, -1].clamp_min(0.0)
    for slack in (1e-9, 1e-6, 1e-3):
        threshold = tops.max() * (1 + slack)
        if bool((threshold > 0) and cholesky(form.matrix.clone(), threshold.expand(len(tops)).clone(), torch.zeros_like(tops)).all()):
            return rd.sqrt_up(rd.mul_up(float(threshold), 1 + 1e-12))
    return math.inf
