"""Vectors to try on a finite layer: its lower side starts from what the search over its symbol found. docs/theory.md#lower-side."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gramlip.norm.finite.layer import Layer
from gramlip.norm.search.lower import Peak
from gramlip.norm.symbol.polyphase import axes
from gramlip.operators.linear_maps import Conv

SAMPLE_BYTES = 48 << 20  # what one application of a finite layer may hold


def sample(op: Conv) -> tuple[Conv, tuple[str, ...]]:
    """The layer and the padding mode of each axis, or a smaller layer whose norm it cannot exceed (lemma 10).

    Inputs on a window of an axis meet what a zero-padded axis of the window's size does, so only the axes that were cut are zero-padded.
    """
    scalar = 16 if op.weight.is_complex() else 8
    taps, sizes, small = math.prod(op.weight.shape[1:]), list(op.sizes or ()), op
    modes = [op.padding_mode] * op.dims
    while True:
        base = axes(small)
        reads = taps * math.prod(axis.outputs or 0 for axis in base)
        held = 14 * op.weight.shape[1] * math.prod(axis.size or 0 for axis in base)
        longest = max(range(len(sizes)), key=sizes.__getitem__)
        if scalar * max(reads, held) <= SAMPLE_BYTES or sizes[longest] <= 8 * max(op.spans):
            return small, tuple(modes)
        pad, whole = max(op.pads[longest]), sizes[longest]
        # a window of an axis that repeats inputs stands farther from its ends than the padding reaches
        room = whole if modes[longest] == "zeros" else whole - 2 * (pad + op.strides[longest])
        cut = min(max(whole * 3 // 4 - pad, max(op.spans)), room)
        if cut < 1 or cut + sum(op.pads[longest]) < op.spans[longest]:
            return small, tuple(modes)
        sizes[longest], modes[longest] = cut, "zeros"
        small = replace(op, input_size=sizes, padding_mode="zeros")


def wave(peak: Peak, layer: Layer, group: int) -> Tensor:
    """A start for the layer's own power steps: the best block's singular vector on a plane wave under a sine window.

    The vector lives on the inputs, split into the phases of a stride, or on the outputs where the blocks were flipped.
    """
    if any(axis.stride > 1 and axis.dilation > 1 for axis in layer.geometry):
        return start_like(layer, _blank(layer))
    flipped, vector = peak.flipped, peak.vector
    phases = [1 if flipped else min(axis.stride, axis.kernel) for axis in layer.geometry]
    if vector.numel() != layer.shape[1 if flipped else 2] * math.prod(phases):  # the stride was taken as a divisor of itself
        return start_like(layer, _blank(layer))
    x = vector.reshape(-1, *phases)
    for j, (axis, turn, count) in enumerate(zip(layer.geometry, peak.frequency, phases, strict=True)):
        size = (axis.outputs if flipped else axis.size) or 0
        place = torch.arange(size, device=vector.device)
        window = (math.pi / (size + 1) * (place + 1).to(torch.float64)).sin()
        # input i has i + before = stride t + phase, and stands at t; an output stands at its own number
        step = 1 if flipped else axis.stride
        shifted = place if flipped else place + axis.before
        phase, t = shifted.remainder(step), shifted.div(step, rounding_mode="floor").to(torch.float64)
        factor = torch.polar(window * (phase < count), (turn if flipped else -turn) / axis.dilation * t)
        shape = (-1, *(1,) * (len(phases) - 1 - j))
        x = x.index_select(1 + j, phase.clamp_max(count - 1)) * factor.reshape(shape)
    if not layer.is_complex:
        real, imaginary = x.real.contiguous(), x.imag.contiguous()
        x = real if float(real.norm()) >= float(imaginary.norm()) else imaginary
    x = x.flatten(1).mT.contiguous()
    x = layer.adjoint(x, group) if flipped else x
    return x if bool(x.any()) else start_like(layer, x)  # taps that read padding alone leave nothing


def _blank(layer: Layer) -> Tensor:
    return torch.zeros(math.prod(layer.sizes), layer.shape[2], dtype=layer.dtype, device=layer.device)


def start_like(layer: Layer, x: Tensor, number: int = 0) -> Tensor:
    """A deterministic start vector of the shape of x, another one for each number."""
    i = torch.arange(1, x.numel() + 1, dtype=torch.float64, device=x.device)
    v = 0.3 + 0.5 * (i * (0.754877666 + 0.1 * number)).frac() * torch.where((i * i * (0.569840291 + 0.1 * number)).frac() < 0.5, -3.0, 2.0)
    return v.reshape(x.shape).to(layer.dtype)
