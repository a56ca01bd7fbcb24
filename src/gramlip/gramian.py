"""The Gram symbol `G(w) = D(w)* D(w)` on the smaller side of a layer's blocks, in float64, with a bound of its rounding error.

Where it pays, all frequencies share one product: the taps of the kernel's autocorrelation, of which each G(w) is a
combination (docs/theory.md#autocorrelation). Otherwise each block is built and multiplied on its own, in pieces, so that
memory stays bounded. Error bounds: docs/rounding.md#r2-symbol.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from gramlip import certificates as cert
from gramlip import rounding as rd
from gramlip.widen import widen

TAP_BYTES = 208 << 20  # the autocorrelation is kept only while it is smaller than this
WIDE_BYTES = 32 << 20  # and the float64 copy of the kernel while it is smaller than this
MOST_TAPS = 4096  # and has at most so many taps
CHUNK_BYTES = 4 << 20  # blocks are streamed in pieces of about this size, which caches hold


class Gramian:
    """`G(w)` for the symbol of `kernel` (groups, m, n, *k), scaled by a power of two: true norms are `2**exponent` times ours.

    `noise` bounds `||fl(G) - G||_2` for every group and frequency; `side` is the order c of the blocks.
    """

    def __init__(self, kernel: Tensor) -> None:
        """Orient the kernel tall, scale it exactly, and form the taps where that is the cheaper way."""
        tall = kernel.detach()
        self.flipped = tall.shape[1] < tall.shape[2]
        if self.flipped:  # D D* instead of D* D; its conjugation only mirrors the frequencies
            tall = tall.transpose(1, 2)
        self.groups, self.rows, self.side = tall.shape[:3]
        self.span = tuple(tall.shape[3:])
        self.axes = len(self.span)
        self.device = tall.device
        self.is_complex = tall.is_complex()
        self._tall = (tall.flatten(3) if self.axes else tall[..., None]).movedim(-1, 1)  # (groups, taps, rows, side)
        self._dtype = torch.complex128 if self.is_complex else torch.float64
        self._grid = torch.tensor(list(itertools.product(*map(range, self.span))), dtype=torch.int64).reshape(
            math.prod(self.span), self.axes
        )
        self._small = self._tall.numel() * (16 if self.is_complex else 8) <= WIDE_BYTES
        self.exponent = widen(self._tall, None)[1] if self._small else max(widen(t, None)[1] for t in self._tall.unbind(1))
        self._wide = self._cast(self._tall) if self._small else None
        self.mass = self._mass()
        count = (math.prod(2 * k - 1 for k in self.span) - 1) // 2
        tap_bytes = self.groups * (2 * count + 1) * self.side**2 * (16 if self.is_complex else 8)
        shared = tap_bytes <= TAP_BYTES and count <= MOST_TAPS
        ranges = [range(1 - k, k) for k in self.span] if shared else []
        offsets = [q for q in itertools.product(*ranges) if q > (0,) * self.axes]
        self.offsets = torch.tensor(offsets, dtype=torch.int64).reshape(len(offsets), self.axes)
        length = self.rows * self._tall.shape[1] + count + 64
        per = rd.gamma(4.0 * length if self.is_complex else 2.0 * length)
        self.noise = [rd.add_up(rd.mul_up(per, rd.mul_up(m, m)), rd.TINY) if m else 0.0 for m in self.mass]
        self.taps = self._autocorrelation() if shared else None
        # real operations to form one block
        self.operations = (4.0 * count + 2.0 if shared else 8.0 * self.rows) * self.side**2

    def _cast(self, piece: Tensor) -> Tensor:
        """The exact float64 (complex128) copy, conjugated where the sides were exchanged."""
        wide = widen(piece.contiguous(), self.exponent)[0]
        return wide.conj().resolve_conj() if self.flipped and self.is_complex else wide

    def tap(self, p: int) -> Tensor:
        """One tap of the scaled kernel, (groups, rows, side)."""
        return self._wide[:, p] if self._wide is not None else self._cast(self._tall[:, p])

    def _mass(self) -> list[float]:
        """Upper bound of `sum_p ||K_p||_F` for each group."""
        grow = 1.0 + rd.gamma(4.0 * self.rows * self.side)
        if self._wide is not None:
            norms = torch.linalg.vector_norm(self._wide.flatten(2), dim=-1).sum(-1)
        else:
            norms = sum(torch.linalg.vector_norm(self.tap(p), dim=(1, 2)) for p in range(self._tall.shape[1]))
        return [rd.up(x * rd.up(grow)) if x else 0.0 for x in norms.tolist()]  # type: ignore[union-attr]

    def _autocorrelation(self) -> tuple[Tensor, Tensor]:
        """Coefficients of the cosines (A_0 and A_q + A_q*) and of the sines (A_q - A_q*), (groups, taps, c, c)."""
        g, c = self.groups, self.side
        strides = torch.tensor([math.prod(2 * k - 1 for k in self.span[j + 1 :]) for j in range(self.axes)], dtype=torch.int64)
        code = (self._grid * strides).sum(-1)
        taps = torch.zeros(g, 1 + len(self.offsets), c, c, dtype=self._dtype, device=self.device)
        where = {int(q): i + 1 for i, q in enumerate((self.offsets * strides).sum(-1))} | {0: 0}
        gap = code[None, :] - code[:, None]
        for q, i in where.items():
            left, right = (gap == q).nonzero().unbind(1)
            if self._wide is not None:  # one product, the pairs of taps one below the other
                ones, others = self._wide[:, left].flatten(1, 2), self._wide[:, right].flatten(1, 2)
                taps[:, i] = ones.mH @ others
            else:
                for one, other in zip(left.tolist(), right.tolist(), strict=True):
                    taps[:, i].baddbmm_(self.tap(one).mH, self.tap(other))
        later = taps[:, 1:]
        return torch.cat([taps[:, :1], later + later.mH], 1), later - later.mH

    def tap_norms(self, items: Tensor, largest: Tensor) -> Tensor | None:
        """Upper bounds of `||A_q||`, q > 0, (groups, taps), or None where they cannot serve.

        `largest` holds a lower bound of the largest eigenvalue of each layer, `items` the layer of each group: the taps serve
        only where they are small beside it.
        """
        if self.taps is None or not len(self.offsets):
            return None
        even, odd = self.taps
        # A_q = (even + odd) / 2, and the two halves are orthogonal
        halves = [torch.linalg.vector_norm(half, dim=(-2, -1)) for half in (even[:, 1:], odd)]
        sizes = torch.hypot(*halves).cpu() / 2 * (1 + 1e-12)
        reach = (sizes * self.offsets.to(torch.float64).square().sum(-1)).sum(-1) / self.side**0.5
        if bool((reach > largest[items] * sum((k - 1) ** 2 for k in self.span) / 8).all()):
            return None
        # ||A||^2 = ||A* A||, of which one more Gram step gives a closer bound than the Frobenius norm
        scale = torch.where(sizes > 0, sizes, 1.0).to(self.device)
        unit = ((even[:, 1:] + odd) / 2 / scale[..., None, None]).flatten(0, 1)
        error = torch.full((len(unit),), 2 * rd.gamma(8.0 * (self.side + 2)), dtype=torch.float64, device=self.device)
        norms = cert.gram(unit.mH @ unit, error).sqrt().cpu().reshape(sizes.shape).clamp_max(1.0)
        return norms * sizes * (1 + 1e-12)

    def polynomial(self, group: Tensor, index: Tensor, sizes: tuple[int, ...], v: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients (I, taps) of `p(w) = u* D(w) v`, u the image of v at the given frequency, and the exponents (taps, axes)."""
        if self._wide is not None:
            images = _apply(self._wide[group], v)
        else:
            taps = range(self._tall.shape[1])
            images = torch.stack([(self.tap(t)[group].to(v.dtype) @ v[..., None])[..., 0] for t in taps], 1)
        angles = self.waves(index, sizes, self._grid)
        image = (torch.polar(torch.ones_like(angles), -angles)[:, None] @ images)[:, 0]
        return (images @ image.conj()[..., None])[..., 0].cpu(), self._grid.to(torch.float64)

    def waves(self, index: Tensor, sizes: tuple[int, ...], positions: Tensor) -> Tensor:
        """The angles `2 pi sum_j q_j i_j / N_j`, reduced exactly before rounding; (F, positions) on the kernel's device."""
        turns = torch.zeros(len(index), len(positions), dtype=torch.float64)
        for j, n in enumerate(sizes):
            if n > 1:
                turns += (index[:, j, None] * positions[None, :, j]).remainder(n).to(torch.float64) / n
        return (turns * (2 * math.pi)).to(self.device)

    def at(self, group: Tensor, index: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """G at the lattice frequencies `2 pi index / sizes` (F, axes) of the given groups (F,): (F, c, c), real where all are real."""
        if self.taps is None:
            out: Tensor | None = None
            for one in group.unique().tolist():
                there = (group == one).nonzero()[:, 0]
                blocks = self._direct(one, index[there], sizes)
                out = (
                    blocks.new_empty(len(group), self.side, self.side)
                    if out is None
                    else out.to(torch.promote_types(out.dtype, blocks.dtype))
                )
                out[there.to(self.device)] = blocks.to(out.dtype)
            assert out is not None
            return out
        even, odd = self.taps
        group = group.to(self.device)
        if not len(self.offsets):
            return even[group, 0]
        angles = self.waves(index, sizes, self.offsets)
        cosines = torch.cat([torch.ones_like(angles[:, :1]), angles.cos()], 1)
        sines = -angles.sin()
        if self.is_complex:
            return self._combine(cosines.to(torch.complex128), even, group) + self._combine(sines * 1j, odd, group)
        real = self._combine(cosines, even, group)
        if float(sines.abs().max()) < 1e-15:  # frequencies 0 and pi: their error is inside `noise`
            return real
        return torch.complex(real, self._combine(sines, odd, group))

    def _combine(self, weights: Tensor, taps: Tensor, group: Tensor) -> Tensor:
        c = self.side
        if self.groups == 1:
            return (weights @ taps[0].flatten(1)).reshape(-1, c, c)
        if weights.numel() * c * c * 16 <= CHUNK_BYTES:
            return torch.einsum("ft,ftcd->fcd", weights, taps[group])
        out = weights.new_empty(len(weights), c, c)
        for one in group.unique():
            at = group == one
            out[at] = (weights[at] @ taps[one].flatten(1)).reshape(-1, c, c)
        return out

    def _direct(self, group: int, index: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Blocks of one group from pieces of rows of the symbol, so that no more than a few blocks are alive."""
        angles = self.waves(index, sizes, self._grid)
        real = not self.is_complex and bool((angles.sin().abs() < 1e-15).all())
        factors = angles.cos() if real else torch.polar(torch.ones_like(angles), -angles)
        taps = self._tall.shape[1]
        step = max(1, (4 * CHUNK_BYTES) // (16 * self.side * max(taps, len(index))))
        total: Tensor | None = None
        for start in range(0, self.rows, step):
            rows = slice(start, min(start + step, self.rows))
            piece = self._wide[group, :, rows] if self._wide is not None else self._cast(self._tall[group, :, rows])
            flat = piece.flatten(1)
            if real or self.is_complex:
                block = factors.to(flat.dtype if real else factors.dtype) @ flat
            else:
                block = torch.complex(factors.real @ flat, factors.imag @ flat)
            block = block.reshape(-1, *piece.shape[1:])
            total = block.mH @ block if total is None else total.add_(block.mH @ block)
        assert total is not None
        return total

    def chunk(self) -> int:
        """How many blocks are worked on at once."""
        each = 16 * max(self.side**2, len(self.offsets) if self.taps is not None else self._tall.shape[1])
        # several while memory allows: each piece reads all taps once
        return max(1, CHUNK_BYTES // each, min(8, 8 * CHUNK_BYTES // each))

    def crude(self, group: int) -> float:
        """Upper bound of the norm without any frequency: `sum_p ||K_p||_F`, or the root of P times `||sum_p K_p* K_p||` (lemma 14)."""
        if self._wide is None or self.axes == 0:
            return self.mass[group]
        flat = self._wide[group].flatten(0, 1)
        zero = (flat.mH @ flat)[None]
        top = float(cert.moments(zero, torch.tensor([self.noise[group]], dtype=torch.float64, device=self.device)))
        return min(self.mass[group], rd.sqrt_up(rd.mul_up(top, float(self._tall.shape[1]))))


def _apply(taps: Tensor, v: Tensor) -> Tensor:
    """All taps (I, P, rows, side), real or complex, times vectors (I, side): (I, P, rows), complex."""
    if taps.is_complex():
        return (taps @ v[:, None, :, None])[..., 0]
    return torch.view_as_complex((taps @ torch.view_as_real(v)[:, None]).contiguous())
