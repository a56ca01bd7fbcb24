"""`certify`: the enclosure of an operator's norm to a relative width, rounding included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gramlip import rounding as rd
from gramlip.blocks import Symbol, symbol
from gramlip.bound import Bound
from gramlip.boundary import upper_side
from gramlip.devices import on_cpu
from gramlip.errors import InputError
from gramlip.finite import Certificate, Layer
from gramlip.gramian import Gramian
from gramlip.operators import Conv, Dense, Diagonal, Operator, Separable
from gramlip.own import banded, rounded, small
from gramlip.probe import SAMPLE_BYTES, sample, wave
from gramlip.search import Enclosure, Search
from gramlip.widen import widen, widen_each

AUTO_OPERATIONS = 2e10  # finite="auto" certifies the finite layer itself while its estimated operations stay below this
FINITE_BYTES = 384 << 20  # and never with more memory than this
TOGETHER = 1 << 19  # kernels of at most so many entries are searched together
TRIED = 1 << 22  # numbers read by a small layer that is tried as a lower side for every size
LEAST_SIDE = 16  # the order to which smaller blocks are filled up
TRIES = 12
WAYS = {
    "Cholesky": "Cholesky (R3)",
    "Gram": "Gram (theorems 1 and 2, R4)",
    "tap bound": "tap bound (theorem 8)",
    "sum of taps": "sum of taps (lemma 14)",
}


def certify(op: Operator, *, rtol: float = 1e-2, finite: bool | str = "auto") -> Bound:
    """Certified interval of the operator's norm: the search over its symbol, and the finite layer where that is closer.

    Reference: docs/theory.md and docs/rounding.md.
    """
    return certify_all([op], rtol=rtol, finite=finite)[0]


def certify_all(ops: Sequence[Operator], *, rtol: float = 1e-2, finite: bool | str = "auto") -> list[Bound]:
    """The intervals of many operators; small layers of like shape are searched together, which costs little more than one."""
    with torch.no_grad(), on_cpu():
        bounds: list[Bound | None] = [None] * len(ops)
        together: dict[object, list[int]] = {}
        syms: dict[int, Symbol] = {}
        for i, op in enumerate(ops):
            if isinstance(op, Diagonal):
                bounds[i] = _diagonal(op)
            elif isinstance(op, Separable):
                bounds[i] = _separable(op, rtol)
            else:
                syms[i] = sym = symbol(op)
                together.setdefault(_alike(op, sym) if sym.plain.numel() <= TOGETHER else i, []).append(i)
        for alike in together.values():
            for some in (alike[k : k + 64] for k in range(0, len(alike), 64)):
                chosen = [ops[i] for i in some]
                for i, bound in zip(some, _Enclosing(chosen, [syms[i] for i in some], rtol, finite).bounds(), strict=True):  # type: ignore[arg-type]
                    bounds[i] = bound
        return [bound for bound in bounds if bound is not None]


def _alike(op: Dense | Conv, sym: Symbol) -> object:
    """What symbols that are searched together have in common.

    Blocks of nearly equal order are filled up with zeros, but not where a finite layer is to start from its block's vector.
    """
    kernel = sym.kernel
    groups, rows, columns, *span = kernel.shape
    side, own = min(rows, columns), isinstance(op, Conv) and op.input_size is not None and not sym.exact
    filled = 1 << max(side - 1, LEAST_SIDE - 1).bit_length()
    shape = (rows, columns) if own or max(rows, columns) > 4 * filled else (filled, rows < columns)
    return groups, shape, tuple(span), kernel.dtype, kernel.device, sym.points


def _stack(kernels: Sequence[Tensor]) -> Tensor:
    """Kernels (groups, m, n, *k) along a new first axis, filled up with zeros to the largest m and n."""
    rows, columns = (max(k.shape[j] for k in kernels) for j in (1, 2))
    out = kernels[0].new_zeros(len(kernels), len(kernels[0]), rows, columns, *kernels[0].shape[3:])
    for place, kernel in zip(out, kernels, strict=True):
        place[:, : kernel.shape[1], : kernel.shape[2]] = kernel
    return out


def _diagonal(op: Diagonal) -> Bound:
    wide, exponent = widen(op.weight.detach().flatten(), None)
    top = max(rd.hypot_up(map(abs, z)) for z in torch.view_as_real(wide).tolist()) if wide.is_complex() else float(wide.abs().max())
    lower = rd.down(top * (1 - 2.0**-50)) if wide.is_complex() else top
    return Bound(rd.ldexp_down(lower, exponent), rd.ldexp_up(top, exponent), "largest modulus of a diagonal")


def _separable(op: Separable, rtol: float) -> Bound:
    """The norm of a Kronecker product is the product of the norms: docs/theory.md#fixed-maps."""
    lower = upper = abs(op.scale)
    for factor in op.factors:
        part = certify(Dense(factor), rtol=rtol / len(op.factors) * 0.99)
        lower, upper = rd.mul_down(lower, part.lower), rd.mul_up(upper, float(part.upper))
    grow = sum(rd.interpolated(factor.shape[1]) for factor in op.factors)  # the entries come from torch's float64
    return Bound(rd.down(lower * (1 - grow)), rd.up(upper * (1 + grow)), "product of the norms of the axes of a separable map")


def _repeated_most(op: Conv) -> Conv | None:
    """A layer of every size at the size where its padding repeats most; None where it repeats nothing, or too much to try."""
    if op.padding_mode not in ("reflect", "replicate") or not any(map(any, op.pads)):
        return None
    ends = [max(pair) if op.padding_mode == "replicate" else sum(pair) for pair in op.pads]
    sizes = tuple(1 + end + 2 * max(0, span - 1 - sum(pair)) for end, span, pair in zip(ends, op.spans, op.pads, strict=True))
    small = replace(op, input_size=sizes)
    return small if math.prod(small.output_size or ()) * op.weight[0].numel() <= TRIED else None


class _Enclosing:
    """Enclosures of layers with symbols of equal shape: the symbols' search, the layers' own lower sides and certificates."""

    def __init__(self, ops: Sequence[Conv | Dense], syms: list[Symbol], rtol: float, finite: bool | str) -> None:
        self.ops, self.syms, self.rtol, self.finite = ops, syms, rtol, finite
        if len(ops) == 1:
            self.gram = Gramian(self.syms[0].plain, self.syms[0].strides, rtol, self.syms[0].frequencies)
            self.exponents = [self.gram.exponent]
        else:  # each layer on its own scale
            wide, exponents = widen_each(_stack([sym.kernel.detach() for sym in self.syms]))
            self.gram = Gramian(wide.flatten(0, 1), rtol=rtol, frequencies=self.syms[0].frequencies)
            self.exponents = [exponent + self.gram.exponent for exponent in exponents]
        self.groups = self.gram.groups // len(ops)
        self.search = Search(self.gram, self.syms[0].points, np.arange(len(ops)).repeat(self.groups))

    def bounds(self) -> list[Bound]:
        """The intervals, in the order of the operators."""
        self.search.start(self.rtol, not all(sym.exact for sym in self.syms))
        widths, ceilings = np.full(len(self.ops), self.rtol), np.zeros(len(self.ops))
        done: dict[int, Bound] = {}
        lowers: dict[int, tuple[float, float]] = {}
        for i, op in enumerate(self.ops):
            if max(self._mass(i)) == 0.0:
                done[i] = Bound(0.0, 0.0, f"{self.syms[i].because}; all weights are zero")
            elif isinstance(op, Conv) and op.input_size is not None and not self.syms[i].exact:
                peak = self._peak(i)
                own, lower = self._of_size(i, op)
                if own is not None:
                    done[i] = own
                lowers[i] = lower, peak
                ceilings[i], widths[i] = self._room(i, lower)
        todo = [i for i in range(len(self.ops)) if i not in done]
        found = self.search.close(widths, todo, ceilings) if todo else []
        for i, enclosure in zip(todo, found, strict=True):
            done[i] = self._bound(i, enclosure, lowers.get(i))
        return [self._closed(i, op, done[i]) for i, op in enumerate(self.ops)]

    def _closed(self, i: int, op: Conv | Dense, found: Bound) -> Bound:
        """The interval, or that of a small finite layer's matrix where it is closer; it says so where it is wider than asked for."""
        if found.rtol > self.rtol and self.finite is not False and isinstance(op, Conv) and op.input_size is not None and small(op):
            found = min(found, self._whole(i, Layer(op, self.exponents[i])), key=lambda bound: (bound.rtol, float(bound.upper)))
        if found.rtol <= self.rtol or "asked for" in found.because:
            return found
        return replace(found, because=f"{found.because}; wider than asked for")

    def _whole(self, i: int, layer: Layer) -> Bound:
        """The interval of a finite layer's matrix, group by group."""
        masses = [rd.ldexp_up(mass, self.exponents[i]) for mass in self._mass(i)]
        parts = [rounded(layer, group, mass) for group, mass in enumerate(masses)]
        if not all(bool(matrix.isfinite().all()) for matrix, _ in parts):  # taps that meet add up beyond the largest number
            return Bound(0.0, math.inf, "entries beyond the largest number")
        closed = certify_all([Dense(matrix) for matrix, _ in parts], rtol=self.rtol)
        low = max(rd.down(part.lower - error) if error else part.lower for part, (_, error) in zip(closed, parts, strict=True))
        high, most = max((rd.add_up(float(part.upper), error), g) for g, (part, (_, error)) in enumerate(zip(closed, parts, strict=True)))
        entries = "whose entries are rounded (R8)" if parts[most][1] else "(R8)"
        return Bound(max(low, 0.0), high, f"{self._itself(i, layer)} {entries}, as {closed[most].because}")

    def _itself(self, i: int, layer: Layer) -> str:
        return f"{self.syms[i].because.split(':')[0]}: the finite layer itself at size {'x'.join(map(str, layer.sizes))}"

    def _bound(self, i: int, found: Enclosure, below: tuple[float, float] | None) -> Bound:
        op, sym = self.ops[i], self.syms[i]
        upper, why = self._above(i, found)
        if below is not None:
            assert isinstance(op, Conv)
            lower, peak = below
            if upper > lower * (1 + self.rtol) and self._peak(i) > peak * (1 + self.rtol / 8):  # a higher one was found since
                own, again = self._of_size(i, op)
                if own is not None:
                    return own
                lower = max(lower, again)
                ceilings = np.zeros_like(self.search.best)  # of this layer alone
                ceilings[i], width = self._room(i, lower)
                if upper > lower * (1 + self.rtol) and width < self.rtol / 2:  # it can still close
                    upper, why = self._above(i, self.search.close(width, [i], ceilings)[0])
            if lower > upper:  # a vector that the layer stretches more than the theorem allows: never to be hidden
                msg = (
                    f"{why}: the layer stretches a vector by {lower}, beyond the bound {upper}; expected no such vector: please report this"
                )
                raise ArithmeticError(msg)
            return self._scaled(i, lower, upper, f"{why}; lower side from the layer itself")
        if sym.exact:
            factor = math.sqrt(sym.square)
            return self._scaled(i, rd.mul_down(found.lower, factor if factor == 1.0 else rd.down(factor)), upper, why)
        assert isinstance(op, Conv)
        if all(s == 1 for s in op.strides):
            lower, side = rd.ldexp_down(found.lower, self.exponents[i]), "large inputs come as close to the supremum as one likes"
        else:
            lower, side = certify(replace(op, padding_mode="zeros"), rtol=self.rtol).lower, "large inputs of a multiple of the stride"
        if (small := _repeated_most(op)) is not None:
            again = rd.ldexp_down(self._below(i, small)[-1], self.exponents[i])
            if again > lower:
                lower, side = again, f"the layer itself at size {'x'.join(map(str, small.sizes or ()))}"
        return Bound(lower, self._scaled(i, 0.0, upper, "").upper, f"{why}; lower side: {side}")

    def _room(self, i: int, lower: float) -> tuple[float, float]:
        """What the blocks' norm may reach for the layer's interval to close, and how close to their peak it is worth while to prove it."""
        # the width asked for is that of the layer, not of its blocks
        ceiling, peak = lower * (1 + self.rtol * 0.98) / math.sqrt(self.syms[i].square), math.sqrt(float(self.search.best[i]))
        room = ceiling / peak - 1 if peak else 0.0
        return ceiling, self.rtol / 2 if room <= 0 else min(max(room, self.rtol / 16), self.rtol / 4)

    def _mass(self, i: int) -> list[float]:
        """Upper bound of `sum_p ||K_p||_F` over the taps of the layer itself, for each group.

        A symbol adds up the squares over the phases of a stride; padding that repeats inputs lets phases read the same ones.
        """
        sym = self.syms[i]
        phases = math.prod(min(s, k) for s, k in zip(sym.strides, sym.plain.shape[3:], strict=True))
        return [rd.mul_up(mass, rd.sqrt_up(float(phases))) for mass in self.gram.mass[i * self.groups : (i + 1) * self.groups]]

    def _peak(self, i: int) -> float:
        return math.sqrt(float(self.search.best[i]) * self.syms[i].square)

    def _below(self, i: int, op: Conv) -> tuple[Conv, Layer, int, Tensor, float]:
        """The layer that is applied, the group of the best block, and a vector from there with its Rayleigh quotient."""
        part, modes = sample(op)
        layer = Layer(part, self.exponents[i], modes)
        group = int(self.search.lattice.groups(self.search.where)[i]) - i * self.groups
        return part, layer, group, *self._ascend(layer, group, wave(self.search, i, layer, group), self._peak(i), self._mass(i)[group])

    def _of_size(self, i: int, op: Conv) -> tuple[Bound | None, float]:
        """A layer of given size whose blocks bound it from above only: its own interval if it has one, and its lower side."""
        part, layer, group, x, lower = self._below(i, op)
        gap = max(self._peak(i) / lower - 1, 0.0) if lower else math.inf
        if self.finite is True and part is not op:
            limit = f"{SAMPLE_BYTES >> 20} MiB"
            msg = f"finite=True was given for an input of {op.sizes}; expected one whose columns fit in {limit}: type finite=False"
            raise InputError(msg)
        if self.finite is not False and gap > self.rtol * 0.7 and part is op:
            certificate = Certificate(layer, group)
            fits = certificate.bytes <= FINITE_BYTES
            if self.finite is True and not fits:
                msg = (
                    f"finite=True was given for a layer whose own certificate would need {certificate.bytes / 2**30:.1f} GiB; "
                    f"expected at most {FINITE_BYTES / 2**30:.1f} GiB: type finite=False"
                )
                raise InputError(msg)
            if fits and (self.finite is True or certificate.cost * self.groups <= AUTO_OPERATIONS):
                return self._own(i, layer, group, lower, x), lower
        return None, lower

    def _above(self, i: int, found: Enclosure) -> tuple[float, str]:
        """The layer's upper bound from the symbol's: times the padding's factor, or plus what the boundary adds."""
        op, square = self.ops[i], self.syms[i].square
        if square > 1 and isinstance(op, Conv) and op.padding_mode in ("reflect", "replicate"):
            upper, alone, ends = upper_side(op, self.exponents[i], self._mass(i), found.upper)
            by_factor = f"times the factor of the padding on axes {alone}" if alone else ""
            added = "plus the boundary's share (theorem 12)" if ends else ""
            return upper, "; ".join(filter(None, (self._why(i, found), added, by_factor)))
        factor = f"; times sqrt({square}), the factor of the padding" if square > 1 else ""
        return rd.mul_up(found.upper, rd.sqrt_up(float(square))), self._why(i, found) + factor

    def _ascend(self, layer: Layer, group: int, x: Tensor, above: float, mass: float) -> tuple[Tensor, float]:
        """Lanczos steps on the layer until its Rayleigh quotient is as close to the blocks' norm as it can come."""
        best = 0.0
        for _ in range(TRIES):
            y, done = layer.ascend(x, group, above, self.rtol)
            value = layer.lower(y, group, mass)
            better = value > best * (1 + self.rtol / 64)
            if value > best:
                x, best = y, value
            if done or not better:
                break
        return x, best

    def _own(self, i: int, layer: Layer, best: int, lower: float, x: Tensor) -> Bound:
        """The finite layer's own interval, from its block-banded certificate."""
        top, upper, why = banded(layer, self._mass(i), self.rtol, best, lower, x)
        return self._scaled(i, top, upper, f"{self._itself(i, layer)}, {why}")

    def _scaled(self, i: int, lower: float, upper: float, why: str) -> Bound:
        e = self.exponents[i]
        return Bound(rd.ldexp_down(lower, e), rd.ldexp_up(upper, e), why)

    def _why(self, i: int, found: Enclosure) -> str:
        tally = found.tally
        ways = " and ".join(WAYS[way] for way in sorted(tally.ways))
        where = f"; attained at frequency ({', '.join(f'{w + 0.0:.4g}' for w in found.frequency)})" if found.frequency else ""
        cells = " at the corners of cells (theorem 7)" if found.frequency else ""
        group = f" of group {found.group - i * self.groups}" if self.groups > 1 else ""
        layers = f", {len(self.ops)} layers together" if len(self.ops) > 1 else ""
        early = "" if found.finished else "; wider than asked for: as close as rounding and the budget allow"
        blocks = f"{tally.blocks} blocks of {self.gram.side}x{self.gram.side}{cells}{where}{group}{layers}"
        return f"{self.syms[i].because}; {ways} on {blocks}{early}"
