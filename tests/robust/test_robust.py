"""Certified radii: ties, units, pairs of classes, and an attack that must never get below the certificate."""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gramlip as gl
from gramlip import nn as gnn
from gramlip import robust


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 16), nn.ReLU(), nn.Linear(16, 4))
    gnn.spectral_norm_(model, torch.zeros(1, 1, 6, 6))
    x = torch.rand(256, 1, 6, 6)
    y = (4 * x.mean((1, 2, 3))).mul(30).long() % 4  # something learnable enough to have margins
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(20 * model(x), y).backward()
        optimiser.step()
    return gnn.remove(model)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = net()
    x = torch.rand(64, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    return model, x, model(x).argmax(1)


def test_ties_wrong_labels_and_nan_get_radius_zero() -> None:
    logits = torch.tensor([[2.0, 2.0], [1.0, 3.0], [math.nan, 0.0], [math.inf, 1.0], [3.0, -math.inf], [3.0, 0.0]])
    found = robust.radii(logits, torch.zeros(6, dtype=torch.uint8), math.sqrt(2))
    assert found[:5].eq(0.0).all()
    assert 1.5 * (1 - 1e-12) < found[5] <= 1.5


@pytest.mark.parametrize("seed", range(20))
def test_the_radius_of_a_linear_classifier_is_never_above_the_distance_to_the_boundary(seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(5, 3).double()
    x = torch.randn(50, 5, dtype=torch.float64)
    logits = layer(x).detach()
    labels = logits.argmax(1)
    rows = layer.weight.detach()
    gaps = logits.gather(1, labels[:, None]) - logits
    between = torch.linalg.vector_norm(rows[labels][:, None] - rows[None], dim=-1)
    distance = (gaps / between).scatter(1, labels[:, None], math.inf)
    exact = distance.amin(1)
    pairs = robust.radii(logits, labels, 1.0, last=layer)
    assert (pairs <= exact).all()
    assert torch.allclose(pairs, exact)
    single = robust.radii(logits, labels, gl.bound(layer))
    assert (single <= exact).all()


def test_the_constant_is_printed_no_smaller_than_it_is() -> None:
    found = robust.certify(nn.Identity(), [(torch.eye(2), torch.tensor([0, 1]))], 1.2345611)
    assert "times the constant 1.23457 for pixels" in found.because


def test_pixels_units() -> None:
    logits, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    plain = robust.radii(logits, labels, 1.0).item()
    assert robust.radii(logits, labels, 1.0, std=(0.5, 0.25, 0.3)).item() == pytest.approx(plain / 4)
    assert robust.radii(logits, labels, math.inf).item() == 0.0
    assert robust.radii(logits, labels, 0.0).item() == math.inf


def test_certified_accuracies(trained: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
    model, x, y = trained
    upper = gl.bound(model[0], 6).upper * gl.bound(model[3]).upper * gl.bound(model[5]).upper
    loader = [(x[:40], y[:40]), (x[40:], y[40:])]
    model.train()
    found = robust.certify(model, loader, upper)
    assert model.training
    assert found.clean == 1.0
    assert list(found.certified) == list(robust.EPS)
    shares = list(found.certified.values())
    assert shares == sorted(shares, reverse=True)
    assert found.count == 64
    assert "36/255" in str(found)
    assert found.to_dict()["certified"][0]["eps"] == 36 / 255
    assert robust.certified_accuracy(model, loader, 36 / 255, lipschitz=upper) == shares[0]
    features = gl.bound(model[0], 6).upper * gl.bound(model[3]).upper
    pairwise = robust.certify(model, loader, features, last=model[5])
    assert (pairwise.radii >= found.radii * (1 - 1e-9)).all()


@pytest.mark.parametrize("eps", [0.01, 0.05, 0.2])
def test_certified_is_never_above_attacked(trained: tuple[nn.Module, torch.Tensor, torch.Tensor], eps: float) -> None:
    model, x, y = trained
    features = gl.bound(model[0], 6).upper * gl.bound(model[3]).upper
    loader = [(x, y)]
    certified = robust.certified_accuracy(model, loader, eps, lipschitz=features, last=model[5])
    attacked = robust.attacked_accuracy(model, loader, eps)
    assert certified <= attacked <= 1.0
    assert certified > 0 or eps > 0.1


def test_attack_takes_the_normalisation_into_account(trained: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
    model, x, y = trained

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return self.model(0.5 * z + 0.25)

    same = robust.attacked_accuracy(Shifted(), [(x, y)], 1e-6, mean=[0.25], std=[0.5])
    assert same == 1.0
    assert robust.attacked_accuracy(Shifted(), [(x, y)], 1e-6, mean=[10.0]) < 1.0  # a mean alone is not left out
    upper = 0.5 * gl.bound(model[0], 6).upper * gl.bound(model[3]).upper * gl.bound(model[5]).upper
    shifted = robust.certify(Shifted(), [((x - 0.25) / 0.5, y)], upper, std=[0.5])
    assert shifted.radii.allclose(robust.certify(model, [(x, y)], upper / 0.5).radii, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple], ids=lambda kind: kind.__name__)
def test_the_normalisation_of_an_attack_may_be_an_array(kind: Callable[[list[float]], Any]) -> None:
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), torch.rand(6, 3, 1, 1), torch.zeros(6, dtype=torch.long)
    mean, std = [0.25, 0.5, 0.125], [0.5, 0.25, 2.0]
    expected = robust.attacked_accuracy(model, [(x, y)], 1e-9, mean=mean, std=std)
    shifted = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert expected == float((model(shifted).argmax(1) == 0).double().mean())
    assert robust.attacked_accuracy(model, [(x, y)], 1e-9, mean=kind(mean), std=kind(std)) == expected
    robust.attacked_accuracy(model, [(x, y)], 1e-9, std=kind(std))
    robust.attacked_accuracy(model, [(x, y)], 1e-9, mean=kind(mean), std=0.5)


@pytest.mark.parametrize(
    "given", [{"std": [0.0]}, {"std": []}, {"mean": "a"}, {"mean": [math.nan]}, {"mean": [0.0, 0.0], "std": [1.0, 1.0, 1.0]}], ids=str
)
def test_a_normalisation_that_cannot_be_used_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(gl.InputError, match="expected"):
        robust.attacked_accuracy(nn.Flatten(), [(torch.ones(1, 2), torch.tensor([0]))], **given)


def test_an_attack_that_cannot_start_leaves_the_model_in_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    import foolbox

    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())

    def broken(*args: object, **options: object) -> None:
        msg = "no such attack"
        raise RuntimeError(msg)

    for holder, name in ((foolbox, "PyTorchModel"), (foolbox.attacks, "L2ProjectedGradientDescentAttack")):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, broken)
            with pytest.raises(RuntimeError, match="no such attack"):
                robust.attacked_accuracy(model, [(torch.ones(1, 2), torch.tensor([0]))])
        assert [module.training for module in model] == [True, False]


def test_a_constant_is_of_one_shape() -> None:
    """The norm of a convolution grows with the image: the radii of a 12x12 image by the constant of 4x4 ones were 3.7 times too large."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(1, 2, 3, padding=1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x).sum((2, 3))

    loader = [(torch.rand(2, 1, n, n), torch.tensor([0, 1])) for n in (4, 12)]
    for options in ({}, {"local": True, "lipschitz": 1e3}, {"executed": True, "domain": (0.0, 1.0), "lipschitz": 1e3}):
        with pytest.raises(gl.InputError, match=r"samples of shapes \(1, 4, 4\) and \(1, 12, 12\)"):
            gl.robust.certify(Sums(), loader, **options)  # type: ignore[arg-type]
    assert gl.robust.certify(Sums(), loader, 1e3).count == 4


@pytest.mark.parametrize("part", [{"at": torch.zeros(1, 4), "radius": 0.01}, {"inputs": [0]}, {"outputs": [0, 1]}])
def test_a_constant_of_a_part_certifies_nothing_elsewhere(part: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    report = gl.audit(model, (4,), **part)
    with pytest.raises(gl.InputError, match="expected one of all inputs and results"):
        gl.robust.radii(torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([0]), report)
    assert gl.robust.radii(torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([0]), gl.audit(model, (4,), domain=(-1.0, 1.0))) > 0


def test_samples_that_depend_on_each_other_have_no_radius() -> None:
    """Of one sample alone `x - x.mean(0)` is constant, so that the radii of its batches were 1e13: each label goes within about 1."""

    class Centred(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels = (x - x.mean(0)).argmax(1)
    for options in ({}, {"local": True}, {"lipschitz": 1.0}):
        with pytest.raises(gl.InputError, match="in a batch of 4 differ by"):
            gl.robust.certify(Centred(), [(x, labels)], **options)  # type: ignore[arg-type]
    net = nn.Sequential(nn.Linear(3, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3))
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        assert gl.robust.certify(net.to(kind), [(x.to(kind), labels)], 1e3).count == 4


ON_OTHERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "all as the first": lambda x: x[[0]].expand(len(x), -1),
    "all as the last": lambda x: x[[-1]].expand(len(x), -1),
    "backwards": lambda x: x.flip(0),
    "sums so far": lambda x: x.cumsum(0),
    "differences": lambda x: torch.cat([x[:1], x[1:] - x[:-1]]),
    "NaN alone": lambda x: (x - x.mean(0)) / (x - x.mean(0)).norm(dim=0),
    "an error alone": lambda x: F.batch_norm(x, None, None, training=True),
    "for four samples": lambda x: x.reshape(4, 3).flip(0),
    "by their number": lambda x: x / len(x),
}


class Of(nn.Module):
    """A function as a model."""

    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


@pytest.mark.parametrize("name", ON_OTHERS)
def test_what_other_samples_can_change_has_no_radius(name: str) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        gl.InputError, match=r"the (first|last) sample in a batch of 4 differ by .* expected a model that treats samples apart"
    ):
        gl.robust.certify(Of(ON_OTHERS[name]), [(x, x.argmax(1))], 1.0)


@pytest.mark.parametrize("call", [lambda x: x.squeeze(), lambda x: x.reshape(4, 3), lambda x: x > 0, lambda x: x * math.nan, F.dropout])
def test_samples_that_go_through_apart_are_certified(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Dropout()) if call is F.dropout else Of(call)
    assert gl.robust.certify(model, [(x, x.argmax(1))], 1.0).count == 4


@pytest.mark.parametrize("call", [lambda x: x.sum(), lambda x: x.sum(1), lambda x: x[:0], lambda x: x[:, :0], lambda x: x[None]])
def test_logits_of_another_shape_are_one_line(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(gl.InputError, match=r"and labels of shape \(4,\) were given; expected \(batch, classes\)"):
        gl.robust.certify(Of(call), [(torch.randn(4, 3), torch.zeros(4))], 1.0)


@pytest.mark.parametrize("local", [False, True, "eps"])
def test_labels_may_be_truth_values(local: Any) -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    radii = [gl.robust.certify(nn.Identity(), [(x, labels)], local=local).radii for labels in (torch.tensor([0, 1]), x[:, 1] > 0.5)]
    assert torch.equal(*radii)
    assert bool((radii[0] > 0.7).all())


def test_rows_of_the_last_layer_need_the_constant_before_it() -> None:
    """The constant of the whole network counts the last layer too: with its norm of 0.01 the radius was 100 times too large."""
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2, bias=False))
    model[1].weight.data = 0.01 * torch.eye(2)
    batch = (torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    with pytest.raises(gl.InputError, match="last was given without a constant"):
        gl.robust.certify(model, [batch], last=model[1])
    assert float(gl.robust.certify(model, [batch], 1.0, last=model[1]).radii) <= 0.5**0.5


def test_logits_that_are_no_numbers_are_not_counted_as_right() -> None:
    logits = torch.tensor([[math.nan, math.nan], [math.inf, 0.0], [1.0, 0.0]])
    found = robust.certify(nn.Identity(), [(logits, torch.zeros(3, dtype=torch.long))], 1.0)
    assert found.clean == 1 / 3
    assert max(found.certified.values()) <= found.clean


def test_arrays_lists_and_tensors_of_numbers_are_taken() -> None:
    logits, labels, batch = np.array([[3.0, 1.0]]), [0], [(torch.tensor([[3.0, 1.0]]), [0])]
    assert robust.radii(logits, labels, torch.tensor(1.0), std=np.array([0.5])).item() == pytest.approx(math.sqrt(2) / 2)
    for eps in (torch.tensor([0.5, 2.0]), np.array([0.5, 2.0]), [0.5, 2.0]):
        assert robust.certify(nn.Identity(), batch, 1.0, eps=eps).certified == {0.5: 1.0, 2.0: 0.0}
    assert robust.certified_accuracy(nn.Identity(), batch, torch.tensor(0.5), lipschitz=np.float32(1.0)) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: robust.radii(torch.zeros(2), torch.zeros(2), 1.0), "logits of shape"),
        (
            lambda: robust.radii(torch.zeros(2, 2), torch.tensor([0, 2]), 1.0),
            "the label 2 was given for 2 classes; expected integers from 0 to 1",
        ),
        (lambda: robust.radii(torch.zeros(1, 2), torch.tensor([0.5]), 1.0), "a label of torch.float32 was given for 2 classes"),
        (lambda: robust.radii(torch.zeros(1, 2), torch.tensor([0]), -1.0), "lipschitz=-1.0"),
        (lambda: robust.radii(torch.zeros(1, 2), torch.tensor([0]), 1.0, std=0.0), "std=0.0"),
        (lambda: robust.radii(torch.zeros(1, 2), torch.tensor([0]), 1.0, last=torch.zeros(3, 4)), "one row a class"),
        (lambda: robust.certify(nn.Identity(), [], 1.0), "no batch"),
        (lambda: robust.certify(nn.Identity(), [], 1.0, eps=-1.0), "eps=-1.0"),
        (lambda: robust.attacked_accuracy(nn.Identity(), []), "no batch"),
        (lambda: robust.attacked_accuracy(nn.Identity(), [], restarts=0), "restarts=0"),
        (lambda: robust.attacked_accuracy(nn.Identity(), [], steps=1.5), "steps=1.5"),
        (lambda: robust.attacked_accuracy(nn.Identity(), [], eps="a"), "eps='a'"),
        (lambda: robust.attacked_accuracy(nn.Identity(), [(3 * torch.eye(2), torch.tensor([0, 1]))]), "pixels from 0 to 3 were given"),
        (lambda: robust.attacked_accuracy(nn.Identity(), [(torch.full((1, 2), math.nan), torch.tensor([0]))]), "pixels from nan to nan"),
        (lambda: robust.radii(torch.zeros(1, 2), torch.tensor([0]), "2"), "lipschitz='2'"),
        (lambda: robust.radii(torch.zeros(1, 2), torch.tensor([0]), None), "lipschitz=None"),
        (lambda: robust.radii(torch.zeros(1, 2), torch.tensor([0]), 1.0, std="imagenet"), "std='imagenet'"),
        (lambda: robust.radii(torch.zeros(1, 2), torch.tensor([0]), 1.0, last=nn.ReLU()), r"last=ReLU\(\)"),
        (lambda: robust.radii("logits", torch.tensor([0]), 1.0), "logits of type str"),
        (lambda: robust.radii(torch.zeros(1, 2, dtype=torch.complex64), torch.tensor([0]), 1.0), "logits of torch.complex64"),
        (lambda: robust.certify(nn.Identity(), [], 1.0, eps="a"), "eps='a'"),
        (lambda: robust.certify(nn.Identity(), [{"x": torch.zeros(1, 2)}], 1.0), "the loader gave a dict"),
        (lambda: robust.certify(nn.Identity(), [(torch.zeros(1, 2), torch.tensor([0]), None)], 1.0), "the loader gave a tuple of 3"),
        (lambda: robust.certified_accuracy(nn.Identity(), [], (0.1, 0.2), lipschitz=1.0), "expected one radius"),
    ],
)
def test_errors(call: object, message: str) -> None:
    with pytest.raises(gl.InputError, match=message):
        call()


EXTREMES = [0.0, 5e-324, 1e-310, 3e-308, 1e-300, 3e-172, 1e-170, 1e-162, 1e-150, 1e-20, 0.3, 1.0, 1e20, 1e160, 1e200, 1e300, 1.7e308]


def exact_radius(logits: list[float], rows: list[list[float]] | None, constant: float) -> Fraction | None:
    """The square of the true radius for label 0; None where it is infinite."""
    squares = []
    for j in range(1, len(logits)):
        gap = max(Fraction(logits[0]) - Fraction(logits[j]), Fraction(0))
        slope = Fraction(2) if rows is None else sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(rows[0], rows[j], strict=True))
        if gap == 0:
            return Fraction(0)
        if slope and constant:
            squares.append(gap**2 / (slope * Fraction(constant) ** 2))
    return min(squares, default=None)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_no_radius_is_above_the_rational_one_at_any_scale(seed: int, flush: bool) -> None:
    draw = random.Random(seed)

    def number() -> float:
        return draw.choice((-1, 1)) * draw.choice(EXTREMES) * draw.choice((1.0, 0.77, 0.999))

    for _ in range(400):
        logits = [abs(number()), number() if draw.random() < 0.5 else 0.0]
        rows = [[number(), number() if draw.random() < 0.5 else 0.0], [0.0, 0.0] if draw.random() < 0.5 else [number(), number()]]
        bound = abs(number()) if not flush else max(abs(number()), 1e-300)
        last = None if draw.random() < 0.2 else rows
        truth = exact_radius(logits, last, bound)
        tensors = torch.tensor([logits], dtype=torch.float64), last and torch.tensor(last, dtype=torch.float64)
        torch.set_flush_denormal(flush)
        try:
            found = robust.radii(tensors[0], torch.tensor([0]), bound, last=tensors[1]).item()
        finally:
            torch.set_flush_denormal(False)
        assert truth is None or (found < math.inf and Fraction(found) ** 2 <= truth)


def test_radii_are_sharp_at_every_scale() -> None:
    draw = random.Random(0)
    for _ in range(300):
        gap, row, other = (draw.uniform(1, 2) * 2.0 ** draw.randint(-900, 900) for _ in range(3))
        bound = draw.uniform(1, 2) * 2.0 ** draw.randint(-900, 900)
        last = torch.tensor([[row, other], [0.0, 0.0]], dtype=torch.float64)
        found = robust.radii(torch.tensor([[gap, 0.0]], dtype=torch.float64), torch.tensor([0]), bound, last=last).item()
        truth = exact_radius([gap, 0.0], last.tolist(), bound)
        assert truth is not None
        highest, lowest = Fraction(sys.float_info.max), Fraction(sys.float_info.min)
        least = min(truth, highest**2) * (1 - Fraction(1, 10**13)) ** 2
        assert Fraction(found) ** 2 >= least or (found == 0.0 and least < lowest**2)


def test_products_and_norms_that_underflow_certify_nothing_more() -> None:
    def one(gap: float, row: float, constant: float) -> float:
        last = torch.tensor([[row, 0.0], [0.0, 0.0]], dtype=torch.float64)
        return robust.radii(torch.tensor([[gap, 0.0]], dtype=torch.float64), torch.tensor([0]), constant, last=last).item()

    assert 1e-10 * (1 - 1e-13) < one(1e20, 1e-170, 1e200) <= 1e-10
    assert Fraction(one(1e-20, 1e-150, 3.33e-172)) <= Fraction(1e-20) / (Fraction(1e-150) * Fraction(3.33e-172))
    assert one(1.0, 1e200, 1e200) == 0.0  # below the normal range
    assert one(1e200, 1e-200, 1.0) == pytest.approx(sys.float_info.max)  # above it, and the true radius larger still


def half_precision_case() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A classifier in float16, and inputs near its boundary, where both logits are close to the middle of two neighbours of the format."""
    program = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        program.weight.copy_(torch.tensor([[1.0, 2.0**-11, 2.0**-10], [1.0, 2.0**-11, -(2.0**-10)]]))
    program = program.half()
    inputs = torch.tensor([[1.0, 1.0, 2.0**-13], [1.0, 1.0, -(2.0**-13)]], dtype=torch.float16)
    return program, inputs, program(inputs).detach()


def test_radii_of_half_precision_hold_for_the_program_only_with_its_rounding() -> None:
    """Some input of the case lies within the radius of another one, and the program answers otherwise."""
    program, inputs, logits = half_precision_case()
    labels = logits.argmax(1)
    gap = torch.cdist(inputs.double(), inputs.double())
    other = labels[:, None] != labels
    upper = gl.audit(copy.deepcopy(program).float(), (3,)).upper

    def broken(radii: torch.Tensor) -> bool:
        return bool((other & (gap < radii[:, None])).any())

    error = gl.execution_error(program, (3,), domain=(-1.0, 1.0))
    assert broken(robust.radii(logits, labels, upper))
    assert not broken(robust.radii(logits, labels, upper, execution=error))


def test_executed_radii_are_smaller_and_say_so() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.rand(20, 6)
    batch = [(x, model(x).argmax(1))]
    plain = robust.certify(model, batch, gl.audit(model, (6,)))
    executed = robust.certify(model, batch, gl.audit(model, (6,)), executed=True, domain=(0.0, 1.0))
    assert bool((executed.radii < plain.radii).all())
    assert bool((executed.radii > plain.radii - 1e-3).all())
    assert "rounding of both programs" in executed.because
    with pytest.raises(gl.InputError, match=r"type domain=\(0.0, 1.0\)"):
        robust.certify(model, batch, 1.0, executed=True)
    with pytest.raises(gl.InputError, match="expected both or neither"):
        robust.certify(model, batch, 1.0, domain=(0.0, 1.0))
    with pytest.raises(gl.InputError, match="expected True, False or 'eps'"):
        robust.certify(model, batch, 1.0, local="all")
    with pytest.raises(gl.InputError, match="execution"):
        robust.radii(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), 1.0, execution=torch.ones(2))
