"""The Gram symbol `G(w) = D(w)* D(w)` on the smaller side of a layer's blocks, in float64, with a bound of its rounding error.

Where it pays, all frequencies share one product: the taps of the kernel's autocorrelation, of which each G(w) is a
combination (docs/theory.md#autocorrelation). Otherwise each block is built and multiplied on its own, in pieces, so that
memory stays bounded. Error bounds: docs/rounding.md#symbol.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from gramlip import certificates as cert
from gramlip import rounding as rd
from gramlip.widen import widen

TAP_BYTES = 96 << 20  # the autocorrelation is kept only while it is smaller than this
CHUNK_BYTES = 48 << 20  # blocks are streamed in pieces of about this size


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
        self._tall = tall.flatten(3) if self.axes else tall[..., None]
        self._grid = torch.tensor(list(itertools.product(*map(range, self.span))), dtype=torch.int64).reshape(
            math.prod(self.span), self.axes
        )
        self._small = self._tall.numel() * 16 <= TAP_BYTES
        self.exponent = widen(self._tall, None)[1] if self._small else max(widen(t, None)[1] for t in self._tall.unbind(-1))
        self._wide = self._cast(self._tall) if self._small else None
        self.mass = self._mass()
        offsets = [q for q in itertools.product(*(range(1 - k, k) for k in self.span)) if q > (0,) * self.axes]
        self.offsets = torch.tensor(offsets, dtype=torch.int64).reshape(len(offsets), self.axes)
        length = self.rows * self._tall.shape[-1] + len(offsets) + 64
        per = rd.gamma(4.0 * length if self.is_complex else 2.0 * length)
        self.noise = [rd.add_up(rd.mul_up(per, rd.mul_up(m, m)), rd.TINY) if m else 0.0 for m in self.mass]
        tap_bytes = self.groups * (2 * len(offsets) + 1) * self.side**2 * (16 if self.is_complex else 8)
        self.taps = self._autocorrelation() if self._small and tap_bytes <= TAP_BYTES else None
        # real operations to form one block
        self.operations = (4.0 * len(offsets) + 2.0 if self.taps is not None else 8.0 * self.rows) * self.side**2

    def _cast(self, piece: Tensor) -> Tensor:
        """The exact float64 (complex128) copy, conjugated where the sides were exchanged."""
        wide = widen(piece, self.exponent)[0]
        return wide.conj().resolve_conj() if self.flipped and self.is_complex else wide

    def tap(self, p: int) -> Tensor:
        """One tap of the scaled kernel, (groups, rows, side)."""
        return self._wide[..., p] if self._wide is not None else self._cast(self._tall[..., p])

    def _mass(self) -> list[float]:
        """Upper bound of `sum_p ||K_p||_F` for each group."""
        grow = 1.0 + rd.gamma(4.0 * self.rows * self.side)
        if self._wide is not None:
            norms = torch.linalg.vector_norm(self._wide, dim=(1, 2)).sum(-1)
        else:
            norms = sum(torch.linalg.vector_norm(self.tap(p), dim=(1, 2)) for p in range(self._tall.shape[-1]))
        return [rd.up(x * rd.up(grow)) if x else 0.0 for x in norms.tolist()]  # type: ignore[union-attr]

    def _autocorrelation(self) -> tuple[Tensor, Tensor]:
        """Coefficients of the cosines (A_0 and A_q + A_q*) and of the sines (A_q - A_q*), (groups, taps, c, c)."""
        assert self._wide is not None
        g, c, p = self.groups, self.side, self._tall.shape[-1]
        strides = torch.tensor([math.prod(2 * k - 1 for k in self.span[j + 1 :]) for j in range(self.axes)], dtype=torch.int64)
        code = (self._grid * strides).sum(-1)
        taps = self._wide.new_zeros(g, 1 + len(self.offsets), c, c)
        where = {int(q): i + 1 for i, q in enumerate((self.offsets * strides).sum(-1))} | {0: 0}
        gap = code[None, :] - code[:, None]
        if p * c <= 1024 or p == 1:  # one product of all pairs of taps
            flat = self._wide.permute(0, 1, 3, 2).reshape(g, self.rows, p * c)
            pairs = (flat.mH @ flat).reshape(g, p, c, p, c).permute(0, 1, 3, 2, 4).reshape(g, p * p, c, c)
            keep = (gap >= 0).flatten().nonzero()[:, 0]
            slot = torch.tensor([where[int(q)] for q in gap.flatten()[keep]], device=self.device)
            taps.index_add_(1, slot, pairs[:, keep.to(self.device)])
        else:
            wide = self._wide.permute(3, 0, 1, 2).contiguous()
            for q, i in where.items():
                left, right = (gap == q).nonzero(as_tuple=True)
                a = wide[left.to(self.device)].transpose(0, 1).reshape(g, -1, c)
                b = wide[right.to(self.device)].transpose(0, 1).reshape(g, -1, c)
                taps[:, i] = a.mH @ b
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
        later = (even[:, 1:] + odd) / 2
        sizes = torch.linalg.vector_norm(later, dim=(-2, -1)).cpu()
        reach = (sizes * self.offsets.to(torch.float64).square().sum(-1)).sum(-1) / self.side**0.5
        if bool((reach > largest[items] * sum((k - 1) ** 2 for k in self.span) / 4).all()):
            return None
        # ||A||^2 = ||A* A||, of which one more Gram step gives a closer bound than the Frobenius norm
        scale = torch.where(sizes > 0, sizes, 1.0).to(self.device)
        unit = (later / scale[..., None, None]).flatten(0, 1)
        error = torch.full((len(unit),), 2 * rd.gamma(8.0 * (self.side + 2)), dtype=torch.float64, device=self.device)
        norms = cert.gram(unit.mH @ unit, error).sqrt().cpu().reshape(sizes.shape).clamp_max(1.0)
        return norms * sizes * (1 + 1e-12)

    def polynomial(self, group: Tensor, index: Tensor, sizes: tuple[int, ...], v: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients (I, taps) of `p(w) = u* D(w) v`, u the image of v at the given frequency, and the exponents (taps, axes)."""
        if self._wide is not None:
            images = torch.einsum("irct,ic->itr", self._wide[group].to(v.dtype), v)
        else:
            taps = range(self._tall.shape[-1])
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
            return torch.stack([self._one(int(g), i[None], sizes) for g, i in zip(group, index, strict=True)])
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

    def _one(self, group: int, index: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """One block from pieces of the symbol, so that no more than a few matrices of c x c are alive."""
        angles = self.waves(index, sizes, self._grid)[0]
        real = not self.is_complex and bool((angles.sin().abs() < 1e-15).all())
        factors = angles.cos() if real else torch.polar(torch.ones_like(angles), -angles)
        total: Tensor | None = None
        step = max(1, CHUNK_BYTES // (16 * self.side))
        for start in range(0, self.rows, step):
            rows = slice(start, min(start + step, self.rows))
            block: Tensor | None = None
            for p in range(self._tall.shape[-1]):
                piece = self._wide[group, rows, :, p] if self._wide is not None else self._cast(self._tall[group, rows, :, p])
                block = factors[p] * piece if block is None else block.add_(factors[p] * piece)
            assert block is not None
            total = block.mH @ block if total is None else total.addmm_(block.mH, block)
        assert total is not None
        return total

    def chunk(self) -> int:
        """How many blocks are worked on at once."""
        return max(1, CHUNK_BYTES // (16 * self.side**2))
