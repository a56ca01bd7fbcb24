"""Constants that a rule computes from constants, and intervals: what their rounding hides, against 60 digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramlip.errors import UnsupportedError
from gramlip.network.audit import audit, steps_of
from gramlip.network.steps import Attention
from test_rules import Map


class Squared(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) ** 2


@pytest.mark.parametrize("mean", [1e8 / 3 * 2 + k for k in range(0, 300, 75)])
def test_the_shift_of_batch_norm_is_known_up_to_the_rounding_of_what_cancels_in_it(mean: float) -> None:
    layer = nn.BatchNorm1d(1).double().eval()
    layer.running_var.fill_(2.0)  # type: ignore[union-attr]
    layer.running_mean.fill_(mean)  # type: ignore[union-attr]
    low, high = -1e-10, 1e-10
    with mp.workdps(60):
        gain = 1 / mp.sqrt(mp.mpf(2) + mp.mpf(1e-5))
        bias = float(mean * gain)
        one, other = (((mp.mpf(x) - mean) * gain + bias) ** 2 for x in (low, high))
        quotient = abs(other - one) / (mp.mpf(high) - mp.mpf(low))
    layer.bias.data.fill_(bias)
    assert quotient <= audit(Squared(layer).eval(), torch.zeros(1, 1).double(), domain=(low, high)).upper


TINY, SMALL = 6.056862332782005e-279, 5.1372026001416e-83
POINTS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float] | None, Callable[[], mp.mpf]]] = {
    # name: (call, domain, a slope that it has), the slope in 60 digits
    "sum of what is bounded on one side": (
        lambda x: 1 / (x[:, 0].clamp_min(1e16) + x[:, 1].clamp_min(3.0) + x[:, 2].clamp_min(-1e16)),
        None,
        lambda: mp.sqrt(3) / 9,
    ),
    "power near zero": (lambda x: x**0.055, (TINY, 1e-278), lambda: mp.mpf(0.055) * mp.mpf(TINY) ** (mp.mpf(0.055) - 1)),
    "steep power": (lambda x: x**-1.018, (SMALL, 1e-82), lambda: mp.mpf(1.018) * mp.mpf(SMALL) ** (-mp.mpf(1.018) - 1)),
    "exp that underflows": (torch.exp, (-900.0, -800.0), lambda: mp.exp(-800)),
    "exp of few bits": (torch.exp, (-800.0, -744.408), lambda: mp.exp(mp.mpf(-744.408))),
    "weight that underflows": (
        lambda x: torch.addmm(x.new_zeros(3), x, x.new_full((3, 3), 1e-200), alpha=1e-200),
        None,
        lambda: 3 * mp.mpf(1e-200) ** 2,
    ),
}


@pytest.mark.parametrize("name", POINTS)
def test_upper_is_at_least_a_slope_in_60_digits(name: str) -> None:
    call, domain, slope = POINTS[name]
    with mp.workdps(60):
        assert slope() <= audit(Map(call).eval(), torch.zeros(1, 3, dtype=torch.float64), domain=domain).upper


def test_the_scale_of_attention_is_at_least_one_over_the_root() -> None:
    for width in (1, 3, 64, 75, 275, 300, 317):
        network = steps_of(Map(lambda x: F.scaled_dot_product_attention(x, x, x)).eval(), torch.zeros(1, 2, width))
        scales = [step.what.scale for step in network.steps if isinstance(step.what, Attention)]
        assert [Fraction(s) ** 2 * width >= 1 for s in scales] == [True]
        assert scales[0] <= (1 + 1e-15) / math.sqrt(width)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.add(x, x.new_full((), 0.3), alpha=10),
        lambda x: torch.addcmul(x, x.new_full((), 0.3), x.new_full((), 10.0)),
        lambda x: torch.addcdiv(x, x.new_full((), 0.9), x.new_full((), 0.3)),
    ],
    ids=["add", "addcmul", "addcdiv"],
)
def test_a_product_of_constants_that_is_three_only_after_rounding_makes_no_hardswish(call: Callable[[Tensor], Tensor]) -> None:
    """Its slopes are those of the shift as it is, whose error counts: a little above 9."""
    assert 9.0 < audit(Map(lambda x: x * F.relu6(call(x))).eval(), torch.zeros(1, 3, dtype=torch.float64)).upper < 9.001


@pytest.mark.parametrize("call", [lambda x: x * (2**53 + 1), lambda x: x + torch.tensor([1, 2**60 + 1])], ids=["factor", "shift"])
def test_integers_that_float64_does_not_hold_are_refused(call: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedError, match="expected moduli of at most 2"):
        audit(Map(call).eval(), (2,))
