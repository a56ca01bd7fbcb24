"""`certify`: the enclosure of an operator's norm to a relative width, rounding included."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gramlip import rounding as rd
from gramlip.blocks import Symbol, symbol
from gramlip.bound import Bound
from gramlip.finite import Certificate, Layer
from gramlip.gramian import Gramian
from gramlip.operators import Conv, Dense, Diagonal
from gramlip.search import Enclosure, Search

AUTO_OPERATIONS = 2e10  # finite="auto" certifies the finite layer itself while its estimated operations stay below this
FINITE_BYTES = 384 << 20  # and never with more memory than this
TRIES = 12


def certify(op: Conv | Dense | Diagonal, *, rtol: float = 1e-2, finite: bool | str = "auto") -> Bound:
    """Certified interval of the operator's norm: the search over its symbol, and the finite layer where that is closer.

    Reference: docs/theory.md and docs/rounding.md.
    """
    with torch.no_grad():
        if isinstance(op, Diagonal):
            return _diagonal(op)
        return _Enclosing(op, rtol, finite).bound()


def _diagonal(op: Diagonal) -> Bound:
    if op.weight.is_complex():
        pairs = torch.view_as_real(op.weight.resolve_conj()).to(torch.float64).reshape(-1, 2).tolist()
        top = max(rd.hypot_up(map(abs, pair)) for pair in pairs)
        return Bound(rd.down(top * (1 - 2.0**-50)), top, "largest modulus of a diagonal")
    top = max(abs(x) for x in op.weight.to(torch.float64).flatten().tolist())
    return Bound(top, top, "largest entry of a diagonal")


class _Enclosing:
    """One enclosure: the symbol's search, the layer's own lower side, its own certificate."""

    def __init__(self, op: Conv | Dense, rtol: float, finite: bool | str) -> None:
        self.op, self.rtol, self.finite = op, rtol, finite
        self.sym = symbol(op)
        self.gram = Gramian(self.sym.kernel)
        self.search = Search(self.gram, self.sym.points, rtol)

    def bound(self) -> Bound:
        self.search.start()
        if max(self.gram.mass) == 0.0:
            return Bound(0.0, 0.0, f"{self.sym.because}; all weights are zero")
        factor = rd.sqrt_up(float(self.sym.square))
        if self.sym.exact or not isinstance(self.op, Conv) or self.op.input_size is None:
            found = self.search.close(self.rtol)
            lower = rd.mul_down(found.lower, rd.down(factor) if factor != 1.0 else 1.0)
            if not self.sym.exact:
                lower = found.lower if self.sym.square == 1 else 0.0
            return self._scaled(lower, rd.mul_up(found.upper, factor), self._why(found))
        return self._finite(factor)

    def _finite(self, factor: float) -> Bound:
        """A layer of given size whose blocks bound it from above only."""
        assert isinstance(self.op, Conv)
        layer = Layer(self.op, self.gram.exponent)
        group = self.search.where[0]
        above = math.sqrt(self.search.best) * factor
        x, lower = self._ascend(layer, group, _wave(self.sym, self.search, self.op, layer), above)
        certificate = None if self.finite is False else Certificate(layer, group)
        gap = above / lower - 1 if lower else math.inf
        if certificate is not None and gap > self.rtol * 0.9 and self._worth(certificate):
            return self._own(layer, lower, x)
        room = (1 + self.rtol) / (1 + gap) - 1 if gap < math.inf else 0.0
        found = self.search.close(max(room * 0.98, self.rtol / 4))
        upper = rd.mul_up(found.upper, factor)
        why = f"{self._why(found)}; lower side from the layer itself"
        return self._scaled(min(lower, upper), upper, why)

    def _worth(self, certificate: Certificate) -> bool:
        groups = self.gram.groups
        fits = certificate.bytes <= FINITE_BYTES
        return fits and (self.finite is True or certificate.cost * groups <= AUTO_OPERATIONS)

    def _ascend(self, layer: Layer, group: int, x: Tensor, above: float) -> tuple[Tensor, float]:
        """Lanczos steps on the layer until its Rayleigh quotient is as close to the blocks' norm as it can come."""
        best = layer.lower(x, group, self.gram.mass[group])
        for _ in range(TRIES):
            if best >= above * (1 - self.rtol / 4):
                break
            y = layer.ascend(x, group, 12)
            value = layer.lower(y, group, self.gram.mass[group])
            improved = value > best * (1 + self.rtol / 50)
            if value > best:
                x, best = y, value
            if not improved:
                break
        return x, best

    def _own(self, layer: Layer, lower: float, x: Tensor) -> Bound:
        """The finite layer's own certificate, group by group."""
        operations = 0
        top = lower
        for group in range(self.gram.groups):
            if self.gram.mass[group] == 0.0:
                continue
            certificate = Certificate(layer, group)
            certificate.prepare()
            start = x if group == self.search.where[0] else _start_like(layer, x)
            for _ in range(4 * TRIES):
                operations += 1
                if certificate.proves(top * (1 + self.rtol * 0.98), self.gram.mass[group]):
                    break
                start = layer.ascend(start, group, 24)
                value = layer.lower(start, group, self.gram.mass[group])
                top = max(top, value)
            else:
                return self._scaled(top, math.inf, "unreachable")
        upper = rd.up(rd.mul_up(top, rd.up(1 + self.rtol * 0.98)))
        size = "x".join(map(str, layer.sizes))
        why = f"{self.sym.because.split(';')[0]}; the finite layer itself at size {size}: block-banded Cholesky, {operations} factorization(s)"
        return self._scaled(top, upper, why)

    def _scaled(self, lower: float, upper: float, why: str) -> Bound:
        return Bound(_times_power(lower, self.gram.exponent, upward=False), _times_power(upper, self.gram.exponent, upward=True), why)

    def _why(self, found: Enclosure) -> str:
        tally = found.tally
        ways = " and ".join(sorted(tally.ways)) or "none needed"
        where = f"; attained at frequency ({', '.join(f'{w:.4g}' for w in found.frequency)})" if found.frequency else ""
        group = f" of group {found.group}" if self.gram.groups > 1 else ""
        early = "" if found.finished else "; budget reached before the width asked for"
        return f"{self.sym.because}; {ways} on {tally.blocks} blocks of {self.gram.side}x{self.gram.side}{where}{group}{early}"


def _times_power(x: float, exponent: int, *, upward: bool) -> float:
    """x times a power of two, rounded outward where it leaves the normal range."""
    if x == 0.0 or math.isinf(x):
        return x
    try:
        y = math.ldexp(x, exponent)
    except OverflowError:
        return math.inf if upward else 1.7976931348623157e308
    if y < rd.TINY:
        return rd.TINY if upward else 0.0
    return y


def _wave(sym: Symbol, search: Search, op: Conv, layer: Layer) -> Tensor:
    """A start for the layer's own power steps: the best block's singular vector on a plane wave under a sine window."""
    n = layer.kernel.shape[2]
    window = torch.ones((), dtype=torch.float64, device=layer.kernel.device)
    for size in layer.sizes:
        sine = (math.pi * (torch.arange(size, dtype=torch.float64, device=layer.kernel.device) + 1) / (size + 1)).sin()
        window = window[..., None] * sine
    simple = not search.g.flipped and all(s == 1 for s in op.stride) and search.vector is not None  # type: ignore[union-attr]
    if not simple:
        return _start_like(layer, layer.kernel.new_zeros(n, *layer.sizes)) * window
    assert search.vector is not None
    phase = torch.zeros((), dtype=torch.float64, device=layer.kernel.device)
    for size, index, lattice, dilation in zip(layer.sizes, search.where[1], search.sizes, op.dilation, strict=True):  # type: ignore[arg-type]
        angle = 2 * math.pi * index / lattice / dilation
        phase = phase[..., None] - angle * torch.arange(size, dtype=torch.float64, device=layer.kernel.device)
    x = search.vector.to(torch.complex128).reshape(-1, *(1,) * phase.ndim) * torch.polar(window, phase)
    if layer.kernel.is_complex():
        return x
    real, imaginary = x.real, x.imag
    return real if float(real.norm()) >= float(imaginary.norm()) else imaginary


def _start_like(layer: Layer, x: Tensor) -> Tensor:
    """A deterministic start vector of the shape of x."""
    i = torch.arange(1, x.numel() + 1, dtype=torch.float64, device=x.device)
    v = 1 + 0.5 * (i * 0.754877666).frac() * torch.where((i * 0.569840291).frac() < 0.5, -3.0, 1.0)
    return v.reshape(x.shape).to(layer.kernel.dtype)
