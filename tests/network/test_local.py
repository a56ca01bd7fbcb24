"""Local constants, against Jacobians, quotients and values at points of the set, by torch alone."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramlip as gl
from gramlip.cli import main
from gramlip.errors import InputError
from gramlip.network import audit as way
from gramlip.network.compose import compose, constants
from gramlip.network.graph import export
from gramlip.network.local import derivative, jacobians, region, restricted
from gramlip.network.local.relaxations import line
from gramlip.network.rules import lower
from gramlip.network.steps import Slope
from gramlip.targets import read_input
from test_rules import Map

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU("tanh"),
    "mish": nn.Mish,
    "softplus": lambda: nn.Softplus(beta=3.0),
    "elu": lambda: nn.ELU(1.5),
    "celu": lambda: nn.CELU(0.5),
    "selu": nn.SELU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "prelu": lambda: nn.PReLU(init=-0.3),
    "hardtanh": nn.Hardtanh,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "relu6": nn.ReLU6,
    "softshrink": nn.Softshrink,
    "logsigmoid": nn.LogSigmoid,
    "softsign": nn.Softsign,
}
ENTRYWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "sin": torch.sin,
    "cos": torch.cos,
    "atan": torch.atan,
    "erf": torch.erf,
    "exp": torch.exp,
    "square": torch.square,
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "steep gate": lambda x: x * torch.sigmoid(40 * x),
    "gate": lambda x: x * torch.sigmoid(x),
    "hard gate": lambda x: x * F.hardsigmoid(0.7 * x),
    "gelu by hand": lambda x: x * (1.0 + torch.erf(0.9 * x)),
    "gelu of a quotient": lambda x: 0.5 * x * (1.0 + torch.erf(x / 1.4142135)),
    "clamp": lambda x: x.clamp(-0.3, 1.0),
    "cube": lambda x: x**3,
    "two relus": lambda x: x.relu() + (x - 0.3).relu(),
    "leaky by hand": lambda x: torch.maximum(0.1 * x, x),
    "tent": lambda x: x.abs() - 2.0 * (x - 0.25).abs() + (x - 0.5).abs(),
    "shrunk": lambda x: torch.where(x > 0.2, x - 0.2, torch.where(x < -0.2, x + 0.2, torch.zeros_like(x))),
}


def mlp(sizes: list[int], act: Callable[[], nn.Module], seed: int, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(sizes):
        layers += [nn.Linear(n, m), act()]
    model = nn.Sequential(*layers[:-1]).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p *= scale
    return model


def between(call: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(mlp([3, 5], nn.Tanh, 1), Map(call), mlp([5, 2], nn.Tanh, 2)).eval()


def lines(first: nn.Module, act: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(first, act, nn.Conv1d(3, 2, 3)).double().eval()


class Residual(nn.Module):
    """Convolutions with batch norm, a stride, a skip, pooling and a head."""

    def __init__(self, act: Callable[[], nn.Module], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.down, self.head = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Linear(6, 3)
        self.act = act()
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        nn.init.normal_(self.norm.running_mean)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = self.act(x + self.two(self.act(self.one(x))))
        return self.head(F.avg_pool2d(F.max_pool2d(self.act(self.down(x)), 2) + self.act(self.down(x))[..., 1:3, 1:3], 2).flatten(1))


class Strided(nn.Module):
    """Convolutions with a stride, a skip and a mean, without a maximum."""

    def __init__(self, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.stem, self.norm, self.down = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, stride=2, padding=1)
        self.inner, self.act = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), act()
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.down(self.act(self.norm(self.stem(x)))))
        return (x + self.act(self.inner(x))).mean((2, 3))


class Token(nn.Module):
    """A transformer's block with a gate: layer norm, attention, products of values."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 4)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        a, b = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(a * torch.sigmoid(b)) * torch.softmax(x, -1)


class MaxMin(nn.Module):
    """The larger and the smaller of entries of two halves."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split(x.shape[1] // 2, 1)
        return torch.cat([torch.max(a, b), torch.min(a, b)], 1)


class Ordered(nn.Module):
    """Neighbouring entries in order, in groups of so many."""

    def __init__(self, count: int, *, descending: bool = False) -> None:
        super().__init__()
        self.count, self.descending = count, descending

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.count)).sort(2, descending=self.descending)[0].flatten(1, 2)


def pooled(seed: int) -> nn.Module:
    """Convolutions, overlapping, padded and dilated windows of which the largest entries are taken, and a mean."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 3, 3, padding=1)]
    layers += [nn.MaxPool2d(2, 1, dilation=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)]
    return nn.Sequential(*layers).double().eval()


def maxima_of_channels(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv1d(2, 6, 3), Ordered(2), nn.AdaptiveMaxPool1d(3), nn.Conv1d(6, 2, 2)).double().eval()


def largest_and_least(x: Tensor) -> Tensor:
    return torch.cat([x.amax(1, True), x[:, :2].min(1, True)[0], x.max(1)[0].expand(3, -1).mT], 1)


COMPARING: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "maxmin": (lambda: mlp([4, 10, 8, 3], MaxMin, 5, 2.0), (4,)),
    "in order": (lambda: mlp([4, 9, 6, 3], lambda: Ordered(3), 5, 2.0), (4,)),
    "in falling order": (lambda: mlp([4, 10, 8, 3], lambda: Ordered(2, descending=True), 6, 2.0), (4,)),
    "pooled": (lambda: pooled(0), (2, 8, 8)),
    "maxima of channels": (lambda: maxima_of_channels(0), (2, 9)),
    "largest and least": (lambda: between(largest_and_least), (3,)),
    "wide mean": (lambda: Map(lambda x: 2.0 * x.mean((2, 3))).eval(), (1, 65, 65)),
    "spread of a mean": (lambda: Map(lambda x: (x.mean((2, 3), keepdim=True) - x).relu().sum(1)).eval(), (2, 5, 5)),
}  # fmt: skip
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: (lambda act=act: mlp([4, 9, 7, 3], act, 5, 2.0), (4,)) for name, act in ACTIVATIONS.items()},
    **{name: (lambda call=call: between(call), (3,)) for name, call in ENTRYWISE.items()},
    "residual": (lambda: Residual(nn.ReLU, 0), (2, 8, 8)),
    "smooth residual": (lambda: Residual(nn.SiLU, 1), (2, 8, 8)),
    "residual of relus": (lambda: Strided(nn.ReLU), (2, 9, 9)),
    "strided": (lambda: Strided(nn.ReLU), (2, 6, 6)),
    "smooth strided": (lambda: Strided(nn.SiLU), (2, 6, 6)),
    "token": (lambda: Token(0), (3, 4)),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 3)).double().eval(), (2, 4, 4)),
    "reflect": (lambda: lines(nn.Conv1d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Tanh()), (2, 7)),
    "transposed": (lambda: lines(nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), nn.ReLU()), (2, 5)),
    "joined": (lambda: Map(lambda x: torch.cat([x.relu(), (-x).tanh()], 1)[:, 1:7] * x[:, :1]).eval(), (4,)),
    "permuted": (lambda: Map(lambda x: torch.relu(x.permute(0, 2, 1).flip(1)) @ torch.tanh(x)).eval(), (3, 4)),
    **COMPARING,
    "split": (lambda: Map(lambda x: x.split([1, 3], 1)[1].relu() - x.split([1, 3], 1)[0].sigmoid()).eval(), (4,)),
}  # fmt: skip


def points(x: Tensor, radius: float, count: int, seed: int) -> Tensor:
    """Random points of the ball, most of them on its sphere, some close to each other."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, *x.shape[1:], generator=generator, dtype=torch.float64)
    steps /= steps.flatten(1).norm(dim=1).reshape(-1, *(1,) * (x.ndim - 1))
    lengths = torch.rand(count, *(1,) * (x.ndim - 1), generator=generator, dtype=torch.float64) ** 0.1
    return x + radius * steps * lengths


def steepest(model: nn.Module, xs: Tensor) -> float:
    """The largest norm of the Jacobian at the points, and the largest quotient of two of them, by torch alone."""
    xs = xs.clone().requires_grad_()
    ys = model(xs).flatten(1)
    rows = [torch.autograd.grad(ys[:, j].sum(), xs, retain_graph=True)[0].flatten(1) for j in range(ys.shape[1])]
    rounded = any(isinstance(m, nn.Hardsigmoid) for m in model.modules())  # torch takes its derivative, 1/6, in float32
    best = 0.0 if rounded else float(torch.linalg.matrix_norm(torch.stack(rows, 1), 2).max())
    with torch.no_grad():
        return max(best, float((torch.pdist(ys) / torch.pdist(xs.flatten(1))).max()))


def centre(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "hardsigmoid"])  # torch's derivative of it takes 1/6 in float32
def test_a_local_constant_is_never_below_what_points_of_the_ball_show_and_falls_with_the_radius(name: str) -> None:
    make, shape = MODELS[name]
    model, x = make(), centre(shape, 3)
    before = math.inf
    for radius in (0.8, 0.05):
        report = gl.audit(model, x, at=x, radius=radius, effort=0.0)
        seen = steepest(model, points(x, radius, 40, 7))
        assert seen <= report.upper * (1 + 1e-9)
        assert report.lower <= report.upper <= before * 1.02  # linear relaxations on smaller sets are others, and may be a little worse
        before = report.upper


@pytest.mark.parametrize("name", MODELS)
def test_every_entry_of_the_result_stays_in_its_interval(name: str) -> None:
    make, shape = MODELS[name]
    model, x = make(), centre(shape, 4)
    network = lower(export(model, (x,))).network
    for radius in (1.0, 0.05):
        area = region([tuple(x.shape)], None, x, radius)
        assert area is not None
        value = restricted(network, area).values[network.outputs[0]]
        with torch.no_grad():
            ys = torch.cat([model(y[None]) for y in points(x, radius, 60, 8)])
        slope = torch.autograd.functional.jacobian(model, x).reshape(-1, x.numel())
        ends = x + radius * (slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12)).reshape(-1, *x.shape[1:])
        with torch.no_grad():
            ys = torch.cat([ys, torch.cat([model(y[None]) for e in ends for y in (e, 2 * x[0] - e)])])
        assert bool((value.low - 1e-12 <= ys).all())
        assert bool((ys <= value.high + 1e-12).all())
        assert value.whole.low - 1e-12 <= float(ys.min())
        assert float(ys.max()) <= value.whole.high + 1e-12


@pytest.mark.parametrize("name", ["relu", "leaky", "hardtanh", "relu6", "strided", "transposed", *COMPARING])
def test_inside_one_region_of_a_piecewise_linear_network_it_is_the_norm_of_the_jacobian(name: str) -> None:
    make, shape = MODELS[name]
    model, x = make(), centre(shape, 11)
    exact = float(torch.linalg.matrix_norm(torch.autograd.functional.jacobian(model, x).reshape(-1, x.numel()), 2))
    upper = gl.audit(model, x, at=x, radius=1e-7, effort=0.0).upper
    assert exact * (1 - 1e-9) <= upper <= exact * (1 + 1e-6)


@pytest.mark.parametrize("name", ["tanh", "silu", "gelu", "softplus", "reflect", "smooth strided"])
def test_of_smooth_networks_it_tends_to_the_norm_of_the_jacobian(name: str) -> None:
    make, shape = MODELS[name]
    model, x = make(), centre(shape, 12)
    exact = float(torch.linalg.matrix_norm(torch.autograd.functional.jacobian(model, x).reshape(-1, x.numel()), 2))
    upper = gl.audit(model, x, at=x, radius=1e-7, effort=0.0).upper
    assert exact * (1 - 1e-6) <= upper <= exact * (1 + 1e-5)


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "silu", "gelu", "relu", "elu", "smooth deep"])
@pytest.mark.parametrize("radius", [0.03, 0.3, 1.0])
def test_the_derivative_stays_near_its_line_and_values_near_theirs(name: str, radius: float) -> None:
    model = mlp([3, 8, 6, 7, 4], nn.Tanh, 6, 1.5) if name == "smooth deep" else mlp([3, 12, 9, 4], ACTIVATIONS[name], 5, 2.0)
    x = centre((3,), 3)
    area = region([(1, 3)], None, x, radius)
    assert area is not None
    local = restricted(lower(export(model, (x,))).network, area)
    steps = local.network.steps
    composed = compose(local.network, constants(steps, [[steps[s].shape for s in step.sources] for step in steps]))
    found = derivative(local.network, composed, area)
    assert found is not None
    xs = points(x, radius, 400, 3)
    seen = torch.func.vmap(torch.func.jacrev(lambda y: model(y[None])[0]))(xs).detach() - found.centre
    if found.third is not None:
        seen = seen - torch.einsum("tjl,kl->ktj", found.third, xs - x)
    assert float(torch.linalg.matrix_norm(seen, 2).max()) <= (found.left(torch.ones(4, dtype=torch.float64)) + found.rest()) * (1 + 1e-9)
    assert bool((seen.norm(dim=-1).amax(0) <= found.left_rows() * (1 + 1e-9)).all())
    with torch.no_grad():
        moved = (model(xs) - model(x) - (xs - x) @ found.centre.mT).abs() / (xs - x).norm(dim=1, keepdim=True)
    assert bool((moved.amax(0) <= found.stray(area) * (1 + 1e-6) + 1e-9).all())


@pytest.mark.parametrize("shape", [(3, 6), (6, 3), (1, 4), (5, 5)])
@pytest.mark.parametrize("far", [0.01, 1.0, 30.0])
def test_the_middle_and_what_moves_are_bounded_together(shape: tuple[int, int], far: float) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    middle = torch.randn(*shape, generator=generator, dtype=torch.float64)
    third = torch.randn(*shape, 4, generator=generator, dtype=torch.float64) * 0.2
    upper, best = jacobians.together(middle, third, far), 0.0
    for _ in range(20):
        d = torch.randn(4, generator=generator, dtype=torch.float64)
        for _ in range(60):
            u, s, v = torch.linalg.svd(middle + far * (third @ (d / d.norm())))
            d = torch.einsum("tjl,t,j->l", third, u[:, 0], v[0])
        best = max(best, float(s[0]))
    assert best <= upper * (1 + 1e-12)
    apart = float(torch.linalg.matrix_norm(middle, 2)) + far * jacobians.least_unfolding(third)
    assert upper <= apart * (1 + 1e-9)
    assert upper <= (1.02 if far < 0.1 else 1.25) * best


def test_smooth_networks_are_bounded_closely_in_the_middle_radii() -> None:
    for act, sizes, radius, most in ((nn.Tanh, [6, 40, 40, 3], 0.1, 1.02), (nn.SiLU, [10, 60, 60, 5], 0.3, 1.1)):
        model, x = mlp(sizes, act, 3), centre((sizes[0],), 103)
        seen = steepest(model, points(x, radius, 300, 1))
        assert seen <= gl.audit(model, x, at=x, radius=radius, effort=0.1).upper <= most * seen


def test_norms_of_many_matrices_are_never_below_theirs() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((40, 5, 5), (7, 1, 9), (3, 30, 30), (5, 8, 2)):
        many = torch.randn(*shape, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(-9, 9, (shape[0], 1, 1))
        many[0] = 0.0
        many[1] = many[1, :, :1] * many[1, :1]  # rank one: no room but for rounding
        truth = torch.linalg.matrix_norm(many, 2)
        found = jacobians.norms_of_many(many)
        assert bool((found >= truth * (1 - 1e-15)).all())
        assert bool((found <= truth * 1.3 + 1e-100).all())
        assert float(found[1] / truth[1]) < 1 + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_small_relu_networks_against_all_their_regions_in_a_box(seed: int) -> None:
    model, x = mlp([2, 6, 5, 2], nn.ReLU, seed, 1.5), centre((2,), seed)
    low, high = x - 0.6, x + 0.6
    upper = gl.audit(model, x, domain=(low, high)).upper
    grid = torch.cartesian_prod(
        *(torch.linspace(float(a), float(b), 300, dtype=torch.float64) for a, b in zip(low[0], high[0], strict=True))
    )
    weights = [layer.weight.detach() for layer in model if isinstance(layer, nn.Linear)]  # type: ignore[reportGeneralTypeIssues]
    patterns: set[tuple[bool, ...]] = set()
    with torch.no_grad():
        z = model[0](grid)
        signs = torch.cat([z > 0, model[2](z.relu()) > 0], 1).unique(dim=0)
    patterns |= {tuple(row) for row in signs.tolist()}
    steep: list[float] = []
    for p in patterns:
        first, second = torch.tensor(p[:6]).double(), torch.tensor(p[6:]).double()
        steep.append(float(torch.linalg.matrix_norm(weights[2] @ (second[:, None] * (weights[1] @ (first[:, None] * weights[0]))), 2)))
    assert max(steep) <= upper * (1 + 1e-12)
    assert upper <= 2.5 * max(steep)


@pytest.mark.parametrize("name", ["relu", "strided", "joined"])
def test_a_box_with_an_interval_for_each_entry(name: str) -> None:
    make, shape = MODELS[name]
    model, x = make(), centre(shape, 21)
    width = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.5
    width.flatten()[0] = 0.0  # one entry that does not move
    generator = torch.Generator().manual_seed(2)
    xs = torch.cat([x + width * (2 * torch.rand(1, *shape, generator=generator, dtype=torch.float64) - 1).sign() for _ in range(12)])
    report = gl.audit(model, x, domain=(x - width, x + width), effort=0.0)
    assert steepest(model, xs) <= report.upper * (1 + 1e-9)
    assert report.lower <= report.upper
    both = gl.audit(model, x, domain=(x - width, x + width), at=x, radius=0.2, effort=0.0)
    assert both.upper <= min(report.upper, gl.audit(model, x, at=x, radius=0.2, effort=0.0).upper) * 1.01


def test_from_chosen_inputs_to_chosen_outputs() -> None:
    model, x = mlp([5, 8, 8, 4], nn.Tanh, 3, 1.5), centre((5,), 6)
    for options in ({}, {"at": x, "radius": 0.3}, {"domain": (x - 0.1, x + 0.1)}):
        report = gl.audit(model, x, inputs=[0, -2], outputs=[1, 2], effort=0.0, **options)
        jacobian = torch.autograd.functional.jacobian(model, x)[0, :, 0][[1, 2]][:, [0, 3]]
        assert float(torch.linalg.matrix_norm(jacobian, 2)) <= report.upper
        assert report.lower <= report.upper <= gl.audit(model, x, effort=0.0, **options).upper * (1 + 1e-6)
        assert "2 of 5 inputs; 2 of 4 outputs" in str(report.network.because)
    linear = nn.Linear(3, 2, bias=False).double()
    part = float(linear.weight[1, 2].detach().abs())
    assert gl.audit(linear, (3,), inputs=[2], outputs=[1]).upper == pytest.approx(part, rel=1e-5)
    for bad in ([], [5], [0.5], 3, [True]):
        with pytest.raises(InputError, match="of the 5 entries"):
            gl.audit(model, x, inputs=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_it_is_never_above_the_global_constant(name: str) -> None:
    make, shape = MODELS[name]
    model, x = make(), centre(shape, 2)
    assert gl.audit(model, x, at=x, radius=50.0, effort=0.0).upper <= gl.audit(model, x, effort=0.0).upper * (1 + 1e-6)


def test_a_search_around_an_input_that_ends_above_that_of_all_inputs_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inner = [layer for _ in range(2) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), *inner, nn.Conv2d(4, 2, 3, padding=1)).eval()
    x = torch.randn(1, 1, 6, 6)
    everywhere = gl.audit(model, x, effort=0.0)
    right = way._coupled
    monkeypatch.setattr(way, "_coupled", lambda whole, network, effort: None if whole.local else right(whole, network, effort))
    monkeypatch.setattr(way, "WAYS", {name: way.WAYS[name] for name in ("composition", "coupling")})
    around = gl.audit(model, x, at=x, radius=1.0, effort=0.0)
    assert 0.0 < everywhere.upper < math.inf
    assert around.upper == everywhere.upper


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": torch.zeros(1, 4)}, "radius=None"),
        ({"radius": 0.5}, "at of NoneType"),
        ({"at": torch.zeros(1, 4), "radius": -1.0}, "positive finite radius"),
        ({"at": torch.zeros(1, 4), "radius": True}, "positive finite radius"),
        ({"at": torch.zeros(1, 5), "radius": 0.5}, "broadcast to the input's shape"),
        ({"at": torch.full((1, 4), math.nan), "radius": 0.5}, "finite"),
        ({"at": torch.full((1, 4), 2.0), "radius": 0.5, "domain": (0.0, 1.0)}, "inside of domain"),
        ({"domain": (torch.ones(1, 4), torch.zeros(1, 4))}, "the lower first"),
        ({"domain": (torch.zeros(1, 3), 1.0)}, "broadcast to the input"),
    ],
)
def test_sets_that_cannot_be_used_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        gl.audit(mlp([4, 3], nn.ReLU, 0), torch.zeros(1, 4, dtype=torch.float64), **options)  # type: ignore[arg-type]


SMOOTH_OR_KINKED: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: act() for name, act in ACTIVATIONS.items() if name not in ("prelu", "softsign")},
    **{
        name: ENTRYWISE[name]
        for name in ("abs", "sin", "cos", "atan", "erf", "clamp", "gate", "quick gelu", "steep gate", "hard gate", "gelu by hand")
    },
}


@pytest.mark.parametrize("name", SMOOTH_OR_KINKED)
def test_slopes_and_values_on_random_intervals(name: str) -> None:
    call = SMOOTH_OR_KINKED[name]
    step = lower(export(Map(call).eval(), (torch.zeros(1, 1, dtype=torch.float64),))).network.steps[-1]
    assert isinstance(step.what, Slope)
    assert step.what.within is not None
    generator = torch.Generator().manual_seed(0)
    ends = 12 * (torch.rand(2, 400, generator=generator, dtype=torch.float64) - 0.5) ** 3 * 8
    ends[1, 200:] = ends[0, 200:] + 0.02  # narrow ones
    low, high = ends.sort(0)[0]
    on = step.what.within(low, high)
    parts = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    xs = low + (high - low) * parts
    ys = call(xs)
    slopes = ys.diff(dim=0) / xs.diff(dim=0)
    room = 1e-12 * ys.abs().amax(0) / (high - low) * 200 + 1e-9 + (1e-6 if name == "softplus" else 0.0)
    assert bool((on.low - room <= slopes).all())
    assert bool((slopes <= on.high + room).all())
    jump = 1e-8 if name == "softplus" else 1e-12  # of torch's own function, which becomes the identity at 20
    assert bool((on.least <= ys + jump).all())
    assert bool((ys <= on.most + jump).all())
    narrow = slice(200, None)
    assert float((on.high - on.low)[narrow].mean()) < 0.5 * float(torch.as_tensor(step.what.high)) + 1e-9


@pytest.mark.parametrize("name", SMOOTH_OR_KINKED)
def test_an_activation_stays_within_its_line(name: str) -> None:
    call = SMOOTH_OR_KINKED[name]
    step = lower(export(Map(call).eval(), (torch.zeros(1, 1, dtype=torch.float64),))).network.steps[-1]
    assert isinstance(step.what, Slope)
    generator = torch.Generator().manual_seed(1)
    low, high = (6 * (torch.rand(2, 300, generator=generator, dtype=torch.float64) - 0.5)).sort(0)[0]
    at = low + (high - low) * torch.rand(300, generator=generator, dtype=torch.float64)
    found = line(step.what, low, high, (at, at))
    assert found is not None
    xs = low + (high - low) * torch.linspace(0, 1, 201, dtype=torch.float64)[:, None]
    left = call(xs) - call(at) - found.slope * (xs - at)
    assert bool((found.low - 1e-12 <= left).all())
    assert bool((left <= found.high + 1e-12).all())
    assert float((found.high - left.amax(0)).mean()) < 0.05 * float((xs[-1] - xs[0]).mean())
    if name == "relu":  # the triangle
        assert float((found.high - left.amax(0)).max()) < 1e-11


def test_radii_around_each_image_hold_against_points_and_are_never_smaller() -> None:
    model = mlp([6, 24, 24, 4], nn.ReLU, 2, 1.3)
    xs = torch.randn(10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = model(xs).argmax(1)
    labels[0] = (labels[0] + 1) % 4  # a wrong one
    wide = gl.robust.certify(model, [(xs, labels)], eps=0.05)
    found = gl.robust.certify(model, [(xs, labels)], eps=0.05, local=True)
    assert found.radii[0] == 0.0
    assert bool((found.radii >= wide.radii).all())
    assert float(found.radii[1:].sum()) > 1.5 * float(wide.radii[1:].sum())
    for x, label, radius in zip(xs[1:], labels[1:], found.radii[1:], strict=True):
        around = points(x[None], float(radius), 200, 5)
        assert bool((model(around).argmax(1) == label).all())
        logits = model(x[None])[0].detach()
        slope = torch.autograd.functional.jacobian(model, x[None])[0, :, 0]
        nearest = min(float((logits[label] - logits[j]) / (slope[label] - slope[j]).norm()) for j in range(4) if j != label)
        assert float(radius) <= nearest * (1 + 1e-9)


def small() -> nn.Module:
    """A network for the command line, the same at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def test_an_input_read_from_a_file_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = torch.arange(48, dtype=torch.uint8).reshape(4, 4, 3).numpy()
    image.fromarray(pixels).save(tmp_path / "image.png")
    image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    read = read_input(tmp_path / "image.png")
    assert read.shape == (1, 3, 4, 4)
    assert float(read[0, 2, 1, 0]) == 14 / 255
    assert read_input(tmp_path / "grey.png").shape == (1, 1, 4, 4)
    torch.save(torch.zeros(1, 3, 4, 4), tmp_path / "x.pt")
    np.save(tmp_path / "x.npy", np.zeros((3, 4, 4), dtype=np.float32))
    uppers = []
    for name in ("x.pt", "x.npy"):
        options = ["--at", str(tmp_path / name), "--radius", "0.01", "--effort", "0", "--json", "-"]
        assert main(["audit", "test_local:small", "--input", "3,4,4", "--outputs", "0,1", *options]) == 0
        uppers.append(json.loads(capsys.readouterr().out)["network"]["upper"])
    assert uppers[0] == uppers[1]
    (tmp_path / "bad.npy").write_text("no array")
    torch.save({"x": 1}, tmp_path / "dict.pt")
    for bad in ("bad.npy", "dict.pt", "none.npy", "x.txt"):
        assert main(["audit", "test_local:small", "--input", "3,4,4", "--at", str(tmp_path / bad), "--radius", "1"]) == 2
        assert bad in capsys.readouterr().err
    assert main(["audit", "demo", "--at", str(tmp_path / "x.pt"), "--radius", "1"]) == 2
    assert "--at and --radius" in capsys.readouterr().err
