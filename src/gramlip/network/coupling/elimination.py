"""Anchors eliminated one at a time: from a form of the segment's output down to a quadratic form of its input.

For `u = D q` with `0 <= D <= 1` diagonal, any diagonal `L >= 0` gives `u* L (q - u) >= 0`; adding it twice and maximising
over u leaves `H + B* (2 L - H_uu)^-1 B`. docs/network.md#elimination, arXiv 2404.04375 for chains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gramlip.network.coupling.linear_forms import Link, System, size_of, sizes_of
from gramlip.numerics import rounding as rd
from gramlip.numerics.cholesky import cholesky

FLOOR = 1e-250  # forms below it are given up: underflow would be above the bounds of rounding
LIFTS = 24  # multipliers that a factorisation refuses are raised so many times, by a tenth each


@dataclass
class Choice:
    """Multipliers of one anchor, free of scale: `shape` (one logarithm a multiplier) and `excess` (one number).

    The multipliers are `exp(shape)` times the least number that could do, times `1 + 2 exp(excess)`.
    """

    shape: Tensor
    excess: Tensor

    def weights(self, own: Tensor, channels: Tensor, steps: int) -> Tensor:
        """The multipliers (n,) for the anchor's own block (F, n, n); nothing is proved here."""
        shape = self.shape.exp()[channels]
        root = shape.rsqrt()
        least = power_estimate(root[:, None] * own * root, steps).clamp_min(FLOOR)
        return shape * least * (0.5 + self.excess.exp())


Choices = dict[int, Choice]


@dataclass
class Quadratic:
    """A Hermitian form (F, n, n) over the anchors `live`, in that order."""

    live: list[int]
    matrix: Tensor


def raised(live: list[int], matrix: Tensor, noise: Tensor | float) -> Quadratic:
    """A form at least as large as any within `noise` in norm of `matrix`: what is known up to noise is replaced by what is above it."""
    matrix = 0.5 * (matrix + matrix.mH)
    room = (noise + rd.gamma(8) * (sizes_of(matrix.detach()) + noise)) * (1 + 1e-9)
    matrix.diagonal(dim1=-2, dim2=-1).add_(room[:, None])
    return Quadratic(live, matrix)


def start(system: System, terminal: Tensor | None = None) -> Quadratic:
    """The form `|output|^2`, or `output* terminal output` for a positive semidefinite form (F, m, m) of the output."""
    live = sorted(system.output.blocks)
    wide = torch.cat([system.output.blocks[a].expand(system.frequencies, -1, -1) for a in live], -1)
    size = size_of(wide)
    error = rd.hypot_up(system.output.errors[a] for a in live)
    unit = rd.gamma(16.0 * (wide.shape[1] + 4))
    noise = rd.add_up(
        rd.mul_up(2.0, rd.mul_up(size, error)),
        rd.mul_up(error, error),
        rd.mul_up(unit, rd.mul_up(size, size)),
    )
    if terminal is None:
        return raised(live, wide.mH @ wide, noise)
    return raised(live, wide.mH @ (terminal @ wide), noise * sizes_of(terminal.detach()))


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
    rows = [
        query.blocks[a].expand(f, -1, -1) if a in query.blocks else form.matrix.new_zeros(f, n, s) for a, s in zip(live, sizes, strict=True)
    ]
    error = rd.hypot_up(query.errors.values())
    old = form.matrix.shape[-1] - n
    rest, pair = form.matrix[:, :old, :old], form.matrix[:, old:, :old]
    if live != form.live[:-1]:
        at = torch.cat([torch.full((s,), a in form.live[:-1]) for a, s in zip(live, sizes, strict=True)]).nonzero()[:, 0]
        every, total = torch.arange(f)[:, None, None], sum(sizes)
        rest = form.matrix.new_zeros(f, total, total).index_put((every, at[:, None], at), rest)
        pair = form.matrix.new_zeros(f, n, total).index_put((every, torch.arange(n)[:, None], at), pair)
    return Split(live, rest, pair, form.matrix[:, old:, old:], torch.cat(rows, -1) if rows else pair, error)


def power_estimate(own: Tensor, steps: int) -> Tensor:
    """Nearly the largest eigenvalue over all frequencies, from power steps; its gradient is that of the vector found."""
    with torch.no_grad():
        v = own.abs().sum(-1, keepdim=True).to(own.dtype) + 1e-300
        for _ in range(steps):
            v = own @ (v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(1e-300))
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(1e-300)
        best = int((v.mH @ (own @ v)).real.argmax())
    return (v[best].mH @ (own[best] @ v[best])).real[0, 0]


def closed_form(system: System) -> Choices:
    """One multiplier an anchor, the largest eigenvalue of its own block: ECLipsE-Fast where the segment is a chain."""
    found = Choices()
    for k in order(system):
        count = int(system.channels[k].max()) + 1
        excess = torch.tensor(max(system.ratios[k] - 0.5, 1e-3), dtype=torch.float64).log()
        found[k] = Choice(torch.zeros(count, dtype=torch.float64), excess)
    return found


def eliminated(system: System, form: Quadratic, choices: Choices) -> Quadratic | None:
    """The form of the input alone, in plain floating point; None where a step was not positive definite."""
    for k in order(system):
        if k not in form.live:
            continue
        parts = split(system, form, k)
        weights = choices[k].weights(parts.own, system.channels[k], 12)
        inner = torch.diag(2.0 * weights).to(parts.own.dtype) - parts.own
        factor, info = torch.linalg.cholesky_ex(inner)
        if bool(info.any()):
            return None
        root = torch.linalg.solve_triangular(factor, parts.pair + weights[:, None] * parts.rows, upper=False)
        form = Quadratic(parts.live, parts.rest + root.mH @ root)
    return form


def certified(system: System, form: Quadratic, choices: Choices) -> Quadratic | None:
    """A form of the input that is proved to be above: every rounding is bounded a posteriori. None where the proof fails.

    No eigenvalue or solution of a system is trusted. docs/network.md#certificate.
    """
    for k in order(system):
        if k not in form.live:
            continue
        parts = split(system, form, k)
        proved = _multiplied(parts, choices[k], system.channels[k])
        if proved is None:
            return None
        weights, inner, least = proved
        b = parts.pair + weights[:, None] * parts.rows
        x = torch.linalg.solve(inner, b)
        cross = x.mH @ b
        residual = b - inner @ x
        matrix = parts.rest + cross + cross.mH - x.mH @ (inner @ x)
        sizes = [sizes_of(t) for t in (x, b, inner, parts.rows)]
        unit = rd.gamma(16.0 * (len(weights) + matrix.shape[-1] + 8))
        off = float(weights.max()) * parts.error + unit * (sizes[1] + float(weights.max()) * sizes[3])
        gap = sizes_of(residual) + unit * (sizes[1] + sizes[2] * sizes[0]) + off
        slack = unit * (2 * sizes[0] * sizes[1] + sizes[0].square() * sizes[2] + sizes_of(parts.rest))
        form = raised(parts.live, matrix, (2 * sizes[0] * off + slack + gap.square() / least) * (1 + 1e-9))
    return form


def _multiplied(parts: Split, choice: Choice, channels: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Multipliers, `2 L - H_uu` and a proved lower bound of its least eigenvalue; multipliers that are too small are raised."""
    weights = choice.weights(parts.own, channels, 60)
    for _ in range(LIFTS):
        inner = torch.diag(2.0 * weights).to(parts.own.dtype) - parts.own
        least = _least_eigenvalue(inner)
        if least is not None:
            return weights, inner, least
        weights = weights * 1.1
    return None


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


def root_of(form: Quadratic) -> float:
    """Upper bound of the root of the largest eigenvalue over all frequencies; infinite where the proof fails."""
    if not form.live:
        return 0.0
    tops = torch.linalg.eigvalsh(form.matrix)[:, -1].clamp_min(0.0)
    for slack in (1e-9, 1e-6, 1e-3):
        threshold = tops.max() * (1 + slack)
        if bool((threshold > FLOOR) and cholesky(form.matrix.clone(), threshold.expand(len(tops)).clone(), torch.zeros_like(tops)).all()):
            return rd.sqrt_up(rd.mul_up(float(threshold), 1 + 1e-12))
    return float("inf")


# ---- runs of pieces ------------------------------------------------------------------------------------------------------
#
# Runs: pieces of a network one after the other, each with its own forms, linked from the last to the first.


@dataclass
class Piece:
    """Forms of some steps, and how the next piece's form reaches their output; the last piece has no link."""

    system: System
    link: Link | None = None


@dataclass
class MultiplierSearch:
    """What a search may choose: multipliers of each piece's anchors, and the power of each link's weights."""

    choices: list[Choices]
    powers: list[Tensor]

    @staticmethod
    def closed(run: Sequence[Piece]) -> MultiplierSearch:
        """Multipliers in closed form."""
        return MultiplierSearch([closed_form(piece.system) for piece in run], [torch.tensor(1.0, dtype=torch.float64) for _ in run])

    def variables(self) -> list[Tensor]:
        """All tensors."""
        return [t for choices in self.choices for c in choices.values() for t in (c.shape, c.excess)] + self.powers

    def copy(self) -> MultiplierSearch:
        """The same values, detached."""

        def own(t: Tensor) -> Tensor:
            return t.detach().clone()

        copied = [{k: Choice(own(c.shape), own(c.excess)) for k, c in choices.items()} for choices in self.choices]
        return MultiplierSearch(copied, [own(p) for p in self.powers])


def objective(run: Sequence[Piece], search: MultiplierSearch) -> Tensor | None:
    """Smooth maximum over the frequencies of the logarithm of the input's form, in plain floating point; None where it fails."""
    terminal, logarithm = None, 0.0
    form = None
    for piece, choices, power in zip(reversed(run), reversed(search.choices), reversed(search.powers), strict=True):
        if form is not None:
            assert piece.link is not None
            terminal = piece.link(form.matrix, power)[0]
            scale = float(terminal.detach().abs().max().clamp_min(1e-250))
            terminal, logarithm = terminal / scale, logarithm + math.log(scale)
        form = eliminated(piece.system, start(piece.system, terminal), choices)
        if form is None:
            return None
    assert form is not None
    top = torch.linalg.eigvalsh(form.matrix)[:, -1].clamp_min(1e-300).log()
    return torch.logsumexp(40.0 * top, 0) / 40.0 + logarithm


def reached(run: Sequence[Piece], search: MultiplierSearch) -> float:
    """The objective as a number, to rank choices by; infinite where it fails."""
    with torch.no_grad():
        value = objective(run, search)
    return math.inf if value is None or math.isnan(float(value)) else float(value)


def improve(run: Sequence[Piece], search: MultiplierSearch, steps: int, rate: float = 0.1) -> MultiplierSearch:
    """Choices after gradient steps on their logarithms, the best met; never worse than those given."""
    best, now, least = search.copy(), search.copy(), math.inf
    for t in now.variables():
        t.requires_grad_()
    optimiser = torch.optim.Adam(now.variables(), lr=rate)
    for i in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1.0 - i / steps)
        value = objective(run, now)
        if value is None or not math.isfinite(float(value.detach())):
            with torch.no_grad():
                for t, good in zip(now.variables(), best.variables(), strict=True):
                    t.copy_(good)
                for choices in now.choices:
                    for choice in choices.values():
                        choice.excess.add_(0.2)  # back to the best, a little inside
            rate *= 0.5
            optimiser = torch.optim.Adam(now.variables(), lr=rate)
            continue
        size = float(value.detach())
        if size < least:
            least, best = size, now.copy()
        optimiser.zero_grad()
        value.backward()  # type: ignore[reportUnknownMemberType]
        optimiser.step()
    return best


def certificate(run: Sequence[Piece], search: MultiplierSearch) -> float:
    """A proved upper bound of the run's Lipschitz constant for these choices; infinite where the proof fails."""
    terminal, doublings = None, 0
    form = None
    with torch.no_grad():
        for piece, choices, power in zip(reversed(run), reversed(search.choices), reversed(search.powers), strict=True):
            if form is not None:
                assert piece.link is not None
                matrix, noise = piece.link(form.matrix, power)
                above = raised([], matrix, noise).matrix
                exponent = 2 * (math.frexp(float(above.abs().max()))[1] // 2)  # forms of size 1: no underflow, however long the run
                terminal, doublings = above * 2.0**-exponent, doublings + exponent // 2
            form = certified(piece.system, start(piece.system, terminal), choices)
            if form is None:
                return math.inf
            if not form.live:
                return 0.0
    assert form is not None
    root = root_of(form)
    if root == math.inf or not -900 < math.frexp(root)[1] + doublings < 900:
        return math.inf
    return rd.up(math.ldexp(root, doublings))


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
            live = (live - {k}) | set(query.blocks)
            work += system.frequencies * float(sum(len(system.channels[a]) for a in live) + len(system.channels[k])) ** 3
    return work
