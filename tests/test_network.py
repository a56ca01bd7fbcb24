"""Whole networks: the upper side against Jacobians of the real modules, against enumeration, and the coupled bounds' gain."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gramlip import Bound, bound
from gramlip.coupling import segments
from gramlip.errors import InputError, UnsupportedError
from gramlip.network import audit

ROOT = Path(__file__).resolve().parent.parent
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
        return torch.cumprod(self.a(x) * torch.sigmoid(self.b(x)), 1) + torch.fft.fft(x).real


def test_what_has_no_rule_is_listed_at_once_and_never_guessed() -> None:
    with pytest.raises(UnsupportedError) as error:
        audit(Gated().eval(), (4,))
    assert "aten.cumprod" in str(error.value)
    assert "fft" in str(error.value)
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
    with pytest.raises(UnsupportedError, match="overwrites"):
        audit(InPlace(aliased=True).eval(), (4,))


def test_assumptions_are_visible() -> None:
    report = audit(Gated().eval(), (4,), assume={"aten.cumprod": 2.0, "aten.fft_fft": 2.0, "aten.real": 1.0, "aten.mul": 5.0})
    assert report.upper < float("inf")
    assert any("aten.cumprod taken as 2-Lipschitz by assumption" in note for note in report.notes)
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


def test_segments_multiply_to_the_whole() -> None:
    torch.manual_seed(2)
    from gramlip.compose import constants
    from gramlip.fold import fold
    from gramlip.graph import export
    from gramlip.rules import lower

    model = models.settled(models.DnCNN(3, 4), torch.zeros(1, 1, 6, 6))
    network = fold(lower(export(model, (torch.zeros(1, 1, 6, 6),))).network)
    own = constants(network.steps, [[network.steps[x].shape for x in s.sources] for s in network.steps])
    found = segments.coupled(network, own, effort=0.0)
    assert found is not None
    assert segments.total(found) <= 1.0001 * audit(model, (1, 6, 6), effort=0).upper
    assert steepest(model, (1, 6, 6)) <= segments.total(found)
    assert Bound(0.0, segments.total(found), "").upper > 0


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
