"""Rules: slopes against mpmath, every table entry against its torch call, maps against their Jacobians, registration."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gramlip.errors import InputError, UnsupportedError
from gramlip.network.audit import audit
from gramlip.network.rules.activations import SLOPES
from gramlip.rules import RULES, register
from rule_cases import Map

A = torch.ops.aten

SMOOTH: dict[str, Callable[[mpmath.mpf], mpmath.mpf]] = {
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "mish": lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x))),
    "gelu": lambda x: x * mpmath.ncdf(x),
    "gelu tanh": lambda x: x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3))),
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "erf": mpmath.erf,
}
STARTS = {"silu": (2.4, -2.4), "mish": (1.5, -2.2), "gelu": (1.4, -1.4), "gelu tanh": (1.4, -1.4), "sigmoid": (0.0, 0.0), "erf": (0.0, 0.0)}


@pytest.mark.parametrize("name", SMOOTH)
def test_slopes_lie_just_outside_the_real_extremes(name: str) -> None:
    with mpmath.workdps(40):
        extremes = []
        for begin in STARTS[name]:
            at = mpmath.findroot(lambda x: mpmath.diff(SMOOTH[name], x, 2), begin)
            extremes.append(mpmath.diff(SMOOTH[name], at))
        low, high, image, at_zero = SLOPES[name]
        top = max(extremes)
        assert top <= mpmath.mpf(high) <= top + mpmath.mpf("1e-15")
        if name not in ("sigmoid", "erf"):
            assert min(extremes) - mpmath.mpf("1e-15") <= mpmath.mpf(low) <= min(extremes)
            least = mpmath.findroot(lambda x: mpmath.diff(SMOOTH[name], x), -1.2 if "gelu" not in name else -0.75)
            assert mpmath.mpf(image[0]) <= SMOOTH[name](least) <= mpmath.mpf(image[0]) + mpmath.mpf("1e-14")
        assert at_zero[0] <= SMOOTH[name](mpmath.mpf(0)) <= at_zero[1]


def test_selu_constants() -> None:
    with mpmath.workdps(40):
        product = mpmath.mpf("1.6732632423543772848170429916717") * mpmath.mpf("1.0507009873554804934193349852946")
        assert product <= SLOPES["selu"][1] <= product + mpmath.mpf("1e-14")


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(torch, name) for name in ("abs", "tanh", "sigmoid", "sin", "cos", "atan", "erf")},
    **{
        name: getattr(F, name)
        for name in ("relu", "relu6", "softplus", "softshrink", "hardsigmoid", "hardswish", "silu", "mish", "gelu", "selu")
    },
    "log_sigmoid": F.logsigmoid,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", SLOPES)
def test_slopes_and_images_hold_on_a_grid(name: str) -> None:
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    y = CALLS[name](x)
    slope = y.diff() / x.diff()  # of the values themselves: torch's own derivative of hardsigmoid is rounded to float32
    low, high, image, at_zero = SLOPES[name]
    assert low - 1e-9 <= float(slope.min())
    assert float(slope.max()) <= high + 1e-9
    assert high <= float(slope.max()) + 1e-3
    assert image[0] - 1e-9 <= float(y.min())
    assert float(y.max()) <= image[1] + 1e-9
    assert at_zero[0] <= float(CALLS[name](torch.zeros(1, dtype=torch.float64))) <= at_zero[1]


SMALL = (3, 6, 6)
SLOPE_WEIGHT = torch.tensor([0.5, -3.0])
MAPS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], float]] = {
    # name: (call, shape, exact constant or an upper limit of what may be reported)
    "leaky": (lambda x: F.leaky_relu(x, -2.0), (4,), 2.0),
    "elu": (lambda x: F.elu(x, 1.5), (4,), 1.5),
    "celu": (lambda x: F.celu(x, 0.5), (4,), 1.0),
    "hardtanh": (F.hardtanh, (4,), 1.0),
    "clamp": (lambda x: x.clamp(-1, 0.5), (4,), 1.0),
    "softmax": (lambda x: torch.softmax(x, -1), (5,), 0.5),
    "log_softmax": (lambda x: torch.log_softmax(x, -1), (5,), math.sqrt(5) + 1e-6),
    "logsumexp": (lambda x: torch.logsumexp(x, 1), (5,), 1.0),
    "max pool": (lambda x: F.max_pool2d(x, 3, 2, 1), SMALL, 2.0),
    "max pool overlapping": (lambda x: F.max_pool2d(x, 3, 1, 1), SMALL, 3.0),
    "avg pool": (lambda x: F.avg_pool2d(x, 2), SMALL, 0.506),
    "avg pool ceil": (lambda x: F.avg_pool2d(x, 4, 4, 1, ceil_mode=True, count_include_pad=False), SMALL, 0.6),
    "avg pool 1d unbatched": (lambda x: F.avg_pool1d(x[0], 3, 1), (4, 9), 1.0 + 1e-9),
    "avg pool 2d unbatched": (lambda x: F.avg_pool2d(x[0], 9, 1, 4), (1, 12, 12), 1.0 + 1e-9),
    "avg pool 3d unbatched": (lambda x: F.avg_pool3d(x[0], 3, 1, 1), (1, 4, 4, 4), 1.0 + 1e-9),
    "adaptive unbatched": (lambda x: F.adaptive_avg_pool2d(x[0], (4, 5)), SMALL, 1.3),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (4, 5)), SMALL, 1.3),
    "adaptive max": (lambda x: F.adaptive_max_pool2d(x, 4), SMALL, 2.01),
    "global": (lambda x: x.mean((2, 3)), SMALL, 1 / 6 + 1e-6),
    "sum": (lambda x: x.sum(1), SMALL, math.sqrt(3) + 1e-6),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), SMALL, 2.0 + 1e-6),
    "bilinear": (lambda x: F.interpolate(x, size=(9, 11), mode="bilinear"), SMALL, 2.2),
    "bicubic": (lambda x: F.interpolate(x, size=(9, 9), mode="bicubic"), SMALL, 2.2),
    "nearest uneven": (lambda x: F.interpolate(x, scale_factor=3.1), (1, 5, 5), 4.0 + 1e-9),
    "bicubic by a factor": (lambda x: F.interpolate(x, scale_factor=1.3, mode="bicubic"), (2, 5, 5), 1.37),
    "bicubic antialias": (lambda x: F.interpolate(x, size=(4, 5), mode="bicubic", antialias=True), SMALL, 0.8),
    "avg pool negative": (lambda x: F.avg_pool2d(x, (2, 3), (2, 1), divisor_override=-3), SMALL, 1.5),
    "maximum broadcast": (lambda x: torch.maximum(x, -50.0 * torch.ones(5, 1, 4)), (4,), math.sqrt(5) + 1e-6),
    "topk": (lambda x: x.topk(2, 1)[0], (4,), 1.0),
    "windows": (lambda x: F.unfold(x, 3, padding=1), SMALL, 3.0 + 1e-9),
    "windows added": (lambda x: F.fold(x, (4, 4), 2), (4, 9), 2.0 + 1e-9),
    "matrix for each": (lambda x: torch.einsum("bij,ijk->bik", x, torch.arange(24.0, dtype=x.dtype).reshape(3, 4, 2)), (3, 4), 55.54),
    "swish by hand": (lambda x: x * torch.sigmoid(1.702 * x), (9,), 1.0999),
    "gelu by hand": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), (9,), 1.1290),
    "gelu with half behind": (lambda x: 0.5 * (x * (torch.erf(0.9 * x) + 1.0)), (9,), 1.1290),
    "gelu without half": (lambda x: x * (torch.erf(x / math.sqrt(2.0)) + 1.0), (9,), 2.2579),
    "hardswish of a multiple": (lambda x: x * F.hardsigmoid(0.7 * x), (9,), 1.5 + 1e-9),
    "swish of a multiple": (lambda x: (3.0 * x) * torch.sigmoid(x), (9,), 3.2996),
    "hardswish by hand": (lambda x: F.relu6(x + 3) * x / 6, (9,), 1.5 + 1e-9),
    "hardswish by clamp": (lambda x: x * (x + 3).clamp(0, 6) / 6, (9,), 1.5 + 1e-9),
    "clamp between tensors": (lambda x: x.clamp(torch.zeros(4), torch.arange(4.0)), (4,), 1.0),
    "rms norm of type": (lambda x: F.rms_norm(x, (4,)), (4,), 6.8e7),
    "shuffle": (lambda x: F.pixel_shuffle(x, 2), (4, 3, 3), 1.0),
    "index": (lambda x: x[:, [0, 0, 1]], (4,), math.sqrt(2) + 1e-6),
    "slices": (lambda x: x[:, :, 1:5, ::2], SMALL, 1.0),
    "permute": (lambda x: x.permute(0, 3, 1, 2).reshape(1, -1), SMALL, 1.0),
    "cat": (lambda x: torch.cat([x, 2 * x], 1), (4,), math.sqrt(5) + 1e-6),
    "stack": (lambda x: torch.stack([x, x, x]), (4,), math.sqrt(3) + 1e-6),
    "expand": (lambda x: x[:, :1].expand(1, 9), (4,), 3.0),
    "pad": (lambda x: F.pad(x, (2, 2), mode="replicate"), (2, 6), math.sqrt(3) + 1e-6),
    "pad reflect": (lambda x: F.pad(x, (2, 1, 2, 2), mode="reflect"), SMALL, 3.01),
    "scale": (lambda x: (3 - 2 * x) / 4 + x, (4,), 0.5 + 1e-9),
    "broadcast": (lambda x: x + torch.ones(5, 4), (4,), math.sqrt(5) + 1e-6),
    "where": (lambda x: torch.where(torch.tensor([True, False, True, False]), x, torch.zeros(4)), (4,), 1.0),
    "chunk": (lambda x: x.chunk(2, 1)[0] + x.chunk(2, 1)[1], (4,), 2.0 + 1e-9),
    "topmost": (lambda x: x.amax(1), (4,), 1.0),
    "matmul": (lambda x: torch.arange(6.0).reshape(2, 3) @ x, (3, 4), 7.35),
    "matrix times vector": (lambda x: torch.arange(6.0).to(x).reshape(2, 3) @ x[0], (3,), 7.3485),
    "vector times matrix": (lambda x: x[0] @ torch.arange(6.0).to(x).reshape(3, 2), (3,), 7.3890),
    "matrices times vector": (lambda x: torch.arange(12.0).to(x).reshape(2, 2, 3) @ x[0], (3,), 30.03),
    "layer norm": (lambda x: F.layer_norm(x, (4,), eps=0.25), (4,), 2.0 + 1e-6),
    "rms norm": (lambda x: F.rms_norm(x, (4,), eps=0.25), (4,), 2.0 + 1e-6),
    "group norm": (lambda x: F.group_norm(x, 2, eps=0.25), (4, 3), 2.0 + 1e-6),
    "std": (lambda x: x.std(1), (4,), 1 / math.sqrt(3) + 1e-6),
    "logaddexp": (lambda x: torch.logaddexp(x, x.flip(1)), (4,), math.sqrt(2) + 1e-6),
    "hypot": (lambda x: torch.hypot(x, x.new_ones(3, 1, 4)), (4,), math.sqrt(3) + 1e-6),
    "lerp": (lambda x: torch.lerp(x, x.flip(1), 0.25), (4,), 1.0 + 1e-6),
    "lerp to constants": (lambda x: torch.lerp(x.new_ones(4), x, torch.arange(4.0).to(x)), (4,), 3.0 + 1e-6),
    "addcmul": (lambda x: torch.addcmul(x, x.new_full((4,), 3.0), x, value=0.5), (4,), 2.5 + 1e-6),
    "addcdiv": (lambda x: torch.addcdiv(x, x, x.new_full((4,), 4.0), value=2), (4,), 1.5 + 1e-6),
    "einsum of three": (lambda x: torch.einsum("bi,ij,jk->bk", x, x.new_ones(4, 2), x.new_ones(2, 3)), (4,), 6.93),
    "unbatched": (lambda x: F.conv2d(x[0], x.new_ones(2, 3, 2, 2), x.new_ones(2), padding=1), (3, 4, 4), 9.8),
    "unbatched pad": (lambda x: F.pad(x[0], (1, 1, 1, 1), mode="reflect"), (3, 4, 4), 2.0 + 1e-9),
    "unbatched circular": (lambda x: F.pad(x[0], (1, 2), mode="circular"), (3, 4), math.sqrt(2) + 1e-9),
    "pad of rows": (lambda x: F.pad(x, (1, 1)), (3,), 1.0),
    "prelu": (lambda x: F.prelu(x, SLOPE_WEIGHT), (2, 5), 3.0),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_are_bounded_above_their_jacobians_and_tightly(name: str) -> None:
    call, shape, most = MAPS[name]
    dtype = torch.float32 if name in ("matmul", "prelu", "where", "broadcast", "clamp between tensors") else torch.float64
    upper = audit(Map(call).eval(), shape, effort=-1).upper
    generator = torch.Generator().manual_seed(1)
    best = 0.0
    for scale in (0.05, 1.0, 4.0):
        x = scale * torch.randn(1, *shape, generator=generator, dtype=dtype)
        matrix = torch.autograd.functional.jacobian(call, x)
        best = max(best, float(torch.linalg.matrix_norm(matrix.reshape(-1, x.numel()).double(), 2)))
    assert best <= upper * (1 + 1e-6)
    assert upper <= most


def test_nearest_neighbours_are_counted_where_torchs_derivative_takes_others() -> None:
    x = torch.arange(5.0).reshape(1, 1, 5)
    taken = F.interpolate(x, scale_factor=2.1).reshape(-1)
    assert (
        math.sqrt(int(torch.bincount(taken.long()).max())) <= audit(Map(lambda x: F.interpolate(x, scale_factor=2.1)).eval(), (1, 5)).upper
    )


@pytest.mark.parametrize("sides", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_neighbours_are_counted_as_the_dtype_rounds_their_places(sides: tuple[int, ...], dtype: torch.dtype) -> None:
    """From 2 points to 82 torch takes the first 41 times in float64, 42 times in float32 and in two dimensions."""
    module, x = torch.nn.Upsample(size=(82, *sides)), torch.zeros(1, 1, 2, *sides, dtype=dtype)
    x[0, 0, 0] = 1.0
    assert float(module(x).double().norm()) <= audit(module.eval(), x).upper


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.max(1)[1],
        lambda x: x.sort(1)[1].float(),
        lambda x: F.max_pool2d(x[None], 2, return_indices=True)[1] * 0.5,
        torch.argmax,
        lambda x: x[:, 0] * (x[:, 1] > 0),
    ],
)
def test_integers_and_truth_values_jump(call: Callable[[Tensor], Tensor]) -> None:
    report = audit(Map(call).eval(), (4, 4), strict=False)
    assert report.upper == math.inf
    assert any("integers or truth values" in row.reason for row in report.left_out)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "bits": (lambda x: x.view(torch.float16), r"a view of the bits as torch\.float16"),
    "early switch": (lambda x: F.softplus(x, 3.0, 1.0), "jumps by 0.104 where it switches to the identity"),
    "negative beta": (lambda x: F.softplus(x, -1.0), "expected a positive beta"),
    "never softplus": (lambda x: F.softplus(x, 1.0, -1e4), r"jumps by 1e\+04"),
    "out": (lambda x: torch.mul(x, 3.0, out=torch.empty_like(x)), r"writes into a list or by out="),
    "complex slopes": (lambda x: torch.view_as_real(torch.tanh(x.to(torch.complex64))), "tanh.default of complex values"),
    "complex layers": (
        lambda x: torch.view_as_real(F.conv1d(2 * x.to(torch.complex64), 1j * torch.ones(1, 4, 1))),
        "conv1d.default of complex values",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_theorem_covers_is_refused_and_unbounded_where_that_is_asked_for(name: str) -> None:
    call, said = REFUSED[name]
    with pytest.raises(UnsupportedError, match=said):
        audit(Map(call).eval(), (4, 4))
    assert audit(Map(call).eval(), (4, 4), strict=False).upper == math.inf


@pytest.mark.parametrize("beta", [0.01, 0.5, 1.0, 30.0])
def test_softplus_with_its_own_threshold_has_a_constant(beta: float) -> None:
    assert audit(Map(lambda x: F.softplus(x, beta)).eval(), (4,)).upper == 1.0


def test_a_shift_that_is_three_only_after_rounding_is_no_hardswish() -> None:
    report = audit(Map(lambda x: x * F.relu6(x + 0.1 + 2.9)).eval(), (4,), strict=False)
    assert 9.0 < report.upper < 9.001
    assert audit(Map(lambda x: x * F.relu6(x + 1.0 + 2.0)).eval(), (4,)).upper == 9.0


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x * (torch.erf(x) + 0.5),
        lambda x: x * (torch.erf(-x) + 1.0),
        lambda x: x * (torch.erf(x + 1.0) + 1.0),
        lambda x: (x + 1.0) * (torch.erf(x) + 1.0),
        lambda x: -x * torch.sigmoid(x),
        lambda x: x * (torch.sigmoid(x) + 1.0),
        lambda x: x * torch.erf(x),
    ],
)
def test_what_is_like_a_gate_has_its_own_slopes(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(-12, 12, 24001, dtype=torch.float64).requires_grad_(True)
    steepest = float(torch.autograd.grad(call(x).sum(), x)[0].abs().max())
    upper = audit(Map(call).eval(), (4,)).upper
    assert steepest <= upper * (1 + 1e-12)
    assert upper <= steepest * (1 + 1e-3)


def test_an_assumption_that_two_inputs_refute_is_an_error() -> None:
    with pytest.raises(InputError, match=r"taken as 1-Lipschitz by assumption .* two inputs are stretched by"):
        audit(Map(lambda x: torch.cumsum(x, 1)).eval(), (8,), assume={"aten.cumsum": 1.0})


def test_a_users_rule_is_used_and_its_absence_is_an_error() -> None:
    @torch.library.custom_op("gramliptest::triple", mutates_args=())
    def triple(x: Tensor) -> Tensor:
        return 3.0 * x

    triple.register_fake(lambda x: torch.empty_like(x))
    triple.register_autograd(lambda ctx, grad: 3.0 * grad)
    model = Map(lambda x: triple(x)).eval()
    with pytest.raises(UnsupportedError, match=r"gramliptest\.triple"):
        audit(model, (4,))

    @register("gramliptest.triple")
    def rule(call: object) -> float:
        return 3.0

    try:
        assert audit(model, (4,)).upper == pytest.approx(3.0)
        assert audit(model, (4,)).lower == pytest.approx(3.0, rel=1e-4)
    finally:
        del RULES["gramliptest.triple"]


@pytest.mark.parametrize(
    "call", [torch.round, torch.exp, F.hardshrink, lambda x: 1.0 / x, lambda x: x / x.abs().sum(), lambda x: F.threshold(x, 0.1, 20.0)]
)
def test_functions_without_a_constant_are_unbounded_with_a_reason(call: Callable[[Tensor], Tensor]) -> None:
    report = audit(Map(call).eval(), (4,), strict=False)
    assert report.upper == math.inf
    assert report.left_out or report.unsupported
