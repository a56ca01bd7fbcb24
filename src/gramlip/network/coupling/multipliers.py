"""Multipliers: which diagonal `L` the elimination takes. Any positive ones prove a bound, so nothing here has to be trusted.

In closed form from the last anchor to the first; by gradient steps on their logarithms; and, where the matrix of the whole system
can be paid for, by Newton steps on the barrier of the semidefinite program. docs/network.md#multipliers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from gramlip.network.coupling.elimination import (
    Piece,
    Quadratic,
    Weigh,
    certified,
    descend,
    eliminated,
    middle_of,
    order,
    part_of,
    root_of,
    start,
)
from gramlip.network.coupling.linear_forms import Form, Slopes, System

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
        v = torch.linalg.vector_norm(blocks, dim=-1, keepdim=True).to(blocks.dtype) + tiny
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

    def inside(self) -> MultiplierSearch:
        """A copy a little further inside."""
        copied = self.copy()
        for choices in copied.choices:
            for choice in choices.values():
                choice.excess.add_(0.2)
        return copied

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


def _fixed(logarithms: Logarithms) -> Weigh:
    return lambda k, _, exponent: (logarithms[k] - exponent * math.log(4.0)).exp()


def proved(system: System, logarithms: Logarithms) -> float:
    """A proved upper bound of a system's norm for these multipliers; infinite where the proof fails."""
    with torch.no_grad():
        form = certified(system, start(system), _fixed(logarithms))
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


RATES, RATES_AFTER = (0.3, 0.04), (0.12, 0.03)  # of the first and the last step, from closed forms and from a search on a coarser torus,
MEMORIES = (0.2, 0.5)  # and how much of the one before the averages of Adam keep: few steps have to do


def improve(run: Sequence[Piece], search: MultiplierSearch, steps: int, rates: tuple[float, float] = RATES) -> MultiplierSearch:
    """Choices after gradient steps on their logarithms, the best met; never worse than those given."""
    best, now, least, lowered = search.copy(), search.copy(), math.inf, 1.0
    optimiser = _optimiser(now)
    for i in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lowered * rates[0] * (rates[1] / rates[0]) ** (i / steps)
        value = objective(run, now)
        size = math.nan if value is None else float(value.detach())
        if value is None or not math.isfinite(size):
            now, lowered = best.inside(), 0.5 * lowered
            optimiser = _optimiser(now)
            continue
        if size < least:
            least, best = size, now.copy()
        optimiser.zero_grad()
        value.backward()  # type: ignore[reportUnknownMemberType]
        optimiser.step()
    return best


def _optimiser(search: MultiplierSearch) -> torch.optim.Adam:
    return torch.optim.Adam([t.requires_grad_() for t in search.variables()], betas=MEMORIES)


# ---- Newton steps --------------------------------------------------------------------------------------------------------
#
# The whole system at once: with every value as a form of z, M(rho, l) = rho |x|^2 + sum l_i (|w_i|^2 - |q_i|^2) - |output|^2 is positive
# semidefinite where the norm is at most sqrt(rho). A primal-dual method makes rho small: X, positive definite as M is, tends to a matrix
# with X M = 0 and with traces of X times what M gains by each variable of 1 for rho and 0 for the multipliers. z are the input and, but
# for steep and linear entries, the values themselves, so that a query reads few entries of z and M is made of few blocks.

GAP = 1e-3  # relative, of rho: what is left where the search ends
ROUGH, FINE = (0.8, 8), (0.88, 32)  # steps are shortened to powers of a ratio, up to so many: to look ahead, and to be taken
LONG = 8  # chains of so many anchors start from their halves,
JOINED, MOST_JOINED = 0.3, 30  # whose gaps are so small, after at most so many steps


@dataclass
class Program:
    """The program in units of a start: `rho` and the multipliers are 1 there. `w` entries of z follow the `x` first ones.

    The vectors of a multiplier are `p = e - ratio q` and q, and what M gains with it is `p p* - q q*`. A query of one anchor reads few
    entries of z: it is kept as its rows among all queries, the columns between the first and the last one read, and that block.
    """

    queries: list[tuple[slice, slice, Tensor]]
    ratio: Tensor
    output: Tensor
    x: int
    variable: Tensor  # for each w the number of its multiplier
    rho: float  # logarithms of the units of rho
    units: Tensor  # and of the multipliers
    places: list[tuple[int, int, int]]  # anchor, and its first and last + 1 entry among w

    @staticmethod
    def of(system: System, logarithms: Logarithms, rho: float) -> Program:
        """The program of a system, around feasible multipliers; `rho` is the logarithm of their bound, squared."""
        places, variable = _places(system, logarithms)
        x, units = len(system.channels[0]), torch.cat([logarithms[k] for k, _, _ in places])
        halves = 0.5 * torch.cat([torch.full((x,), rho, dtype=torch.float64), units])
        queries, output = _forms(system, places)
        ratio = torch.cat([system.slopes[k].split[0][system.slopes[k].on] for k, _, _ in places])

        def scaled(wide: Tensor, first: int, last: int) -> tuple[slice, slice, Tensor]:
            cols = _span(wide)
            return slice(first, last), cols, wide[:, :, cols] * (halves[x + first : x + last, None] - halves[cols]).exp()

        blocks = [scaled(wide, first, last) for (_, first, last), wide in zip(places, queries, strict=True)]
        return Program(blocks, ratio, output * (-halves).exp(), x, variable, rho, units, places)

    def matrix(self, y: Tensor) -> Tensor:
        """M at `y`: rho, and the multipliers."""
        return self.direction(y) - self.output.mH @ self.output

    def direction(self, dy: Tensor) -> Tensor:
        """The change of M by `dy`."""
        weights, n = dy[1:][self.variable], self.output.shape[-1]
        m = self.output.new_zeros(len(self.output), n, n)
        for rows, cols, q in self.queries:
            weight, ratio = weights[rows, None], self.ratio[rows, None]
            m[:, cols, cols] += q.mH @ ((weight * (ratio - 1.0) * (ratio + 1.0)) * q)
            at, cross = slice(self.x + rows.start, self.x + rows.stop), weight * ratio * q
            m[:, at, cols] -= cross
            m[:, cols, at] -= cross.mH
        m.diagonal(dim1=-2, dim2=-1)[:] += torch.cat([dy[:1].expand(self.x), weights])
        return m

    def moved(self, dy: Tensor, s: Tensor, queried: Tensor) -> Tensor:
        """`direction(dy) @ s` for a Hermitian s whose queries are known."""
        weights, ratio = dy[1:][self.variable, None], self.ratio[:, None]
        lifted = weights * (s[:, self.x :] - ratio * queried)
        back = ratio * lifted + weights * queried
        result = torch.cat([dy[0] * s[:, : self.x], lifted], -2)
        for rows, cols, q in self.queries:
            result[:, cols] -= q.mH @ back[:, rows]
        return result

    def queried(self, s: Tensor) -> Tensor:
        """All queries of the columns of a matrix."""
        return torch.cat([q @ s[:, cols] for _, cols, q in self.queries], -2)

    def traces(self, s: Tensor) -> Tensor:
        """The traces of the products of a Hermitian matrix with what M gains with each variable."""
        diagonal = s.diagonal(dim1=-2, dim2=-1).real.sum(0)
        gains = diagonal[self.x :].clone()
        for rows, cols, q in self.queries:
            u, ratio = q @ s[:, cols], self.ratio[rows]
            cross = u[:, :, self.x + rows.start : self.x + rows.stop].diagonal(dim1=-2, dim2=-1).real.sum(0)
            gains[rows] += (ratio - 1.0) * (ratio + 1.0) * _product(u[:, :, cols], q).sum(-1) - 2.0 * ratio * cross
        return torch.cat([diagonal[: self.x].sum()[None], _grouped(gains, self.variable, self.count)])

    def vectors(self, s: Tensor, queried: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The values `p* s (p, x)`, `p* s q` and `q* s (q, x)` of a Hermitian matrix, between all vectors p and q and the input."""
        ratio, u = self.ratio[:, None], queried[:, :, self.x :]
        qq = self.queried(queried.mH)
        pq = u.mH - ratio * qq
        pp = s[:, self.x :, self.x :] - ratio * u - pq * self.ratio
        inputs = queried[:, :, : self.x]
        return torch.cat([pp, s[:, self.x :, : self.x] - ratio * inputs], -1), pq, torch.cat([qq, inputs], -1)

    def products(self, left: Tensor, right: Tensor, queried: Tensor) -> Tensor:
        """The traces of `T_i left T_j right` for Hermitian matrices, T_i being what M gains with variable i; `queried` of `right`."""
        n, x = len(self.variable), self.x
        p, cross, q = map(_product, self.vectors(left, self.queried(left)), self.vectors(right, queried))
        block = (p[:, :n] + q[:, :n]).sub_(cross).sub_(cross.mT)
        full = torch.empty(self.count + 1, self.count + 1, dtype=torch.float64)
        full[1:, 1:] = _grouped(_grouped(block, self.variable, self.count).mT, self.variable, self.count)
        full[0, 0] = _product(left[:, :x, :x], right[:, :x, :x]).sum()
        full[0, 1:] = full[1:, 0] = _grouped((p[:, n:] - q[:, n:]).sum(-1), self.variable, self.count)
        return full

    @cached_property
    def blocks(self) -> list[tuple[slice, int]]:
        """The input and the anchors as parts of z, each with the first column that M couples it with."""
        parts = [slice(0, self.x), *(slice(self.x + first, self.x + last) for _, first, last in self.places)]
        rows = [slice(self.x + rows.start, self.x + rows.stop) for rows, _, _ in self.queries]
        reads = [*zip(rows, [cols for _, cols, _ in self.queries], strict=True), (slice(0, 0), _span(self.output))]

        def first(at: slice) -> int:
            return min([at.start, *(cols.start for rows, cols in reads if rows == at or (cols.start < at.stop and at.start < cols.stop))])

        return [(at, first(at)) for at in parts]

    def longest(self, m: Tensor, step: Tensor, lengths: tuple[float, int]) -> float:
        """`_longest` for M and a change of it: anchor after anchor eliminated, from the last one."""

        def fits(length: float) -> bool:
            front, low = m[:, :0, :0], m.shape[-1]  # what is left of M between the columns low and at.stop
            for at, first in reversed(self.blocks):
                rows = torch.add(m[:, at, min(low, first) : at.stop], step[:, at, min(low, first) : at.stop], alpha=length)
                n, grown = at.stop - at.start, low - min(low, first)
                front = nn.functional.pad(front, (grown, 0, grown, 0)) if grown else front
                rows += front[:, -n:]
                factor, info = torch.linalg.cholesky_ex(rows[:, :, -n:])
                if bool(info.any()):
                    return False
                root = torch.linalg.solve_triangular(factor, rows[:, :, :-n], upper=False)
                front, low = front[:, :-n, :-n] - root.mH @ root, min(low, first)
            return True

        return _longest(fits, lengths)

    @cached_property
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
    return t if n == len(numbers) else torch.zeros(n, *t.shape[1:], dtype=t.dtype).index_add(0, numbers, t)


def _span(wide: Tensor) -> slice:
    """From the first to the last column that is not zero."""
    read = (wide != 0).any(-2).any(0).nonzero()[:, 0]
    return slice(int(read[0]), int(read[-1]) + 1) if len(read) else slice(0, 1)


def _places(system: System, logarithms: Logarithms) -> tuple[list[tuple[int, int, int]], Tensor]:
    """The anchors with multipliers, each with its first and last + 1 entry among w; and for each w the number of its multiplier."""
    places, variable, total, count = list[tuple[int, int, int]](), list[Tensor](), 0, 0
    for k in sorted(logarithms):
        numbers = torch.unique(system.channels[k][system.slopes[k].on], return_inverse=True)[1]
        variable.append(numbers + count)
        count += int(numbers.max()) + 1
        places.append((k, total, total + len(numbers)))
        total += len(numbers)
    return places, torch.cat(variable)


def _forms(system: System, places: Sequence[tuple[int, int, int]]) -> tuple[list[Tensor], Tensor]:
    """The queries of the entries that are not linear, anchor by anchor, and the output, as matrices on z."""
    x, like = len(system.channels[0]), next(iter(system.output.blocks.values()))
    size, first = x + places[-1][2], {k: start for k, start, _ in places}

    def on_z(form: Form) -> Tensor:
        wide = like.new_zeros(system.frequencies, next(iter(form.blocks.values())).shape[-2], size)
        for a, block in form.blocks.items():
            wide[:, :, values[a][0]] += block @ values[a][1]
        return wide

    values = {0: (slice(0, x), torch.eye(x, dtype=like.dtype)[None])}  # columns and block of each anchor
    queries = list[Tensor]()
    for k in range(1, len(system.queries)):
        query, slopes, on = system.queries[k], system.slopes[k], system.slopes[k].on
        assert query is not None
        q = on_z(query) if query.blocks else like.new_zeros(system.frequencies, len(slopes.centre), size)
        value = slopes.split[1][:, None] * q
        if k in first:
            queries.append(q[:, on])
            value[:, on, x + first[k] + torch.arange(len(on))] += slopes.radius[on].to(like.dtype)
        cols = _span(value)
        values[k] = cols, value[:, :, cols].clone()
    return queries, on_z(system.output)


def newton_cost(system: System) -> float:
    """Multiplications of one Newton step, roughly."""
    sizes = [len(slopes.on) for slopes in system.slopes]
    reads = [sum(len(system.channels[a]) for a in query.blocks) if query is not None else 0 for query in system.queries]
    n = float(sum(sizes[1:]))
    z = n + len(system.channels[0])
    return system.frequencies * (6 * z**3 + 10 * z * sum(a * b for a, b in zip(sizes[1:], reads[1:], strict=True))) + n**3 / 6


def newton(system: System, logarithms: Logarithms, steps: int) -> Iterator[Logarithms]:
    """Better and better multipliers from feasible ones, within so many steps of a primal-dual method (HKM, with a corrector)."""
    if steps < 1 or not logarithms:
        return
    at = Iterate.first(system, _joined(system, logarithms))
    for _ in range(steps):
        at = None if at is None else at.next()
        if at is None:
            return
        yield at.program.logarithms(at.y)
        if at.gap < GAP * float(at.y[0]):
            return


def _joined(system: System, logarithms: Logarithms) -> Logarithms:
    """Multipliers to start from: of a long chain those of its halves, once their own gaps are small; else the given ones.

    Where |v| <= r |x| and |output| <= s |v| follow from two sums of multipliers, s^2 times the first and the second give r s.
    """
    middle, last = middle_of(system), len(system.queries) - 1
    if middle is None or last < LONG:
        return logarithms
    joined, scale = Logarithms(), 0.0
    for first, end in (middle, last), (0, middle):
        at = _half(part_of(system, first, end))
        if at is None:
            return logarithms
        joined |= {first + k: logs + scale for k, logs in at.program.logarithms(at.y).items()}
        scale += at.program.rho + math.log(float(at.y[0]))
    return joined if bound_logarithm(system, joined) < bound_logarithm(system, logarithms) else logarithms


def _half(system: System) -> Iterate | None:
    """A point of a half with a small gap; None where numbers fail."""
    closed = closed_logarithms(system)
    at = Iterate.first(system, _joined(system, closed)) if closed else None
    for _ in range(MOST_JOINED):
        if at is None or at.gap < JOINED * float(at.y[0]):
            break
        at = at.next()
    return at


@dataclass
class Iterate:
    """Variables y, M there, the inverse of M with its queries, and the dual matrix X."""

    program: Program
    y: Tensor
    m: Tensor
    inverse: Tensor
    queried: Tensor
    dual: Tensor

    @staticmethod
    def first(system: System, logarithms: Logarithms) -> Iterate | None:
        """A little inside the multipliers given; None where they prove nothing."""
        rho = bound_logarithm(system, logarithms)
        if not math.isfinite(rho):
            return None
        program = Program.of(system, logarithms, rho)
        return Iterate.at(program, torch.cat([torch.full((1,), 1.5), torch.ones(program.count)]).double())

    @staticmethod
    def at(program: Program, y: Tensor, dual: Tensor | None = None) -> Iterate | None:
        """The point y, with a multiple of the inverse for X if none is given; None where M is not positive definite."""
        m = program.matrix(y)
        factor, info = torch.linalg.cholesky_ex(m)
        if bool(info.any()):
            return None
        inverse = torch.cholesky_inverse(factor)
        dual = inverse / inverse.diagonal(dim1=-2, dim2=-1)[:, : program.x].real.sum() if dual is None else dual
        return Iterate(program, y, m, inverse, program.queried(inverse), dual)

    @property
    def gap(self) -> float:
        """The trace of X M."""
        return float(_product(self.dual, self.m).sum())

    def next(self) -> Iterate | None:
        """The point after one step; None where numbers fail."""
        lower, info = torch.linalg.cholesky_ex(self.program.products(self.dual, self.inverse, self.queried))
        if bool(info) or not bool(lower.isfinite().all()):
            return None
        _, dm, dx, turned = self._step(lower, torch.zeros_like(self.m))
        mean = self._left(dm, dx) ** 3 * self.gap / (self.m.shape[0] * self.m.shape[-1])
        dy, dm, dx, _ = self._step(lower, mean * self.inverse - _hermitian(dx @ turned))
        part, dual_part = self.program.longest(self.m, dm, FINE), _longest_dual(self.dual, dx, FINE)
        return Iterate.at(self.program, self.y + part * dy, self.dual + dual_part * dx) if part + dual_part > 0 else None

    def _left(self, dm: Tensor, dx: Tensor) -> float:
        """The part of the gap that the longest steps would leave."""
        m = self.m + self.program.longest(self.m, dm, ROUGH) * dm
        dual = self.dual + _longest_dual(self.dual, dx, ROUGH) * dx
        return min(max(float(_product(dual, m).sum()) / self.gap, 0.0), 1.0)

    def _step(self, lower: Tensor, goal: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The steps of y, of M and of X, and that of M times the inverse.

        To first order, X M becomes `goal` M, and the traces of X what they should be.
        """
        rest = self.program.traces(goal)
        rest[0] -= 1.0
        dy = torch.cholesky_solve(rest[:, None], lower)[:, 0]
        turned = self.program.moved(dy, self.inverse, self.queried)
        return dy, self.program.direction(dy), goal - _hermitian(self.dual @ turned).add_(self.dual), turned


def _hermitian(matrix: Tensor) -> Tensor:
    return torch.add(matrix, matrix.mH).mul_(0.5)


def _longest_dual(dual: Tensor, dx: Tensor, lengths: tuple[float, int]) -> float:
    return _longest(lambda length: not bool(torch.linalg.cholesky_ex(torch.add(dual, dx, alpha=length))[1].any()), lengths)


def _longest(fits: Callable[[float], bool], lengths: tuple[float, int]) -> float:
    """Nearly the longest part of a step that fits, at most all of it, and a little less."""
    if fits(1.0):
        return 1.0
    (ratio, short), long = lengths, 0
    while short - long > 1:
        middle = (short + long) // 2
        short, long = (middle, long) if fits(ratio**middle) else (short, middle)
    return 0.95 * ratio**short if short < lengths[1] or fits(ratio**short) else 0.0


def bound_logarithm(system: System, logarithms: Logarithms) -> float:
    """The logarithm of the square of what these multipliers give in plain floating point."""
    form = eliminated(system, start(system), _fixed(logarithms))
    if form is None or not form.live or not bool(form.matrix.isfinite().all()):
        return math.inf
    top = float(torch.linalg.eigvalsh(form.matrix)[:, -1].max())
    return math.log(top) + form.exponent * math.log(4.0) if top > 0 else math.inf
