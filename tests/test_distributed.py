"""Processes over gloo: DDP, FSDP2, weights in shards, shared bounds and the shared penalty, each against one process alone."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gramlip as gl
from gramlip import distributed
from gramlip import nn as gnn


def net(exact: bool) -> nn.Sequential:
    """Normalised; the tracked form stands still in eval mode, so that every process sees one function of the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 4))
    return gnn.spectral_norm_(model, torch.zeros(1, 2, 4, 4), exact=exact).train(exact)


def batch() -> torch.Tensor:
    return torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def alone(exact: bool) -> list[torch.Tensor]:
    model = net(exact)
    (model(batch()[:2]).square().mean() / 2 + model(batch()[2:]).square().mean() / 2).backward()
    return [p.grad for p in model.parameters()]


def ddp(rank: int) -> None:
    for exact in (True, False):
        model = net(exact)
        wrapped = DistributedDataParallel(model)
        wrapped(batch()[2 * rank : 2 * rank + 2]).square().mean().backward()
        for mine, expected in zip(model.parameters(), alone(exact), strict=True):
            assert torch.allclose(mine.grad, expected, atol=1e-6)


def ddp_tracked(rank: int) -> None:
    wrapped = DistributedDataParallel(net(exact=False).train())
    optimiser = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(5):
        optimiser.zero_grad()
        wrapped(batch()[2 * rank : 2 * rank + 2]).square().mean().backward()
        optimiser.step()
    for name, mine in wrapped.module.state_dict().items():
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, mine), name


def fsdp(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    for exact in (True, False):
        model = net(exact)
        whole = model(batch()).detach()
        for layer in (model[0], model[2], model[4], model):
            fully_shard(layer)
        assert torch.allclose(model(batch()), whole, atol=1e-6)
        model(batch()[2 * rank : 2 * rank + 2]).square().mean().backward()
        for mine, expected in zip(model.parameters(), alone(exact), strict=True):
            assert torch.allclose(mine.grad.full_tensor(), expected, atol=1e-6)
    plain = nn.Linear(8, 6)
    expected = gl.bound(plain.weight)
    fully_shard(plain)  # its hooks gather the weight, and change nothing
    assert distributed.bounds([plain]) == [expected]


def wrapped(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    torch.manual_seed(4)
    linear = nn.Linear(8, 6)
    expected = gl.bound(linear)
    assert gl.bound(DistributedDataParallel(linear)) == expected
    for original in (True, False):
        whole = FullyShardedDataParallel(copy.deepcopy(linear), use_orig_params=original, device_id=torch.device("cpu"))
        assert distributed.bounds([whole, torch.eye(2)])[0] == expected
        for call in (gl.bound, lambda m: gl.audit(m, (8,)), gnn.spectral_norm, lambda m: gnn.LipschitzPenalty(nn.Sequential(m))):
            with pytest.raises(gl.InputError, match="keeps its weights in shards"):
                call(whole)
    fully_shard(linear)
    for call in (gl.bound, lambda m: gl.audit(m, (8,))):
        with pytest.raises(gl.InputError, match=r"in shards.*gramlip\.distributed\.bounds"):
            call(linear)


def sharded(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(3)
    weight = torch.randn(6, 8)
    for exact in (True, False):
        linear = gnn.spectral_norm(nn.Linear(8, 6), exact=exact).eval()
        linear.weight = weight
        expected = linear.weight.detach()
        chain = linear.parametrizations.weight[0]
        split = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        value = chain(split)
        assert isinstance(value, DTensor)
        assert value.to_local().shape == (3, 8)
        assert torch.allclose(value.full_tensor(), expected, atol=1e-6)
        value.square().sum().backward()
        whole = weight.clone().requires_grad_()
        chain(whole).square().sum().backward()
        assert torch.allclose(split.grad.full_tensor(), whole.grad, atol=1e-5)
    plain = nn.Linear(8, 6)
    plain.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(1)]))
    (found,) = distributed.bounds([plain])
    assert found == gl.bound(weight)


def shared_bounds(rank: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3), (nn.Conv2d(2, 3, 3), 8), torch.eye(3), nn.Conv1d(2, 2, 3)]
    everything = distributed.bounds(layers, rtol=1e-3)
    assert everything == [gl.bound(*(x if isinstance(x, tuple) else (x,)), rtol=1e-3) for x in layers]
    with pytest.raises(gl.InputError, match="NaN"):  # on both ranks, though one of them met it
        distributed.bounds([nn.Linear(4, 3), torch.full((2, 2), float("nan"))])


def shared_penalty(rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(3, 3))
    whole = gnn.LipschitzPenalty(model, threshold=0.1)()
    expected = torch.autograd.grad(whole, [m.weight for m in model])
    part = gnn.LipschitzPenalty(model, threshold=0.1, shared=True)()
    grads = torch.autograd.grad(part, [m.weight for m in model], allow_unused=True, materialize_grads=True)
    for g, e in zip(grads, expected, strict=True):
        dist.all_reduce(g)
        assert torch.allclose(g / 2, e, atol=1e-5)
    total = part.detach().clone()
    dist.all_reduce(total)
    assert torch.allclose(total / 2, whole)
    assert set(gnn.LipschitzPenalty(model, shared=True).certify()) == {"0", "1", "2"}


def sharded_penalty(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(4, 4))
    whole = gnn.LipschitzPenalty(model, threshold=0.1)()
    expected = torch.autograd.grad(whole, [m.weight for m in model])
    fully_shard(model)
    part = gnn.LipschitzPenalty(model, threshold=0.1)()
    part.backward()
    assert torch.allclose(part, whole)
    for layer, e in zip(model, expected, strict=True):
        assert torch.allclose(layer.weight.grad.full_tensor(), e, atol=1e-6)


def held(weight: torch.Tensor, mesh, placements, rtol: float = 1e-6) -> str:
    """The interval of a matrix in shards holds its norm, is as narrow as was asked for, and is that of one process but for rounding."""
    from torch.distributed.tensor import distribute_tensor

    (found,) = distributed.bounds([distribute_tensor(weight, mesh, placements)], rtol=rtol)
    norm = float(torch.linalg.matrix_norm(weight.to(torch.complex128 if weight.is_complex() else torch.float64), 2))
    alone = gl.bound(weight, rtol=rtol)
    assert found.lower <= norm * (1 + 1e-12)
    assert found.upper >= norm * (1 - 1e-12)
    assert found.rtol <= rtol
    assert found.lower == pytest.approx(alone.lower, rel=1e-9)
    assert found.upper == pytest.approx(alone.upper, rel=1e-9)
    return found.because


def in_parts(rank: int) -> None:
    """Shards of rows and of columns, of any dtype, scale and shape, some of them empty."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    generator = torch.Generator().manual_seed(5)
    for shape in ((7, 10), (10, 7), (1, 5), (5, 1), (1, 1), (33, 65)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64):
            weight = torch.randn(*shape, dtype=torch.complex64, generator=generator)
            weight = weight if dtype.is_complex else weight.real.to(dtype)
            for axis in (0, 1):
                found = held(weight, mesh, [Shard(axis)])
                assert f"Gram matrices of {ranks} ranks, added" in found, (shape, dtype, axis, found)
    held(torch.randn(9, 12, dtype=torch.float64, generator=generator) * 1e-200, mesh, [Shard(1)])
    scales = torch.logspace(-300, 0, 12, dtype=torch.float64)  # the rows of ranks on different scales
    held(torch.randn(12, 3, dtype=torch.float64, generator=generator) * scales[:, None], mesh, [Shard(0)])
    zero, unit = (distribute_tensor(w, mesh, [Shard(0)]) for w in (torch.zeros(5, 4), torch.eye(6)))
    torch.manual_seed(8)
    plain = nn.Linear(4, 4)
    assert distributed.bounds([zero, plain, unit])[0].upper == 0.0
    found = distributed.bounds([plain, unit, (nn.Conv2d(1, 1, 3), 5), unit, zero, unit], rtol=1e-3)
    assert [b.upper for b in found[1::2]] == [found[1].upper] * 3
    assert found[0] == gl.bound(plain, rtol=1e-3)
    assert "added" not in distributed.bounds([distribute_tensor(torch.eye(3), mesh, [Replicate()])])[0].because
    bad = torch.ones(6, 6)
    bad[-1, -1] = torch.nan
    with pytest.raises(gl.InputError, match="NaN"):  # on all ranks, though one of them holds it
        distributed.bounds([distribute_tensor(bad, mesh, [Shard(0)])])
    with pytest.raises(gl.InputError, match="rtol"):
        distributed.bounds([unit], rtol=-1.0)


def on_meshes(rank: int) -> None:
    """Meshes of two axes, of some of the ranks, and FSDP2 on tensor parallelism."""
    import itertools

    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    generator = torch.Generator().manual_seed(6)
    for placements in itertools.product((Shard(0), Shard(1), Replicate()), repeat=2):
        for shape in ((7, 10), (10, 7)):
            held(torch.randn(*shape, generator=generator), mesh, list(placements))
    weight = torch.randn(6, 9, generator=generator)
    some = DTensor.from_local(weight[:3] if rank == 1 else weight[3:], DeviceMesh("cpu", [1, 2]), [Shard(0)], run_check=False)
    found, one = distributed.bounds([some, torch.eye(2)])
    assert found.upper == pytest.approx(gl.bound(weight).upper)
    assert one == gl.bound(torch.eye(2))
    bad = DTensor.from_local(torch.full((2, 3), torch.nan if rank == 1 else 1.0), DeviceMesh("cpu", [1, 2]), [Shard(0)], run_check=False)
    with pytest.raises(gl.InputError, match="NaN"):  # on the ranks outside of the mesh, too
        distributed.bounds([bad])
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8))
    expected = [gl.bound(layer).upper for layer in model]
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    for layer in model:
        fully_shard(layer, mesh=mesh["data"])
    assert [b.upper for b in distributed.bounds(list(model))] == pytest.approx(expected)


def a_failing_rank(rank: int) -> None:
    """An error in the rows of one rank, or in the certificate, is the same error on all, and nobody waits for the others."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    split = distribute_tensor(torch.eye(8), mesh, [Shard(0)])

    def failing(*_: object) -> None:
        msg = "none is left"
        raise MemoryError(msg)

    for owner, name in ((distributed.Part, "gram"), (distributed.Part, "exponent"), (distributed, "certify_sum")):
        with pytest.MonkeyPatch.context() as patch:
            if rank == (0 if name == "certify_sum" else 1):
                patch.setattr(owner, name, failing)
            with pytest.raises(MemoryError, match="none is left"):
                distributed.bounds([split])
    assert distributed.bounds([split])[0].upper >= 1.0


CHECKS = {check.__name__: check for check in (ddp, ddp_tracked, fsdp, wrapped, sharded, shared_bounds, shared_penalty, sharded_penalty)}
PARTED = {2: (in_parts, a_failing_rank), 4: (in_parts, a_failing_rank, on_meshes)}


def main(rank: int, store: str, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    for check in CHECKS.values() if ranks == 2 else ():
        dist.barrier()
        check(rank)
    distributed.IN_PARTS = 0
    for check in PARTED[ranks]:
        dist.barrier()
        check(rank)
    dist.destroy_process_group()
    os._exit(0)  # every check has passed; the interpreter's own end aborts one time in twenty, in the threads of gloo


@pytest.mark.parametrize("count", [2, 4])
def test_processes(tmp_path: Path, count: int) -> None:
    command = [sys.executable, "-W", "ignore", __file__]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([*command, str(r), str(tmp_path / "store"), str(count)], env=environment, stderr=subprocess.PIPE, text=True)
        for r in range(count)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * count, "\n".join(outputs)


def test_a_checkpoint_of_70b_is_shared_evenly() -> None:
    """docs/scale.md"""
    block = [(8192, 8192)] * 2 + [(1024, 8192)] * 2 + [(28672, 8192)] * 2 + [(8192, 28672)]
    costs = [distributed.cost(torch.empty(shape, device="meta")) for shape in [*block * 80, (128256, 8192)]]
    for ranks in (2, 8, 64):
        shares = [distributed.share(costs, ranks=ranks, rank=rank) for rank in range(ranks)]
        assert sorted(i for part in shares for i in part) == list(range(len(costs)))
        assert max(sum(costs[i] for i in part) for part in shares) <= 1.01 * sum(costs) / ranks


def test_alone_is_one_rank() -> None:
    assert distributed.world() == 1
    assert distributed.bounds([torch.eye(2)])[0].upper >= 1.0


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
