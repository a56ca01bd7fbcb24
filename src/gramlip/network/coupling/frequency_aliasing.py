"""Links: the form that one piece leaves on its input, as the form that the piece before it starts from on its output.

docs/network.md#links. A torus of N points with r phases carries the same values as one of r N points; where a strided layer
has mixed the frequencies f + N k, the form is replaced by one above it that does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from gramlip.network.coupling.circulant import Circulant
from gramlip.network.coupling.linear_forms import sizes_of
from gramlip.numerics import rounding as rd

Sides = tuple[int, ...]


class Link(Protocol):
    """From a form (F, n, n) of the later piece's input to one (F', m, m) of the earlier piece's output."""

    def __call__(self, form: Tensor, power: Tensor) -> tuple[Tensor, Tensor | float]:
        """A form above it up to the noise (each in norm) that is returned beside it; `power` shapes the weights of aliases."""
        ...


@dataclass
class Pooled:
    """`weight` times the sum over all places: on the torus, the frequency 0 times a constant; known up to `error` in norm."""

    torus: Circulant
    places: int
    weight: float
    error: float

    def __call__(self, form: Tensor, power: Tensor) -> tuple[Tensor, Tensor | float]:
        """`|w sum x|^2 = places w^2 |x(0)|^2`, x(0) the unitary transform at frequency 0 on the torus of all places."""
        factor = self.places * self.weight**2
        wide = torch.zeros(self.torus.frequencies, *form.shape[1:], dtype=torch.complex128)
        wide = wide.index_put((torch.zeros(1, dtype=torch.long),), (form * factor).to(torch.complex128))
        # |w sum x + e|^2 with |e| <= error |x|, in the form: 2 |w sum| error + error^2 times its size.
        off = rd.mul_up(self.error, rd.add_up(rd.mul_up(2.0, rd.sqrt_up(factor * (1 + 1e-9))), self.error))
        size = float(sizes_of(form.detach()).max())
        return wide, rd.add_up(rd.mul_up(rd.gamma(8), rd.mul_up(factor, size)), rd.mul_up(off, size))


@dataclass
class Alias:
    """From phases `inner` on the torus `later` to phases `outer` on the torus `earlier`; both tori have the same fine points."""

    later: Circulant
    inner: Sides
    earlier: Circulant
    outer: Sides

    def __call__(self, form: Tensor, power: Tensor) -> tuple[Tensor, Tensor | float]:
        """Theorem N8: `P <= sum_k P_kk / t_k` over the aliases k, for weights t that add up to at most 1."""
        if self.later.points == self.earlier.points and self.inner == self.outer:
            return form, 0.0
        blocks, noise = self._aliases(form, power)
        index, alias, mirrored = self._sources
        fine = blocks[index, alias]
        fine = torch.where(mirrored[:, None, None], fine.conj(), fine)  # real weights: the form at -f is the conjugate
        spread = noise[index]
        count = math.prod(self.outer)
        if count == 1:
            return fine, spread
        turns = _turns(self.earlier, self.outer)
        f, c = len(turns), fine.shape[-1]
        joined = torch.einsum("fkj,fkcd,fki->fjcid", turns.conj(), fine.reshape(f, count, c, c), turns).reshape(f, count * c, count * c)
        spread = spread.reshape(f, count).amax(1)
        return joined, spread + rd.gamma(16.0 * count) * count * sizes_of(joined.detach())

    def _aliases(self, form: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        """A block for each alias of each frequency of `later`: (F, K, C, C)."""
        count = math.prod(self.inner)
        f, c = len(form), form.shape[-1] // count
        if count == 1:
            return form[:, None], torch.zeros(f, dtype=torch.float64)
        turns = _turns(self.later, self.inner)
        parts = torch.einsum("fkj,fjcid,fki->fkcd", turns, form.reshape(f, count, c, count, c), turns.conj())
        sizes = parts.diagonal(dim1=-2, dim2=-1).real.sum(-1)
        sizes = sizes.clamp_min(1e-9 * float(sizes.detach().max()) + 1e-300)
        logs = power * sizes.log()
        shares = torch.softmax(logs, 1)
        shares = shares / (shares.sum(1, keepdim=True) * (1.0 + rd.gamma(count + 8.0)))  # their sum is at most 1
        noise = rd.gamma(32.0 * count) * count * sizes_of(form.detach()) / shares.detach().amin(1)
        return parts / shares[..., None, None], noise

    @cached_property
    def _sources(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each fine frequency that `earlier` needs: the frequency of `later`, the alias, and whether to conjugate."""
        n, m = torch.tensor(self.later.points), torch.tensor(self.earlier.points)
        whole = n * torch.tensor(self.inner)
        assert bool((whole == m * torch.tensor(self.outer)).all())
        steps = torch.cartesian_prod(*(torch.arange(r) for r in self.outer)).reshape(-1, len(self.outer))
        wanted = (self.earlier.grid[:, None] + m * steps).reshape(-1, len(n))
        index, mirrored = self.later.find(wanted % n)
        turned = torch.where(mirrored[:, None], (-wanted) % whole, wanted)
        alias = torch.zeros(len(wanted), dtype=torch.long)
        for j, r in enumerate(self.inner):
            alias = alias * r + turned[:, j] // n[j]
        return index, alias, mirrored


def _turns(torus: Circulant, phases: Sides) -> Tensor:
    """The unitary matrices (F, K, K) from phases j to the frequencies f + N k of the fine torus."""
    turns = torch.ones(torus.frequencies, 1, 1, dtype=torch.complex128)
    for axis, (n, r) in enumerate(zip(torus.points, phases, strict=True)):
        k = torch.arange(r)
        fine = torus.grid[:, axis, None, None] + n * k[:, None]
        angle = -2.0 * math.pi * ((fine * k) % (n * r)).double() / (n * r)
        one = torch.polar(torch.full_like(angle, r**-0.5), angle)
        turns = torch.einsum("fkj,fli->fklji", turns, one).reshape(torus.frequencies, turns.shape[1] * r, -1)
    return turns
