"""Runs: pieces of a network one after the other, each with its own forms, linked from the last to the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gramlip.network.coupling.elimination import Choice, Choices, certified, closed_form, eliminated, order, raised, root_of, start
from gramlip.network.coupling.frequency_aliasing import Link
from gramlip.network.coupling.linear_forms import System
from gramlip.numerics import rounding as rd


@dataclass
class Piece:
    """Forms of some steps, and how the next piece's form reaches their output; the last piece has no link."""

    system: System
    link: Link | None = None


@dataclass
class Search:
    """What a search may choose: multipliers of each piece's anchors, and the power of each link's weights."""

    choices: list[Choices]
    powers: list[Tensor]

    @staticmethod
    def closed(run: Sequence[Piece]) -> Search:
        """Multipliers in closed form."""
        return Search([closed_form(piece.system) for piece in run], [torch.tensor(1.0, dtype=torch.float64) for _ in run])

    def variables(self) -> list[Tensor]:
        """All tensors."""
        return [t for choices in self.choices for c in choices.values() for t in (c.shape, c.excess)] + self.powers

    def copy(self) -> Search:
        """The same values, detached."""

        def own(t: Tensor) -> Tensor:
            return t.detach().clone()

        copied = [{k: Choice(own(c.shape), own(c.excess)) for k, c in choices.items()} for choices in self.choices]
        return Search(copied, [own(p) for p in self.powers])


def objective(run: Sequence[Piece], search: Search) -> Tensor | None:
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


def reached(run: Sequence[Piece], search: Search) -> float:
    """The objective as a number, to rank choices by; infinite where it fails."""
    with torch.no_grad():
        value = objective(run, search)
    return math.inf if value is None or math.isnan(float(value)) else float(value)


def improve(run: Sequence[Piece], search: Search, steps: int, rate: float = 0.1) -> Search:
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


def certificate(run: Sequence[Piece], search: Search) -> float:
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
