"""What an audit may search: more effort never gives a larger upper side, time bounds it, and every phase is shown with its name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gramlip.errors import InputError
from gramlip.network import Effort, coupling
from gramlip.network.audit import audit
from gramlip.network.lower_bound import CROP
from test_network import models


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10))


def convolutions(channels: int = 3) -> nn.Module:
    inner = [m for _ in range(2) for m in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), *inner, nn.Conv2d(channels, 1, 3, padding=1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (1, 28, 28)),
    "deep and narrow": (lambda: nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(6, 6), nn.ReLU()))), (6,)),
    "convolutions": (convolutions, (1, 9, 8)),
    "residual": (lambda: models.CifarResNet(1, (2, 4, 6)), (3, 9, 9)),
    "linear": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(30, 4)), (2, 10)),
}


@pytest.mark.parametrize(("where", "seed"), [("entries", 0), ("tori", 0), ("tori", 1)])
@pytest.mark.parametrize("name", NETWORKS)
def test_more_effort_never_gives_a_larger_upper_side(name: str, where: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling, "BUDGET", 3e7)
    monkeypatch.setattr(coupling, "NEWTON", 1e9)
    monkeypatch.setattr(coupling, "STEPS", 12)
    if where == "tori":
        monkeypatch.setattr(coupling, "ENTRIES", 4)
        monkeypatch.setattr(coupling, "SMALL", 0)
        monkeypatch.setattr(coupling, "CHEAP", 0.0)
    build, shape = NETWORKS[name]
    torch.manual_seed(seed)
    model = models.settled(build(), torch.zeros(1, *shape))
    reports = [audit(model, shape, effort=effort) for effort in (-1, 0, 1, 2, 3)]
    uppers = [report.upper for report in reports]
    assert uppers == sorted(uppers, reverse=True)
    assert max(report.lower for report in reports) <= uppers[-1]


@given(
    st.lists(st.tuples(st.floats(0.01, 100.0), st.floats(0.01, 100.0)), min_size=2, max_size=6),
    st.floats(0.01, 100.0),
)
def test_choices_that_are_not_proved_could_not_have_given_less(pairs: list[tuple[float, float]], composed: float) -> None:
    """Whatever choices prove and promise, in any order: more of them give no larger bound, and the result is that of proving all."""
    proved = [p for p, _ in pairs]
    choices = [(promise, bound) for bound, promise in pairs]  # a choice that is its own proof
    found = [coupling._least(choices[:n], float, coupling.KEPT, composed, Effort()) for n in range(1, len(pairs) + 1)]
    assert found == sorted(found, reverse=True)
    counted = [max(p, coupling.KEPT * q) for p, q in pairs if q * coupling.GAIN < composed]
    assert found[-1] == min([math.inf, *counted])
    assert found[-1] >= min([math.inf, *proved])


def test_what_promises_no_gain_is_not_begun_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling, "ENTRIES", 0)
    monkeypatch.setattr(coupling, "CHEAP", 0.0)
    torch.manual_seed(0)
    model = convolutions().eval()
    for name, value, said in (("GAIN", 1e9, "no gain was seen"), ("PROOF", 1.0, "would take too long")):
        with monkeypatch.context() as patch:
            patch.setattr(coupling, name, value)
            report = audit(model, (1, 9, 8), effort=0)
            assert report.upper == audit(model, (1, 9, 8), effort=-1).upper
            assert said in report.network.because  # type: ignore[union-attr]
    assert "not coupled" not in audit(model, (1, 9, 8), effort=0).network.because  # type: ignore[union-attr]


def test_no_time_leaves_composition_and_a_lower_side() -> None:
    torch.manual_seed(0)
    model, begin = perceptron().eval(), time.monotonic()
    report = audit(model, (1, 28, 28), time_limit=0.0, effort=1e6)
    assert time.monotonic() - begin < 30
    assert report.upper == audit(model, (1, 28, 28), effort=-1).upper
    assert report.lower > 0
    assert "the time was up" in report.network.because  # type: ignore[union-attr]


@pytest.mark.parametrize("limit", [-1.0, float("nan"), "1"])
def test_a_time_limit_that_is_none_is_refused(limit: object) -> None:
    with pytest.raises(InputError, match="seconds"):
        audit(nn.Linear(2, 2), (2,), time_limit=limit)  # type: ignore[arg-type]


def test_every_phase_is_shown_with_its_name() -> None:
    seen: list[str] = []

    def watch(names: list[str]) -> list[str]:
        seen.extend(names)
        return names

    audit(convolutions().eval(), (1, 9, 8), effort=0, progress=watch)
    phases = list(dict.fromkeys(name.split(": ")[0] for name in seen))
    assert phases == ["export", "layers", "coupling", "lower side"]
    assert "layers: 0" in seen


class Fixed(nn.Module):
    """Takes one size of input alone."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv, self.weight = nn.Conv2d(1, 1, 3, padding=1), nn.Parameter(torch.randn(1, 1, size, size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x)) * self.weight.detach()


@pytest.mark.parametrize("build", [lambda: convolutions(2), lambda: Fixed(CROP + 8)], ids=["convolutions", "one size alone"])
def test_large_inputs_have_a_lower_side_near_that_of_small_ones(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, n = build().eval(), CROP + 8
    report = audit(model, (1, n, n), effort=-1)
    x = torch.randn(1, 1, n, n, dtype=torch.float64)
    v = torch.randn_like(x)
    double = model.double()
    for _ in range(4):  # power steps on the module itself
        v = v / v.norm()
        value = torch.func.jvp(double, (x,), (v,))[1].detach()
        (v,) = torch.func.vjp(double, x)[1](value)
    assert 0.5 * float(v.detach().norm().sqrt()) <= report.lower <= report.upper
