"""Warm starts: the highest frequencies and singular vectors of layers of one shape, followed from one training step to the next.

Between two searches only `|u* D(w) v|` is maximised, in turn over u, w and v: docs/training.md#tracking. It never falls in a step
while the weights stand still, and is a lower estimate of the supremum over all frequencies at any time. Several peaks are
followed, since a penalty pushes the highest one down until another takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gramlip.errors import InputError
from gramlip.nn.norm_op import NormGeometry, replicated, unit
from gramlip.numerics.precision import real_dtype, without_autocast
from gramlip.numerics.sums import norm

SEARCH_STEPS = 12  # power steps per grid point in a search
TOGETHER = 1 << 24  # entries of the waves that a search holds at a time
STRIDES = (0.0, 1.0, 4.0)  # multiples of the safe step along the gradient that are tried; 0 keeps the frequency


class Tracker(nn.Module):
    """Estimates of the norms of L layers whose weights have one shape and one plan, from `peaks` frequencies of each group.

    Buffers, which belong to the state_dict so that training resumes as it was, with B = L groups: `frequency` (B, peaks, axes),
    `vector` (B, peaks, n, 2), real and imaginary part.
    """

    positions: Tensor
    turns: Tensor
    start: Tensor
    frequency: Tensor
    vector: Tensor

    def __init__(self, plan: NormGeometry, weights: Sequence[Callable[[], Tensor]], steps: int, peaks: int) -> None:
        super().__init__()
        self.plan, self.steps, self._weights = plan, steps, tuple(weights)
        first = _full(self._weights[0]().detach())
        shape, options = plan.kernel(first).shape, dict[str, Any](dtype=real_dtype(first), device=first.device)
        axes = [torch.arange(k, **options) - (k - 1) / 2 for k in shape[3:]]  # centred: a phase of D(w), which changes no norm
        half = [torch.arange(n if j + 1 < len(axes) else n // 2 + 1, device=first.device) for j, n in enumerate(plan.grid)]
        batch, peaks = len(self._weights) * plan.groups, min(peaks, math.prod(plan.grid) // 2 + 1)
        start = unit(torch.randn(shape[2], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).flatten())
        self.register_buffer("positions", _product(axes, options), persistent=False)
        self.register_buffer("turns", _product(half, {"dtype": torch.int64, "device": first.device}), persistent=False)
        self.register_buffer("start", start.reshape(shape[2], 2).to(**options), persistent=False)
        self.register_buffer("frequency", torch.zeros(batch, peaks, len(axes), **options))
        self.register_buffer("vector", torch.zeros(batch, peaks, shape[2], 2, **options))

    def __len__(self) -> int:
        return len(self._weights)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tracker:
        """Follow the model to another device, in the precision that estimates are made in."""
        return super()._apply(lambda x: fn(x).to(x.dtype), recurse)

    def forward(self, due: Sequence[int] = ()) -> Tensor:
        """Search for the peaks of the layers that are due, track all, then lower estimates (L,) of the norms with their graph."""
        with without_autocast(self.frequency):
            kernels = self.kernels()
            chosen, probes, scale = plainly(partial(self.follow, due=due), kernels.detach())
            one = kernels if self.plan.groups == 1 else kernels[chosen]
            return torch.linalg.vector_norm(_image(one, probes[:, None]), dim=(1, 2, 3)) * scale * self.plan.attained

    @torch.no_grad()
    def search(self) -> None:
        """Find the peaks of all layers afresh, outside of a call."""
        with without_autocast(self.frequency):
            kernels = self.kernels()
            self._search(kernels, self._scale(kernels), range(len(self)))

    def kernels(self) -> Tensor:
        """The kernels (B, m, n, taps) of all layers in float32 at least, with their graph."""
        parts = [self.plan.kernel(_full(weight())) for weight in self._weights]
        stacked = torch.cat(parts) if len(parts) > 1 else parts[0]
        return stacked.reshape(*stacked.shape[:3], -1).to(self.frequency.dtype)

    def follow(self, kernels: Tensor, due: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """One call on plain kernels: the group (L,) with each layer's highest peak, its D(w) v as probes over the scale, and the scale."""
        scale, peaks, groups = self._scale(kernels), self.frequency.shape[1], self.plan.groups
        self._search(kernels, scale, due)
        heights, scaled = self.frequency.new_zeros(()), _Scaled(kernels, 1 / scale)
        for _ in range(self.steps):
            heights = self._step(scaled)
        best = heights.reshape(len(self), -1).argmax(-1)
        chosen = best // peaks + groups * torch.arange(len(self), device=best.device)
        vector = torch.view_as_complex(self.vector[chosen, best % peaks]) / scale[chosen, None]
        return chosen, vector[..., None] * self._waves(self.frequency[chosen, best % peaks])[..., None, :], scale[chosen]

    def _scale(self, kernels: Tensor) -> Tensor:
        """Powers of two (B,) near the largest entries of each layer: in these units no square over- or underflows."""
        each = kernels.reshape(len(self), -1)
        exponent = torch.frexp(torch.maximum(each.amax(1), -each.amin(1)).nan_to_num())[1]
        widest = math.frexp(torch.finfo(kernels.dtype).max)[1] * 3 // 4  # the inverse is a number too
        return torch.ldexp(torch.ones_like(each[:, 0]), exponent.clamp(-widest, widest)).repeat_interleave(self.plan.groups)

    def _search(self, kernels: Tensor, scale: Tensor, which: Sequence[int]) -> None:
        """Find the peaks of some layers afresh, by power iteration at every point of the grid.

        What was tracked stays where it is higher.
        """
        groups = self.plan.groups
        rows = torch.tensor([i * groups + g for i in which for g in range(groups)], dtype=torch.int64, device=kernels.device)
        for some in rows.split(max(1, TOGETHER // (len(self.turns) * kernels[0, 0].numel()))) if which else ():
            self._search_rows(_Scaled(kernels[some], 1 / scale[some]), some)

    def _search_rows(self, kernels: _Scaled, rows: Tensor) -> None:
        frequency, vector = self.frequency[rows], torch.view_as_complex(self.vector[rows])
        before = self._values(kernels, frequency, vector)
        line, best = torch.arange(len(rows), device=rows.device), before.argmax(-1)
        # From what was tracked, so that no search undoes the steps before it, and a direction that is orthogonal to nothing for long.
        found = self._peaks(kernels, unit(torch.view_as_complex(self.start) + vector[line, best]))
        worse = self._values(kernels, *found).amax(-1) < before.amax(-1)
        found[0][worse, -1] = frequency[worse, best[worse]]
        found[1][worse, -1] = vector[worse, best[worse]]
        self.frequency[rows], self.vector[rows] = found[0], torch.view_as_real(found[1])

    def _peaks(self, kernels: _Scaled, start: Tensor) -> tuple[Tensor, Tensor]:
        """Frequencies and vectors of the highest points of the grid, none next to a higher one or to its mirror image.

        The power iteration starts from `start` (B, n) at every point.
        """
        sides = torch.tensor(self.plan.grid, device=start.device)
        points = (self.turns * (2 * math.pi / sides)).to(self.frequency.dtype)
        waves = self._waves(points)
        vectors = start[:, None].expand(-1, len(points), -1)
        left = points.new_zeros(())
        for _ in range(SEARCH_STEPS):
            back = kernels.back(kernels.image(vectors, waves))
            left, vectors = _split((back * waves.conj()[:, None]).sum(-1), vectors)
        tops, line = [], torch.arange(len(start), device=start.device)
        for _ in range(self.frequency.shape[1]):
            tops.append(top := left.argmax(-1))
            near = torch.zeros_like(left, dtype=torch.bool)
            for other in (self.turns[top], -self.turns[top]):  # a real kernel has the same norm at w and -w
                gap = (self.turns[None] - other[:, None]).remainder(sides)
                near |= (torch.minimum(gap, sides - gap) <= 1).all(-1)
            left = torch.where(near, -1.0, left)
        chosen = torch.stack(tops, -1)
        return points[chosen], vectors[line[:, None], chosen]

    def _waves(self, frequency: Tensor) -> Tensor:
        """exp(-i p.w): (..., taps)."""
        angle = (frequency[..., None, :] * self.positions).sum(-1)  # no product of matrices, which settings cut short
        return torch.polar(torch.ones_like(angle), -angle)

    def _values(self, kernels: _Scaled, frequency: Tensor, vector: Tensor) -> Tensor:
        """||D(w) v||: (B, peaks)."""
        return torch.linalg.vector_norm(kernels.image(vector, self._waves(frequency)), dim=(1, 3))

    def _step(self, kernels: _Scaled) -> Tensor:
        """U from v, then w from (u, v), then v from (u, w): none of them lowers |u* D(w) v|, which is returned, (B, peaks)."""
        waves, v = self._waves(self.frequency), torch.view_as_complex(self.vector)
        image = kernels.image(v, waves)
        back = kernels.back(image)
        if self.frequency.shape[-1]:
            self.frequency.copy_(self._climb((back.conj() * v[..., None]).sum(2), waves))
            waves = self._waves(self.frequency)
        length, v = _split((back * waves.conj()[:, :, None]).sum(-1), v)
        self.vector.copy_(torch.view_as_real(v))
        size = torch.linalg.vector_norm(image, dim=(1, 3))
        return length / torch.where(size > 0, size, 1.0)

    def _climb(self, taps: Tensor, waves: Tensor) -> Tensor:
        """The frequencies moved along the gradient of `|sum_p c_p exp(-i p.w)|^2`, c_p = u* K_p v, as far as it grows."""
        terms = taps * waves
        slope = -1j * terms @ self.positions.to(terms.dtype)
        gradient = (terms.sum(-1).conj()[..., None] * slope).real
        curvature = (terms.abs() @ self.positions.abs()).square().sum(-1, keepdim=True)
        safe = gradient / torch.where(curvature > 0, curvature, 1.0)
        safe = torch.where(safe.isfinite(), safe, 0.0)
        tried = self.frequency[..., None, :] + safe[..., None, :] * safe.new_tensor(STRIDES)[:, None]
        height = (taps[..., None, :] * self._waves(tried)).sum(-1).abs()
        return tried.take_along_dim(height.argmax(-1)[..., None, None], -2)[..., 0, :]


class _Scaled(NamedTuple):
    """Kernels (B, m, n, taps) over a power of two each; what they are multiplied by is divided, which is far smaller."""

    kernels: Tensor
    inverse: Tensor

    def image(self, vector: Tensor, waves: Tensor) -> Tensor:
        """D(w) v, (B, m, peaks, 2), of vectors (B, peaks, n) and waves (..., peaks, taps)."""
        return _image(self.kernels, (vector * self.inverse[:, None, None])[..., None] * waves[..., None, :])

    def back(self, image: Tensor) -> Tensor:
        """K_p* u for every tap p, (B, peaks, n, taps)."""
        return _back(self.kernels, image * self.inverse[:, None, None, None])


def plainly(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """A function of the plain tensors below any transform of `torch.func`, where what is followed can be written; it has no graph."""
    return _Plainly.apply(function, *tensors)  # type: ignore[no-any-return]


class _Plainly(torch.autograd.Function):
    """`plainly`: torch hands plain tensors to the forward pass alone."""

    @staticmethod
    def forward(function: Callable[..., Any], *tensors: Tensor) -> Any:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.count = len(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[None, ...]:
        return (None,) * ctx.count

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        msg = "a penalty was called under torch.vmap over weights; expected one model: type one LipschitzPenalty for each of them"
        raise InputError(msg)


def _product(axes: list[Tensor], options: dict[str, Any]) -> Tensor:
    """All combinations (F, axes); one empty row without axes."""
    return torch.cartesian_prod(*axes).reshape(-1, len(axes)) if axes else torch.zeros(1, 0, **options)


def _image(kernels: Tensor, probes: Tensor) -> Tensor:
    """D(w) v: (B, m, peaks, 2), from probes (B, peaks, n, taps)."""
    columns = torch.view_as_real(probes.flatten(2).mT.contiguous())  # (B, n taps, peaks, 2)
    return (kernels.flatten(2) @ columns.flatten(2)).unflatten(-1, columns.shape[2:])


def _back(kernels: Tensor, image: Tensor) -> Tensor:
    """K_p* u for every tap p: (B, peaks, n, taps), complex."""
    back = (kernels.flatten(2).mT @ image.flatten(2)).unflatten(-1, image.shape[2:])
    return torch.view_as_complex(back).mT.unflatten(-1, kernels.shape[2:])


def _split(v: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths and unit vectors along the last axis; what has no direction, or is no number, keeps the one `before`."""
    length = norm(v)
    return length, torch.where((length > 0)[..., None], unit(v), before).contiguous()


def _full(weight: Tensor) -> Tensor:
    """The weight, gathered where it is sharded."""
    sharded = replicated(weight)
    return weight if sharded is None else sharded[0]
