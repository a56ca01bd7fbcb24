"""Functions of one value put together from several calls, radial maps and response normalisation, against derivatives by torch alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gramlip.network.audit import audit
from gramlip.numerics import rounding as rd
from rule_cases import Map

Call = Callable[[Tensor], Tensor]
WIDTHS = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
LINE = torch.cat([torch.linspace(-12, 12, 24001), *(s * torch.logspace(-6, 6, 1500) for s in (1, -1))]).double()


def steepest(call: Call, points: Tensor) -> float:
    """The largest length of the derivatives of all results by one entry."""
    x = points[:, None].expand(-1, 4).clone().requires_grad_(True)
    parts = call(x).reshape(len(points), -1, 4)
    squares = torch.zeros_like(x)
    for k in range(parts.shape[1]):
        squares += torch.autograd.grad(parts[:, k].sum(), x, retain_graph=True)[0] ** 2
    return float(squares.sqrt().nan_to_num(0.0).max())


def upper(call: Call, **options: tuple[float, float]) -> float:
    return audit(Map(call).eval(), torch.zeros(1, 4, dtype=torch.float64), effort=-1, strict=False, **options).upper  # type: ignore[arg-type]


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


FUNCTIONS: dict[str, Call] = {
    "tanh beside sigmoid": lambda x: torch.cat([x.tanh(), x.sigmoid()], 1),
    "sine beside cosine": lambda x: torch.cat([x.sin(), x.cos()], 1),
    "silu of both signs": lambda x: torch.cat([F.silu(x), F.silu(-x)], 1),
    "elu of both signs": lambda x: torch.cat([F.elu(x), F.elu(-x)], 1),
    "four beside each other": lambda x: torch.cat([F.gelu(x), (2 * x).tanh(), torch.sigmoid(-x), x], 1),
    "shifted bumps": lambda x: torch.cat([torch.exp(-((x - c) ** 2)) for c in (-1.0, 0.0, 1.5)], 1),
    "a probability and its square": lambda x: (lambda p: torch.cat([p, p * p], 1))(x.sigmoid()),
    "tanh less sigmoid": lambda x: x.tanh() - x.sigmoid(),
    "swish and the value": lambda x: x * torch.sigmoid(1.702 * x) + x,
    "gelu written out": tanh_gelu,
    "gelu in other words": lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "mish written out": lambda x: x * F.softplus(x).tanh(),
    "mish less silu": lambda x: x * F.softplus(x).tanh() - x * torch.sigmoid(2 * x),
    "swish of several widths": lambda x: x * torch.sigmoid(WIDTHS * x),
    "a gate that is shifted": lambda x: x * torch.sigmoid(x + 1),
    "snake": lambda x: x + 0.5 * torch.sin(2 * x).pow(2),
    "snakes of several widths": lambda x: x + (1 / (WIDTHS + 1e-9)) * torch.sin(WIDTHS * x) ** 2,
    "product of two gates": lambda x: x.tanh() * x.sigmoid(),
    "softplus written out": lambda x: torch.log1p(torch.exp(-x.abs())) + F.relu(x),
    "over one and its square": lambda x: x / (1 + x**2),
    "half of a normalisation": lambda x: x * torch.rsqrt(1 + x * x),
    "square of a gate": lambda x: x.tanh() ** 2,
    "difference of softpluses": lambda x: F.softplus(x + 1) - F.softplus(x - 1),
    "sigmoid of exponentials": lambda x: 1 / (1 + torch.exp(-x)),
    "sigmoids of several widths and signs": lambda x: (1 + torch.exp(torch.tensor([-3.0, -0.5, 1.0, 2.0]) * x + 0.3)) ** -1,
    "swish of exponentials": lambda x: x / (1 + torch.exp(-x)),
    "square times swish of a negative": lambda x: x * x / (1 + torch.exp(x.abs())),
    "softplus of exponentials": lambda x: torch.log(1 + torch.exp(x)),
    "softplus with another number": lambda x: torch.log(0.3 + torch.exp(-2 * x)),
    "mish of exponentials": lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))),
    "logarithm of cosh": lambda x: torch.log(torch.cosh(x)),
    "tanh of exponentials": lambda x: 1 - 2 / (torch.exp(2 * x) + 1),
    "arc tangent of a cube": lambda x: torch.atan(x**3),
    "tanh of a square": lambda x: torch.tanh(x**2),
    "value over a hypotenuse": lambda x: x / torch.sqrt(1 + x**2),
    "value times a bell": lambda x: x * torch.exp(-(x**2) / 2),
    "third wave of an oscillator": lambda x: (x**3 - 3 * x) * torch.exp(-x * x / 2),
    "a shifted bell and its second moment": lambda x: x * x * torch.exp(-((x - 1) ** 2) / 3),
    "Morlet": lambda x: torch.cos(5 * x) * torch.exp(-x * x / 2),
    "Gompertz": lambda x: torch.exp(-torch.exp(-x)),
    "power of minus three halves": lambda x: (1 + x * x) ** -1.5,
    "exponential of a sine": lambda x: torch.exp(torch.sin(x)),
    "one over a wave": lambda x: 1 / (2 + torch.sin(x)),
}
UNBOUNDED: dict[str, Call] = {
    "square": lambda x: x * x.abs(),
    "wave that grows": lambda x: x * x.sin(),
    "gate of a square": lambda x: x * x * x.sigmoid(),
    "cube beside it": lambda x: torch.cat([x, x**3], 1),
    "pole": lambda x: x / (x**2 - 1),
    "waves of two lengths that grow": lambda x: x.abs() * (x.sin() + (1.41 * x).cos()),
    "wave of a square": lambda x: torch.sin(x**2),
    "softplus of a square": lambda x: torch.log(1 + torch.exp(x * x)),
    "square over an exponential that falls": lambda x: x * x / (1 + torch.exp(-x)),
}
JUMPS: dict[str, Call] = {
    "at zero": lambda x: x + F.hardtanh(1 / x),
    "at zero, by a power": lambda x: x + F.hardtanh(x**-1),
    "beside the value": lambda x: torch.cat([x, F.hardtanh(1 / x)], 1),
    "in a product": lambda x: x.sigmoid() * F.relu6(1 / x),
    "at every turn of a sine": lambda x: x.sin() + F.hardtanh(1 / x.sin()),
    "away from zero": lambda x: x + F.hardtanh(1 / (x + 1)),
    "at both ends of an interval": lambda x: x + F.hardtanh(1 / F.softshrink(x, 0.5)),
    "a sign": lambda x: x / x.abs(),
    "arc tangent of one over it": lambda x: torch.atan(1 / x),
    "sigmoid of one over it": lambda x: 1 / (1 + torch.exp(-1 / x)),
    "tanh of a negative cube": lambda x: torch.tanh(x**-3),
    "a sign by a root": lambda x: x * torch.rsqrt(x * x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_one_value_have_the_constant_that_their_derivatives_show(name: str) -> None:
    call = FUNCTIONS[name]
    seen, bound = steepest(call, LINE), upper(call)
    assert seen <= bound * (1 + 1e-12)
    assert bound <= seen * 1.002


@pytest.mark.parametrize("name", ["tanh beside sigmoid", *list(FUNCTIONS)[2::3], *list(UNBOUNDED)[:4]])
def test_functions_of_one_value_on_a_domain(name: str) -> None:
    call = {**FUNCTIONS, **UNBOUNDED}[name]
    seen, bound = steepest(call, torch.linspace(-1.5, 0.7, 8001, dtype=torch.float64)), upper(call, domain=(-1.5, 0.7))
    assert seen <= bound * (1 + 1e-12)
    assert bound <= seen * 1.25


@pytest.mark.parametrize("name", UNBOUNDED)
def test_functions_of_one_value_without_a_constant(name: str) -> None:
    assert upper(UNBOUNDED[name]) == math.inf


@pytest.mark.parametrize("name", JUMPS)
def test_functions_that_jump_have_no_constant_however_flat_they_are(name: str) -> None:
    assert upper(JUMPS[name]) == math.inf
    assert upper(JUMPS[name], domain=(-1.5, 0.7)) == math.inf


def test_a_length_at_which_a_radial_map_jumps() -> None:
    assert upper(lambda x: x * F.hardtanh(1 / (torch.linalg.vector_norm(x, dim=1, keepdim=True) - 1))) == math.inf


def test_a_jump_that_vanishes_with_its_factor_is_none() -> None:
    assert 1.0 <= upper(lambda x: x.tanh() * F.hardsigmoid(1 / x)) < math.inf


def test_a_logarithm_of_an_exponential_that_overflows_is_not_infinite() -> None:
    pieces = rd.Pieces(torch.tensor([[720.0, 730.0]], dtype=torch.float64), True, lambda at: (rd.WHOLE, rd.WHOLE))
    low, high = pieces.logarithm(pieces.exponential(pieces.start(1, rd.interval(1.0)))).value[0].tolist()
    assert low <= 720.0 < 730.0 <= high


def test_slopes_at_a_single_number_are_in_order() -> None:
    low, high = torch.tensor([0.0, 0.0, 0.0, -0.1]), torch.tensor([0.0, 0.0, 1e-3, 0.1])  # the first two entries do not move
    assert 1.9 <= upper(lambda x: x + 0.9 * torch.sin(x), domain=(low.double(), high.double())) <= 1.91  # type: ignore[arg-type]


def test_the_extreme_slope_of_gelu_in_40_digits() -> None:
    exact = 1.1289930686587718  # tests/network/test_rules.py compares the table's number with 40 digits
    assert exact <= upper(tanh_gelu) <= exact * (1 + 2e-5)


ACTIVATIONS: list[Call] = [
    torch.tanh,
    torch.sigmoid,
    F.silu,
    F.gelu,
    F.elu,
    F.mish,
    F.relu,
    torch.atan,
    torch.sin,
    lambda x: F.leaky_relu(x, 0.1),
    lambda x: torch.exp(-x * x),
    lambda x: torch.sqrt(x * x + 0.1),
    lambda x: 1 / (1 + x * x),
    lambda x: torch.log1p(F.relu(x)),
    lambda x: x**3,
    lambda x: 1 / (1 + torch.exp(-x)),
    lambda x: torch.log(0.5 + torch.exp(x)),
    lambda x: torch.exp(-x.abs()),
    lambda x: (1 + x * x) ** -1.5,
    torch.cosh,
]


def expression(draw: random.Random, depth: int) -> Call:
    """A random function of one value."""
    kind = draw.random()
    if depth == 0 or kind < 0.1:
        return lambda x: x
    f, g = expression(draw, depth - 1), expression(draw, depth - 1)
    if kind < 0.45:
        act = draw.choice(ACTIVATIONS)
        return lambda x: act(f(x))
    if kind < 0.6:
        a, b, wide = draw.choice([-2.0, 0.5, 3.0]), draw.choice([0.0, 0.7, -2.0]), WIDTHS if draw.random() < 0.3 else 1.0
        return lambda x: (a * wide) * f(x) + b
    return draw.choice([lambda x: f(x) + g(x), lambda x: f(x) - g(x), lambda x: f(x) * g(x), lambda x: f(x) / (1.5 + g(x) ** 2)])


@pytest.mark.parametrize("seed", range(8))
def test_random_functions_are_never_steeper_than_their_bound(seed: int) -> None:
    draw = random.Random(seed)
    parts = [expression(draw, 3) for _ in range(1 + seed % 2)]

    def call(x: Tensor) -> Tensor:
        return torch.cat([f(x) for f in parts], 1)

    for points, options in ((LINE, {}), (torch.linspace(-1.5, 0.7, 4001, dtype=torch.float64), {"domain": (-1.5, 0.7)})):
        assert steepest(call, points) <= upper(call, **options) * (1 + 1e-9) + 1e-9


# ---- radial maps ---------------------------------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)


def square(x: Tensor) -> Tensor:
    return (x**2).sum(-1, keepdim=True)


CAPSULE = 3 * math.sqrt(3) / 8
RADIAL: dict[str, tuple[Call, float]] = {
    # name: (call, its exact constant)
    "squash": (lambda x: square(x) / (1 + square(x)) * x / torch.sqrt(square(x) + 1e-9), CAPSULE),
    "squash of lengths": (lambda x: (norm(x) ** 2 / (1 + norm(x) ** 2)) * (x / (norm(x) + 1e-8)), CAPSULE),
    "squash in one": (lambda x: x * norm(x) / (1 + norm(x) ** 2), CAPSULE),
    "wide squash": (lambda x: x * norm(x) / (0.5 + square(x)), CAPSULE / math.sqrt(0.5)),
    "into a ball": (lambda x: x * torch.clamp(1 / (norm(x) + 1e-6), max=1.0), 1.0),
    "tanh of the length": (lambda x: x * torch.tanh(norm(x)), 1.1996786402577337),
    "root": (lambda x: x / (1 + square(x)).sqrt(), 1.0),
}


@pytest.mark.parametrize("name", RADIAL)
def test_radial_maps_have_their_exact_constant(name: str) -> None:
    call, exact = RADIAL[name]
    bound = audit(Map(call).eval(), torch.zeros(1, 3, dtype=torch.float64), effort=-1).upper
    assert exact <= bound * (1 + 1e-7)
    assert bound <= exact * (1 + 1e-4)
    for r in torch.logspace(-3, 2, 60).tolist():
        matrix = torch.autograd.functional.jacobian(call, torch.tensor([[0.6 * r, 0.0, -0.8 * r]], dtype=torch.float64)).reshape(3, 3)
        assert float(torch.linalg.matrix_norm(matrix, 2)) <= bound * (1 + 1e-9)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x * square(x),
        lambda x: x * norm(x.flip(0)) / (1 + square(x)),
        lambda x: x / norm(x) / (1 + norm(x)),
        lambda x: x.flip(-1) * norm(x) / (1 + norm(x)),
        lambda x: x * x.norm(dim=-2, keepdim=True) / (1 + square(x)),
        lambda x: x * x.norm(1, dim=-1, keepdim=True) / (1 + square(x)),
    ],
)
def test_what_is_no_radial_map_is_none(call: Call) -> None:
    assert audit(Map(call).eval(), torch.zeros(3, 3, dtype=torch.float64), effort=-1, strict=False).upper == math.inf


# ---- global response normalisation ---------------------------------------------------------------------------------------


def response(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Samples, height, width, channels."""
    sizes = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    return x * (sizes / (sizes.mean(-1, keepdim=True) + eps))


@pytest.mark.parametrize("channels", [1, 2, 5, 16])
def test_response_normalisation_is_bounded_and_nearly_attained(channels: int) -> None:
    x = torch.randn(1, 2, 2, channels, generator=torch.Generator().manual_seed(channels), dtype=torch.float64)
    bound, most = audit(Map(response).eval(), x, effort=-1).upper, 0.0
    for small in (1.0, 0.1, 1e-3):
        x[..., 1:] *= small
        matrix = torch.autograd.functional.jacobian(response, 5 * x).reshape(x.numel(), -1)
        most = max(most, float(torch.linalg.matrix_norm(matrix, 2)))
    assert most <= bound * (1 + 1e-9)
    assert bound <= 1.05 * most


def test_response_normalisation_around_a_point_holds_its_jacobians() -> None:
    generator = torch.Generator().manual_seed(3)
    at = 1.0 + torch.rand(1, 2, 2, 6, generator=generator, dtype=torch.float64)
    bound = audit(Map(response).eval(), at, effort=-1, at=at, radius=0.2).upper
    assert bound < 5.0
    for _ in range(10):
        step = torch.randn(at.shape, generator=generator, dtype=torch.float64)
        matrix = torch.autograd.functional.jacobian(response, at + 0.199 * step / step.norm()).reshape(at.numel(), -1)
        assert float(torch.linalg.matrix_norm(matrix, 2)) <= bound * (1 + 1e-9)


# ---- intervals -----------------------------------------------------------------------------------------------------------


def test_intervals_hold_the_exact_results_of_their_points() -> None:
    draw = random.Random(0)
    for _ in range(300):
        x, y = (sorted(draw.choice([-1, 1, 0]) * draw.random() * 10.0 ** draw.randint(-200, 100) for _ in range(2)) for _ in range(2))
        a, b = (rd.flushed(rd.interval(*ends)) for ends in (x, y))
        for p in x:
            low, high = rd.power(a, 3).tolist()
            assert low <= Fraction(p) ** 3 <= high
            low, high = rd.inverse(a).tolist()
            if p:
                assert low == -math.inf or Fraction(low) <= 1 / Fraction(p)
                assert high == math.inf or 1 / Fraction(p) <= Fraction(high)
            for q in y:
                for made, exact in ((rd.plus(a, b), Fraction(p) + Fraction(q)), (rd.times(a, b), Fraction(p) * Fraction(q))):
                    low, high = made.tolist()
                    assert low <= exact <= high


# ---- pieces without an end -----------------------------------------------------------------------------------------------


def falling(pieces: rd.Pieces) -> dict[str, tuple[rd.Known, Call]]:
    """Functions that fall, as they are known on pieces, and the same by torch."""
    t, one = pieces.start(1, rd.interval(1.0)), rd.interval(1.0)
    square, minus = pieces.product(t, t, True), pieces.scaled(t, -one.flip(-1), rd.interval(0.0))
    above = pieces.scaled(square, one, one)
    hypotenuse, bell = pieces.root(above, 1), pieces.exponential(pieces.scaled(square, -one.flip(-1), rd.interval(0.0)))
    power = pieces.raised(above, -1.5, rd.WHOLE, torch.tensor(0), rd.power(pieces.root(above, -1).value, 3), rd.interval(0.0, 1.0))
    gate = pieces.inverse(pieces.scaled(pieces.exponential(minus), one, one))
    return {
        "over the third power": (power, lambda x: (1 + x * x) ** -1.5),
        "over a hypotenuse": (pieces.inverse(hypotenuse), lambda x: (1 + x * x) ** -0.5),
        "bell": (bell, lambda x: torch.exp(-x * x)),
        "sigmoid": (gate, torch.sigmoid),
        "swish": (pieces.product(t, gate, False), F.silu),
        "logarithm": (pieces.logarithm(above), lambda x: torch.log(1 + x * x)),
    }


@pytest.mark.parametrize("start", [1.0, 3.0, 1024.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_is_known_without_an_end_holds_far_out(start: float, sign: float) -> None:
    ends = torch.tensor([[start, math.inf]], dtype=torch.float64)
    x = (sign * start * torch.logspace(0, 6, 400, dtype=torch.float64)).requires_grad_(True)
    pieces = rd.Pieces(ends if sign > 0 else -ends.flip(-1), True, lambda at: (rd.WHOLE, rd.WHOLE))
    for name, (known, call) in falling(pieces).items():
        value = call(x)
        slope = torch.autograd.grad(value.sum(), x)[0]
        for exact, (low, high) in (
            (value, known.value.reshape(-1)),
            (value * x ** -int(known.k), known.h.reshape(-1)),
            (slope, known.slope.reshape(-1)),
            (x * slope, known.grown.reshape(-1)),
        ):
            room = 1e-12 * exact.abs() + 1e-140
            assert bool(((exact >= low - room) & (exact <= high + room)).all()), name
