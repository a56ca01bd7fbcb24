"""Warm starts: the highest frequencies and singular vectors of layers of one shape, followed from one training step to the next.

Between two searches only `|u* D(w) v|` is maximised, in turn over u, w and v: docs/training.md#tracking. It never falls in a step
while the weights stand still, and is a lower estimate of the supremum over all frequencies at any time. Several peaks are
followed, since a penalty pushes the highest one down until another takes its place.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from gramlip.errors import InputError
from gramlip.nn.norm_op import NormGeometry, replicated, unit
from gramlip.numerics.precision import real_dtype, without_autocast
from gramlip.numerics.sums import norm

SEARCH_STEPS = 12  # power steps per grid point in a search
TOGETHER = 1 << 24  # entries of the waves that a search holds at a time
JUMP = 1.25  # between two calls: an estimate that changes by more is of weights that were not reached by small steps
STRIDES = (0.0, 1.0, 4.0)  # multiples of the safe step along the gradient that are tried; 0 keeps the frequency


class Tracker(nn.Module):
    """Estimates of the norms of L layers whose weights have one shape and one plan, from `peaks` frequencies of each group.

    Buffers, which belong to the state_dict so that training resumes as it was, with B = L groups: `frequency` (B, peaks, axes),
    `vector` (B, peaks, n, 2), real and imaginary part, and `height` (L,), the estimates of the last call.

    Args:
        plan: of all layers.
        weights: of the layers as they are now, for their shape, dtype and device; nothing of them is kept.
        steps: tracking steps a call.
        peaks: frequencies followed in each group.
    """

    frequency: Tensor
    vector: Tensor
    height: Tensor

    def __init__(self, plan: NormGeometry, weights: Sequence[Tensor], steps: int, peaks: int) -> None:
        super().__init__()
        self.plan, self.steps, self.count = plan, steps, len(weights)
        first = _full(weights[0].detach())
        shape, options = plan.kernel(first).shape, dict[str, Any](dtype=real_dtype(first), device=first.device)
        batch, peaks = self.count * plan.groups, min(peaks, math.prod(plan.grid) // 2 + 1)
        self._taps, self._fixed = tuple(shape[3:]), dict[torch.device, tuple[Tensor, Tensor, Tensor]]()
        self.register_buffer("frequency", torch.zeros(batch, peaks, len(self._taps), **options))
        self.register_buffer("vector", torch.zeros(batch, peaks, shape[2], 2, **options))
        self.register_buffer("height", torch.zeros(self.count, **options))
        self.key = _keep(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[reportUnknownMemberType]
        self.key = _keep(self)

    def __len__(self) -> int:
        return self.count

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tracker:
        """Follow the model to another device, in the precision that estimates are made in."""
        empty = self.height.is_meta
        super()._apply(lambda x: fn(x).to(x.dtype), recurse)
        if empty and not self.height.is_meta:  # `to_empty` leaves any number there
            for buffer in self.buffers():
                buffer.zero_()
        return self

    def _constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """On the device of the state: the taps' positions, the grid's points in turns, and a fixed direction to search from."""
        device = self.frequency.device
        if device not in self._fixed:
            options, n = dict[str, Any](dtype=self.frequency.dtype, device=device), self.vector.shape[2]
            axes = [torch.arange(k, **options) - (k - 1) / 2 for k in self._taps]  # centred: a phase of D(w), which changes no norm
            half = [torch.arange(n if j + 1 < len(axes) else n // 2 + 1, device=device) for j, n in enumerate(self.plan.grid)]
            start = unit(torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).flatten()).reshape(n, 2)
            turns = _product(half, {"dtype": torch.int64, "device": device})
            self._fixed[device] = _product(axes, options), turns, torch.view_as_complex(start.to(**options))
        return self._fixed[device]

    def forward(self, weights: Sequence[Tensor], due: Sequence[int] = (), watch: bool = False, still: bool = False) -> Tensor:
        """Search for the peaks of the layers that are due, track all, then lower estimates (L,) of the norms with their graph.

        Args:
            weights: of the layers.
            due: the layers to search.
            watch: search those too whose estimate has jumped since the last call.
            still: leave the state as it is: no search that is kept, no tracking step.
        """
        values, scale = self.scaled(weights, due, watch, still)
        return values * scale * self.plan.attained

    def scaled(self, weights: Sequence[Tensor], due: Sequence[int], watch: bool, still: bool) -> tuple[Tensor, Tensor]:
        """The same before the padding's factor, as (L,) values near one and the powers of two (L,) that they are in units of."""
        with without_autocast(self.frequency):
            kernels = self.kernels(weights)
            chosen, probes, scale = self._followed(kernels.detach(), list(due), watch, still)
            one = kernels if self.plan.groups == 1 else kernels[chosen]
            return torch.linalg.vector_norm(_image(one, probes[:, None]), dim=(1, 2, 3)), scale

    def _followed(self, kernels: Tensor, due: list[int], watch: bool, still: bool) -> tuple[Tensor, ...]:
        """`follow` or `look` on the plain tensors below any transform; one opaque operation where code is compiled."""
        if torch.compiler.is_compiling():
            state = (self.frequency, self.vector, self.height)
            if still:
                return tuple(torch.ops.gramlip.look(kernels, *state, watch, self.key))
            return tuple(torch.ops.gramlip.follow(kernels, *state, due, watch, self.key))
        if kernels.is_meta:
            return _shapes(kernels, self.vector, self.height)
        return plainly(lambda plain: self.look(plain, watch) if still else self.follow(plain, due, watch), kernels)

    @torch.no_grad()
    def search(self, weights: Sequence[Tensor]) -> None:
        """Find the peaks of all layers afresh, outside of a call."""
        with without_autocast(self.frequency):
            kernels = self.kernels(weights)
            self._search(kernels, self._scale(kernels), range(len(self)))

    def kernels(self, weights: Sequence[Tensor]) -> Tensor:
        """The kernels (B, m, n, taps) of all layers in float32 at least, with their graph."""
        parts = [self.plan.kernel(_full(weight)) for weight in weights]
        stacked = torch.cat(parts) if len(parts) > 1 else parts[0]
        return stacked.reshape(*stacked.shape[:3], -1).to(self.frequency.dtype)

    def follow(self, kernels: Tensor, due: Sequence[int], watch: bool) -> tuple[Tensor, Tensor, Tensor]:
        """One call on plain kernels: the group (L,) with each layer's highest peak, its D(w) v as probes over the scale, and the scale."""
        scale = self._scale(kernels)
        scaled = _Scaled(kernels, 1 / scale)
        self._search(kernels, scale, due)
        heights = self.frequency.new_zeros(())
        for i in range(self.steps):
            before, heights = self._step(scaled)
            if i == 0 and watch and (jumped := self._jumped(before, scale)):
                self._search(kernels, scale, jumped)
                heights = self._step(scaled)[1]
        self.height.copy_(heights.reshape(len(self), -1).amax(-1) * scale[:: self.plan.groups])
        return self._probes(kernels, scale, heights)

    def _jumped(self, before: Tensor, scale: Tensor) -> list[int]:
        """The layers whose estimate differs by more than `JUMP` from that of the last call."""
        now = before.reshape(len(self), -1).amax(-1) * scale[:: self.plan.groups]
        same = (now <= self.height * JUMP) & (now * JUMP >= self.height)
        return [] if bool(same.all()) else (~same).nonzero()[:, 0].tolist()

    def _probes(self, kernels: Tensor, scale: Tensor, heights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        peaks, groups = self.frequency.shape[1], self.plan.groups
        best = heights.reshape(len(self), -1).argmax(-1)
        chosen = best // peaks + groups * torch.arange(len(self), device=best.device)
        vector = torch.view_as_complex(self.vector[chosen, best % peaks]) / scale[chosen, None]
        return chosen, vector[..., None] * self._waves(self.frequency[chosen, best % peaks])[..., None, :], scale[chosen]

    def _scale(self, kernels: Tensor) -> Tensor:
        """Powers of two (B,) near the largest entries of each layer: in these units no square over- or underflows."""
        each = kernels.reshape(len(self), -1)
        most = torch.maximum(each.amax(1), -each.amin(1))  # on a CPU five times as fast as `aminmax` or the norm
        exponent = torch.frexp(most.nan_to_num())[1]
        widest = math.frexp(torch.finfo(kernels.dtype).max)[1] * 3 // 4  # the inverse is a number too
        return torch.ldexp(torch.ones_like(most), exponent.clamp(-widest, widest)).repeat_interleave(self.plan.groups)

    def with_state(self, frequency: Tensor, vector: Tensor, height: Tensor) -> Tracker:
        """A twin that works on another state."""
        twin = copy.copy(self)
        twin._buffers = self._buffers | {"frequency": frequency, "vector": vector, "height": height}
        return twin

    def look(self, kernels: Tensor, watch: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What `follow` returns, without a step and on a copy of the state; where it watches, layers that jumped are searched there."""
        twin = self.with_state(self.frequency.clone(), self.vector.clone(), self.height.clone())
        scale = self._scale(kernels)
        scaled = _Scaled(kernels, 1 / scale)
        values = self._values(scaled, self.frequency, torch.view_as_complex(self.vector))
        if watch and (jumped := self._jumped(values, scale)):
            twin._search(kernels, scale, jumped)
            for _ in range(SEARCH_STEPS):  # no later call goes on from here
                values = twin._step(scaled)[1]
        return twin._probes(kernels, scale, values)

    def _search(self, kernels: Tensor, scale: Tensor, which: Sequence[int]) -> None:
        """Find the peaks of some layers afresh, by power iteration at every point of the grid.

        What was tracked stays where it is higher.
        """
        groups = self.plan.groups
        rows = torch.tensor([i * groups + g for i in which for g in range(groups)], dtype=torch.int64, device=kernels.device)
        for some in rows.split(max(1, TOGETHER // (len(self._constants()[1]) * kernels[0, 0].numel()))) if which else ():
            self._search_rows(_Scaled(kernels[some], 1 / scale[some]), some)

    def _search_rows(self, kernels: _Scaled, rows: Tensor) -> None:
        frequency, vector = self.frequency[rows], torch.view_as_complex(self.vector[rows])
        before = self._values(kernels, frequency, vector)
        line, best = torch.arange(len(rows), device=rows.device), before.argmax(-1)
        # From what was tracked, so that no search undoes the steps before it, and a direction that is orthogonal to nothing for long.
        found = self._peaks(kernels, unit(self._constants()[2] + vector[line, best]))
        worse = self._values(kernels, *found).amax(-1) < before.amax(-1)
        found[0][worse, -1] = frequency[worse, best[worse]]
        found[1][worse, -1] = vector[worse, best[worse]]
        self.frequency[rows], self.vector[rows] = found[0], torch.view_as_real(found[1])

    def _peaks(self, kernels: _Scaled, start: Tensor) -> tuple[Tensor, Tensor]:
        """Frequencies and vectors of the highest points of the grid, none next to a higher one or to its mirror image.

        The power iteration starts from `start` (B, n) at every point.
        """
        sides, turns = torch.tensor(self.plan.grid, device=start.device), self._constants()[1]
        points = (turns * (2 * math.pi / sides)).to(self.frequency.dtype)
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
            for other in (turns[top], -turns[top]):  # a real kernel has the same norm at w and -w
                gap = (turns[None] - other[:, None]).remainder(sides)
                near |= (torch.minimum(gap, sides - gap) <= 1).all(-1)
            left = torch.where(near, -1.0, left)
        chosen = torch.stack(tops, -1)
        return points[chosen], vectors[line[:, None], chosen]

    def _waves(self, frequency: Tensor) -> Tensor:
        """exp(-i p.w): (..., taps)."""
        angle = (frequency[..., None, :] * self._constants()[0]).sum(-1)  # no product of matrices, which settings cut short
        return torch.polar(torch.ones_like(angle), -angle)

    def _values(self, kernels: _Scaled, frequency: Tensor, vector: Tensor) -> Tensor:
        """||D(w) v||: (B, peaks)."""
        return torch.linalg.vector_norm(kernels.image(vector, self._waves(frequency)), dim=(1, 3))

    def _step(self, kernels: _Scaled) -> tuple[Tensor, Tensor]:
        """U from v, then w from (u, v), then v from (u, w): none of them lowers |u* D(w) v|, which is returned before and after."""
        waves, v = self._waves(self.frequency), torch.view_as_complex(self.vector)
        image = kernels.image(v, waves)
        back = kernels.back(image)
        if self.frequency.shape[-1]:
            self.frequency.copy_(self._climb((back.conj() * v[..., None]).sum(2), waves))
            waves = self._waves(self.frequency)
        length, v = _split((back * waves.conj()[:, :, None]).sum(-1), v)
        self.vector.copy_(torch.view_as_real(v))
        size = torch.linalg.vector_norm(image, dim=(1, 3))
        return size, length / torch.where(size > 0, size, 1.0)

    def _climb(self, taps: Tensor, waves: Tensor) -> Tensor:
        """The frequencies moved along the gradient of `|sum_p c_p exp(-i p.w)|^2`, c_p = u* K_p v, as far as it grows."""
        terms, positions = taps * waves, self._constants()[0]
        slope = -1j * terms @ positions.to(terms.dtype)
        gradient = (terms.sum(-1).conj()[..., None] * slope).real
        curvature = (terms.abs() @ positions.abs()).square().sum(-1, keepdim=True)
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


_TRACKERS: WeakValueDictionary[int, Tracker] = WeakValueDictionary()
_NUMBERS = itertools.count()


def _keep(tracker: Tracker) -> int:
    """A number by which the opaque operation finds the geometry of a tracker; the tracker itself is not kept alive."""
    key = next(_NUMBERS)
    _TRACKERS[key] = tracker
    return key


@torch.library.custom_op("gramlip::follow", mutates_args=("frequency", "vector", "height"))
def _follow(
    kernels: Tensor, frequency: Tensor, vector: Tensor, height: Tensor, due: list[int], watch: bool, key: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`Tracker.follow` as one operation, on the state that is given."""
    return _TRACKERS[key].with_state(frequency, vector, height).follow(kernels, due, watch)


@_follow.register_fake
def _(
    kernels: Tensor, frequency: Tensor, vector: Tensor, height: Tensor, due: list[int], watch: bool, key: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _shapes(kernels, vector, height)


@torch.library.custom_op("gramlip::look", mutates_args=())
def _look(kernels: Tensor, frequency: Tensor, vector: Tensor, height: Tensor, watch: bool, key: int) -> tuple[Tensor, Tensor, Tensor]:
    """`Tracker.look` as one operation: a function of its inputs, which an audit takes for a constant."""
    return _TRACKERS[key].with_state(frequency, vector, height).look(kernels, watch)


@_look.register_fake
def _(kernels: Tensor, frequency: Tensor, vector: Tensor, height: Tensor, watch: bool, key: int) -> tuple[Tensor, Tensor, Tensor]:
    return _shapes(kernels, vector, height)


def _shapes(kernels: Tensor, vector: Tensor, height: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `Tracker.follow` returns, without values."""
    shape = len(height), vector.shape[2], kernels.shape[-1]
    probes = kernels.new_empty(shape, dtype=torch.promote_types(kernels.dtype, torch.complex64))
    return kernels.new_empty(shape[0], dtype=torch.int64), probes, kernels.new_empty(shape[0])


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
        msg = (
            "tracked norms were asked for under torch.vmap over weights; expected one model: "
            "type one LipschitzPenalty for each of them, or spectral_norm(module, exact=True)"
        )
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
