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
from gramlip.numerics.precision import norm, real_dtype, without_autocast

SEARCH_STEPS = 12  # power steps per grid point in a search
TOGETHER = 1 << 24  # entries of the waves that a search holds at a time
JUMP = 1.25  # between two calls: an estimate that changes by more is of weights that were not reached by small steps
Peak = tuple[Tensor, Tensor, Tensor]  # what `Tracker.follow` returns
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
        options = dict[str, Any](dtype=real_dtype(first), device=first.device)
        self._columns, self._fixed = plan.columns(first.shape), dict[tuple[torch.device, torch.dtype], _Constants]()
        self._inputs = math.prod(first.shape[1:])
        (n, *taps), batch, peaks = self._columns.shape, self.count * plan.groups, min(peaks, math.prod(plan.grid) // 2 + 1)
        self.register_buffer("frequency", torch.zeros(batch, peaks, len(taps), **options))
        self.register_buffer("vector", torch.zeros(batch, peaks, n, 2, **options))
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

    def _constants(self) -> _Constants:
        """What the geometry fixes, on the device and in the precision of the state."""
        key = device, _ = self.frequency.device, self.frequency.dtype
        if key not in self._fixed:
            options, (n, *taps) = dict[str, Any](dtype=self.frequency.dtype, device=device), self._columns.shape
            axes = [torch.arange(k, **options) - (k - 1) / 2 for k in taps]  # centred: a phase of D(w), which changes no norm
            half = [torch.arange(n if j + 1 < len(axes) else n // 2 + 1, device=device) for j, n in enumerate(self.plan.grid)]
            start = unit(torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).flatten()).reshape(n, 2)
            phases = _phases(self._columns.flatten().to(device)) if any(s > 1 for s in self.plan.strides) else None
            self._fixed[key] = _Constants(
                positions := _product(axes, options),
                -positions,
                positions.norm(dim=-1),
                torch.ones((), **options),
                torch.tensor(STRIDES, **options)[:, None],
                _product(half, {"dtype": torch.int64, "device": device}),
                torch.view_as_complex(start.to(**options)),
                phases,
            )
        return self._fixed[key]

    def forward(self, weights: Sequence[Tensor], due: Sequence[int] = (), still: bool = False) -> Tensor:
        """Search for the peaks of the layers that are due, track all, then lower estimates (L,) of the norms with their graph.

        Searched as well is every layer whose estimate has jumped since the last call.

        Args:
            weights: of the layers.
            due: the layers to search.
            still: leave the state as it is: no search that is kept, no tracking step.
        """
        if not torch.is_grad_enabled() and not still and not torch.compiler.is_compiling():
            return self._read(weights, due)
        values, scale = self.scaled(weights, due, still)
        return values * scale * self.plan.attained

    def _read(self, weights: Sequence[Tensor], due: Sequence[int]) -> Tensor:
        """The same without a graph, which needs no product of the kernels with the vectors that were found."""

        def read(plain: Tensor) -> tuple[Tensor]:
            self._track(plain, due)
            return (self.last(),)

        with without_autocast(self.frequency):
            return plainly(read, self.kernels(weights))[0]

    def scaled(self, weights: Sequence[Tensor], due: Sequence[int], still: bool) -> tuple[Tensor, Tensor]:
        """The same before the padding's factor, as (L,) values near one and the units (L,) that they are in."""
        with without_autocast(self.frequency):
            kernels = self.kernels(weights)
            chosen, probes, scale = self._followed(kernels.detach(), list(due), still)
            kept = kernels if self.plan.groups == 1 else kernels[chosen]
            return torch.linalg.vector_norm(kept @ probes.mT, dim=(1, 2)), scale  # in this order the gradient lies in memory as the weight

    def divided(self, weight: Tensor, goal: float, most: float, due: Sequence[int], still: bool) -> Tensor:
        """The weight of the one layer times `goal` over its estimate, at most times `most`, with its graph; zero stays zero.

        Args:
            weight: of the layer.
            goal: what the estimate becomes, before the padding's factor.
            most: the largest number to multiply by; what is no number stays one that is seen.
            due: as for a call.
            still: as for a call.
        """
        sharded = replicated(weight)
        with without_autocast(self.frequency):
            kernels = self.kernels([weight]).detach()
            chosen, probes, (unit,) = self._followed(kernels, list(due), still)
            kernel = kernels if self.plan.groups == 1 else kernels.index_select(0, chosen)
            image = probes[0] @ kernel[0].mT
            value = torch.linalg.vector_norm(image)
            left = image / torch.where(value == 0, 1.0, value)
            if self.plan.groups > 1:
                left = left.new_zeros(self.plan.groups, *left.shape).index_copy(0, chosen, left[None]).transpose(0, 1).flatten(1)
            plain = sharded is not None or torch.compiler.is_compiling()
            value = _value(_full(weight), left, probes[0]) if plain else value
            scale = (goal / torch.where(value == 0, 1.0, value) / unit).clamp_max(most)
            if plain:
                return (weight * (scale if sharded is None else sharded[1](scale))).to(weight.dtype)
            slope = torch.where((value == 0) | (scale == most), 0.0, -scale / value)
            return _Divided.apply(weight, left, probes[0], scale, slope)  # type: ignore[no-any-return]

    def _followed(self, kernels: Tensor, due: list[int], still: bool) -> tuple[Tensor, ...]:
        """`follow` or `look` on the plain tensors below any transform; one opaque operation where code is compiled."""
        if torch.compiler.is_compiling():
            state = (self.frequency, self.vector, self.height)
            if still:
                return tuple(torch.ops.gramlip.look(kernels, *state, self.key))
            return tuple(torch.ops.gramlip.follow(kernels, *state, due, self.key))
        if kernels.is_meta:
            return _shapes(kernels, self.height)
        return plainly(self.look if still else lambda plain: self.follow(plain, due), kernels)

    def last(self) -> Tensor:
        """The estimates (L,) of the last call."""
        return self.height * self.plan.attained

    @torch.no_grad()
    def search(self, weights: Sequence[Tensor]) -> None:
        """Find the peaks of all layers afresh, outside of a call."""
        with without_autocast(self.frequency):
            kernels = self.kernels(weights)
            self._search(self._scaled(kernels), range(len(self)))

    def kernels(self, weights: Sequence[Tensor]) -> Tensor:
        """The weights (B, m, inputs * taps) of all layers in float32 at least, with their graph."""
        parts = [_full(weight) for weight in weights]
        stacked = torch.stack(parts) if len(parts) > 1 else parts[0]
        return stacked.reshape(len(self) * self.plan.groups, -1, self._inputs).to(self.frequency.dtype)

    def follow(self, kernels: Tensor, due: Sequence[int]) -> Peak:
        """One call on plain kernels: the group (L,) with each layer's highest peak, its D(w) v as probes over the unit, and the unit."""
        return self._probes(*self._track(kernels, due))

    def _track(self, kernels: Tensor, due: Sequence[int]) -> tuple[_Scaled, _Peaks]:
        scaled = self._scaled(kernels, None if due else self.height)
        self._search(scaled, due)
        peaks = self._step(scaled)
        if jumped := self._jumped(peaks.before, scaled.scale):
            scaled = self._scaled(kernels)
            self._search(scaled, jumped)
            peaks = self._step(scaled)
        for _ in range(self.steps - 1):
            peaks = self._step(scaled)
        self.height.copy_(self._highest(peaks.heights) * scaled.scale)
        return scaled, peaks

    def _highest(self, heights: Tensor) -> Tensor:
        return heights.reshape(len(self), -1).amax(-1)

    def _jumped(self, before: Tensor, scale: Tensor) -> list[int]:
        """The layers whose estimate differs by more than `JUMP` from that of the last call."""
        now, last = torch.stack([self._highest(before) * scale, self.height]).tolist()
        return [i for i, (a, b) in enumerate(zip(now, last, strict=True)) if not b / JUMP <= a <= b * JUMP]

    def _probes(self, scaled: _Scaled, peaks: _Peaks) -> Peak:
        groups, count = self.plan.groups, self.frequency.shape[1]
        best = peaks.heights.reshape(len(self), -1).argmax(-1)
        if len(self) > 1:
            best = best + groups * count * torch.arange(len(self), device=best.device)
        vector, waves = (x.flatten(0, 1).index_select(0, best)[:, None] for x in (peaks.vector, peaks.waves))
        return best // count, scaled.rows(vector, waves, 1 / scaled.scale), scaled.scale

    def _scaled(self, kernels: Tensor, scale: Tensor | None = None) -> _Scaled:
        """The kernels in units of numbers (L,) near their norms, or of powers of two near their largest entries.

        In these units no square over- or underflows. Estimates of the last call are such numbers, or the layer has jumped.
        """
        widest = math.frexp(torch.finfo(kernels.dtype).max)[1] * 3 // 4  # the inverse is a number too
        if scale is None:
            each = kernels.reshape(len(self), -1)
            most = torch.maximum(each.amax(1), -each.amin(1))  # on a CPU five times as fast as `aminmax` or the norm
            exponent = torch.frexp(most.nan_to_num())[1]
            scale = torch.ldexp(torch.ones_like(most), exponent.clamp(-widest, widest))
        else:
            scale = scale.clamp(2.0**-widest, 2.0**widest)
        inverse = 1 / scale
        return _Scaled(
            kernels, scale, inverse.repeat_interleave(self.plan.groups) if self.plan.groups > 1 else inverse, self._constants().phases
        )

    def with_state(self, frequency: Tensor, vector: Tensor, height: Tensor) -> Tracker:
        """A twin that works on another state."""
        twin = copy.copy(self)
        twin._buffers = self._buffers | {"frequency": frequency, "vector": vector, "height": height}
        return twin

    def look(self, kernels: Tensor) -> Peak:
        """What `follow` returns, without a step and on a copy of the state; layers that jumped are searched there."""
        twin = self.with_state(self.frequency.clone(), self.vector.clone(), self.height.clone())
        scaled, vector, waves = self._scaled(kernels), torch.view_as_complex(self.vector), self._waves(self.frequency)
        values = torch.linalg.vector_norm(scaled.image(vector, waves), dim=(2, 3))
        peaks = _Peaks(values, values, vector, waves)
        if jumped := self._jumped(values, scaled.scale):
            twin._search(scaled, jumped)
            for _ in range(SEARCH_STEPS):  # no later call goes on from here
                peaks = twin._step(scaled)
        return twin._probes(scaled, peaks)

    def _search(self, kernels: _Scaled, which: Sequence[int]) -> None:
        """Find the peaks of some layers afresh, by power iteration at every point of the grid.

        What was tracked stays where it is higher.
        """
        groups = self.plan.groups
        rows = torch.tensor([i * groups + g for i in which for g in range(groups)], dtype=torch.int64, device=kernels.inverse.device)
        for lines in rows.split(max(1, TOGETHER // (len(self._constants().turns) * self._columns.numel()))) if which else ():
            self._search_rows(kernels.of(lines), lines)

    def _search_rows(self, kernels: _Scaled, rows: Tensor) -> None:
        frequency, vector = self.frequency[rows], torch.view_as_complex(self.vector[rows])
        before = self._values(kernels, frequency, vector)
        line, best = torch.arange(len(rows), device=rows.device), before.argmax(-1)
        # From what was tracked, so that no search undoes the steps before it, and a direction that is orthogonal to nothing for long.
        peaks = self._peaks(kernels, unit(self._constants().start + vector[line, best]))
        worse = self._values(kernels, *peaks).amax(-1) < before.amax(-1)
        peaks[0][worse, -1] = frequency[worse, best[worse]]
        peaks[1][worse, -1] = vector[worse, best[worse]]
        self.frequency[rows], self.vector[rows] = peaks[0], torch.view_as_real(peaks[1])

    def _peaks(self, kernels: _Scaled, start: Tensor) -> tuple[Tensor, Tensor]:
        """Frequencies and vectors of the highest points of the grid, none next to a higher one or to its mirror image.

        The power iteration starts from `start` (B, n) at every point.
        """
        sides, turns = torch.tensor(self.plan.grid, device=start.device), self._constants().turns
        points = (turns * (2 * math.pi / sides)).to(self.frequency.dtype)
        waves = self._waves(points)
        vectors = start[:, None].expand(-1, len(points), -1)
        left = points.new_zeros(())
        for _ in range(SEARCH_STEPS):
            back = kernels.back(kernels.image(vectors, waves), waves.shape[-1])
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
        fixed = self._constants()
        angle = (frequency[..., None, :] * fixed.turning).sum(-1)  # no product of matrices, which settings cut short
        return torch.polar(fixed.one.expand_as(angle), angle)

    def _values(self, kernels: _Scaled, frequency: Tensor, vector: Tensor) -> Tensor:
        """||D(w) v||: (B, peaks)."""
        return torch.linalg.vector_norm(kernels.image(vector, self._waves(frequency)), dim=(2, 3))

    def _step(self, kernels: _Scaled) -> _Peaks:
        """U from v, then w from (u, v), then v from (u, w): none of them lowers |u* D(w) v|."""
        waves, v = self._waves(self.frequency), torch.view_as_complex(self.vector)
        left, size = _unit(kernels.image(v, waves))
        back = kernels.back(left, waves.shape[-1])
        if self.frequency.shape[-1]:
            frequency, waves = self._climb((back.conj() * v[..., None]).sum(2), waves)
            self.frequency.copy_(frequency)
        height, v = _split((back * waves.conj()[:, :, None]).sum(-1), v)
        self.vector.copy_(torch.view_as_real(v))
        return _Peaks(size, height, v, waves.expand(len(v), -1, -1))

    def _climb(self, taps: Tensor, waves: Tensor) -> tuple[Tensor, Tensor]:
        """The frequencies moved along the gradient of `|sum_p c_p exp(-i p.w)|^2`, c_p = u* K_p v, as far as it grows; and their waves."""
        terms, fixed = taps * waves, self._constants()
        slope = (terms * terms.sum(-1, keepdim=True).conj()).imag
        gradient = (slope[..., None] * fixed.positions).sum(-2)
        curvature = (terms.abs() * fixed.reach).sum(-1, keepdim=True).square()
        safe = (gradient / curvature.clamp_min(torch.finfo(curvature.dtype).tiny)).nan_to_num(0.0, 0.0, 0.0)
        tried = self.frequency[..., None, :] + safe[..., None, :] * fixed.strides
        waves = self._waves(tried)
        best = (taps[..., None, :] * waves).sum(-1).abs().argmax(-1)[..., None, None]
        return tried.take_along_dim(best, -2).squeeze(-2), waves.take_along_dim(best, -2).squeeze(-2)


class _Peaks(NamedTuple):
    """`|u* D(w) v|` before and after a step, both (B, peaks), with the v (B, peaks, n) and the waves (B, peaks, taps) of the latter."""

    before: Tensor
    heights: Tensor
    vector: Tensor
    waves: Tensor


class _Phases(NamedTuple):
    """Where the columns of the polyphase kernel stand in the weight, which is never copied, and where its columns stand in the kernel.

    Not all of the kernel's are `present`; None where they are.
    """

    there: Tensor
    present: Tensor | None
    back: Tensor


def _phases(columns: Tensor) -> _Phases:
    present = columns >= 0
    back = columns.argsort(stable=True)[int((~present).sum()) :]
    return _Phases(columns.clamp_min(0), None if bool(present.all()) else present, back)


class _Constants(NamedTuple):
    """The taps' positions, negated, how far out they are, numbers, the grid's points in turns, a fixed direction to search from."""

    positions: Tensor
    turning: Tensor
    reach: Tensor
    one: Tensor
    strides: Tensor
    turns: Tensor
    start: Tensor
    phases: _Phases | None


class _Scaled(NamedTuple):
    """Kernels (B, m, columns) in units (L,) of each layer; what they are multiplied by is divided (B,), which is far smaller."""

    kernels: Tensor
    scale: Tensor
    inverse: Tensor
    phases: _Phases | None

    def of(self, rows: Tensor) -> _Scaled:
        """Some of the kernels."""
        return self._replace(kernels=self.kernels[rows], inverse=self.inverse[rows])

    def rows(self, vector: Tensor, waves: Tensor, inverse: Tensor) -> Tensor:
        """What the kernel's rows are multiplied by for D(w) v: (B, 2 peaks, columns), real and imaginary parts in turn.

        Args:
            vector: (B, peaks, n).
            waves: (..., peaks, taps).
            inverse: of the units, (B,).
        """
        columns = ((vector * inverse[:, None, None])[..., None] * waves[..., None, :]).flatten(2)
        if self.phases is not None:
            columns = columns[..., self.phases.back]
        return torch.stack([columns.real, columns.imag], 2).flatten(1, 2)

    def image(self, vector: Tensor, waves: Tensor) -> Tensor:
        """D(w) v, (B, peaks, 2, m)."""
        return (self.rows(vector, waves, self.inverse) @ self.kernels.mT).unflatten(1, (-1, 2))

    def back(self, image: Tensor, taps: int) -> Tensor:
        """K_p* u for every tap p, (B, peaks, n, taps), complex."""
        back = ((image * self.inverse[:, None, None, None]).flatten(1, 2) @ self.kernels).unflatten(1, (-1, 2))
        columns = torch.complex(back[:, :, 0], back[:, :, 1])
        if self.phases is not None:
            columns = columns[..., self.phases.there]
            columns = columns if self.phases.present is None else torch.where(self.phases.present, columns, 0.0)
        return columns.unflatten(-1, (-1, taps))


_TRACKERS: WeakValueDictionary[int, Tracker] = WeakValueDictionary()
_NUMBERS = itertools.count()


def _keep(tracker: Tracker) -> int:
    """A number by which the opaque operation finds the geometry of a tracker; the tracker itself is not kept alive."""
    key = next(_NUMBERS)
    _TRACKERS[key] = tracker
    return key


@torch.library.custom_op("gramlip::follow", mutates_args=("frequency", "vector", "height"))
def _follow(kernels: Tensor, frequency: Tensor, vector: Tensor, height: Tensor, due: list[int], key: int) -> Peak:
    """`Tracker.follow` as one operation, on the state that is given."""
    return _TRACKERS[key].with_state(frequency, vector, height).follow(kernels, due)


@_follow.register_fake
def _(kernels: Tensor, frequency: Tensor, vector: Tensor, height: Tensor, due: list[int], key: int) -> Peak:
    return _shapes(kernels, height)


@torch.library.custom_op("gramlip::look", mutates_args=())
def _look(kernels: Tensor, frequency: Tensor, vector: Tensor, height: Tensor, key: int) -> Peak:
    """`Tracker.look` as one operation: a function of its inputs, which an audit takes for a constant."""
    return _TRACKERS[key].with_state(frequency, vector, height).look(kernels)


@_look.register_fake
def _(kernels: Tensor, frequency: Tensor, vector: Tensor, height: Tensor, key: int) -> Peak:
    return _shapes(kernels, height)


def _shapes(kernels: Tensor, height: Tensor) -> Peak:
    """What `Tracker.follow` returns, without values."""
    layers = len(height)
    return kernels.new_empty(layers, dtype=torch.int64), kernels.new_empty(layers, 2, kernels.shape[-1]), kernels.new_empty(layers)


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


class _Divided(torch.autograd.Function):
    """`weight * c` with `c` proportional to `1 / v`, where `v = Re(u* D(w) v)` is linear in the weight: all of it in few passes.

    Memory for whole weights is what costs here: autograd takes it four times for the same expression, this once in each direction.
    """

    @staticmethod
    def forward(weight: Tensor, left: Tensor, probes: Tensor, scale: Tensor, slope: Tensor) -> Tensor:
        """The weight of M rows, N entries each, times the scale.

        Args:
            weight: any shape.
            left: u, real and imaginary part, (2, M).
            probes: D(w) v likewise, (2, N): `v` is the sum of both `left_i . weight probes_i`.
            scale: c, of no axes.
            slope: dc/dv, of no axes: `-c / v`, or 0 where c is constant.
        """
        del left, probes, slope
        return (weight * scale).to(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, left, probes, scale, slope = ctx.saved_tensors
        grad = grads[0].contiguous()
        derived = torch.is_grad_enabled()  # derivatives of this are asked for
        if derived:
            scale, slope = _moved(weight, left, probes, scale, slope)
        total = torch.dot(grad.flatten().to(left.dtype), weight.flatten().to(left.dtype))
        left, out = left * (total * slope), (grad * scale).reshape(left.shape[1], -1)
        if derived:
            out = out + left.mT @ probes
        else:  # a product of matrices of two columns takes four times as long
            out.addcmul_(left[0, :, None], probes[0]).addcmul_(left[1, :, None], probes[1])
        return out.reshape(weight.shape), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        weight, left, probes, scale, slope = ctx.saved_tensors
        scale, slope = _moved(weight, left, probes, scale, slope)
        return (tangents[0] * scale + weight * (slope * _value(tangents[0], left, probes))).to(weight.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        _Plainly.vmap(info, in_dims, *inputs)


def _moved(weight: Tensor, left: Tensor, probes: Tensor, scale: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The same scale and slope as functions of the weight: `c` falls as `1 / v`, its slope as `1 / v**2`."""
    value = _value(weight, left, probes)
    ratio = torch.where(slope == 0, 1.0, value.detach() / torch.where(slope == 0, 1.0, value))
    return scale * ratio, slope * ratio * ratio


def _value(weight: Tensor, left: Tensor, probes: Tensor) -> Tensor:
    return (left * (probes @ weight.to(left.dtype).reshape(left.shape[1], -1).mT)).sum()


def _product(axes: list[Tensor], options: dict[str, Any]) -> Tensor:
    """All combinations (F, axes); one empty row without axes."""
    return torch.cartesian_prod(*axes).reshape(-1, len(axes)) if axes else torch.zeros(1, 0, **options)


def _unit(image: Tensor) -> tuple[Tensor, Tensor]:
    """D(w) v (B, peaks, 2, m) as unit vectors, or zero, and their lengths."""
    size = torch.linalg.vector_norm(image, dim=(2, 3))
    return image / size.clamp_min(torch.finfo(size.dtype).tiny)[..., None, None], size


def _split(v: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths and unit vectors along the last axis; what has no direction, or is no number, keeps the one `before`."""
    length = norm(v)
    known = (length > 0) & (length < math.inf)
    return length, torch.where(known[..., None], v / length[..., None], before)


def _full(weight: Tensor) -> Tensor:
    """The weight, gathered where it is sharded."""
    sharded = replicated(weight)
    return weight if sharded is None else sharded[0]
