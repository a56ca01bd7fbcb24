"""`Tracker`: the top frequencies and singular vectors of layers of one shape, followed from one training step to the next.

A search looks at every frequency of a grid. Between two searches a step maximises `|u* D(w) v|` in turn over u, w and v
(docs/training.md#tracking). While the weights stand still no step lowers this value. It is never above the supremum over all
frequencies. Several peaks are followed, because a penalty pushes the highest peak down until another one is higher.
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
JUMP = 1.25  # an estimate that changed by more since the last call belongs to new weights, such as a checkpoint: search again
Peak = tuple[Tensor, Tensor, Tensor]  # the result of `Tracker.follow`
STRIDES = (0.0, 1.0, 4.0)  # multiples of the safe step along the gradient that are tried; 0 keeps the frequency


class Tracker(nn.Module):
    """Estimates of the norms of L layers that share one weight shape and one geometry, from `peaks` frequencies of each group.

    The state is in buffers, and so in the state_dict: training resumes as if it had not stopped. With B = L * groups they are
    `frequency` (B, peaks, axes), `vector` (B, peaks, n, 2), real and imaginary part, and `height` (L,), the last estimates.

    Args:
        geometry: the geometry that all layers share.
        weights: the weights of the layers. Only their shape, dtype and device are read.
        steps: number of tracking steps in a call.
        peaks: frequencies followed in each group.
    """

    frequency: Tensor
    vector: Tensor
    height: Tensor

    def __init__(self, geometry: NormGeometry, weights: Sequence[Tensor], steps: int, peaks: int) -> None:
        super().__init__()
        self.geometry, self.steps, self.count = geometry, steps, len(weights)
        first = _full(weights[0].detach())
        options = dict[str, Any](dtype=real_dtype(first), device=first.device)
        self._columns, self._fixed = geometry.columns(first.shape), dict[tuple[torch.device, torch.dtype], _Constants]()
        self._inputs = math.prod(first.shape[1:])
        (n, *taps), batch, peaks = self._columns.shape, self.count * geometry.groups, min(peaks, math.prod(geometry.grid) // 2 + 1)
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
        """Move the state to another device; its precision stays."""
        empty = self.height.is_meta
        super()._apply(lambda x: fn(x).to(x.dtype), recurse)
        if empty and not self.height.is_meta:  # `to_empty` leaves the memory unset
            for buffer in self.buffers():
                buffer.zero_()
        return self

    def _constants(self) -> _Constants:
        """Constants of the geometry, on the device and in the precision of the state."""
        key = device, _ = self.frequency.device, self.frequency.dtype
        if key not in self._fixed:
            options, (n, *taps) = dict[str, Any](dtype=self.frequency.dtype, device=device), self._columns.shape
            axes = [torch.arange(k, **options) - (k - 1) / 2 for k in taps]  # centred: a phase of D(w), which changes no norm
            half = [torch.arange(n if j + 1 < len(axes) else n // 2 + 1, device=device) for j, n in enumerate(self.geometry.grid)]
            start = unit(torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).flatten()).reshape(n, 2)
            phases = _phases(self._columns.flatten().to(device)) if any(s > 1 for s in self.geometry.strides) else None
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
        """Lower estimates (L,) of the norms, with their graph: search the layers that are due, then track all layers.

        A layer whose estimate has jumped since the last call is searched too.

        Args:
            weights: the weights of the layers.
            due: the numbers of the layers to search.
            still: leave the state as it is: no tracking step, and no search is kept.
        """
        if not torch.is_grad_enabled() and not still and not torch.compiler.is_compiling():
            return self._read(weights, due)
        values, scale = self.scaled(weights, due, still)
        return values * scale * self.geometry.attained

    def _read(self, weights: Sequence[Tensor], due: Sequence[int]) -> Tensor:
        """The same estimates without a graph: they are the heights of the last tracking step."""

        def read(plain: Tensor) -> tuple[Tensor]:
            self._track(plain, due)
            return (self.last(),)

        with without_autocast(self.frequency):
            return plainly(read, self.kernels(weights))[0]

    def scaled(self, weights: Sequence[Tensor], due: Sequence[int], still: bool) -> tuple[Tensor, Tensor]:
        """The estimates without the padding's factor, as values (L,) near one and their units (L,)."""
        with without_autocast(self.frequency):
            kernels = self.kernels(weights)
            chosen, probes, scale = self._followed(kernels.detach(), list(due), still)
            kept = kernels if self.geometry.groups == 1 else kernels[chosen]
            # in this order of the product the gradient has the memory layout of the weight
            return torch.linalg.vector_norm(kept @ probes.mT, dim=(1, 2)), scale

    def divided(self, weight: Tensor, goal: float, most: float, due: Sequence[int], still: bool) -> Tensor:
        """The weight of the only layer, scaled so that its estimate becomes `goal`, with its graph; a zero weight stays zero.

        Args:
            weight: the weight of the layer.
            goal: the wanted estimate, without the padding's factor.
            most: the largest scale. A scale that is NaN stays NaN, so that the user sees it.
            due: as in a call.
            still: as in a call.
        """
        with without_autocast(self.frequency):
            left, probes, unit, value = self._singular(weight, due, still)
            sharded = replicated(weight)
            plain = sharded is not None or torch.compiler.is_compiling()
            value = _value(_full(weight), left, probes) if plain else value
            scale = (goal / torch.where(value == 0, 1.0, value) / unit).clamp_max(most)
            if plain:
                return (weight * (scale if sharded is None else sharded[1](scale))).to(weight.dtype)
            slope = torch.where((value == 0) | (scale == most), 0.0, -scale / value)
            return _Divided.apply(weight, left, probes, scale, slope)  # type: ignore[no-any-return]

    def _singular(self, weight: Tensor, due: Sequence[int], still: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the only layer, without a graph: u on the rows of the weight, the probes of D(w) v, the unit, and `|u* D(w) v|` in it."""
        kernels = self.kernels([weight]).detach()
        chosen, probes, (unit,) = self._followed(kernels, list(due), still)
        kernel = kernels if self.geometry.groups == 1 else kernels.index_select(0, chosen)
        image = probes[0] @ kernel[0].mT
        value = torch.linalg.vector_norm(image)
        left = image / torch.where(value == 0, 1.0, value)
        if self.geometry.groups > 1:
            left = left.new_zeros(self.geometry.groups, *left.shape).index_copy(0, chosen, left[None]).transpose(0, 1).flatten(1)
        return left, probes[0], unit, value

    def _followed(self, kernels: Tensor, due: list[int], still: bool) -> tuple[Tensor, ...]:
        """`follow` or `look` on the plain tensors below any transform of `torch.func`; compiled code calls one opaque operation."""
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
        return self.height * self.geometry.attained

    @torch.no_grad()
    def search(self, weights: Sequence[Tensor]) -> None:
        """Search for the peaks of all layers, outside of a call."""
        with without_autocast(self.frequency):
            kernels = self.kernels(weights)
            self._search(self._scaled(kernels), range(len(self)))

    def kernels(self, weights: Sequence[Tensor]) -> Tensor:
        """The weights of all layers as (B, m, inputs * taps), in float32 or float64, with their graph."""
        parts = [_full(weight) for weight in weights]
        stacked = torch.stack(parts) if len(parts) > 1 else parts[0]
        return stacked.reshape(len(self) * self.geometry.groups, -1, self._inputs).to(self.frequency.dtype)

    def follow(self, kernels: Tensor, due: Sequence[int]) -> Peak:
        """One call on plain kernels: for each layer the group (L,) of its highest peak, the probes of D(w) v there, and the unit (L,)."""
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
        groups, count = self.geometry.groups, self.frequency.shape[1]
        best = peaks.heights.reshape(len(self), -1).argmax(-1)
        if len(self) > 1:
            best = best + groups * count * torch.arange(len(self), device=best.device)
        vector, waves = (x.flatten(0, 1).index_select(0, best)[:, None] for x in (peaks.vector, peaks.waves))
        return best // count, scaled.rows(vector, waves, 1 / scaled.scale), scaled.scale

    def _scaled(self, kernels: Tensor, scale: Tensor | None = None) -> _Scaled:
        """The kernels in units (L,) near their norms: the last estimates, or powers of two near the largest entries.

        In these units no square overflows or underflows. A last estimate that is far from the norm counts as a jump.
        """
        widest = math.frexp(torch.finfo(kernels.dtype).max)[1] * 3 // 4  # so that the inverse is finite too
        if scale is None:
            each = kernels.reshape(len(self), -1)
            most = torch.maximum(each.amax(1), -each.amin(1))  # on a CPU five times as fast as `aminmax` or the norm
            exponent = torch.frexp(most.nan_to_num())[1]
            scale = torch.ldexp(torch.ones_like(most), exponent.clamp(-widest, widest))
        else:
            scale = scale.clamp(2.0**-widest, 2.0**widest)
        inverse = 1 / scale
        return _Scaled(
            kernels,
            scale,
            inverse.repeat_interleave(self.geometry.groups) if self.geometry.groups > 1 else inverse,
            self._constants().phases,
        )

    def with_state(self, frequency: Tensor, vector: Tensor, height: Tensor) -> Tracker:
        """A copy of this tracker that works on another state."""
        twin = copy.copy(self)
        twin._buffers = self._buffers | {"frequency": frequency, "vector": vector, "height": height}
        return twin

    def look(self, kernels: Tensor) -> Peak:
        """The result of `follow` without a change of the state; layers that jumped are searched on a copy of it."""
        twin = self.with_state(self.frequency.clone(), self.vector.clone(), self.height.clone())
        scaled, vector, waves = self._scaled(kernels), torch.view_as_complex(self.vector), self._waves(self.frequency)
        values = torch.linalg.vector_norm(scaled.image(vector, waves), dim=(2, 3))
        peaks = _Peaks(values, values, vector, waves)
        if jumped := self._jumped(values, scaled.scale):
            twin._search(scaled, jumped)
            for _ in range(SEARCH_STEPS):  # this copy is not tracked further
                peaks = twin._step(scaled)
        return twin._probes(scaled, peaks)

    def _search(self, kernels: _Scaled, which: Sequence[int]) -> None:
        """Search for the peaks of some layers, by power iteration at every point of the grid. A higher tracked peak is kept."""
        groups = self.geometry.groups
        rows = torch.tensor([i * groups + g for i in which for g in range(groups)], dtype=torch.int64, device=kernels.inverse.device)
        for lines in rows.split(max(1, TOGETHER // (len(self._constants().turns) * self._columns.numel()))) if which else ():
            self._search_rows(kernels.of(lines), lines)

    def _search_rows(self, kernels: _Scaled, rows: Tensor) -> None:
        frequency, vector = self.frequency[rows], torch.view_as_complex(self.vector[rows])
        before = self._values(kernels, frequency, vector)
        line, best = torch.arange(len(rows), device=rows.device), before.argmax(-1)
        # Start from the tracked vector, so that no search undoes earlier steps, plus a fixed direction in case the top is orthogonal to it.
        peaks = self._peaks(kernels, unit(self._constants().start + vector[line, best]))
        worse = self._values(kernels, *peaks).amax(-1) < before.amax(-1)
        peaks[0][worse, -1] = frequency[worse, best[worse]]
        peaks[1][worse, -1] = vector[worse, best[worse]]
        self.frequency[rows], self.vector[rows] = peaks[0], torch.view_as_real(peaks[1])

    def _peaks(self, kernels: _Scaled, start: Tensor) -> tuple[Tensor, Tensor]:
        """Frequencies and vectors of the highest points of the grid. Neighbours of a chosen point and of its mirror image are left out.

        The power iteration starts from `start` (B, n) at every point.
        """
        sides, turns = torch.tensor(self.geometry.grid, device=start.device), self._constants().turns
        points = (turns * (2 * math.pi / sides)).to(self.frequency.dtype)
        waves = self._waves(points)
        vectors = start[:, None].expand(-1, len(points), -1)
        heights = points.new_zeros(())
        for _ in range(SEARCH_STEPS):
            back = kernels.back(kernels.image(vectors, waves), waves.shape[-1])
            heights, vectors = _split((back * waves.conj()[:, None]).sum(-1), vectors)
        chosen = _summits(heights, turns, sides, self.frequency.shape[1])
        return points[chosen], vectors[torch.arange(len(start), device=start.device)[:, None], chosen]

    def _waves(self, frequency: Tensor) -> Tensor:
        """exp(-i p.w): (..., taps)."""
        fixed = self._constants()
        angle = (frequency[..., None, :] * fixed.turning).sum(-1)  # no matrix product: global settings may lower its precision
        return torch.polar(fixed.one.expand_as(angle), angle)

    def _values(self, kernels: _Scaled, frequency: Tensor, vector: Tensor) -> Tensor:
        """||D(w) v||: (B, peaks)."""
        return torch.linalg.vector_norm(kernels.image(vector, self._waves(frequency)), dim=(2, 3))

    def _step(self, kernels: _Scaled) -> _Peaks:
        """One tracking step: u from v, then w from (u, v), then v from (u, w). None of the three lowers |u* D(w) v|."""
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
        """The best frequencies, and their waves, along the gradient of `|sum_p c_p exp(-i p.w)|^2` with c_p = u* K_p v."""
        terms, fixed = taps * waves, self._constants()
        slope = (terms * terms.sum(-1, keepdim=True).conj()).imag
        gradient = (slope[..., None] * fixed.positions).sum(-2)
        curvature = (terms.abs() * fixed.reach).sum(-1, keepdim=True).square()
        safe = (gradient / curvature.clamp_min(torch.finfo(curvature.dtype).tiny)).nan_to_num(0.0, 0.0, 0.0)
        tried = self.frequency[..., None, :] + safe[..., None, :] * fixed.strides
        waves = self._waves(tried)
        best = (taps[..., None, :] * waves).sum(-1).abs().argmax(-1)[..., None, None]
        return tried.take_along_dim(best, -2).squeeze(-2), waves.take_along_dim(best, -2).squeeze(-2)


def _summits(heights: Tensor, turns: Tensor, sides: Tensor, count: int) -> Tensor:
    """The numbers (B, count) of the highest points, none a neighbour of a higher one or of its mirror image."""
    tops: list[Tensor] = []
    for _ in range(count):
        tops.append(top := heights.argmax(-1))
        near = torch.zeros_like(heights, dtype=torch.bool)
        for other in (turns[top], -turns[top]):  # a real kernel has the same norm at w and -w
            gap = (turns[None] - other[:, None]).remainder(sides)
            near |= (torch.minimum(gap, sides - gap) <= 1).all(-1)
        heights = torch.where(near, -1.0, heights)
    return torch.stack(tops, -1)


class _Peaks(NamedTuple):
    """`|u* D(w) v|` before and after a step, both (B, peaks), and the v (B, peaks, n) and waves (B, peaks, taps) after it."""

    before: Tensor
    heights: Tensor
    vector: Tensor
    waves: Tensor


class _Phases(NamedTuple):
    """The columns of the polyphase kernel are columns of the weight, which is not copied.

    Attributes:
        there: for each column of the kernel, its column in the weight.
        present: which columns of the kernel are in the weight; the others are zero. None if all are.
        back: for each column of the weight, its column in the kernel.
    """

    there: Tensor
    present: Tensor | None
    back: Tensor


def _phases(columns: Tensor) -> _Phases:
    present = columns >= 0
    back = columns.argsort(stable=True)[int((~present).sum()) :]
    return _Phases(columns.clamp_min(0), None if bool(present.all()) else present, back)


class _Constants(NamedTuple):
    """Constants of one geometry on one device.

    Attributes:
        positions: of the taps, centred, (taps, axes).
        turning: `-positions`, the factor of the frequency in a wave's angle.
        reach: distance of each tap from the centre, (taps,).
        one: the number 1.
        strides: `STRIDES` as a column.
        turns: the points of the grid, in turns, (F, axes).
        start: a fixed unit vector that searches start from, (n,).
        phases: columns of a strided kernel; None without a stride.
    """

    positions: Tensor
    turning: Tensor
    reach: Tensor
    one: Tensor
    strides: Tensor
    turns: Tensor
    start: Tensor
    phases: _Phases | None


class _Scaled(NamedTuple):
    """Kernels (B, m, columns) and the unit (L,) of each layer. The vectors are divided by the units, since they are smaller."""

    kernels: Tensor
    scale: Tensor
    inverse: Tensor
    phases: _Phases | None

    def of(self, rows: Tensor) -> _Scaled:
        """The kernels of some groups."""
        return self._replace(kernels=self.kernels[rows], inverse=self.inverse[rows])

    def rows(self, vector: Tensor, waves: Tensor, inverse: Tensor) -> Tensor:
        """The probes whose products with the kernel's rows are D(w) v: (B, 2 peaks, columns), real and imaginary parts in turn.

        Args:
            vector: (B, peaks, n).
            waves: (..., peaks, taps).
            inverse: 1 over the units, (B,).
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
    """A number by which an opaque operation finds the tracker. The tracker is not kept alive."""
    key = next(_NUMBERS)
    _TRACKERS[key] = tracker
    return key


@torch.library.custom_op("gramlip::follow", mutates_args=("frequency", "vector", "height"))
def _follow(kernels: Tensor, frequency: Tensor, vector: Tensor, height: Tensor, due: list[int], key: int) -> Peak:
    """`Tracker.follow` as one operation on the given state."""
    return _TRACKERS[key].with_state(frequency, vector, height).follow(kernels, due)


@_follow.register_fake
def _(kernels: Tensor, frequency: Tensor, vector: Tensor, height: Tensor, due: list[int], key: int) -> Peak:
    return _shapes(kernels, height)


@torch.library.custom_op("gramlip::look", mutates_args=())
def _look(kernels: Tensor, frequency: Tensor, vector: Tensor, height: Tensor, key: int) -> Peak:
    """`Tracker.look` as one operation without side effects, so that an audit can take its result as a constant."""
    return _TRACKERS[key].with_state(frequency, vector, height).look(kernels)


@_look.register_fake
def _(kernels: Tensor, frequency: Tensor, vector: Tensor, height: Tensor, key: int) -> Peak:
    return _shapes(kernels, height)


def _shapes(kernels: Tensor, height: Tensor) -> Peak:
    """Tensors of the shapes that `Tracker.follow` returns."""
    layers = len(height)
    return kernels.new_empty(layers, dtype=torch.int64), kernels.new_empty(layers, 2, kernels.shape[-1]), kernels.new_empty(layers)


def plainly(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Call a function on the plain tensors below any transform of `torch.func`, where the state can be written; the result has no graph."""
    return _Plainly.apply(function, *tensors)  # type: ignore[no-any-return]


class _Plainly(torch.autograd.Function):
    """`plainly` as a function of autograd: torch gives plain tensors to `forward` only."""

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
    """`weight * c` with `c` proportional to `1 / value`, where `value = Re(u* D(w) v)` is linear in the weight.

    The time goes into memory of the size of the weight: autograd allocates it four times, this function once in each direction.
    """

    @staticmethod
    def forward(weight: Tensor, left: Tensor, probes: Tensor, scale: Tensor, slope: Tensor) -> Tensor:
        """The weight of M rows, N entries each, times the scale.

        Args:
            weight: any shape.
            left: u, real and imaginary part, (2, M).
            probes: of D(w) v, (2, N): `value` is the sum over i of `left_i . weight probes_i`.
            scale: c, a scalar tensor.
            slope: dc/dvalue, a scalar tensor: `-c / value`, or 0 if c is constant.
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
        derived = torch.is_grad_enabled()  # a second derivative is wanted
        if derived:
            scale, slope = _moved(weight, left, probes, scale, slope)
        total = torch.dot(grad.flatten().to(left.dtype), weight.flatten().to(left.dtype))
        left, out = left * (total * slope), (grad * scale).reshape(left.shape[1], -1)
        if derived:
            out = out + left.mT @ probes
        else:  # a matrix product with two columns would take four times as long
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
    """The same scale and slope as functions of the weight: `c` falls as `1 / value`, its slope as `1 / value**2`."""
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
    """Lengths and unit vectors along the last axis; where the length is zero or not finite, the vector is the one `before`."""
    length = norm(v)
    known = (length > 0) & (length < math.inf)
    return length, torch.where(known[..., None], v / length[..., None], before)


def _full(weight: Tensor) -> Tensor:
    """The weight; a sharded one is gathered."""
    sharded = replicated(weight)
    return weight if sharded is None else sharded[0]
