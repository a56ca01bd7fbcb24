"""What a call writes, and where: in-place calls on parts of values, scatters, sums at fixed places, samples of a grid."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gramlip as gl
from gramlip.errors import UnsupportedError
from gramlip.network.graph import export
from rule_cases import Map


def matrix(call: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """Of a linear call with constants, in float64, by a basis pushed through torch itself."""
    basis = torch.eye(torch.Size(shape).numel(), dtype=torch.float64)
    zero = call(torch.zeros(1, *shape, dtype=torch.float64))
    return torch.stack([(call(row.reshape(1, *shape)) - zero).reshape(-1) for row in basis], 1)


def in_parts(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], 6, 4, dtype=x.dtype)
    y[:, :3] = 2 * x
    y[:, 3:] = x.flip(1)
    return y


def over_what_is_read(x: Tensor) -> Tensor:
    y = x.clone()
    row = y[:, 0]
    y[:, 0] = 3 * y[:, 1]
    return y + row[:, None]


def through_views_of_views(x: Tensor) -> Tensor:
    y = 2 * x
    part = y.transpose(1, 2)[:, 1:3].unsqueeze(1)
    part[..., 0] += 5 * x[:, 0, :2].reshape(1, 1, 2)
    y.mul_(2)
    return torch.cat([y.flatten(1), part.flatten(1)], 1)


def by_strides(x: Tensor) -> Tensor:
    y = torch.zeros(1, 6, 8, dtype=x.dtype)
    y[:, ::2, 1::2] = x
    y[:, 1::2] += y[:, ::2]
    return y


def by_indices(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, torch.tensor([2, 0])] = x[:, [1, 1]]
    y[:, :, torch.tensor([True, False, False, False])] = 4.0
    return y


def in_a_loop(x: Tensor) -> Tensor:
    out = torch.empty(1, 3, 4, dtype=x.dtype)
    state = torch.zeros(1, 4, dtype=x.dtype)
    for i in range(3):
        state += x[:, i]
        out[:, i] = state
    return out


def split_and_joined(x: Tensor) -> Tensor:
    a, b = (2 * x).split([1, 2], 1)
    a += 3 * b[:, :1]
    b[:, 1] = 0.0
    return torch.cat([b, a], 1)


def einsum_is_a_view(x: Tensor) -> Tensor:
    y = 1 * x
    torch.einsum("bij->bji", y)[:, 0] *= 7
    return y


LINEAR = [
    in_parts,
    over_what_is_read,
    through_views_of_views,
    by_strides,
    by_indices,
    in_a_loop,
    split_and_joined,
    einsum_is_a_view,
    lambda x: torch.zeros(1, 3, 4, dtype=x.dtype).scatter_add(2, torch.tensor([0, 1, 1, 1]).expand(1, 3, 4), x),
    lambda x: x.scatter(1, torch.tensor([[[2, 0, 1, 0]]]), 3 * x),
    lambda x: torch.zeros(1, 3, 9, dtype=x.dtype).index_add(2, torch.tensor([8, 0, 8, 8]), x, alpha=-2),
    lambda x: x.index_put((torch.tensor([0, 0, 0]), torch.tensor([0, 1, 1])), 2 * x[:, 2], accumulate=True),
    lambda x: x.index_put((torch.tensor([0, 0]), torch.tensor([0, 1])), x[0, 2, :1]),
    lambda x: x.scatter_reduce(1, torch.tensor([[[0] * 4, [0] * 4, [1] * 4]]), 5 * x, "mean"),
    lambda x: x.masked_fill(torch.eye(3, 4).bool(), 3.0).cumsum(1),
    lambda x: torch.linalg.cross(x.transpose(1, 2), torch.tensor([[3.0, -1.0, 2.0]], dtype=x.dtype).expand(1, 4, 3)),
    lambda x: torch.kron(torch.tensor([[2.0, -1.0]], dtype=x.dtype), x[0]),
    lambda x: torch.diff(torch.tensordot(x, torch.ones(3, 2, dtype=x.dtype), dims=([1], [0])), dim=1),
    lambda x: torch.einsum("bii->bi", x[:, :, :3]),
    lambda x: torch.einsum("bij,bij->bi", x, torch.linspace(-1, 2, 4, dtype=x.dtype).expand(1, 1, 4)),
    lambda x: F.bilinear(x, torch.ones(1, 3, 2, dtype=x.dtype), torch.linspace(-1, 1, 40, dtype=x.dtype).reshape(5, 4, 2)),
]


@pytest.mark.parametrize("call", LINEAR, ids=lambda call: call.__name__)
def test_an_audit_is_not_below_the_matrix_and_not_far_above(call: Callable[[Tensor], Tensor]) -> None:
    truth = float(torch.linalg.matrix_norm(matrix(call, (3, 4)), 2))
    report = gl.audit(Map(call).eval(), torch.zeros(1, 3, 4, dtype=torch.float64))
    assert report.lower <= truth * (1 + 1e-9)
    assert truth <= report.upper * (1 + 1e-12)
    assert report.upper <= 3 * truth


@pytest.mark.parametrize("call", LINEAR[:8], ids=lambda call: call.__name__)
def test_the_graph_without_in_place_calls_is_the_function(call: Callable[[Tensor], Tensor]) -> None:
    """The lower side evaluates it: every entry is what torch's own call gives."""
    from gramlip.network.lower_bound import function
    from gramlip.network.rules import lower

    program = export(Map(call).eval(), (torch.zeros(1, 3, 4, dtype=torch.float64),))
    assert not program.refused
    x = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    run = function(program, [(1, 3, 4)], lower(program).computed)
    assert torch.equal(run(x.reshape(-1)), call(x).reshape(-1))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen[:2] += x[0, :2]
        return x + self.seen


def test_a_buffer_is_not_written() -> None:
    with pytest.raises(UnsupportedError, match="writes into a weight or buffer"):
        gl.audit(Counts().eval(), (4,))


def test_views_whose_entries_overlap_are_not_written() -> None:
    """Of overlapping windows torch multiplies what two of them share twice: by 9, where each of them says 3."""

    def call(x: Tensor) -> Tensor:
        y = x.clone()
        y.unfold(1, 2, 1).mul_(3)
        return y

    assert float(torch.linalg.matrix_norm(matrix(call, (4,)), 2)) == 9.0
    with pytest.raises(UnsupportedError, match="several entries of a view share"):
        gl.audit(Map(call).eval(), (4,))

    def apart(x: Tensor) -> Tensor:
        y = x.clone()
        y.unfold(1, 2, 2).mul_(3)
        return y

    assert gl.audit(Map(apart).eval(), (4,)).upper == pytest.approx(3.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.scatter(1, torch.tensor([[0, 0]]), x),
        lambda x: x.index_copy(1, torch.tensor([1, 1]), x[:, :2]),
        lambda x: x.index_put((torch.tensor([0, 0]), torch.tensor([1, 1])), x[0, :2]),
    ],
)
def test_a_place_that_is_named_twice_is_refused(call: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedError, match="named twice"):
        gl.audit(Map(call).eval(), (4,))


GRIDS: dict[str, Tensor] = {
    "spread": torch.linspace(-1.3, 1.3, 18).reshape(1, 3, 3, 2),
    "gathered": torch.full((1, 4, 4, 2), 0.1) + 0.02 * torch.linspace(-1, 1, 32).reshape(1, 4, 4, 2),
    "halves": torch.tensor([-0.5, 0.0, 0.5, 1.0]).repeat(4).reshape(1, 4, 2, 2),
}


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("name", GRIDS)
def test_samples_of_a_fixed_grid(name: str, mode: str, padding: str) -> None:
    grid = GRIDS[name].double()

    def call(x: Tensor) -> Tensor:
        return F.grid_sample(x, grid, mode, padding, align_corners=False)

    truth = float(torch.linalg.matrix_norm(matrix(call, (1, 4, 5)), 2))
    upper = gl.audit(Map(call).eval(), torch.zeros(1, 1, 4, 5, dtype=torch.float64), effort=-1).upper
    assert truth <= upper * (1 + 1e-12)
    assert upper <= 2.1 * truth + 1e-9


@pytest.mark.parametrize("order", [1.0, 1.5, 2.0, 3.0, float("inf")])
def test_norms_of_any_order_and_distances(order: float) -> None:
    points = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    for call in (
        lambda x: torch.linalg.vector_norm(x, order, -1),
        lambda x: torch.cdist(x, points, order),
        lambda x: torch.cdist(x, 2 * x, order),
    ):
        upper = gl.audit(Map(call).eval(), (5, 3), effort=-1).upper
        for seed in range(10):
            x = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(seed))
            jacobian = torch.autograd.functional.jacobian(call, x).reshape(-1, 15)
            assert float(torch.linalg.matrix_norm(jacobian, 2)) <= upper * (1 + 1e-5)
