"""The case table is the public one; here are the judgements on it, and a row for each registered layer.

A judgement is a function of a case that raises AssertionError: the tests call them, and so do the mutants.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

import gramlip as gl
from gramlip.nn.parametrizations import Residual
from gramlip.norm import polyphase
from gramlip.testing import TRAPS, Case, cases

__all__ = ["LAYERS", "LINEAR", "ROUNDING", "TRAPS", "Case", "cases", "check", "closes", "every_size", "holds", "theorem"]

ROUNDING = 1e-12  # of the oracle itself: its singular values are correct to a few 1e-14


def check(case: Case, finite: bool | str = "auto") -> None:
    """One-sided: the interval holds the truth."""
    interval = gl.bound(case.operator(), finite=finite)
    holds(case, interval)
    if not bool(case.weight().any()):
        assert interval.lower == interval.upper == 0.0


def holds(case: Case, interval: gl.Bound) -> None:
    """One-sided: this interval holds the truth."""
    assert interval.upper >= case.truth * (1 - ROUNDING), f"upper {interval.upper} below the truth {case.truth}: {case.name}"
    assert interval.lower <= case.truth * (1 + ROUNDING), f"lower {interval.lower} above the truth {case.truth}: {case.name}"


def theorem(case: Case) -> None:
    """The padding theorem alone, by SVD of its blocks: `sqrt(square) max ||D(w)||` is not below the truth, and equal where `exact`.

    The library's intervals carry a width that could hide a wrong theorem; these values have none. An axis of all
    frequencies is sampled, with the cosine factor.
    """
    sym = polyphase.symbol(case.operator())
    kernel = sym.kernel.to(torch.complex128)
    exponent = math.frexp(float(kernel.abs().amax()))[1]
    kernel = kernel * 2.0 ** -(exponent // 2) * 2.0 ** -(exponent - exponent // 2)
    factor, lines = math.sqrt(sym.padding_norm_squared), []
    for points, degree in zip(sym.points, sym.degrees, strict=True):
        side = points or max(1, math.ceil(24 * degree))
        factor /= 1.0 if points else math.cos(math.pi * degree / side)
        lines.append(torch.arange(side, dtype=torch.float64) * (2 * math.pi / side))
    frequencies = torch.cartesian_prod(*lines).reshape(-1, len(lines))
    largest = float(torch.linalg.matrix_norm(replace(sym, plain=kernel, strides=(1,) * len(lines)).at(frequencies), 2).max())
    value, error = (math.ldexp(x, exponent) for x in (largest * factor, ROUNDING * float(kernel.abs().sum())))
    assert value >= case.truth - error, f"{sym.because}: {value} below the truth {case.truth}: {case.name}"
    if sym.exact and None not in sym.points:
        assert value <= case.truth + error, f"{sym.because} said to be exact: {value} of {case.truth}: {case.name}"


def closes(case: Case, rtol: float = 1e-2) -> None:
    """The interval holds the truth and is as narrow as asked for."""
    interval = gl.bound(case.operator(), rtol=rtol)
    holds(case, interval)
    assert interval.upper <= interval.lower * (1 + rtol), f"{interval} of {case.truth} is wider than {rtol}: {case.name}"


def every_size(layer: list[Case]) -> None:
    """The interval for every input size bounds the layer at each of these sizes."""
    upper = gl.bound(layer[0].operator(None)).upper
    for case in layer:
        assert upper >= case.truth * (1 - ROUNDING), f"upper {upper} for every size below the truth {case.truth}: {case.name}"


# One row for each type that `describe` knows: a layer and the shape of one input. LINEAR ones have an oracle, the others
# (max pooling) a known answer in test_known_answers.py.


def _conv(kind: type[nn.Module], *args: object, **more: object) -> nn.Module:
    torch.manual_seed(0)
    return kind(*args, **more)


def _batch_norm(kind: type[nn.Module]) -> nn.Module:
    module = kind(3).eval()
    with torch.no_grad():
        for name, values in (("weight", [1.0, -3.0, 0.5]), ("bias", [2.0, 0.0, 1.0]), ("running_mean", [1.0, 2.0, 3.0])):
            getattr(module, name).copy_(torch.tensor(values))
        module.running_var.copy_(torch.tensor([0.5, 4.0, 0.01]))  # type: ignore[operator,union-attr]
    return module


LINEAR: dict[type, tuple[nn.Module, tuple[int, ...]]] = {
    nn.Linear: (_conv(nn.Linear, 5, 4), (5,)),
    nn.Conv1d: (_conv(nn.Conv1d, 2, 3, 3, padding=1), (2, 7)),
    nn.Conv2d: (_conv(nn.Conv2d, 2, 3, 3, stride=2, padding=1), (2, 6, 5)),
    nn.Conv3d: (_conv(nn.Conv3d, 1, 2, 2), (1, 3, 4, 3)),
    nn.ConvTranspose1d: (_conv(nn.ConvTranspose1d, 2, 3, 3, stride=2, output_padding=1), (2, 5)),
    nn.ConvTranspose2d: (_conv(nn.ConvTranspose2d, 2, 2, 3, padding=1), (2, 4, 4)),
    nn.ConvTranspose3d: (_conv(nn.ConvTranspose3d, 2, 1, 2, stride=2), (2, 2, 3, 2)),
    nn.Identity: (nn.Identity(), (2, 3)),
    nn.Flatten: (nn.Flatten(), (2, 3)),
    nn.Unflatten: (nn.Unflatten(1, (2, 3)), (6,)),
    nn.PixelShuffle: (nn.PixelShuffle(2), (4, 2, 3)),
    nn.PixelUnshuffle: (nn.PixelUnshuffle(2), (1, 4, 2)),
    nn.ChannelShuffle: (nn.ChannelShuffle(2), (4, 2, 2)),
    nn.BatchNorm1d: (_batch_norm(nn.BatchNorm1d), (3, 4)),
    nn.BatchNorm2d: (_batch_norm(nn.BatchNorm2d), (3, 2, 2)),
    nn.BatchNorm3d: (_batch_norm(nn.BatchNorm3d), (3, 2, 1, 2)),
    nn.SyncBatchNorm: (_batch_norm(nn.SyncBatchNorm), (3, 2, 2)),
    nn.Upsample: (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 4, 3)),
    **{getattr(nn, f"AvgPool{d}d"): (getattr(nn, f"AvgPool{d}d")(3, 2, 1), (1, *(5, 4, 5)[:d])) for d in (1, 2, 3)},
    **{getattr(nn, f"AdaptiveAvgPool{d}d"): (getattr(nn, f"AdaptiveAvgPool{d}d")(3), (1, *(5, 4, 5)[:d])) for d in (1, 2, 3)},
    **{
        getattr(nn, f"{mode}Pad{d}d"): (getattr(nn, f"{mode}Pad{d}d")((2, 1) * d), (1, *(4, 3, 3)[:d]))
        for mode in ("Zero", "Reflection", "Replication", "Circular")
        for d in (1, 2, 3)
    },
    **{getattr(nn, f"ConstantPad{d}d"): (getattr(nn, f"ConstantPad{d}d")(1, 0.5), (1, *(4, 3, 2)[:d])) for d in (1, 2, 3)},
}
LAYERS: dict[type, tuple[nn.Module, tuple[int, ...]]] = LINEAR | {
    Residual: (Residual(_conv(nn.Linear, 4, 4)), (4,)),
    **{getattr(nn, f"MaxPool{d}d"): (getattr(nn, f"MaxPool{d}d")(3, 2, 1), (1, *(7, 6, 7)[:d])) for d in (1, 2, 3)},
    **{getattr(nn, f"AdaptiveMaxPool{d}d"): (getattr(nn, f"AdaptiveMaxPool{d}d")(3), (1, *(5, 7, 5)[:d])) for d in (1, 2, 3)},
}
