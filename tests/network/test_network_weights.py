"""Weights that a model computes from others, and what its calls read from memory: float64 on both sides, against 60 digits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from gramlip.errors import UnsupportedError
from gramlip.network import running_errors
from gramlip.network.audit import audit
from test_rules import Map

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def weight_norm_in_digits(layer: nn.Module) -> mp.mpf:
    """The spectral norm of `g v / |v|`, row by row, in 60 digits."""
    with mp.workdps(60):
        raw = layer.parametrizations.weight  # type: ignore[union-attr]
        gains, rows = raw.original0.detach().double(), raw.original1.detach().double()  # type: ignore[union-attr]
        matrix = mp.matrix(
            [[mp.mpf(float(g)) * v / mp.norm(mp.matrix(row)) for v in row] for g, row in zip(gains, rows.tolist(), strict=True)]
        )
        return mp.svd_r(matrix, compute_uv=False)[0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weight_norm_is_that_of_real_numbers_in_every_type(dtype: torch.dtype) -> None:
    for seed in range(40):
        torch.manual_seed(seed)
        layer = parametrizations.weight_norm(nn.Linear(4, 4, bias=False)).to(dtype).eval()
        report, truth = audit(layer, torch.zeros(1, 4, dtype=dtype), rtol=1e-9, effort=-1), weight_norm_in_digits(layer)
        assert report.lower <= truth <= report.upper <= truth * (1 + 1e-6), seed
        assert "float64 gives" not in report.network.because  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.spectral_norm,
        lambda layer: parametrizations.orthogonal(layer, orthogonal_map="householder"),
        lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
        lambda layer: parametrizations.orthogonal(layer, orthogonal_map="matrix_exp"),
    ],
    ids=["spectral norm", "householder", "cayley", "matrix exp"],
)
def test_parametrizations_are_those_of_their_weights_in_float64(wrap: Callable[[nn.Module], nn.Module], dtype: torch.dtype) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        layer = wrap(nn.Linear(4, 4)).to(dtype).eval()
        report = audit(layer, torch.zeros(1, 4, dtype=dtype), rtol=1e-9, effort=-1)
        truth = float(torch.linalg.matrix_norm(copy.deepcopy(layer).double().weight.detach(), 2))  # type: ignore[arg-type]
        assert report.lower <= truth * (1 + 1e-13)
        assert truth * (1 - 1e-13) <= report.upper <= truth * (1 + 1e-6)


@pytest.mark.parametrize("power", [0, 8, 100, 160])
def test_weight_norm_of_rows_with_huge_and_small_entries(power: int) -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        layer = parametrizations.weight_norm(nn.Linear(4, 4, bias=False).double()).eval()
        raw = layer.parametrizations.weight  # type: ignore[union-attr]
        with torch.no_grad():
            raw.original1.mul_(10.0 ** (power * (2 * torch.rand(4, 4).double() - 1)))  # type: ignore[union-attr]
            raw.original0.mul_(10.0 ** torch.randint(-3, 4, (4, 1)))  # type: ignore[union-attr]
        report, truth = audit(layer, torch.zeros(1, 4, dtype=torch.float64), rtol=1e-9, effort=-1), weight_norm_in_digits(layer)
        assert report.lower <= truth <= report.upper, seed


class Cancelling(nn.Module):
    """All entries of the weight are rounded in the same direction; the layer is of the weight itself."""

    def __init__(self, shift: float, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(weight.double()), shift

    def forward(self, x: Tensor) -> Tensor:
        return x @ ((self.weight + self.shift) - self.shift)


def check_cancelling() -> None:
    for shift in (0.0, 1e8, 1e10, 1e17):
        for weight in (0.3 * torch.eye(2), torch.full((10000, 1), 52429.51 * 2.0**-19, dtype=torch.float64), torch.full((1, 1), 0.7)):
            report, truth = audit(Cancelling(shift, weight), (len(weight),)), float(torch.linalg.matrix_norm(weight.double(), 2))
            assert report.lower <= truth * (1 + 1e-13)
            assert truth * (1 - 1e-13) <= report.upper <= 1.02 * (truth + len(weight) ** 0.5 * 4e-16 * shift)


def test_intervals_hold_the_real_constant_where_computing_a_weight_cancels() -> None:
    check_cancelling()


def check_shifts() -> None:
    """Two thresholds that are the same number, and are not in float64: the function is zero."""
    one, other = nn.Parameter(torch.zeros(1).double()), 1.5e16
    model = Map(lambda x: torch.relu(x - ((one + 3.0) + other - other)) - torch.relu(x - (one + other - other + 3.0))).eval()
    for seed in range(4):  # not every search meets a pair that the errors alone tell apart
        assert audit(model, (3,), domain=(-10.0, 10.0), seed=seed).lower == 0.0


def test_thresholds_that_differ_by_rounding_alone_stretch_nothing() -> None:
    check_shifts()


def convolutions() -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Linear(8 * 16, 10)]
    return nn.Sequential(*layers[:1], nn.ReLU(), *layers[1:2], nn.ReLU(), nn.Flatten(), *layers[2:]).double()


class Standardised(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        flat = w.flatten(1) - w.flatten(1).mean(1, keepdim=True)
        return (flat / (flat.square().mean(1, keepdim=True) + 1e-5).sqrt()).view_as(w)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(-0.3).double())

    def forward(self, w: Tensor) -> Tensor:
        return w * self.log.exp()


@pytest.mark.parametrize("kind", ["weight norm", "spectral norm", "standardised", "scaled", "pruned"])
def test_the_errors_of_ordinary_weights_cost_next_to_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrap = {
        "weight norm": parametrizations.weight_norm,
        "spectral norm": parametrizations.spectral_norm,
        "standardised": lambda layer: parametrize.register_parametrization(layer, "weight", Standardised()),
        "scaled": lambda layer: parametrize.register_parametrization(layer, "weight", Scaled()),
        "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.4),
    }[kind]
    model = convolutions()
    for layer in [layer for layer in model if hasattr(layer, "weight")]:
        wrap(layer)
    example = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    made = audit(model.eval(), example, effort=-1)
    monkeypatch.setattr(running_errors, "_BOUNDS", dict.fromkeys(running_errors._BOUNDS, lambda m: torch.zeros_like(m.result)))
    exact = audit(model, example, effort=-1)
    assert exact.upper <= made.upper <= exact.upper * (1 + 1e-12)
    assert exact.lower * (1 - 1e-8) <= made.lower <= exact.lower * (1 + 1e-8)  # measured, with other signs
    assert (made.upper == exact.upper) == (kind == "pruned")
    assert "float64 gives" not in made.network.because  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x, w: x @ torch.matrix_exp(w - w.mT), "come from aten.matrix_exp.default"),
        (lambda x, w: x @ (w - w.std()), "come from aten.std.correction"),
        (lambda x, w: F.prelu(x, w.exp().mean().reshape(1)), "go into aten.prelu.default"),
        (lambda x, w: F.batch_norm(x, w.detach()[0].exp(), w.detach()[1].exp()), "go into aten.batch_norm.default"),
        (lambda x, w: torch.addcmul(w[0] * w[1], x, w[0] * w[1]), "go into aten.addcmul.default"),
        (lambda x, w: torch.relu(x - w.exp()[0]) - torch.relu(-x - w.exp()[0]), "go into aten.sub.Tensor"),
    ],
)
def test_a_report_says_where_weights_are_those_of_float64(call: Callable[[Tensor, Tensor], Tensor], why: str) -> None:
    weight = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    report = audit(Map(lambda x: call(x, weight)).eval(), (4,))
    assert why in report.network.because  # type: ignore[union-attr]
    assert report.lower <= report.upper


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: F.linear(x, w[0] * w[1], w[0, 0] * w[1, 0]),
        lambda x, w: torch.addmm(w[0, 0] * w[1, 0], x, w[0] * w[1], alpha=0.5, beta=2.0),
        lambda x, w: (w[0] * w[1]) @ x[0],
        lambda x, w: (x @ (w * w.exp())).sum(0),
        lambda x, w: torch.einsum("bi,ij->bj", x, w[0] * w[1]),
        lambda x, w: x * (w[0, 0] * w[1, 0]) + w[0, 1] * w[1, 1] - (w[0, 1] * w[1, 0]),
        lambda x, w: x / (w[0, 0] * w[1, 0]),
        lambda x, w: x * (w[0, 0] * w[1, 0]).detach_(),
        lambda x, w: F.layer_norm(x, (4,), w[0, 0] * w[1, 0], w[0, 1] * w[1, 0]),
        lambda x, w: F.conv1d(x[:, None], (w[0] * w[1])[:, None], (w[0] * w[1])[0]),
        lambda x, w: F.conv_transpose1d(x[..., None], (w[0] * w[1])[..., None]),
        lambda x, w: torch.baddbmm(w[0, 0] * w[1, 0], x[None], (w[0] * w[1])[None]),
    ],
)
def test_rules_carry_the_errors_of_weights(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    weight = nn.Parameter(1.0 + torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)))
    report = audit(Map(lambda x: call(x, weight)).eval(), (4,), effort=-1)
    assert "float64 gives" not in report.network.because  # type: ignore[union-attr]
    shaken = audit(Map(lambda x: call(x, (weight + 1e12) - 1e12)).eval(), (4,), effort=-1)
    assert shaken.upper >= report.upper * (1 + 1e-5)
    assert "float64 gives" not in shaken.network.because  # type: ignore[union-attr]


def test_what_a_model_makes_without_a_type_does_not_depend_on_the_default_one() -> None:
    model, found = Map(lambda x: x * torch.linspace(0.1, 0.7, 3)).eval(), []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found.append(audit(model, torch.zeros(1, 3, dtype=torch.float64)).upper)
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[0] == found[1] >= 0.7


@pytest.mark.parametrize(
    "call",
    [lambda x: x * torch.ones(4, 4).as_strided((4,), (5,)), lambda x: x * torch.ones(4).view(torch.int32).double()],
    ids=["places", "bits"],
)
def test_weights_read_from_memory_are_refused_and_have_no_lower_side(call: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedError, match="reads places or bits of memory"):
        audit(Map(call).eval(), (4,))
    report = audit(Map(call).eval(), (4,), strict=False)
    assert (report.lower, report.upper) == (0.0, float("inf"))


class Heads(nn.Module):
    """The attention of nanoGPT: heads are views, and joined again by a view of a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.all = nn.LayerNorm(4), nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (part.view(b, t, 2, c // 2).transpose(1, 2) for part in self.all(self.norm(x)).split(c, 2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(b, t, c)


def test_views_are_of_entries_whatever_the_layout() -> None:
    report = audit(Heads().eval(), (5, 4))
    assert 0.0 < report.lower <= report.upper < float("inf")
    turned = audit(Map(lambda x: 2 * x.t().view(-1)).eval(), torch.randn(3, 2).t())
    assert turned.lower <= 2.0 <= turned.upper <= 2.0 + 1e-9


def test_an_operation_without_derivatives_costs_the_lower_side_alone() -> None:
    report = audit(Map(lambda x: x + torch.heaviside(x, torch.tensor(0.5))).eval(), (3,))
    assert 0.0 <= report.lower <= report.upper == float("inf")
    weight = nn.Parameter(torch.rand(3))
    report = audit(Map(lambda x: x * weight.exp() + 0 * torch.heaviside(x * weight.exp(), torch.tensor(0.5))).eval(), (3,))
    assert report.lower == 0.0 < float(weight.detach().double().exp().max()) <= report.upper < float("inf")
