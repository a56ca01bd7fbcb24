"""Multipliers: which diagonal `L` the elimination takes. Any positive ones prove a bound, so nothing here has to be trusted.

In closed form from the last anchor to the first; by gradient steps on their logarithms; and, where the matrix of the whole system
can be paid for, by Newton steps on the barrier of the semidefinite program. docs/network.md#multipliers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gramlip.network.coupling.elimination import (
    Piece,
    Quadratic,
    Weigh,
    certified,
    descend,
    eliminated,
    order,
    root_of,
    start,
)
from gramlip.network.coupling.linear_forms import Slopes, System

FEW, MANY = 12, 60  # power steps: in the search, and where it counts, there
BEST = 8  # of the frequencies with the largest quotients alone after the first
EXACT = 1e9  # eigenvalues are taken in full of blocks of so many cubed rows


@dataclass
class Choice:
    """Multipliers of one anchor, free of scale: `shape` (one logarithm a multiplier) and `excess` (one number).

    The multipliers are `exp(shape)` times the least number that could do, times `1 + exp(excess)`.
    """

    shape: Tensor
    excess: Tensor

    def weights(self, block: Tensor, channels: Tensor, steps: int) -> Tensor:
        """The multipliers (n,) for the anchor's own block (F, n, n); nothing is proved here."""
        shape = self.shape.to(block.real.dtype).exp()[channels]
        return shape * _least(block, shape, steps) * (1.0 + self.excess.exp())


Choices = dict[int, Choice]
Logarithms = dict[int, Tensor]  # of the multipliers of each anchor's entries that are not linear


def _least(block: Tensor, shape: Tensor, steps: int) -> Tensor:
    """The least number that makes `shape` times it large enough for `own`."""
    root = shape.rsqrt()
    return power_estimate(root[:, None] * block * root, steps).clamp_min(max(1e-250, torch.finfo(block.dtype).tiny))


def power_estimate(blocks: Tensor, steps: int) -> Tensor:
    """Nearly the largest eigenvalue over all frequencies, from power steps; its gradient is that of the vector found.

    After `FEW` steps those go on that are among the `BEST` so far.
    """
    with torch.no_grad():
        tiny = max(1e-300, torch.finfo(blocks.dtype).tiny)
        v = blocks.abs().sum(-1, keepdim=True).to(blocks.dtype) + tiny
        estimate, v = _powered(blocks, v, min(steps, FEW), tiny)
        if steps > FEW:
            best = torch.topk(estimate[:, 0, 0], min(BEST, len(estimate)))[1]
            estimate, v = _powered(blocks[best], v[best], steps - FEW, tiny)
        else:
            best = torch.arange(len(blocks))
        at = int(estimate[:, 0, 0].argmax())
        place, vector = int(best[at]), v[at]
    return (vector.mH @ (blocks[place] @ vector)).real[0, 0]


def _powered(blocks: Tensor, v: Tensor, steps: int, tiny: float) -> tuple[Tensor, Tensor]:
    """The quotients (F, 1, 1) of vectors after power steps, and the vectors."""
    for _ in range(steps):
        v = blocks @ (v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(tiny))
    v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(tiny)
    return (v.mH @ (blocks @ v)).real, v


def _largest(blocks: Tensor) -> float:
    if blocks.shape[0] * float(blocks.shape[-1]) ** 3 <= EXACT and bool(blocks.isfinite().all()):
        return float(torch.linalg.eigvalsh(blocks)[:, -1].max())
    return float(power_estimate(blocks, MANY))


def _shape(slopes: Slopes) -> Tensor:
    """Multipliers that are the best ones, up to a factor, if the block is a multiple of the identity."""
    radius, centre = slopes.radius[slopes.on], slopes.centre[slopes.on].abs()
    return radius * (radius + torch.maximum(centre, 1e-2 * radius))


@dataclass
class MultiplierSearch:
    """The variables of a search: multipliers of each piece's anchors, and the power of each link's weights."""

    choices: list[Choices]
    powers: list[Tensor]

    @staticmethod
    def closed(run: Sequence[Piece]) -> MultiplierSearch:
        """Multipliers in closed form; where slopes are alike those of ECLipsE-Fast for chains."""
        return MultiplierSearch([_closed(piece.system) for piece in run], [torch.tensor(1.0, dtype=torch.float64) for _ in run])

    def variables(self) -> list[Tensor]:
        """All tensors."""
        return [t for choices in self.choices for c in choices.values() for t in (c.shape, c.excess)] + self.powers

    def copy(self) -> MultiplierSearch:
        """The same values, detached."""

        def own(t: Tensor) -> Tensor:
            return t.detach().clone()

        copied = [{k: Choice(own(c.shape), own(c.excess)) for k, c in choices.items()} for choices in self.choices]
        return MultiplierSearch(copied, [own(p) for p in self.powers])

    def weighs(self, run: Sequence[Piece], steps: int) -> list[Weigh]:
        """The choices of each piece as `eliminated` and `certified` ask for them."""
        return [_weigh(piece.system, choices, steps) for piece, choices in zip(run, self.choices, strict=True)]


def _weigh(system: System, choices: Choices, steps: int) -> Weigh:
    return lambda k, own, _: choices[k].weights(own, system.channels[k][system.slopes[k].on], steps)


def _closed(system: System) -> Choices:
    choices = Choices()
    for k in order(system):
        slopes, channels = system.slopes[k], system.channels[k]
        if not len(slopes.on):
            continue
        shape = torch.zeros(int(channels.max()) + 1, dtype=torch.float64)
        shape[channels[slopes.on]] = _shape(slopes).log()
        # where all slopes are alike, `radius + |centre|` over the radius of the least multiplier
        ratio = float(((slopes.centre[slopes.on].abs() / slopes.radius[slopes.on]).median()).clamp(1e-2, 10.0))
        choices[k] = Choice(shape, torch.tensor(ratio, dtype=torch.float64).log())
    return choices


def closed_logarithms(system: System) -> Logarithms | None:
    """Multipliers in closed form, for the forms as elimination meets them: ECLipsE-Fast for chains. None where it fails."""
    logarithms = Logarithms()

    def weigh(k: int, block: Tensor, exponent: int) -> Tensor:
        slopes = system.slopes[k]
        radius = slopes.radius[slopes.on]
        weights = _shape(slopes) * max(_largest(block / radius[:, None] / radius), 1e-250)
        logarithms[k] = weights.log() + exponent * math.log(4.0)
        return weights

    with torch.no_grad():
        return None if eliminated(system, start(system), weigh) is None else logarithms


def proved(system: System, logarithms: Logarithms) -> float:
    """A proved upper bound of a system's norm for these multipliers; infinite where the proof fails."""

    def weigh(k: int, block: Tensor, exponent: int) -> Tensor:
        return (logarithms[k] - exponent * math.log(4.0)).exp()

    with torch.no_grad():
        form = certified(system, start(system), weigh)
        return math.inf if form is None else root_of(form)


def certificate(run: Sequence[Piece], search: MultiplierSearch) -> float:
    """A proved upper bound of the run's Lipschitz constant for these choices; infinite where the proof fails."""
    with torch.no_grad():
        form = descend(run, search.powers, search.weighs(run, MANY), certified)
        return math.inf if form is None else root_of(form)


# ---- gradient steps ------------------------------------------------------------------------------------------------------


def _descended(run: Sequence[Piece], search: MultiplierSearch) -> Quadratic | None:
    """The input's form in plain floating point; None where it fails or is zero."""
    form = descend(run, search.powers, search.weighs(run, FEW), eliminated)
    return None if form is None or not form.live or not bool(form.matrix.detach().isfinite().all()) else form


SHARP = 10.0  # of the smooth maximum: choices that are good at the frequencies of a coarse torus alone are no good


def objective(run: Sequence[Piece], search: MultiplierSearch) -> Tensor | None:
    """Smooth maximum of the logarithms of all eigenvalues of the input's form, in plain floating point; None where it fails."""
    form = _descended(run, search)
    if form is None:
        return None
    logarithms = torch.linalg.eigvalsh(form.matrix).double().clamp_min(1e-300).log().reshape(-1)
    return torch.logsumexp(SHARP * logarithms, 0) / SHARP + form.exponent * math.log(4.0)


def reached(run: Sequence[Piece], search: MultiplierSearch) -> float:
    """The logarithm of the largest eigenvalue of the input's form, to rank choices by; infinite where it fails."""
    with torch.no_grad():
        form = _descended(run, search)
        value = math.inf if form is None else float(torch.linalg.eigvalsh(form.matrix).max())
    return math.log(max(value, 1e-300)) + form.exponent * math.log(4.0) if form is not None and value < math.inf else math.inf


RATES = (0.3, 0.04)  # of the first and the last step,
MEMORIES = (0.2, 0.5)  # and how much of the one before the averages of Adam keep: few steps have to do


def improve(run: Sequence[Piece], search: MultiplierSearch, steps: int) -> MultiplierSearch:
    """Choices after gradient steps on their logarithms, the best met; never worse than those given."""
    lowered = 1.0
    best, now, least = search.copy(), search.copy(), math.inf
    for t in now.variables():
        t.requires_grad_()
    optimiser = torch.optim.Adam(now.variables(), betas=MEMORIES)
    for i in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lowered * RATES[0] * (RATES[1] / RATES[0]) ** (i / steps)
        value = objective(run, now)
        if value is None or not math.isfinite(float(value.detach())):
            with torch.no_grad():
                for t, good in zip(now.variables(), best.variables(), strict=True):
                    t.copy_(good)
                for choices in now.choices:
                    for choice in choices.values():
                        choice.excess.add_(0.2)  # back to the best, a little inside
            lowered *= 0.5
            optimiser = torch.optim.Adam(now.variables(), betas=MEMORIES)
            continue
        size = float(value.detach())
        if size < least:
            least, best = size, now.copy()
        optimiser.zero_grad()
        value.backward()  # type: ignore[reportUnknownMemberType]
        optimiser.step()
    return best


# ---- Newton steps --------------------------------------------------------------------------------------------------------
#
# The whole system at once: with every value as a form of z = (input, w), M(rho, l) = rho |x|^2 + sum l_i (|w_i|^2 - |q_i|^2) - |output|^2
# is positive semidefinite where the norm is at most sqrt(rho). A primal-dual method makes rho small: X, positive definite as M is, tends
# to a matrix with X M = 0 and with traces of X times what M gains by each variable of 1 for rho and 0 for the multipliers.

GAP = 2e-3  # relative, of rho: what is left where the search ends


@dataclass
class Program:
    """The program in units of a start: `rho` and the multipliers are 1 there. `w` entries of z follow the `x` first ones."""

    queries: Tensor
    output: Tensor
    x: int
    variable: Tensor  # for each w the number of its multiplier
    units: Tensor  # logarithms of the units of the multipliers
    places: list[tuple[int, int, int]]  # anchor, and its first and last + 1 entry among w

    @staticmethod
    def of(system: System, logarithms: Logarithms, rho: float) -> Program:
        """The program of a system, around feasible multipliers; `rho` is the logarithm of their bound, squared."""
        x = len(system.channels[0])
        places, variable, total, count = list[tuple[int, int, int]](), list[Tensor](), 0, 0
        for k in range(1, len(system.queries)):
            if k not in logarithms:
                continue
            on = system.slopes[k].on
            numbers = torch.unique(system.channels[k][on], return_inverse=True)[1]
            variable.append(numbers + count)
            count += int(numbers.max()) + 1
            places.append((k, total, total + len(on)))
            total += len(on)
        forms, queries = _forms(system, x, places, x + total)
        output = sum(system.output.blocks[a].expand(system.frequencies, -1, -1) @ forms[a] for a in system.output.blocks)
        assert isinstance(output, Tensor)
        units = torch.cat([logarithms[k] for k, _, _ in places])
        q = torch.cat([queries[k][:, system.slopes[k].on] for k, _, _ in places], -2)
        scale = torch.cat([torch.full((x,), -0.5 * rho, dtype=torch.float64), -0.5 * units]).exp()
        return Program((0.5 * units).exp()[:, None] * q * scale, output * scale, x, torch.cat(variable), units, places)

    def matrix(self, y: Tensor) -> Tensor:
        """M at `y`: rho, and the multipliers."""
        weights = y[1:][self.variable]
        m = -(self.queries.mH @ (weights[:, None] * self.queries)) - self.output.mH @ self.output
        m.diagonal(dim1=-2, dim2=-1)[:] += torch.cat([y[:1].expand(self.x), weights])
        return m

    def direction(self, dy: Tensor) -> Tensor:
        """The change of M by `dy`."""
        weights = dy[1:][self.variable]
        m = -(self.queries.mH @ (weights[:, None] * self.queries))
        m.diagonal(dim1=-2, dim2=-1)[:] += torch.cat([dy[:1].expand(self.x), weights])
        return m

    def traces(self, s: Tensor) -> Tensor:
        """The traces of the products of Hermitian matrices with what M gains with each variable."""
        diagonal = s.diagonal(dim1=-2, dim2=-1).real.sum(0)
        diagonal_rest = diagonal[self.x :] - ((self.queries @ s) * self.queries.conj()).real.sum((0, -1))
        return torch.cat([diagonal[: self.x].sum()[None], _grouped(diagonal_rest, self.variable, self.count)])

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """The traces of `T_i one T_j other` for Hermitian matrices, T_i being what M gains with variable i."""
        x, q = self.x, self.queries
        u, v = q @ left, q @ right
        across = _product(u[:, :, x:], v[:, :, x:])
        block = _product(left[:, x:, x:], right[:, x:, x:]) - across - across.mT + _product(u @ q.mH, v @ q.mH)
        full = torch.empty(self.count + 1, self.count + 1, dtype=torch.float64)
        full[1:, 1:] = _grouped(_grouped(block, self.variable, self.count).mT, self.variable, self.count)
        full[0, 0] = _product(left[:, :x, :x], right[:, :x, :x]).sum()
        mixed = _product(left[:, x:, :x], right[:, x:, :x]).sum(-1) - _product(u[:, :, :x], v[:, :, :x]).sum(-1)
        full[0, 1:] = full[1:, 0] = _grouped(mixed, self.variable, self.count)
        return full

    @property
    def count(self) -> int:
        """Number of multipliers."""
        return int(self.variable.max()) + 1

    def logarithms(self, y: Tensor) -> Logarithms:
        """The multipliers at `y`, in the system's own units."""
        logs = y[1:][self.variable].log() + self.units
        return {k: logs[first:last] for k, first, last in self.places}


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The real part of `a conj(b)` entry by entry, summed over the frequencies."""
    return (a.real * b.real + a.imag * b.imag if a.is_complex() else a * b).sum(0)


def _grouped(t: Tensor, numbers: Tensor, n: int) -> Tensor:
    """Sums of the rows that share a number."""
    return torch.zeros(n, *t.shape[1:], dtype=t.dtype).index_add(0, numbers, t)


def _forms(system: System, x: int, places: Sequence[tuple[int, int, int]], size: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Every anchor and every query as matrices on z: v = C q + R w."""
    dtype = next(iter(system.output.blocks.values())).dtype
    first = {k: start for k, start, _ in places}
    forms = {0: torch.eye(x, size, dtype=dtype).expand(system.frequencies, -1, -1)}
    queries = dict[int, Tensor]()
    for k in range(1, len(system.queries)):
        query, slopes = system.queries[k], system.slopes[k]
        assert query is not None
        n = len(slopes.centre)
        q = torch.zeros(system.frequencies, n, size, dtype=dtype)
        for a, block in query.blocks.items():
            q = q + block.expand(system.frequencies, -1, -1) @ forms[a]
        queries[k], forms[k] = q, slopes.centre[:, None] * q
        if k in first:
            forms[k][:, slopes.on, x + first[k] + torch.arange(len(slopes.on))] += slopes.radius[slopes.on].to(dtype)
    return forms, queries


def newton_cost(system: System) -> float:
    """Multiplications of one Newton step, roughly."""
    n = float(sum(len(slopes.on) for slopes in system.slopes[1:]))
    z = n + len(system.channels[0])
    return system.frequencies * (6 * z**3 + 4 * n * z * z + 2 * n * n * z) + n**3


def newton(system: System, logarithms: Logarithms, steps: int) -> Iterator[Logarithms]:
    """Better and better multipliers from feasible ones, within so many steps of a primal-dual method (HKM, with a corrector)."""
    rho = _bound_logarithm(system, logarithms)
    if not math.isfinite(rho) or not logarithms:
        return
    at = Iterate.first(Program.of(system, logarithms, rho))
    for _ in range(steps):
        at = None if at is None else at.next()
        if at is None:
            return
        yield at.program.logarithms(at.y)
        if at.gap < GAP * float(at.y[0]):
            return


@dataclass
class Iterate:
    """Variables y, M there, the inverse of M, and the dual matrix X."""

    program: Program
    y: Tensor
    m: Tensor
    inverse: Tensor
    dual: Tensor

    @staticmethod
    def first(program: Program) -> Iterate | None:
        """A little inside; X a multiple of the inverse."""
        y = torch.ones(1 + program.count, dtype=torch.float64)
        y[0] = 1.5
        m = program.matrix(y)
        inverse = _inverse(m)
        return None if inverse is None else Iterate(program, y, m, inverse, inverse / program.traces(inverse)[0])

    @property
    def gap(self) -> float:
        """The trace of X M."""
        return float(_product(self.dual, self.m).sum())

    def next(self) -> Iterate | None:
        """The point after one step; None where numbers fail."""
        lower, info = torch.linalg.cholesky_ex(self.program.products(self.dual, self.inverse))
        if bool(info) or not bool(lower.isfinite().all()):
            return None
        size = self.gap
        _, dm, dx = self._step(lower, torch.zeros_like(self.m))
        left = float(_product(self.dual + _longest(self.dual, dx) * dx, self.m + _longest(self.m, dm) * dm).sum()) / size
        correction = dx @ (dm @ self.inverse)
        mean = min(max(left, 0.0), 1.0) ** 3 * size / (self.m.shape[0] * self.m.shape[-1])
        dy, dm, dx = self._step(lower, mean * self.inverse - 0.5 * (correction + correction.mH))
        y = self.y + _longest(self.m, dm) * dy
        m = self.program.matrix(y)
        inverse = _inverse(m)
        return None if inverse is None else Iterate(self.program, y, m, inverse, self.dual + _longest(self.dual, dx) * dx)

    def _step(self, lower: Tensor, goal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The steps of y, of M and of X: to first order, X M becomes `goal` M, and the traces of X what they should be."""
        rest = self.program.traces(goal)
        rest[0] -= 1.0
        dy = torch.cholesky_solve(rest[:, None], lower)[:, 0]
        dm = self.program.direction(dy)
        dx = goal - self.dual - self.dual @ (dm @ self.inverse)
        return dy, dm, 0.5 * (dx + dx.mH)


def _longest(matrix: Tensor, step: Tensor) -> float:
    """Nearly the longest part of a step, at most all of it, that leaves a positive definite matrix so; and a little less."""
    length = 1.0
    for _ in range(60):
        if not bool(torch.linalg.cholesky_ex(matrix + length * step)[1].any()):
            return length if length == 1.0 else 0.95 * length
        length *= 0.85
    return 0.0


def _inverse(matrix: Tensor) -> Tensor | None:
    factor, info = torch.linalg.cholesky_ex(matrix)
    return None if bool(info.any()) else torch.cholesky_inverse(factor)


def _bound_logarithm(system: System, logarithms: Logarithms) -> float:
    """The logarithm of the square of what these multipliers give in plain floating point."""

    def weigh(k: int, block: Tensor, exponent: int) -> Tensor:
        return (logarithms[k] - exponent * math.log(4.0)).exp()

    form = eliminated(system, start(system), weigh)
    if form is None or not form.live or not bool(form.matrix.isfinite().all()):
        return math.inf
    top = float(torch.linalg.eigvalsh(form.matrix)[:, -1].max())
    return math.log(top) + form.exponent * math.log(4.0) if top > 0 else math.inf
