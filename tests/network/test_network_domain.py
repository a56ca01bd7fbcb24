"""Domains: what is finite only where values are bounded, against Jacobians inside the domain and the published formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramlip.errors import InputError
from gramlip.network.audit import audit
from test_rules import Map


def largest(call: Callable[[Tensor], Tensor], shape: tuple[int, ...], low: float, high: float, points: int = 30) -> float:
    """The largest norm of the Jacobian at random points of the box, its corners and points near its middle, in float64."""
    generator = torch.Generator().manual_seed(2)
    best = 0.0
    for i in range(points):
        u = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
        u = (u, u.round(), 0.5 + 0.02 * (u - 0.5))[i % 3]
        x = low + (high - low) * u
        matrix = torch.autograd.functional.jacobian(call, x).reshape(-1, x.numel())
        best = max(best, float(torch.linalg.matrix_norm(matrix, 2)))
    return best


STEEP: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float], float]] = {
    # name: (call, domain, the exact constant there)
    "exp": (torch.exp, (-1.0, 2.0), math.exp(2.0)),
    "exp2": (torch.exp2, (-1.0, 2.0), math.log(2.0) * 4.0),
    "expm1": (torch.expm1, (-1.0, 2.0), math.exp(2.0)),
    "sqrt": (torch.sqrt, (0.25, 4.0), 1.0),
    "rsqrt": (torch.rsqrt, (0.25, 4.0), 4.0),
    "log": (torch.log, (0.5, 3.0), 2.0),
    "log1p": (torch.log1p, (-0.5, 3.0), 2.0),
    "reciprocal": (torch.reciprocal, (-2.0, -0.5), 4.0),
    "one over": (lambda x: 3.0 / x, (0.5, 2.0), 12.0),
    "sinh": (torch.sinh, (-1.0, 2.0), math.cosh(2.0)),
    "cosh": (torch.cosh, (-2.0, 1.0), math.sinh(2.0)),
    "cube": (lambda x: x**3, (-2.0, 1.0), 12.0),
    "power 1.5": (lambda x: x**1.5, (0.0, 4.0), 3.0),
    "power 0.5": (lambda x: x**0.5, (0.25, 4.0), 1.0),
    "power -2": (lambda x: x**-2, (0.5, 4.0), 16.0),
    "power -2 below zero": (lambda x: (x - 3) ** -2, (-1.0, 1.0), 0.25),
    "power -3 below zero": (lambda x: (x - 3) ** -3, (-1.0, 1.0), 0.1875),
    "square": (torch.square, (-1.0, 2.0), 4.0),
}


def test_sums_with_a_negative_factor_have_the_range_of_both_signs() -> None:
    """`index_add` with alpha = -1 of values in [-3, -1] lies in [0, 6]: its ends were the wrong way round."""
    places = torch.tensor([0, 1, 1])
    for alpha in (-1.0, 0.0, 2.0):

        def call(x: Tensor, alpha: float = alpha) -> Tensor:
            return torch.zeros(1, 3, dtype=x.dtype).index_add(1, places, x, alpha=alpha).exp()

        for domain in ((-3.0, -1.0), (1.0, 2.0)):
            report = audit(Map(call).eval(), (3,), domain=domain)
            assert largest(call, (3,), *domain) <= report.upper < math.inf


def test_attention_to_more_keys_and_values_than_queries_repeats_the_queries() -> None:
    """One sample of queries attends to five of keys: the result has five times as many entries."""
    keys = torch.eye(4, dtype=torch.float64)[:3].expand(5, 3, 4).clone()

    def call(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, keys, keys)

    upper = audit(Map(call).eval(), torch.zeros(1, 2, 4, dtype=torch.float64)).upper
    assert largest(call, (2, 4), -0.1, 0.1) <= upper


def test_a_softmax_after_shifts_of_its_own_has_the_range_of_what_it_reads() -> None:
    """`x - (c - amax x)`: the softmax of x - c, not of x."""
    shift = torch.tensor([[0.0, 3.0, -5.0]], dtype=torch.float64)

    def call(x: Tensor) -> Tensor:
        powers = torch.exp(x - (shift - x.amax(1, keepdim=True)))
        return powers / powers.sum(1, keepdim=True)

    at = shift + torch.tensor([[0.0, 0.0, -9.0]], dtype=torch.float64)
    report = audit(nn.Sequential(Map(call)).eval(), at, at=at, radius=0.01)
    matrix = torch.autograd.functional.jacobian(call, at).reshape(3, 3)
    assert float(torch.linalg.matrix_norm(matrix, 2)) <= report.upper


def test_attention_of_fixed_queries_and_keys_is_linear_in_the_values() -> None:
    fixed = torch.linspace(-2, 2, 15, dtype=torch.float64).reshape(1, 5, 3)

    def call(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(fixed, fixed, x)

    report = audit(Map(call).eval(), torch.zeros(1, 5, 3, dtype=torch.float64))
    assert largest(call, (5, 3), -1.0, 1.0, points=1) <= report.upper < math.inf


@pytest.mark.parametrize("call", [lambda x: x.std(), lambda x: torch.einsum("ii", x[0]), lambda x: x.norm().tanh() + x.mean()])
def test_a_single_number_has_a_constant_on_a_set(call: Callable[[Tensor], Tensor]) -> None:
    example = torch.linspace(-1, 2, 9, dtype=torch.float64).reshape(1, 3, 3)
    for region in ({"domain": (-1.0, 2.0)}, {"at": example, "radius": 0.5}):
        report = audit(Map(call).eval(), example, **region)  # type: ignore[arg-type]
        assert float(torch.autograd.functional.jacobian(call, example).norm()) <= report.upper * (1 + 1e-9) < math.inf


@pytest.mark.parametrize("name", STEEP)
def test_steep_functions_have_their_exact_constant_on_a_domain_and_none_without(name: str) -> None:
    call, domain, exact = STEEP[name]
    report = audit(Map(call).eval(), (3,), domain=domain)
    assert exact <= report.upper <= exact * (1 + 1e-6)
    assert audit(Map(call).eval(), (3,)).upper == math.inf
    assert largest(call, (3,), *domain) <= report.upper


@pytest.mark.parametrize(
    ("call", "domain"),
    [
        (torch.sqrt, (0.0, 1.0)),
        (torch.log, (-1.0, 1.0)),
        (torch.reciprocal, (-1.0, 1.0)),
        (lambda x: x / (x.abs() - 0.5), (0.0, 1.0)),
        (lambda x: x**0.5, (0.0, 1.0)),
        (lambda x: x**-1, (-1.0, 1.0)),
        # no hardswish, whose image starts at -9/4: one channel is clamped to [1, 6], and falls below -50
        (lambda x: 1 / (x * (x + 3).clamp(torch.tensor([0.0, 1.0, 0.0]), torch.full((3,), 6.0)) + 50), (-60.0, 0.0)),
    ],
)
def test_a_domain_that_reaches_a_pole_gives_no_constant(call: Callable[[Tensor], Tensor], domain: tuple[float, float]) -> None:
    report = audit(Map(call).eval(), (3,), domain=domain)
    assert report.upper == math.inf
    assert len(report.left_out) == 1


EYE, ONE = torch.eye(4, dtype=torch.float64), torch.full((1,), 3.0, dtype=torch.float64)
PRODUCTS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], tuple[float, float]]] = {
    "constant chosen": (lambda x: torch.where(torch.tensor([True, False, True, False]), x, 50.0) * x.flip(1), (4,), (0.0, 1.0)),
    "constant filled": (lambda x: x.masked_fill(torch.tensor([True, False, True, False]), -9.0) * x.flip(1), (4,), (0.0, 1.0)),
    "constant joined": (lambda x: torch.cat([x, torch.full((1, 2), 7.0)], 1) * torch.cat([x[:, :2], x], 1), (4,), (0.0, 1.0)),
    "constant of shape": (lambda x: torch.full_like(x, 30.0) * x + x * torch.ones(1, 1).expand_as(x), (4,), (0.0, 1.0)),
    "maximum": (lambda x: torch.maximum(x, torch.full((3, 1, 4), 9.0)) * x, (4,), (0.0, 1.0)),
    "quotient": (lambda x: x / (1.0 + x.abs().sum(1, keepdim=True)), (4,), (-1.0, 1.0)),
    "gate": (lambda x: x[:, :2] * torch.sigmoid(x[:, 2:]), (4,), (-3.0, 3.0)),
    "unequal parts": (lambda x: x.split([1, 4], -1)[1] @ x.split([1, 4], -1)[1].mT, (3, 5), (-1.0, 1.0)),
    "batches": (lambda x: x @ x.reshape(1, 4, 2).expand(3, 4, 2), (2, 4), (-1.0, 1.0)),
    "einsum": (lambda x: torch.einsum("bij,bkj->bik", x, x), (3, 4), (-1.0, 1.0)),
    "einsum outer": (lambda x: torch.einsum("bi,bj->bji", x, x), (3,), (-1.0, 1.0)),
    "coupling": (lambda x: x[:, 2:] * torch.exp(torch.tanh(x[:, :2])) + x[:, :2], (4,), (-1.0, 1.0)),
    "layer norm": (lambda x: F.layer_norm(x, (4,), eps=0.04), (4,), (-1.0, 1.0)),
    "variance": (lambda x: x.var(1), (4,), (-1.0, 2.0)),
    "variance and mean": (lambda x: torch.stack(torch.var_mean(x, (1, 2), correction=0)), (4, 2), (-1.0, 2.0)),
    "deviation": (lambda x: x.std(1) * torch.std_mean(x, 1)[1], (4,), (-1.0, 2.0)),
    "direction": (lambda x: F.normalize(x, dim=1), (4,), (0.5, 2.0)),
    "cosine": (lambda x: F.cosine_similarity(x, torch.arange(4.0).to(x)), (4,), (0.5, 2.0)),
    "clamped": (lambda x: 1 / x.clamp_min(0.1), (4,), (0.5, 2.0)),
    "products added": (lambda x: torch.addcmul(x, x, x.flip(1), value=-0.5), (4,), (-1.0, 2.0)),
    "softplus gate": (lambda x: x * F.softplus(2 * x, beta=3.0), (4,), (-1.0, 1.0)),
    "logsumexp": (lambda x: torch.logsumexp(x, 1, keepdim=True) * x, (4,), (-1.0, 1.0)),
    "clamp between tensors": (
        lambda x: x.clamp(torch.linspace(-1, 0.5, 4).double(), torch.full((4,), 0.75).double()) * x,
        (4,),
        (-1.0, 1.0),
    ),
    "clamp from a tensor": (lambda x: x.clamp(min=torch.linspace(-1, 0.5, 4).double()) * x, (4,), (-1.0, 1.0)),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic") ** 2, (1, 3, 3), (-1.0, 1.0)),
    "padded channels": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1), value=5.0) ** 2, (1, 3, 2), (-1.0, 1.0)),
    "one bias": (lambda x: (lambda y: y @ y.mT)(F.linear(x, 0.01 * EYE, ONE)), (5, 4), (-1.0, 1.0)),
    "tiny factors": (lambda x: F.linear(x, 1e-200 * EYE) * F.linear(x, 1e-100 * EYE) * 1e300, (4,), (0.5, 1.0)),
    "tiny rows": (lambda x: F.linear(F.layer_norm(x, (4,), eps=1.0), 1e-200 * EYE) * x * 1e200, (4,), (0.5, 1.0)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_bounded_above_their_jacobians_in_the_domain(name: str) -> None:
    call, shape, domain = PRODUCTS[name]
    report = audit(Map(call).eval(), torch.zeros(1, *shape, dtype=torch.float64), domain=domain)
    found = largest(call, shape, *domain)
    assert report.lower <= report.upper < math.inf
    assert found <= report.upper <= 30 * found


class Attention(nn.Module):
    """Softmax attention of one or more heads, in one of the ways that users write it."""

    def __init__(self, width: int, heads: int, way: str) -> None:
        super().__init__()
        self.width, self.heads, self.way = width, heads, way
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        scale = (self.width // self.heads) ** -0.5
        if self.way == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.way == "matmul":
            y = torch.softmax(scale * (q @ k.transpose(-2, -1)) + 0.1, -1) @ v
        elif self.way == "scaled":
            y = F.softmax((scale * q) @ k.mT, dim=-1) @ v
        else:
            y = torch.einsum("bhnm,bhmd->bhnd", torch.einsum("bhnd,bhmd->bhnm", q, k).mul(scale).softmax(-1), v)
        return y.transpose(1, 2).flatten(2)


WAYS = ("fused", "matmul", "scaled", "einsum")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("reach", [0.3, 2.0])
def test_attention_on_a_ball_lies_between_its_jacobian_and_the_published_bound(way: str, heads: int, reach: float) -> None:
    torch.manual_seed(heads)
    tokens, width = 5, 4
    model = Attention(width, heads, way).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    example = torch.zeros(1, tokens, width, dtype=torch.float64)
    report = audit(model, example, domain=(-reach, reach))
    assert largest(model, (tokens, width), -reach, reach, points=60) <= report.upper
    assert report.lower <= report.upper
    assert audit(model, example).upper == math.inf
    if heads == 1:  # arXiv 2312.14820, on the ball of radius R that holds the box, with its own matrix A
        a = model.k.weight.mT @ model.q.weight / math.sqrt(width)
        r, n, norm = reach * math.sqrt(width), tokens, lambda m: float(torch.linalg.matrix_norm(m.detach(), 2))
        published = math.sqrt(3) * norm(model.v.weight) * math.sqrt(norm(a) ** 2 * r**4 * (4 * n + 1) + n)
        split = norm(model.k.weight) * norm(model.q.weight) / math.sqrt(width)
        assert report.upper <= published * split / norm(a) * 1.05


@pytest.mark.parametrize("nothing", [torch.tensor([[True, True], [False, False]]), torch.tensor([[0.0, 0.0], [-math.inf, -math.inf]])])
def test_a_query_that_attends_to_nothing_gives_zero(nothing: Tensor) -> None:
    def call(x: Tensor) -> Tensor:
        return torch.sqrt(
            x[:, :1, :1] * 0.0
            + 0.01
            + F.scaled_dot_product_attention(x, x, x, attn_mask=nothing.to(x.dtype) if nothing.is_floating_point() else nothing)
        )

    report = audit(Map(call).eval(), (2, 3), domain=(1.0, 2.0))
    low, high = (float(call(torch.full((1, 2, 3), v)).min()) for v in (1.0, 2.0))
    assert low == high == pytest.approx(0.1)
    seen = [s for s in report.layers if "sqrt" in s.op]
    assert seen
    assert all(s.bound.upper >= 0.5 / 0.1 for s in seen)  # the slope of the root where its argument is 0.01


def test_all_ways_to_write_attention_get_about_one_bound() -> None:
    uppers = []
    for way in WAYS:
        torch.manual_seed(0)
        uppers.append(audit(Attention(8, 2, way).eval(), (6, 8), domain=(-1.0, 1.0)).upper)
    assert max(uppers) <= 1.001 * min(uppers)


@pytest.mark.parametrize("bad", [(1.0, 0.0), (0.0, 0.0), (0.0, math.inf), (math.nan, 1.0), (0.0, 1.0, 2.0)])
def test_a_domain_that_cannot_be_used_is_refused(bad: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="expected two finite numbers, the lower first"):
        audit(nn.Linear(2, 2), (2,), domain=bad)
