"""Whole networks: the upper side against Jacobians of the real modules, against enumeration, and the coupled bounds' gain."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import reduce
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gramlip import bound
from gramlip.errors import InputError, UnsupportedError
from gramlip.network import Effort, coupling
from gramlip.network.audit import audit
from gramlip.numerics import rounding as rd
from test_rules import Map

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
import models  # noqa: E402


def trained(name: str) -> Path:
    """A trained model kept beside the checkout; without it the test is skipped, and says so."""
    path = ROOT.parent / "shared" / "models" / name
    if not path.exists():
        pytest.skip(f"no {path}: trained models are kept outside the repository")
    return path


def steepest(model: nn.Module, shape: tuple[int, ...], points: int = 12, low: float = -2.0, high: float = 2.0) -> float:
    """The largest norm of the real module's Jacobian at random points, in float64: nothing of ours is used."""
    double = model.double().eval()
    generator = torch.Generator().manual_seed(5)
    best = 0.0
    for i in range(points):
        scale = (0.1, 1.0, 3.0)[i % 3]
        x = (scale * torch.randn(1, *shape, generator=generator, dtype=torch.float64)).clamp(low * scale, high * scale)
        matrix = torch.autograd.functional.jacobian(double, x).reshape(-1, x.numel())
        best = max(best, float(torch.linalg.matrix_norm(matrix, 2)))
    model.float()
    return best


CASES = {
    "resnet": (lambda: models.ResNet(4, (1, 1), 5), (3, 16, 16)),
    "cifar resnet": (lambda: models.CifarResNet(1, (4, 6, 8)), (3, 12, 12)),
    "vgg": (lambda: models.vgg(4, 5, 8), (3, 8, 8)),
    "densenet": (lambda: models.DenseNet(4, 2), (3, 8, 8)),
    "mobilenet": (lambda: models.MobileNet(4), (3, 8, 8)),
    "unet": (lambda: models.UNet(4), (1, 8, 8)),
    "dncnn": (lambda: models.DnCNN(4, 3), (1, 8, 8)),
    "controller": (models.controller, (4,)),
    "rnn": (lambda: models.Recurrent(nn.RNN, nonlinearity="relu", num_layers=2, dropout=0.5), (4, 3)),
    "gru": (lambda: models.Recurrent(nn.GRU, bidirectional=True), (3, 3)),
    "lstm": (lambda: models.Recurrent(nn.LSTM, bias=False), (3, 3)),
    "audio": (lambda: models.audio(4, 3), (1, 32)),
    "volume": (lambda: models.volume(3), (1, 6, 6, 6)),
    "odd sizes": (lambda: models.CifarResNet(1, (2, 4, 6)), (3, 9, 7)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_model_is_bounded_above_its_steepest_jacobian(name: str) -> None:
    torch.manual_seed(3)
    build, shape = CASES[name]
    model = models.settled(build(), torch.zeros(1, *shape))
    report = audit(model, shape, effort=0.1)
    found = steepest(model, shape, points=6)
    assert 0.0 < report.lower <= report.upper < float("inf")
    assert found <= report.upper
    assert not report.unsupported


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slope", [0.0, 0.3, -0.5])
def test_upper_is_at_least_the_exact_constant_by_enumeration(seed: int, slope: float) -> None:
    # The first layer maps onto R^6 (R^4 for the second one), so that every pattern of the first layer occurs: the exact constant
    # is at least the largest norm over the patterns of layer one with layer two in a pattern that occurs; one hidden layer: equal.
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 6), nn.LeakyReLU(slope), nn.Linear(6, 3)).double().eval()
    a, b = model[0].weight.detach(), model[2].weight.detach()
    exact = max(
        float(torch.linalg.matrix_norm(b @ torch.diag(torch.tensor(d, dtype=torch.float64)) @ a, 2))
        for d in itertools.product((1.0, slope), repeat=6)
    )
    report = audit(model, torch.zeros(1, 6, dtype=torch.float64))
    assert report.lower <= exact <= report.upper
    assert report.upper <= 1.25 * exact


@pytest.mark.parametrize("seed", range(3))
def test_linear_networks_are_bounded_at_their_exact_norm(seed: int) -> None:
    torch.manual_seed(seed)
    body = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 4)
    )
    model = models.settled(body, torch.zeros(1, 2, 6, 6), seed)
    exact = steepest(model, (2, 6, 6), points=1)
    report = audit(model, (2, 6, 6))
    assert exact <= report.upper
    assert report.lower == pytest.approx(exact, rel=1e-3)
    assert [row.name for row in report.layers][:1] == ["0 + 1 + 2"]


class Wide(nn.Module):
    """Branches that fold: identity plus convolution, parallel convolutions, consecutive 1x1, padding before a convolution."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)
        self.c, self.d, self.e = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=2, padding=1, padding_mode=mode), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        y = 0.5 * (y + x)
        return self.e(self.d(self.c(y)))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_branches_and_neighbours_fold_into_one_operator(mode: str) -> None:
    torch.manual_seed(1)
    model = Wide(mode).eval()
    exact = steepest(model, (2, 6, 5), points=1)
    report = audit(model, (2, 6, 5))
    assert exact <= report.upper
    assert len(report.layers) <= 3
    folded = audit(model, (2, 6, 5), effort=-1)
    assert folded.upper <= float(torch.linalg.matrix_norm(model.c.weight.detach().flatten(1), 2)) * 100


def test_the_published_mlp_is_bounded_better_than_by_the_product() -> None:
    model = models.mlp(trained("mlp-2-10-30-20-2.safetensors"))
    example = torch.zeros(1, 2, dtype=torch.float64)
    exact = 36.4822296
    assert audit(model, example, effort=-1).upper == pytest.approx(43.3057435, rel=1e-6)
    closed = audit(model, example, effort=0)
    searched = audit(model, example)
    assert exact <= searched.upper <= closed.upper <= 39.91
    assert searched.upper <= 36.6
    assert searched.lower == pytest.approx(exact, rel=1e-4)


def test_coupling_gains_on_the_trained_resnet() -> None:
    model = models.resnet20(trained("resnet20-cifar10.safetensors"))
    model.layer2, model.layer3 = nn.Identity(), nn.Identity()
    model.linear = nn.Linear(16, 10)
    plain = audit(model, (3, 12, 12), effort=-1)
    closed = audit(model, (3, 12, 12), effort=0)
    assert closed.upper < plain.upper / 3
    assert closed.lower <= closed.upper


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i1(self.a(x) * torch.sigmoid(self.b(x))) + torch.special.i0(x)


def test_what_has_no_rule_is_listed_at_once_and_never_guessed() -> None:
    with pytest.raises(UnsupportedError) as error:
        audit(Gated().eval(), (4,))
    assert "aten.special_i1" in str(error.value)
    assert "i0" in str(error.value)
    assert "test_network.py" in str(error.value)
    report = audit(Gated().eval(), (4,), strict=False)
    assert report.upper == float("inf")
    assert len(report.unsupported) >= 2
    assert report.to_dict()["unsupported"] == list(report.unsupported)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x)) * self.b(x)


def test_products_are_unbounded_until_a_domain_is_given() -> None:
    torch.manual_seed(0)
    model = Product().eval()
    assert audit(model, (4,)).upper == float("inf")
    assert "product of two values" in audit(model, (4,)).left_out[0].reason
    report = audit(model, (4,), domain=(0.0, 1.0))
    generator = torch.Generator().manual_seed(0)
    double = model.double()
    best = 0.0
    for _ in range(200):
        x = torch.rand(1, 4, generator=generator, dtype=torch.float64).round(decimals=1)
        best = max(best, float(torch.linalg.matrix_norm(torch.autograd.functional.jacobian(double, x).reshape(4, 4), 2)))
    assert best <= report.upper < float("inf")


@pytest.mark.parametrize("norm_first", [True, False])
def test_attention_is_bounded_where_its_inputs_are(norm_first: bool) -> None:
    torch.manual_seed(0)
    model = models.ViT(8, 4, 8, norm_first=norm_first).eval()
    free, held = audit(model, (3, 8, 8)), audit(model, (3, 8, 8), domain=(0.0, 1.0))
    # Layer norm with eps bounds what the attention reads; without one before it, nothing does.
    assert (free.upper < float("inf")) == norm_first
    assert free.lower > 0.0
    assert steepest(model, (3, 8, 8), points=3, low=0.0, high=1.0 / 3.0) <= held.upper < float("inf")


def test_batch_norm_in_training_mode_is_an_error_that_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    with pytest.raises(UnsupportedError, match=r"type model\.eval\(\)"):
        audit(model.train(), (1, 5, 5))
    assert model.training


class InPlace(nn.Module):
    def __init__(self, aliased: bool) -> None:
        super().__init__()
        self.a, self.aliased = nn.Linear(4, 4), aliased

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        view = y.view(2, 2) if self.aliased else x
        y.mul_(3.0).relu_()
        return y + view.sum()


def test_in_place_calls_mean_what_they_mean_in_torch() -> None:
    torch.manual_seed(0)
    model = InPlace(aliased=False).eval()
    assert steepest(model, (4,), 6) <= audit(model, (4,)).upper
    model = InPlace(aliased=True).eval()
    assert steepest(model, (4,), 6) <= audit(model, (4,)).upper


def joined(call: Callable[[Tensor], object], x: Tensor) -> float:
    """The norm of the Jacobian of all results together, in float64, by torch alone."""
    flat = lambda value: torch.cat([v.reshape(-1) for v in tree_leaves(call(value))])  # noqa: E731
    return float(torch.linalg.matrix_norm(torch.autograd.functional.jacobian(flat, x.double()).reshape(-1, x.numel()), 2))


def written(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A value that is overwritten through something which may be a view of it."""

    def call(x: Tensor) -> Tensor:
        value = 1 * x
        other = view(value)
        other *= 5
        return value

    return call


@pytest.mark.parametrize(
    "call",
    [
        lambda x: [x * 3] * 2,
        lambda x: (x, x, x),
        lambda x: {"one": x, "other": [x, 2 * x]},
        lambda x: (lambda y: (y, y.mul_(5)))(x * 3),
    ],
)
def test_a_value_that_is_returned_twice_counts_twice(call: Callable[[Tensor], object]) -> None:
    truth = joined(call, torch.ones(2, 3))
    report = audit(Map(call).eval(), torch.zeros(2, 3))
    assert report.lower <= truth <= report.upper <= truth * (1 + 1e-6)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "select": lambda x: x[:, 0],
    "einsum transposed": lambda x: torch.einsum("ij->ji", x),
    "einsum": lambda x: torch.einsum("...j->...j", x),
    "dropout": lambda x: F.dropout(x, 0.5, False),
    "reshape": lambda x: x.reshape(2, 3),
    "chunk": lambda x: x.chunk(1)[0],
    "movedim": lambda x: x.movedim(0, 1),
    "contiguous": lambda x: x.contiguous(),
    "same type": lambda x: x.to(torch.float32),
    "pad by nothing": lambda x: F.pad(x, (0, 0)),
    "adaptive": lambda x: F.adaptive_avg_pool1d(x, 3),
    "linear": lambda x: F.linear(x, torch.eye(3)),
    "list": lambda x: torch._foreach_mul_([x], 3.0) and x,
    "out": lambda x: torch.mul(x, 3.0, out=x),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_write_through_what_may_be_a_view_counts_or_is_refused(name: str) -> None:
    call = written(VIEWS[name])
    x = torch.ones(2, 3)
    truth = float((call(x + 1) - call(x)).max())  # each entry is multiplied by a constant; in the type that the model has
    report = audit(Map(call).eval(), torch.zeros(2, 3), strict=False)
    assert report.lower <= truth <= report.upper
    if report.unsupported:
        assert report.upper == float("inf")
        with pytest.raises(UnsupportedError, match="expected the call out of place"):
            audit(Map(call).eval(), torch.zeros(2, 3))


def test_a_view_that_a_recurrent_layer_stands_beside_is_not_lost_when_it_is_unrolled() -> None:
    layer = nn.RNN(3, 3, batch_first=True).eval()
    with pytest.raises(UnsupportedError, match="expected the call out of place"):
        audit(nn.Sequential(layer, Map(lambda pair: written(VIEWS["einsum"])(pair[0][0]))).eval(), (4, 3))


def test_dropout_between_recurrent_layers_is_random_in_training_mode() -> None:
    model = nn.RNN(3, 3, num_layers=2, dropout=0.9)
    assert audit(model.eval(), (2, 3), effort=-1).upper < float("inf")
    assert audit(nn.RNN(3, 3).train(), (2, 3), effort=-1).upper < float("inf")
    with pytest.raises(UnsupportedError, match=r"type model\.eval\(\)"):
        audit(model.train(), (2, 3))


class Cell(nn.Module):
    """One or two steps of a recurrent cell."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell = kind(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.cell(x)
        second = self.cell(x, first)
        return second[0] if isinstance(second, tuple) else second


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_recurrent_cells_are_taken_apart(kind: type[nn.RNNCellBase]) -> None:
    model = Cell(kind).eval()
    report = audit(model, (3,))
    assert steepest(model, (3,)) <= report.upper < 100
    assert report.lower > 0.0


def test_scopes_without_gradients_are_part_of_the_function() -> None:
    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            size = 3 * x.abs().amax(1, keepdim=True)
        with torch.autocast("cpu", torch.bfloat16):
            return x + size + F.linear(x, 2 * torch.eye(3))

    x, y = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[2.0, 0.5, 0.5]])
    stretched = float(torch.linalg.vector_norm(call(y) - call(x)) / torch.linalg.vector_norm(y - x))
    assert stretched <= audit(Map(call).eval(), (3,)).upper < 10


@pytest.mark.parametrize(
    "call",
    [
        lambda x: (F.relu(x + 1e9) - 1e9) * 0.5 + (F.relu(x) - F.relu(-x)) * 0.5,
        lambda x: F.relu(F.relu(x + 1e10) - 1e10),
        lambda x: (x + 1e10) - 1e10,
        lambda x: (x + 1e14) - 1e14,
    ],
)
def test_rounding_of_the_forward_pass_never_lifts_the_lower_side(call: Callable[[Tensor], Tensor]) -> None:
    report = audit(Map(call).eval(), (3,))
    assert report.lower <= 1.0 <= report.upper


def test_a_fold_that_underflows_is_not_zero() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double().eval()
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(1e-200 * torch.eye(3, dtype=torch.float64))
    assert 0.0 < audit(model, torch.zeros(1, 3, dtype=torch.float64)).upper < 1e-300
    with torch.no_grad():
        model[1].weight.zero_()
    assert audit(model, torch.zeros(1, 3, dtype=torch.float64)).upper == 0.0


@pytest.mark.parametrize("options", [(2, 3, 1, 2), (2, 1, 1, 2, True)])
@pytest.mark.parametrize("strict", [True, False])
def test_pooling_windows_without_an_entry_are_refused_before_torch_reads_outside_of_the_input(
    options: tuple[int, ...], strict: bool
) -> None:
    with pytest.raises(InputError, match="a window of it holds no entry"):
        audit(Map(lambda x: F.max_pool1d(x, *options)).eval(), (1, 1), strict=strict)


def test_a_random_function_has_no_lower_side() -> None:
    report = audit(nn.Sequential(nn.Linear(9, 9), nn.Dropout()).train(), (9,), strict=False)
    assert report.lower == 0.0


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.AdaptiveAvgPool1d(3), nn.Linear(3, 2)).eval()


SCOPES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", SCOPES)
def test_no_setting_of_the_caller_changes_the_result(name: str, inside: bool) -> None:
    torch.manual_seed(0)
    plain = two_layers()
    meant = audit(plain, (3,))
    torch.manual_seed(0)
    with SCOPES[name]():
        model = two_layers() if inside and name != "device" else plain
        found = audit(model, (3,))
    assert (found.lower, found.upper) == (meant.lower, meant.upper)


@pytest.mark.parametrize("call", [lambda x: two(x.flatten()), lambda x: two(x[0])])
def test_a_vector_goes_through_layers_like_a_batch_of_one(call: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    assert audit(Map(call).eval(), (3,)).upper == pytest.approx(audit(two, (3,)).upper, rel=1e-6)


two = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: torch.take_along_dim(x, x.argsort(-1), -1), "'indices' that depends on the input"),
        (lambda x: x.take(x.argsort(-1)), "'index' that depends on the input"),
        (lambda x: x[:, :0], "values without entries"),
        (lambda x: torch.cat([x, x[:, :0]], 1), "values without entries"),
        (lambda x: torch.view_as_real(torch.sin(x.to(torch.complex64))), "complex values"),
        (lambda x: F.leaky_relu(x, math.nan), "negative_slope holds NaN"),
        (lambda x: x * torch.tensor([1.0, math.nan, 1.0]), "other holds NaN"),
        (lambda x: F.linear(x, torch.eye(3), torch.tensor([0.0, math.inf, 0.0])), "bias holds NaN or infinite"),
    ],
)
def test_what_no_rule_is_meant_for_is_refused(call: Callable[[Tensor], Tensor], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        audit(Map(call).eval(), (3,), domain=(0.0, 1.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("layer", [nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.PReLU(), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.RMSNorm(3)])
def test_weights_that_are_no_numbers_are_refused_by_name(layer: nn.Module, bad: float) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).eval()
    for name, weight in model.state_dict(keep_vars=True).items():
        if weight.is_floating_point():
            kept = weight.detach().clone()
            with torch.no_grad():
                weight.view(-1)[0] = bad
            with pytest.raises(UnsupportedError, match=rf"in 0: {name.removeprefix('0.')} holds NaN"):
                audit(model, (3,))
            with torch.no_grad():
                weight.copy_(kept)
    assert audit(model, (3,)).upper < float("inf")


def test_a_program_is_audited_with_the_inputs_that_it_was_exported_for() -> None:
    program = torch.export.export(two, (torch.zeros(1, 3),))
    assert audit(program, (3,)).upper == audit(two, (3,)).upper
    for example in ((torch.zeros(1, 3), torch.zeros(1, 3)), (4,), torch.zeros(2, 3)):
        with pytest.raises(InputError, match="expected those that the program was exported for"):
            audit(program, example)


@pytest.mark.parametrize(
    "given",
    [
        {"example": None},
        {"example": 3},
        {"example": torch.zeros(0, 3)},
        {"example": torch.zeros(1, 3, dtype=torch.complex64)},
        {"domain": "ab"},
        {"domain": 3},
        {"assume": {"1": "1"}},
        {"assume": ["1"]},
        {"effort": math.inf},
        {"effort": math.nan},
        {"effort": "much"},
        {"data": torch.zeros(0, 3)},
        {"data": [1.0, 2.0, 3.0]},
        {"data": torch.full((2, 3), math.nan)},
        {"seed": 1.5},
        {"seed": "a"},
        {"seed": -1},
        {"strict": "no"},
        {"domain": torch.tensor([0.0, 1.0])},
        {"example": torch.zeros(1, 3, device="meta")},
        {"model": "x"},
        {"model": lambda x: x},
        {"model": nn.Linear(3, 3, device="meta")},
    ],
)
def test_arguments_that_cannot_be_used_are_refused_in_one_line(given: dict[str, object]) -> None:
    with pytest.raises(InputError, match="expected") as error:
        audit(**{"model": two_layers().eval(), "example": (3,), **given})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_assumptions_are_visible() -> None:
    report = audit(Gated().eval(), (4,), assume={"aten.special_i1": 1e20, "aten.special_i0": 1e20, "aten.mul": 1e20})
    assert report.upper < float("inf")
    assert any("aten.special_i1 taken as 1e+20-Lipschitz by assumption" in note for note in report.notes)
    with pytest.raises(InputError, match="expected names"):
        audit(Gated().eval(), (4,), assume={"nothing": 1.0}, strict=False)


def test_parts_that_all_but_cancel_are_no_shares() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)).eval()
    for scale, layer in ((8.0, model[0]), (1 / 7.9, model[2])):
        layer.weight.data = scale * torch.eye(2)
    assert all(row.share is None for row in audit(model, (2,)).layers)


def test_shares_add_up_to_the_logarithm_of_the_product() -> None:
    torch.manual_seed(0)
    model = models.settled(models.ResNet(4, (1, 1), 5), torch.zeros(1, 3, 16, 16))
    next(m for m in model.modules() if isinstance(m, nn.Linear)).weight.data *= 100.0  # far from 1, where the parts all but cancel
    report = audit(model, (3, 16, 16), effort=-1)
    assert sum(row.share or 0.0 for row in report.layers) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("bad", [(), "3,8,8", (3.0,), (0, 2)])
def test_examples_that_cannot_be_used_are_refused(bad: object) -> None:
    with pytest.raises(InputError, match="expected a tensor"):
        audit(nn.Linear(2, 2), bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_shape_is_an_example_of_the_models_own_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)).to(dtype).eval()
    report = audit(model, (3, 8, 8))
    assert (report.lower, report.upper) == ((same := audit(model, torch.zeros(1, 3, 8, 8, dtype=dtype))).lower, same.upper)
    program = torch.export.export(model, (torch.zeros(1, 3, 8, 8, dtype=dtype),))
    assert audit(program, (3, 8, 8)).upper == report.upper


class Polar(nn.Module):
    """A real layer whose weight is a part of a complex tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.Parameter(torch.diag(torch.tensor([3.0 + 9j, 2.0])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.view_as_real(self.held)[..., 0]


def test_a_shape_is_real_where_the_weights_are_complex() -> None:
    report = audit(Polar().eval(), (2,))
    assert report.lower <= 3.0 <= report.upper <= 3.1


def test_a_shape_for_a_program_of_integers_is_refused_as_integers() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2)).eval()
    program = torch.export.export(model, (torch.zeros(1, 5, dtype=torch.int64),))
    with pytest.raises(InputError, match=r"entries of torch\.int64"):
        audit(program, (5,), assume={"0": 1.0})


def test_an_example_of_tensors_and_others_is_refused() -> None:
    with pytest.raises(InputError, match="an example that holds a str was given"):
        audit(nn.Linear(2, 2), (torch.zeros(1, 2), "x"))  # type: ignore[arg-type]


def test_segments_multiply_to_the_whole() -> None:
    torch.manual_seed(2)
    from gramlip.network.compose import constants
    from gramlip.network.fold import fold
    from gramlip.network.graph import export
    from gramlip.network.rules import lower

    model = models.settled(models.DnCNN(3, 4), torch.zeros(1, 1, 6, 6))
    network = fold(lower(export(model, (torch.zeros(1, 1, 6, 6),))).network)
    own = constants(network.steps, [[network.steps[x].shape for x in s.sources] for s in network.steps])
    found = coupling.coupled(network, own, Effort(0.0))
    assert found is not None
    product = reduce(rd.mul_up, (segment.upper for segment in found))
    assert 0 < product <= 1.0001 * audit(model, (1, 6, 6), effort=0).upper
    assert steepest(model, (1, 6, 6)) <= product


def test_layers_of_equal_shape_are_searched_together_and_an_error_names_its_own() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(100, 2)).eval()
    report = audit(model, (4, 5, 5), effort=-1)
    for row, layer in zip(report.layers[:3], layers[::2], strict=True):
        alone = bound(layer, (5, 5))
        assert alone.lower <= row.bound.upper
        assert row.bound.lower <= alone.upper
        assert row.bound.upper <= 1.011 * row.bound.lower
    with torch.no_grad():
        layers[2].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(UnsupportedError, match="in 2: weight holds NaN"):
        audit(model, (4, 5, 5), effort=-1)


def test_lower_side_starts_from_data() -> None:
    """A network that is flat but for one place: points that are given are where the search for its steepest pair begins."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(3))
        net[0].bias.fill_(-1000.0)
    reports = [audit(net, (3,), data=data) for data in (None, torch.full((2, 3), 1001.0))]
    assert reports[0].lower == 0.0
    assert "from data" in reports[1].network.because
    assert "seed 0" in reports[1].network.because
    truth = float(torch.linalg.matrix_norm(net[2].weight.detach().double(), 2))
    assert 0.9 * truth <= reports[1].lower <= truth * (1 + 1e-9) <= reports[1].upper * (1 + 1e-9)
