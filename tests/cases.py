"""The case table is the public one; here are the judgements on it, and a row for each registered layer.

A judgement is a function of a case that raises AssertionError: the tests call them, and so do the mutants.
"""

from __future__ import annotations

import gramlip as gl
import torch
from gramlip.testing import TRAPS, Case, cases
from torch import nn

__all__ = ["LAYERS", "LINEAR", "ROUNDING", "TRAPS", "Case", "bound", "cases", "check", "closes", "every_size"]

ROUNDING = 1e-12  # of the oracle itself: its singular values are correct to a few 1e-14


def bound(case: Case, rtol: float = 1e-2, size: tuple[int, ...] | None = ()) -> gl.Bound:
    """The library's interval for the case."""
    return gl.bound(case.operator(size), rtol=rtol)


def check(case: Case) -> None:
    """One-sided: the interval holds the truth."""
    interval = bound(case)
    assert interval.upper >= case.truth * (1 - ROUNDING), f"upper {interval.upper} below the truth {case.truth}: {case.name}"
    assert interval.lower <= case.truth * (1 + ROUNDING), f"lower {interval.lower} above the truth {case.truth}: {case.name}"
    if not bool(case.weight().any()):
        assert interval.lower == interval.upper == 0.0


def closes(case: Case, rtol: float = 1e-2) -> None:
    """The interval holds the truth and is as narrow as asked for."""
    interval = bound(case, rtol)
    assert interval.lower <= case.truth * (1 + ROUNDING)
    assert interval.upper >= case.truth * (1 - ROUNDING)
    assert interval.upper <= interval.lower * (1 + rtol), f"{interval} of {case.truth} is wider than {rtol}: {case.name}"


def every_size(layer: list[Case]) -> None:
    """The interval for every input size bounds the layer at each of these sizes."""
    upper = bound(layer[0], size=None).upper
    for case in layer:
        assert upper >= case.truth * (1 - ROUNDING), f"upper {upper} for every size below the truth {case.truth}: {case.name}"


# One row for each type that `describe` knows: a layer and the shape of one input. LINEAR ones have an oracle, the others
# (max pooling) a known answer in test_known_answers.py.


def _conv(kind: type[nn.Module], *args: object, **more: object) -> nn.Module:
    torch.manual_seed(0)
    return kind(*args, **more)


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
    **{getattr(nn, f"MaxPool{d}d"): (getattr(nn, f"MaxPool{d}d")(3, 2, 1), (1, *(7, 6, 7)[:d])) for d in (1, 2, 3)},
    **{getattr(nn, f"AdaptiveMaxPool{d}d"): (getattr(nn, f"AdaptiveMaxPool{d}d")(3), (1, *(5, 7, 5)[:d])) for d in (1, 2, 3)},
}
