"""Parts of one value that meet again, and what is known of values joined: against Jacobians and pairs of inputs, by torch alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramlip.network import compose
from gramlip.network.audit import audit
from test_network import steepest
from test_rules import Map


def merging(x: Tensor) -> Tensor:
    """The patch merging of Swin: four strided slices."""
    return torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)


def sorted_thrice(x: Tensor) -> Tensor:
    for _ in range(3):
        a, b = x.chunk(2, 1)
        x = torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)
    return x


def ends(x: Tensor, dim: int = 2) -> Tensor:
    """The largest and the least of groups."""
    return torch.cat([x.amax(dim), x.amin(dim)], 1)


def coupling(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([a, b + 0.5 * torch.tanh(a)], 1)


def shuffled(x: Tensor) -> Tensor:
    """The units of ShuffleNet: channels in two groups that change places, then one half through a layer."""
    a, b = x.chunk(2, 1)
    mixed = torch.cat([a, b.relu()], 1).view(len(x), 2, 2, 3, 3).transpose(1, 2).contiguous().view(len(x), 4, 3, 3)
    a, b = mixed.chunk(2, 1)
    return torch.cat([a, 2 * b.relu()], 1)


COUPLED = math.sqrt((2.25 + math.sqrt(2.25**2 - 4)) / 2)  # the norm of [[1, 0], [1/2, 1]]
TIGHT: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], float]] = {
    # name: (call, shape of a sample, its exact constant)
    "slices": (lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1), (4,), 1.0),
    "swapped": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), (4,), 1.0),
    "stacked": (lambda x: torch.stack([x[:, i] for i in range(4)]), (4,), 1.0),
    "patches merged": (merging, (4, 4, 3), 1.0),
    "views between": (lambda x: torch.cat([y.transpose(1, 2) for y in x.reshape(1, 2, 3, 4).unbind(1)], 1), (6, 4), 1.0),
    "channels": (lambda x: torch.cat([3 * x[:, :2], x[:, 2:].tanh()], 1), (4, 3, 3), 3.0),
    "channels shuffled": (shuffled, (4, 3, 3), 2.0),
    "an entry twice": (lambda x: torch.cat([x[:, :3], x[:, 2:]], 1), (4,), math.sqrt(2)),
    "an index": (lambda x: torch.cat([x[:, [3, 1]], 2 * x[:, [0, 2]]], 1), (4,), 2.0),
    "additive coupling": (coupling, (4,), COUPLED),
    "coupling twice": (lambda x: coupling(coupling(x).flip(1)), (4,), COUPLED**2),
    "halves added": (lambda x: x[:, :2] + x[:, 2:], (4,), math.sqrt(2)),
    "max and min of chunks": (sorted_thrice, (4,), 1.0),
    "max and min of slices": (
        lambda x: torch.stack([torch.maximum(x[:, ::2], x[:, 1::2]), torch.minimum(x[:, ::2], x[:, 1::2])], 2).flatten(1),
        (6,),
        1.0,
    ),
    "min and max, swapped": (lambda x: torch.cat([torch.minimum(*x.chunk(2, 1)), torch.maximum(*x.chunk(2, 1)[::-1])], 1), (6,), 1.0),
    "amax and amin": (lambda x: ends(x.reshape(1, 3, 2)), (6,), 1.0),
    "of three": (lambda x: ends(x.reshape(1, 2, 3)), (6,), 1.0),
    "max and min with places": (lambda x: (lambda y: torch.stack([y.max(2)[0], y.min(2)[0]], 1))(x.reshape(1, 3, 2)), (6,), 1.0),
    "along different axes": (lambda x: torch.cat([x.amax(1), x.amin(2)], 1), (2, 2), math.sqrt(2)),
    "groups of one": (lambda x: ends(x.reshape(1, 4, 1)), (4,), math.sqrt(2)),
    "twice the maximum": (lambda x: torch.cat([torch.maximum(*x.chunk(2, 1))] * 2, 1), (4,), math.sqrt(2)),
    "sorted and one more": (lambda x: torch.cat([ends(x.reshape(1, 2, 2)), 2 * x.reshape(1, 4)], 1), (4,), math.sqrt(5)),
    "crelu": (lambda x: torch.cat([F.relu(x), F.relu(-x)], 1), (4,), 1.0),
    "crelu of parts": (lambda x: torch.cat([F.relu(y) for y in (x[:, :2], -x[:, :2], x[:, 2:])], 1), (4,), 1.0),
    "crelu shifted": (lambda x: torch.cat([F.relu(x + 1), F.relu(-x + 1)], 1), (4,), math.sqrt(2)),
    "value and relu": (lambda x: torch.stack([x, F.relu(x)]), (4,), math.sqrt(2)),
    "sine and cosine": (lambda x: torch.cat([f(k * x) for k in (1.0, 2.0) for f in (torch.sin, torch.cos)], 1), (4,), math.sqrt(5)),
}


@pytest.mark.parametrize("name", TIGHT)
def test_parts_and_pairs_have_their_exact_constant(name: str) -> None:
    call, shape, exact = TIGHT[name]
    upper = audit(Map(call).eval(), shape, effort=-1).upper
    assert steepest(Map(call), shape, points=30) <= upper * (1 + 1e-9)
    assert exact * (1 - 1e-9) <= upper <= exact * (1 + 1e-9)


class Coupling(nn.Module):
    """Glow: a permutation, a split, a shift of one half by a network of the other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.mix = nn.Conv2d(channels, channels, 1)
        self.shift = nn.Sequential(nn.Conv2d(half, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.mix(x).chunk(2, 1)
        return torch.cat([a, b + self.shift(a)], 1)


def test_a_flow_lies_above_its_jacobian_and_below_the_root_of_squares() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Coupling(4), Coupling(4)).eval()
    report = audit(model, (4, 6, 6), effort=-1)
    assert steepest(model, (4, 6, 6), points=6) <= report.upper
    norm = lambda layer: float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2))  # noqa: E731
    for block in model:
        assert norm(block.mix) > 0
    assert sum(row.share or 0.0 for row in report.layers) <= 1.0 + 1e-6


def program(seed: int) -> tuple[nn.Module, int]:
    """A random network of slices, joins, sums, maxima, matrices and activations of values of four entries and fewer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    plan = [(draw(8), draw(1000), draw(1000), torch.randn(12, 12, generator=generator, dtype=torch.float64) / 2) for _ in range(14)]

    def call(x: Tensor) -> Tensor:
        values = [x]
        for kind, i, j, matrix in plan:
            a, b = values[i % len(values)], values[j % len(values)]
            n, m = a.shape[1], b.shape[1]
            least = min(n, m)
            if kind == 0 and n > 1:
                values += a.split([n // 2, n - n // 2], 1)
            elif kind == 1 and n > 1:
                values += [a[:, ::2], a[:, 1::2]]
            elif kind == 2 and n + m <= 12:
                values.append(torch.cat([a, b], 1))
            elif kind == 3:
                values.append(a[:, :least] + b[:, :least])
            elif kind == 4:
                values.append(torch.cat([torch.maximum(a[:, :least], b[:, :least]), torch.minimum(a[:, :least], b[:, :least])], 1)[:, :12])
            elif kind == 5:
                values.append(a @ matrix[:n, : 1 + j % 6])
            elif kind == 6:
                values.append(torch.cat([F.relu(a), F.relu(-b)], 1)[:, :12])
            else:
                values.append(torch.tanh(a).flip(1))
        return torch.cat(values[-4:], 1)

    return Map(call).eval(), 6


@pytest.mark.parametrize("seed", range(24))
def test_random_networks_of_parts_lie_above_their_jacobians(seed: int) -> None:
    model, n = program(seed)
    report = audit(model, torch.zeros(1, n, dtype=torch.float64), effort=-1)
    assert steepest(model, (n,), points=60) <= report.upper * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_the_largest_eigenvalue_of_a_form_lies_above_eigvalsh_and_close(seed: int) -> None:
    generator = np.random.default_rng(seed)
    n = 1 + seed % 9
    matrix = generator.random((n, n)) * 10.0 ** generator.integers(-60 if seed % 2 else -2, 1, (n, n))
    form = matrix + matrix.T
    form[generator.random((n, n)) < 0.3] = 0.0
    form = np.maximum(form, form.T)
    truth = float(np.linalg.eigvalsh(form).max(initial=0.0))
    assert truth * (1 - 1e-12) <= compose.perron_bound(form) <= truth * (1 + 1e-3) + 1e-250


def test_parts_that_are_too_many_are_the_root_of_squares() -> None:
    count = compose.PARTS + 2
    upper = audit(Map(lambda x: torch.stack([x[:, i] for i in range(count)])).eval(), (count,), effort=-1).upper
    assert 1.0 <= upper <= math.sqrt(count) + 1e-9


@pytest.mark.parametrize("ends", [("max",), ("max", "min")])
def test_the_places_of_the_largest_entries_jump_beside_their_values(ends: tuple[str, ...]) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found = [getattr(x, end)(1, keepdim=True) for end in ends]
            return torch.cat([*(values for values, _ in found), found[0][1]], 1)

    assert audit(Model(), (4,)).upper == math.inf
