"""Piecewise linear functions put together from several calls, against quotients of two points on a grid, by torch alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gramlip.network.audit import audit
from test_rules import Map

LEVELS = torch.tensor([0.25, 0.5, 0.75, 1.5], dtype=torch.float64)
GRID = torch.linspace(-6, 6, 12 * 64 + 1, dtype=torch.float64)[:, None].expand(-1, 4)


def stretched(call: Callable[[Tensor], Tensor]) -> float:
    """The largest quotient of neighbours on a grid with all kinks on it, and across the gaps next to each point of it."""
    fine = torch.cat([GRID - 1e-9, GRID, GRID + 1e-9]).sort(0)[0]
    y = call(fine)
    return float((y.diff(dim=0).abs() / fine.diff(dim=0)).max())


CURVES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    # name: (call, its exact constant)
    "soft threshold": (lambda x: F.relu(x - 0.25) - F.relu(-x - 0.25), 1.0),
    "soft threshold of channels": (lambda x: F.relu(x - LEVELS) - F.relu(-x - LEVELS), 1.0),
    "shrinkage": (lambda x: x.sign() * F.relu(x.abs() - 0.5), 1.0),
    "shrinkage by clamp": (lambda x: x - x.clamp(-0.5, 0.5), 1.0),
    "leaky by where": (lambda x: torch.where(x > 0, x, 0.25 * x), 1.0),
    "steep by where": (lambda x: torch.where(x >= 0, x, -3 * x), 3.0),
    "leaky by maximum": (lambda x: torch.maximum(x, 0.25 * x), 1.0),
    "gate": (lambda x: x * (x > 0), 1.0),
    "gate of floats": (lambda x: (x > 0).to(x.dtype) * x * 2, 2.0),
    "gate filled": (lambda x: x.masked_fill(x < 0, 0.0), 1.0),
    "gates of both": (lambda x: torch.where(x > 0, torch.where(x < 1, x, 1.0), 0.0), 1.0),
    "modulus": (lambda x: torch.maximum(x, -x), 1.0),
    "hat": (lambda x: F.relu(x) - 2 * F.relu(x - 1) + F.relu(x - 2), 1.0),
    "parts of a value": (lambda x: F.relu(x) - F.relu(-x), 1.0),
    "in place": (lambda x: (x.clone().clamp_(-1, 1) * 3 - x).abs_(), 2.0),
}
JUMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "late gate": lambda x: x * (x > 1),
    "early where": lambda x: torch.where(x > -0.5, x, 0.5 * x),
    "hard shrinkage": lambda x: torch.where(x.abs() > 0.5, x, 0.0),
    "one point": lambda x: x + torch.where((x >= 0) & (x <= 0), 1.0, 0.0),
    "sign": lambda x: x.sign() * x.abs() + x.sign(),
    "one channel": lambda x: torch.where(x > LEVELS, x - 0.25, 0.0),
}


@pytest.mark.parametrize("name", CURVES)
def test_curves_have_their_exact_constant(name: str) -> None:
    call, exact = CURVES[name]
    report = audit(Map(call).eval(), torch.zeros(1, 4, dtype=torch.float64))
    assert stretched(call) == pytest.approx(exact, rel=1e-5)
    assert report.lower <= report.upper == exact


@pytest.mark.parametrize("name", JUMPS)
def test_curves_that_jump_have_no_constant(name: str) -> None:
    assert stretched(JUMPS[name]) > 1e6
    report = audit(Map(JUMPS[name]).eval(), torch.zeros(1, 4, dtype=torch.float64), strict=False)
    assert report.upper == math.inf


ONE, NONE = torch.tensor(1, dtype=torch.uint8), torch.tensor(0, dtype=torch.uint8)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: (-torch.where(x > 0, ONE, NONE)).to(x.dtype) * x,  # 255 x
        lambda x: (torch.where(x > 0, ONE, NONE) * 200 + 100).to(x.dtype) * 0.01 * x,
        lambda x: (torch.where(x > 0, 2**53 + 1, 2**53) - 2**53).to(x.dtype) * x,
    ],
    ids=["minus one", "above 255", "beyond float64"],
)
def test_integers_that_wrap_around_are_no_curves(call: Callable[[Tensor], Tensor]) -> None:
    report = audit(Map(call).eval(), torch.zeros(1, 4, dtype=torch.float64), strict=False)
    assert stretched(call) <= report.upper
    exact = audit(Map(lambda x: (torch.where(x > 0, 3, 1) * 2).to(x.dtype) * x).eval(), torch.zeros(1, 4, dtype=torch.float64))
    assert exact.upper == 6.0


def expression(seed: int) -> Callable[[Tensor], Tensor]:
    """A random function of one value with kinks at multiples of 1/4 and, as chance will have it, jumps."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    plan = [(draw(12), draw(1000), draw(1000), (draw(17) - 8) / 4) for _ in range(7)]

    def call(x: Tensor) -> Tensor:
        values = [x]
        for kind, i, j, c in plan:
            a, b = values[i % len(values)], values[j % len(values)]
            made = [
                lambda a, b, c: F.relu(a - c),
                lambda a, b, c: (a - c).abs(),
                lambda a, b, c: c * a,
                lambda a, b, c: a + b,
                lambda a, b, c: c - a,
                lambda a, b, c: torch.maximum(a, b + c),
                lambda a, b, c: torch.minimum(a, c * b),
                lambda a, b, c: torch.where(a > c, a, b),
                lambda a, b, c: torch.where(b <= c, a, c),
                lambda a, b, c: a.clamp(min(c, 0.5), 1.0),
                lambda a, b, c: F.leaky_relu(a - c, 0.25),
                lambda a, b, c: (a >= c) * b,
            ][kind](a, b, c)
            values.append(made)
        return values[-1] - values[-2]

    return call


@pytest.mark.parametrize("seed", range(60))
def test_random_curves_lie_above_every_quotient(seed: int) -> None:
    call = expression(seed)
    upper = audit(Map(call).eval(), torch.zeros(1, 4, dtype=torch.float64), effort=-1, strict=False).upper
    assert stretched(call) <= upper * (1 + 1e-6) + 1e-6


@pytest.mark.parametrize("domain", [(-1.0, 0.5), (0.75, 2.0)])
def test_images_of_curves_hold_what_products_read(domain: tuple[float, float]) -> None:
    def call(x: Tensor) -> Tensor:
        curve = torch.where(x > 0, 3 * x, -x) + 0.5
        return curve * x.flip(1) + curve.clamp(max=1.0) * x

    upper = audit(Map(call).eval(), torch.zeros(1, 4, dtype=torch.float64), domain=domain).upper
    low, high = domain
    for corner in itertools.product(torch.linspace(low, high, 4).tolist(), repeat=2):
        x = torch.tensor([[corner[0], corner[1], corner[1], corner[0]]], dtype=torch.float64) + 1e-3
        matrix = torch.autograd.functional.jacobian(call, x.clamp(low, high)).reshape(4, 4)
        assert float(torch.linalg.matrix_norm(matrix, 2)) <= upper


PATTERNS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], float]] = {
    # name: (call, shape of a sample, an upper limit of what may be reported)
    "less its mean": (lambda x: x - x.mean(1, keepdim=True), (4, 3), 1.0),
    "less the mean of all": (lambda x: x - x.mean(), (4,), 1.0),
    "less a mean that lies across": (lambda x: x - x.mean(1), (4, 4), 2.0 + 1e-9),
    "mean less the value": (lambda x: x.mean(1, keepdim=True) - x, (4,), 2.0 + 1e-9),
    "rms norm": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.01), (4,), 10.0 + 1e-9),
    "rms norm by root": (lambda x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 0.01), (4,), 10.0 + 1e-9),
    "length": (lambda x: x / torch.sqrt((x * x).sum(1, keepdim=True) + 0.01), (4, 2), 10.0 + 1e-9),
    "squares of another": (lambda x: x * torch.rsqrt(x.flip(1).pow(2).mean(-1, keepdim=True) + 0.01), (4,), math.inf),
    "squares that lie across": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1) + 0.01), (4, 4), math.inf),
    "eps that is negative": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1.0 - 1.5), (4,), math.inf),
    "channels first": (
        lambda x: (lambda c: c / torch.sqrt(c.pow(2).mean(1, keepdim=True) + 0.01))(x - x.mean(1, keepdim=True)),
        (4, 3),
        10.0 + 1e-9,
    ),
    "softsign": (F.softsign, (4,), 1.0 + 1e-9),
    "softsign of another": (lambda x: x / (1 + x.flip(1).abs()), (4,), math.inf),
    "steep softsign": (lambda x: x / (0.25 + x.abs()), (4,), 4.0 + 1e-9),
    "smooth modulus": (lambda x: torch.sqrt(x**2 + 1), (4,), 1.0),
    "normalize": (lambda x: F.normalize(x, dim=1, eps=0.01), (4,), 100.0 + 1e-6),
    "normalize channels": (lambda x: F.normalize(x, dim=1, eps=0.1), (3, 4), 10.0 + 1e-9),
    "length plus a number": (lambda x: x / (x.norm(dim=-1, keepdim=True) + 0.1), (4,), 10.0 + 1e-9),
    "one over its length": (lambda x: x * (1 / (2 * x.norm(dim=-1, keepdim=True) + 0.1)), (4,), 10.0 + 1e-9),
    "clipped length": (lambda x: x / x.norm(dim=-1, keepdim=True).clamp_min(0.5), (4,), 2.0 + 1e-9),
    "length of all": (lambda x: x / (x.norm() + 0.5), (4, 2), 2.0 + 1e-9),
    "length without a number": (lambda x: x / x.norm(dim=-1, keepdim=True), (4,), math.inf),
    "length of another": (lambda x: x / (x.flip(1).norm(dim=-1, keepdim=True) + 0.1), (4,), math.inf),
    "length that lies across": (lambda x: x / (x.norm(dim=-1) + 0.1), (4, 4), math.inf),
    "length less a number": (lambda x: x / (x.norm(dim=-1, keepdim=True) - 0.1), (4,), math.inf),
    "length that is capped": (lambda x: x / x.norm(dim=-1, keepdim=True).clamp(0.1, 1.0), (4,), 10.0 + 1e-9),
    "a number less the length": (lambda x: x / (2.0 - x.norm(dim=-1, keepdim=True)), (4,), math.inf),
    "sum of moduli": (lambda x: x / (torch.linalg.vector_norm(x, 1, dim=-1, keepdim=True) + 0.1), (4,), math.inf),
    "root of a sum of squares": (lambda x: torch.sqrt((x * x).sum(-1)), (4, 3), 1.0),
    "root of a mean of squares": (lambda x: x.pow(2).mean(1).sqrt(), (4,), 0.5 + 1e-9),
    "smooth length": (lambda x: torch.sqrt(x.pow(2).sum(1) + 0.25), (4,), 1.0),
    "over a root written out": (lambda x: x / (x.pow(2).sum(1, keepdim=True).sqrt() + 0.1), (4,), 10.0 + 1e-9),
    "layer norm by var": (
        lambda x: 3 * (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, correction=0) + 0.01),
        (4,),
        30.0 + 1e-9,
    ),
    "layer norm by std": (lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 0.1), (4,), 10.0 + 1e-9),
    "a scaled value over its std": (lambda x: 0.5 * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 0.1), (4,), 5.0 + 1e-9),
    "std along another axis": (lambda x: (x - x.mean(2, keepdim=True)) / (x.std(1, keepdim=True) + 0.1), (4, 4), math.inf),
    "std of what is not centred": (lambda x: x / (x.std(-1, keepdim=True) + 0.1), (4,), math.inf),
    "cosine to a vector": (
        lambda x: F.cosine_similarity(x, torch.tensor([[3.0, 4.0, 0.0]], dtype=torch.float64), dim=-1, eps=0.1),
        (3,),
        10.0 + 1e-4,
    ),
    "softmax written out": (
        lambda x: torch.exp(x - x.amax(1, keepdim=True)) / torch.exp(x - x.amax(1, keepdim=True)).sum(1, keepdim=True),
        (4,),
        0.5,
    ),
    "powers over their sum": (lambda x: (lambda e: e / e.sum((1, 2), keepdim=True))(torch.exp(2 * x)), (2, 2), 1.0 + 1e-9),
    "powers less the largest of others": (
        lambda x: (lambda e: e / e.sum(1, keepdim=True))(torch.exp(x - 2 * x.amax(1, keepdim=True))),
        (4,),
        1.0 + math.sqrt(4.0),
    ),
    "powers over the sum of others": (lambda x: torch.exp(x) / torch.exp(x).flip(1).cumsum(1)[:, -1:], (4,), math.inf),
    "gaussians over their sum": (lambda x: (lambda e: e / e.sum(1, keepdim=True))(torch.exp(-50 * x**2)), (4,), math.inf),
    "length of what is scaled": (lambda x: F.normalize(3 * x, dim=1, eps=0.1), (4,), 30.0 + 1e-9),
    "gaussian": (lambda x: torch.exp(-(x**2) / 0.02), (4,), 10 * math.exp(-0.5) + 1e-9),
    "gaussian of a length": (lambda x: torch.exp(-2 * (x - 0.1).pow(2).sum(1)), (4,), 2 * math.exp(-0.5) + 1e-9),
    "gaussian of distances": (
        lambda x: torch.exp(-(torch.cdist(x, torch.eye(4, 3, dtype=torch.float64)) ** 2)),
        (2, 3),
        2 * math.sqrt(2 / math.e) + 1e-9,
    ),
    "gaussians of several widths": (lambda x: torch.exp(-torch.tensor([1.0, 8.0]) * x**2), (2,), 4 * math.exp(-0.5) + 1e-9),
    "growing gaussian": (lambda x: torch.exp(x**2), (4,), math.inf),
    "decay": (lambda x: torch.exp(-3 * F.relu(x)), (4,), 3.0 + 1e-9),
    "growth": (lambda x: torch.exp(3 * F.relu(x)), (4,), math.inf),
    "decay of both signs": (lambda x: torch.exp(-F.relu(x) * torch.tensor([1.0, -1.0])), (2,), math.inf),
    "decay after a shift": (lambda x: torch.exp(0.5 - F.relu(x)), (4,), math.exp(0.5) + 1e-7),
    "decay of what is small": (lambda x: torch.exp(2 * (-F.relu(x) + 1)), (4,), 2 * math.exp(2.0) + 1e-6),
    "logistic loss": (lambda x: torch.log1p(torch.exp(-x.abs())) + F.relu(x), (4,), 2.0 + 1e-9),
    "running product": (lambda x: torch.sigmoid(x).cumprod(1), (4, 2), 1.4),
    "running products of whole numbers": (lambda x: x.cumprod(1), (3,), math.inf),
    "product": (lambda x: torch.tanh(x).prod(-1), (4,), 4.0 + 1e-9),
    "product of all": (lambda x: torch.tanh(x).prod(), (2, 2), 4.0 + 1e-9),
    "product that keeps its axis": (lambda x: torch.tanh(x).prod(1, keepdim=True), (1, 2), 1.0 + 1e-9),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_bounded_above_their_jacobians_and_tightly(name: str) -> None:
    call, shape, most = PATTERNS[name]
    upper = audit(Map(call).eval(), torch.zeros(1, *shape, dtype=torch.float64), effort=-1).upper
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-3, 0.05, 1.0, 4.0):
        x = scale * torch.randn(1, *shape, generator=generator, dtype=torch.float64)
        matrix = torch.autograd.functional.jacobian(call, x).reshape(-1, x.numel())
        assert not float(torch.linalg.matrix_norm(matrix.nan_to_num(), 2)) > upper * (1 + 1e-9)
    assert upper <= most
    assert (upper == math.inf) == (most == math.inf)


def test_powers_over_a_sum_of_integers_are_no_softmax() -> None:
    call = Map(lambda x: torch.exp(x) / torch.exp(x).sum(1, keepdim=True, dtype=torch.int64)).eval()
    report = audit(call, torch.zeros(1, 4, dtype=torch.float64), strict=False)
    assert 0.0 <= report.lower <= report.upper == math.inf


BENT = [
    name
    for name in PATTERNS
    if any(word in name for word in ("normalize", "length", "std", "var", "gaussian", "softmax", "powers", "decay", "product"))
]


@pytest.mark.parametrize("name", BENT)
def test_patterns_around_a_point_hold_its_jacobians(name: str) -> None:
    call, shape, _ = PATTERNS[name]
    generator = torch.Generator().manual_seed(2)
    for scale, radius in ((0.02, 0.01), (0.3, 0.1), (2.0, 0.5)):
        at = scale * torch.randn(1, *shape, generator=generator, dtype=torch.float64)
        upper = audit(Map(call).eval(), at, effort=-1, at=at, radius=radius).upper
        for _ in range(5):
            step = torch.randn(at.shape, generator=generator, dtype=torch.float64)
            x = at + 0.999 * radius * step / step.norm()
            matrix = torch.autograd.functional.jacobian(call, x).reshape(-1, x.numel())
            assert not float(torch.linalg.matrix_norm(matrix.nan_to_num(), 2)) > upper * (1 + 1e-9)


def test_rows_of_a_norm_across_rows_are_not_taken_for_bounded() -> None:
    """Entries of groups along the axis before the last: a row may be longer than the root of the group's size."""

    def call(x: Tensor) -> Tensor:
        z = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-4)
        return z @ z.mT

    x = torch.zeros(1, 4, 4, dtype=torch.float64)
    x[0, 0] = torch.linspace(0.01, 0.02, 4)
    matrix = torch.autograd.functional.jacobian(call, x).reshape(16, 16)
    assert float(torch.linalg.matrix_norm(matrix, 2)) <= audit(Map(call).eval(), x, effort=-1).upper
