"""How far the program that runs is from the function, against the program itself: docs/execution.md."""

from __future__ import annotations

import copy
import itertools
import math

import mpmath
import pytest
import torch
from torch import Tensor, nn

import gramlip as gl
from gramlip.errors import InputError, UnsupportedError
from gramlip.network import execution, execution_rules
from gramlip.network.execution_rules import Execution, Operand, arithmetic

FORMATS = [torch.float32, torch.bfloat16, torch.float16]


class Residual(nn.Module):
    """A block with two paths, a scaled one, and a join."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.norm(self.conv(x)))
        return torch.cat([x + 0.3 * y, x - y], 1)


class Attend(nn.Module):
    """Heads of attention with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.wide(x).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class Ordered(nn.Module):
    """Entries in their order, some of them, and parts."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(6, 12), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.wide(x).chunk(3, -1)
        return self.out(torch.cat([a.sort(-1)[0], b.topk(2, -1)[0], c.max(-1, keepdim=True)[0]], -1))


def _settled(model: nn.Module) -> nn.Module:
    """With statistics and gains that are not those of a fresh network."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0.0, 0.5)
            part.running_var.uniform_(0.2, 2.0)
            nn.init.uniform_(part.weight, -1.5, 1.5)
            nn.init.normal_(part.bias)
    return model.eval()


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(1)
    nets = {
        "perceptron": (nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 4)), (12,)),
        "convolutions": (
            nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
                nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="reflect"),
                nn.GELU(),
                nn.AvgPool2d(2),
                nn.Flatten(),
                nn.Linear(32, 4),
                nn.Softmax(-1),
            ),
            (3, 16, 16),
        ),
        "residual": (nn.Sequential(Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)), (4, 6, 6)),
        "transposed": (nn.Sequential(nn.ConvTranspose1d(3, 4, 3, stride=2), nn.LeakyReLU(0.1), nn.Conv1d(4, 2, 3), nn.Sigmoid()), (3, 8)),
        "volumes": (nn.Sequential(nn.Conv3d(1, 3, 3), nn.PReLU(3), nn.Flatten(), nn.Linear(24, 3), nn.Softplus()), (1, 4, 4, 4)),
        "normalised": (nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 3), nn.ELU(1.5)), (12,)),
        "attention": (Attend(), (5, 8)),
        "ordered": (Ordered(), (6,)),
    }
    return {name: (_settled(model), shape) for name, (model, shape) in nets.items()}


NETWORKS = networks()


def _measured(model: nn.Module, inputs: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The largest error of an entry, and of a sample in l2, against float64."""
    program, exact = copy.deepcopy(model).to(dtype), copy.deepcopy(model).double()
    with torch.no_grad():
        off = (program(inputs).double() - exact(inputs.double())).abs().flatten(1)
    return float(off.max()), float(torch.linalg.vector_norm(off, dim=1).max())


def _points(shape: tuple[int, ...], centre: Tensor, radius: float, dtype: torch.dtype) -> Tensor:
    """Points of a ball in the format: on the sphere, along the signs, and near the centre."""
    generator = torch.Generator().manual_seed(7)
    ways = torch.randn(48, *shape, generator=generator, dtype=torch.float64)
    ways[:16] = ways[:16].sign()
    lengths = torch.where(torch.arange(48) < 40, 0.99, 0.1).reshape(-1, *[1] * len(shape)) * radius
    return (centre + ways / torch.linalg.vector_norm(ways.flatten(1), dim=1).reshape(lengths.shape) * lengths).to(dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_program_is_farther_off_than_the_bound(name, dtype):
    model, shape = NETWORKS[name]
    centre = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16).double()
    found = gl.execution_error(model, shape, dtype=dtype, at=centre[None], radius=0.05)
    points = _points(shape, centre, 0.05, dtype)
    for batch in (points, points[:1], points[40:43]):
        entry, whole = _measured(model, batch, dtype)
        assert entry <= found.largest
        assert whole <= found.upper
    assert found.upper < math.inf


@pytest.mark.parametrize("threads", [1, 2])
def test_no_box_and_no_number_of_threads_breaks_it(threads):
    model, shape = NETWORKS["convolutions"]
    found, before = gl.execution_error(model, shape, domain=(0.0, 1.0)), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        corners = torch.rand(32, *shape, generator=torch.Generator().manual_seed(1)).round()
        entry, whole = _measured(model, torch.cat([corners, corners * 0.37]), torch.float32)
    finally:
        torch.set_num_threads(before)
    assert entry <= found.largest
    assert whole <= found.upper < 0.1


def test_double_precision_against_numbers_of_many_digits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2)).double()
    found = gl.execution_error(model, (6,), domain=(-2.0, 2.0))
    first, last = model[0], model[2]
    points = 4 * torch.rand(20, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 2
    with mpmath.workdps(40):
        for x, y in zip(points, model(points).tolist(), strict=True):
            inner = [_affine(row, bias, x.tolist()) for row, bias in zip(first.weight.tolist(), first.bias.tolist(), strict=True)]
            middle = [mpmath.tanh(value) for value in inner]
            outer = [_affine(row, bias, middle) for row, bias in zip(last.weight.tolist(), last.bias.tolist(), strict=True)]
            assert max(abs(mpmath.mpf(a) - b) for a, b in zip(y, outer, strict=True)) <= found.largest
    assert found.upper < 1e-12


def _affine(row, bias, x):
    return sum((mpmath.mpf(a) * mpmath.mpf(b) for a, b in zip(row, x, strict=True)), mpmath.mpf(bias))


def _in_turn(weight: Tensor, x: Tensor) -> Tensor:
    """A product of a row and a vector in float32, one term after the other."""
    total = torch.zeros((), dtype=torch.float32)
    for a, b in zip(weight, x, strict=True):
        total = total + a * b
    return total


def test_the_worst_order_of_a_sum_is_covered():
    """Large terms that cancel, in the order in which the partial sums stay large longest."""
    n = 64
    weight = torch.cat([torch.full((n,), 1.0), torch.full((n,), -1.0), torch.full((1,), 2.0**-20)])[None].float()
    model = nn.Linear(2 * n + 1, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    found = gl.execution_error(model, (2 * n + 1,), domain=(0.9, 1.1))
    x = (0.9 + 0.2 * torch.rand(2 * n + 1, generator=torch.Generator().manual_seed(0))).float()
    exact = float((weight[0].double() * x.double()).sum())
    orders = [torch.arange(2 * n + 1), torch.randperm(2 * n + 1, generator=torch.Generator().manual_seed(1)), x.argsort(descending=True)]
    off = max(abs(float(_in_turn(weight[0][o], x[o])) - exact) for o in orders)
    assert 0 < off <= found.largest


FUNCTIONS = {
    "tanh": (torch.tanh, mpmath.tanh, (-9.0, 9.0)),
    "sigmoid": (torch.sigmoid, lambda x: 1 / (1 + mpmath.exp(-x)), (-30.0, 30.0)),
    "exp": (torch.exp, mpmath.exp, (-10.0, 10.0)),
    "log": (torch.log, mpmath.log, (0.01, 20.0)),
    "log1p": (torch.log1p, mpmath.log1p, (-0.9, 20.0)),
    "sin": (torch.sin, mpmath.sin, (-20.0, 20.0)),
    "cos": (torch.cos, mpmath.cos, (-20.0, 20.0)),
    "erf": (torch.erf, mpmath.erf, (-5.0, 5.0)),
    "sqrt": (torch.sqrt, mpmath.sqrt, (0.01, 50.0)),
    "rsqrt": (torch.rsqrt, lambda x: 1 / mpmath.sqrt(x), (0.01, 50.0)),
    "reciprocal": (torch.reciprocal, lambda x: 1 / x, (0.01, 50.0)),
    "silu": (nn.functional.silu, lambda x: x / (1 + mpmath.exp(-x)), (-30.0, 30.0)),
    "mish": (nn.functional.mish, lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x))), (-20.0, 15.0)),
    "gelu": (nn.functional.gelu, lambda x: x * (1 + mpmath.erf(x / mpmath.sqrt(2))) / 2, (-9.0, 9.0)),
    "softplus": (nn.functional.softplus, lambda x: mpmath.log1p(mpmath.exp(x)), (-20.0, 40.0)),
    "elu": (nn.functional.elu, lambda x: x if x > 0 else mpmath.expm1(x), (-12.0, 3.0)),
    "log_sigmoid": (nn.functional.logsigmoid, lambda x: -mpmath.log1p(mpmath.exp(-x)), (-20.0, 20.0)),
}


@pytest.mark.parametrize("dtype", [torch.float64, *FORMATS])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_library_functions_err_by_no_more_than_is_assumed(name, dtype):
    function, exact, (low, high) = FUNCTIONS[name]
    x = (low + (high - low) * torch.rand(97, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).to(dtype)
    with mpmath.workdps(40):
        truth = torch.tensor([float(exact(mpmath.mpf(v))) for v in x.double().tolist()], dtype=torch.float64)
        wide = [abs(mpmath.mpf(a) - exact(mpmath.mpf(v))) for a, v in zip(function(x).double().tolist(), x.double().tolist(), strict=True)]
    off = torch.tensor([float(w) for w in wide], dtype=torch.float64)
    given = Operand(x.double().abs(), torch.zeros(97, dtype=torch.float64), x.double(), x.double())
    args = {"self": given, "threshold": 20.0, "beta": 1.0}
    call = Execution(name, function, args, truth.abs() * (1 + 1e-12), arithmetic(dtype))
    assert bool((off <= execution_rules.RULES[name](call)).all())


def test_sums_that_may_overflow_have_no_bound():
    model = nn.Linear(200, 1, bias=False)
    nn.init.constant_(model.weight, 100.0)
    assert gl.execution_error(model, (200,), dtype=torch.float16, domain=(-10.0, 10.0)).upper == math.inf
    assert gl.execution_error(model, (200,), dtype=torch.float16, domain=(-1.0, 1.0)).upper < 100.0
    mean = nn.AdaptiveAvgPool1d(1)
    assert gl.execution_error(mean, (1, 4096), dtype=torch.float16, domain=(10.0, 11.0)).upper < 1.0


def test_weights_that_the_format_does_not_hold_count():
    """All of them are rounded the same way, and what they are multiplied by cancels."""
    model = nn.Linear(64, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([1.0 + 2.0**-12, 2.0**-13 - 1.0]).repeat(32)[None])
    found = gl.execution_error(model, (64,), dtype=torch.float16, at=torch.ones(1, 64), radius=1e-3)
    off = _measured(model, torch.ones(1, 64, dtype=torch.float16), torch.float16)[0]
    assert off > 0.01
    assert off <= found.largest < 2 * off


@pytest.mark.parametrize("value", [0.1, -0.3])
def test_numbers_that_are_filled_in_count(value):
    class Padded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.pad(x, (1, 1), value=value)

    found = gl.execution_error(Padded(), (3,), dtype=torch.float16, domain=(-1.0, 1.0))
    off = _measured(Padded(), torch.zeros(1, 3, dtype=torch.float16), torch.float16)[0]
    assert 0 < off <= found.largest < 2 * off


class Cancelling(nn.Module):
    """A branch that all but cancels its input: folded, they are one map of small norm."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.branch.weight.copy_(0.001 * torch.ones(4, 4) - torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x


class Padded1x1(nn.Module):
    """Two convolutions with a padding between them, which fold into one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


@pytest.mark.parametrize(("make", "shape"), [(Cancelling, (4,)), (Padded1x1, (4, 5, 5))])
def test_roundings_inside_what_folds_count(make, shape, monkeypatch):
    """By norms alone: what happens before a sum of branches, or before a padding, is not forgotten."""
    monkeypatch.setattr(execution._Propagation, "_by_rows", lambda self: (None, ()))
    model = make().eval()
    found = gl.execution_error(model, shape, dtype=torch.bfloat16, domain=(-1.0, 1.0))
    points = (2 * torch.rand(200, *shape, generator=torch.Generator().manual_seed(1)) - 1).to(torch.bfloat16)
    entry, whole = _measured(model, points, torch.bfloat16)
    assert 0 < entry <= found.largest
    assert whole <= found.upper < math.inf


def test_it_grows_with_the_set():
    model, shape = NETWORKS["perceptron"]
    x = torch.zeros(1, *shape)
    errors = [gl.execution_error(model, shape, at=x, radius=r).upper for r in (0.01, 0.1, 1.0)]
    assert all(a <= b for a, b in itertools.pairwise(errors))


def test_settings_that_void_it_are_refused():
    model = nn.Linear(3, 2)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(InputError, match="set_float32_matmul_precision"):
            gl.execution_error(model, (3,), domain=(0.0, 1.0))
        assert gl.execution_error(model.double(), (3,), domain=(0.0, 1.0)).upper < 1e-14
    finally:
        torch.set_float32_matmul_precision(before)


def test_flushed_denormals_cost_what_they_are():
    usual = arithmetic(torch.float32).tiny
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        assert arithmetic(torch.float32).tiny == torch.finfo(torch.float32).tiny > usual
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "no set of inputs"),
        ({"domain": (0.0, 1.0), "dtype": torch.int32}, "expected one of"),
        ({"domain": (0.0, 1.0), "dtype": torch.float64, "sums": torch.float16}, "sums="),
        ({"at": torch.zeros(1, 3)}, "radius"),
    ],
)
def test_what_cannot_be_used_is_said(arguments, match):
    with pytest.raises(InputError, match=match):
        gl.execution_error(nn.Linear(3, 2), (3,), **arguments)


class Scanned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.logsumexp(x.cumsum(-1), -1)


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double().tanh().float()


def test_calls_without_a_rule_are_listed():
    with pytest.raises(UnsupportedError, match=r"aten\.cumsum.*aten\.logsumexp"):
        gl.execution_error(Scanned(), (3,), domain=(0.0, 1.0))
    with pytest.raises(UnsupportedError, match="changes the dtype"):
        gl.execution_error(Cast(), (3,), domain=(0.0, 1.0))
    with pytest.raises(UnsupportedError, match="computes a weight"):
        gl.execution_error(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), (3,), domain=(0.0, 1.0))
