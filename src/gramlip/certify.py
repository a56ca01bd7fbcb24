"""`certify`: the enclosure of an operator's norm to a relative width, rounding included."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from gramlip import rounding as rd
from gramlip.blocks import symbol
from gramlip.bound import Bound
from gramlip.boundary import excess
from gramlip.finite import Certificate, Layer
from gramlip.gramian import Gramian
from gramlip.operators import Conv, Dense, Diagonal, Operator, Separable
from gramlip.search import Enclosure, Search

AUTO_OPERATIONS = 2e10  # finite="auto" certifies the finite layer itself while its estimated operations stay below this
FINITE_BYTES = 384 << 20  # and never with more memory than this
TRIES = 12
WAYS = {"Cholesky": "Cholesky (R3)", "Gram": "Gram (theorems 1 and 2, R4)", "tap bound": "tap bound (theorem 8)"}


def certify(op: Operator, *, rtol: float = 1e-2, finite: bool | str = "auto") -> Bound:
    """Certified interval of the operator's norm: the search over its symbol, and the finite layer where that is closer.

    Reference: docs/theory.md and docs/rounding.md.
    """
    with torch.no_grad(), _on_cpu():
        if isinstance(op, Diagonal):
            return _diagonal(op)
        if isinstance(op, Separable):
            return _separable(op, rtol)
        return _Enclosing(op, rtol, finite).bound()


def _on_cpu() -> AbstractContextManager[object]:
    """The lattice lives on the CPU, whatever the default device; the context costs time, so only where it is needed."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _diagonal(op: Diagonal) -> Bound:
    if op.weight.is_complex():
        pairs = torch.view_as_real(op.weight.resolve_conj()).to(torch.float64).reshape(-1, 2).tolist()
        top = max(rd.hypot_up(map(abs, pair)) for pair in pairs)
        return Bound(rd.down(top * (1 - 2.0**-50)), top, "largest modulus of a diagonal")
    top = max(abs(x) for x in op.weight.to(torch.float64).flatten().tolist())
    return Bound(top, top, "largest entry of a diagonal")


def _separable(op: Separable, rtol: float) -> Bound:
    """The norm of a Kronecker product is the product of the norms: docs/theory.md#fixed-maps."""
    lower = upper = abs(op.scale)
    for factor in op.factors:
        part = certify(Dense(factor), rtol=rtol / len(op.factors) * 0.99)
        lower, upper = rd.mul_down(lower, part.lower), rd.mul_up(upper, float(part.upper))
    # The entries come from torch's float64: each is within a few units of the real constant (docs/rounding.md#fixed-maps).
    grow = 2.0**-44 * len(op.factors)
    return Bound(rd.down(lower * (1 - grow)), rd.up(upper * (1 + grow)), "product of the norms of the axes of a separable map")


class _Enclosing:
    """One enclosure: the symbol's search, the layer's own lower side, its own certificate."""

    def __init__(self, op: Conv | Dense, rtol: float, finite: bool | str) -> None:
        self.op, self.rtol, self.finite = op, rtol, finite
        self.sym = symbol(op)
        self.gram = Gramian(self.sym.kernel)
        self.search = Search(self.gram, self.sym.points)

    def bound(self) -> Bound:
        """The interval."""
        self.search.start(self.rtol)
        if max(self.gram.mass) == 0.0:
            return Bound(0.0, 0.0, f"{self.sym.because}; all weights are zero")
        if isinstance(self.op, Conv) and self.op.input_size is not None and not self.sym.exact:
            return self._of_size(self.op)
        found = self.search.close(self.rtol)[0]
        upper, why = self._above(found)
        if self.sym.exact:
            factor = math.sqrt(self.sym.square)
            return self._scaled(rd.mul_down(found.lower, factor if factor == 1.0 else rd.down(factor)), upper, why)
        assert isinstance(self.op, Conv)
        if all(s == 1 for s in self.op.stride):  # type: ignore[union-attr]
            return self._scaled(found.lower, upper, f"{why}; lower side: large inputs come as close to the supremum as one likes")
        large = certify(replace(self.op, padding_mode="zeros"), rtol=self.rtol)
        return Bound(large.lower, self._scaled(0.0, upper, "").upper, f"{why}; lower side: large inputs of a multiple of the stride")

    def _of_size(self, op: Conv) -> Bound:
        """A layer of given size whose blocks bound it from above only."""
        layer = Layer(op, self.gram.exponent)
        group = int(self.search.lattice.decode(self.search.where)[0])
        above = math.sqrt(float(self.search.best) * self.sym.square)
        x, lower = self._ascend(layer, group, _wave(self.search, op, layer), above)
        gap = above / lower - 1 if lower else math.inf
        note = ""
        if self.finite is not False and gap > self.rtol * 0.9:
            certificate = Certificate(layer, group)
            if certificate.bytes > FINITE_BYTES:
                note = f"; the finite layer's own certificate would need {certificate.bytes / 2**30:.1f} GiB" if self.finite is True else ""
            elif self.finite is True or certificate.cost * self.gram.groups <= AUTO_OPERATIONS:
                return self._own(layer, lower, x)
        room = (1 + self.rtol) / (1 + gap) - 1 if gap < math.inf else 0.0
        found = self.search.close(max(room * 0.98, self.rtol / 4))[0]
        upper, why = self._above(found)
        return self._scaled(min(lower, upper), upper, f"{why}; lower side from the layer itself{note}")

    def _above(self, found: Enclosure) -> tuple[float, str]:
        """The layer's upper bound from the symbol's: times the padding's factor, or plus what the boundary adds."""
        upper = rd.mul_up(found.upper, rd.sqrt_up(float(self.sym.square)))
        if self.sym.square > 1 and isinstance(self.op, Conv) and self.op.padding_mode in ("reflect", "replicate"):
            parts = [excess(self.op, g, self.gram.exponent, self.gram.mass[g]) for g in range(self.gram.groups)]
            if None not in parts:
                extra = max(p for p in parts if p is not None)
                other = rd.sqrt_up(rd.add_up(rd.mul_up(found.upper, found.upper), extra))
                if other < upper:
                    return other, f"{self._why(found)}; plus the boundary's share"
        factor = f"; times sqrt({self.sym.square}), the norm of the padding" if self.sym.square > 1 else ""
        return upper, self._why(found) + factor

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
        top, factorizations, width, floor = lower, 0, self.rtol * 0.98, 0.0
        for group in range(self.gram.groups):
            if rd.mul_up(self.gram.mass[group], rd.sqrt_up(float(layer.shared))) <= top:
                continue
            certificate = Certificate(layer, group)
            certificate.prepare()
            vector = x if group == int(self.search.lattice.decode(self.search.where)[0]) else _start_like(layer, x)
            while True:
                factorizations += 1
                if certificate.proves(max(top, floor) * (1 + width), self.gram.mass[group]):
                    break
                before = top
                vector = layer.ascend(vector, group, 24)
                top = max(top, layer.lower(vector, group, self.gram.mass[group]))
                if top <= before * (1 + width / 50):  # no better vector is in reach: the interval stays wider than asked for
                    width *= 1.5
                    # a layer whose taps read nothing but padding, or cancel, has norm zero: prove a small number instead
                    floor = max(floor, self.gram.mass[group] * 2.0**-20) if top == 0.0 else floor
        upper = rd.mul_up(max(top, floor), rd.up(1 + width))
        size = "x".join(map(str, layer.sizes))
        mode = {"zeros": "zero"}.get(self.op.padding_mode, self.op.padding_mode)  # type: ignore[union-attr]
        why = f"{mode} padding: the finite layer itself at size {size}, block-banded Cholesky (theorem 11, R3), {factorizations} factorizations"
        return self._scaled(top, upper, why)

    def _scaled(self, lower: float, upper: float, why: str) -> Bound:
        return Bound(_times_power(lower, self.gram.exponent, upward=False), _times_power(upper, self.gram.exponent, upward=True), why)

    def _why(self, found: Enclosure) -> str:
        tally = found.tally
        ways = " and ".join(WAYS[way] for way in sorted(tally.ways))
        where = f"; attained at frequency ({', '.join(f'{w:.4g}' for w in found.frequency)})" if found.frequency else ""
        cells = " at the corners of cells (theorem 7)" if found.frequency else ""
        group = f" of group {found.group}" if self.gram.groups > 1 else ""
        early = "" if found.finished else "; budget reached before the width asked for"
        return f"{self.sym.because}; {ways} on {tally.blocks} blocks of {self.gram.side}x{self.gram.side}{cells}{where}{group}{early}"


def _times_power(x: float, exponent: int, *, upward: bool) -> float:
    """X times a power of two, rounded outward where it leaves the normal range."""
    if x == 0.0 or math.isinf(x):
        return x
    try:
        y = math.ldexp(x, exponent)
    except OverflowError:
        return math.inf if upward else 1.7976931348623157e308
    if y < rd.TINY:
        return rd.TINY if upward else 0.0
    return y


def _wave(search: Search, op: Conv, layer: Layer) -> Tensor:
    """A start for the layer's own power steps: the best block's singular vector on a plane wave under a sine window."""
    n = layer.kernel.shape[2]
    window = torch.ones((), dtype=torch.float64, device=layer.kernel.device)
    for size in layer.sizes:
        sine = (math.pi * (torch.arange(size, dtype=torch.float64, device=layer.kernel.device) + 1) / (size + 1)).sin()
        window = window[..., None] * sine
    simple = not search.g.flipped and all(s == 1 for s in op.stride)  # type: ignore[union-attr]
    if not simple:
        return _start_like(layer, layer.kernel.new_zeros(n, *layer.sizes)) * window
    index = search.lattice.decode(search.where)[1][0].tolist()
    phase = torch.zeros((), dtype=torch.float64, device=layer.kernel.device)
    for size, i, lattice, dilation in zip(layer.sizes, index, search.lattice.sizes, op.dilation, strict=True):  # type: ignore[arg-type]
        angle = 2 * math.pi * i / lattice / dilation
        phase = phase[..., None] - angle * torch.arange(size, dtype=torch.float64, device=layer.kernel.device)
    x = search.vectors[0].reshape(-1, *(1,) * phase.ndim) * torch.polar(window, phase)
    if layer.kernel.is_complex():
        return x
    real, imaginary = x.real, x.imag
    return real if float(real.norm()) >= float(imaginary.norm()) else imaginary


def _start_like(layer: Layer, x: Tensor) -> Tensor:
    """A deterministic start vector of the shape of x."""
    i = torch.arange(1, x.numel() + 1, dtype=torch.float64, device=x.device)
    v = 1 + 0.5 * (i * 0.754877666).frac() * torch.where((i * 0.569840291).frac() < 0.5, -3.0, 1.0)
    return v.reshape(x.shape).to(layer.kernel.dtype)
