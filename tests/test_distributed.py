"""Two processes over gloo: DDP, FSDP2, sharded weights, shared bounds and the shared penalty, each against one process alone."""

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


CHECKS = {check.__name__: check for check in (ddp, ddp_tracked, fsdp, wrapped, sharded, shared_bounds, shared_penalty, sharded_penalty)}


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for check in CHECKS.values():
        dist.barrier()
        check(rank)
    dist.destroy_process_group()
    os._exit(0)  # every check has passed; the interpreter's own end aborts one time in twenty, in the threads of gloo


def test_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, __file__]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([*command, str(r), str(tmp_path / "store")], env=environment, stderr=subprocess.PIPE, text=True) for r in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)


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
    main(int(sys.argv[1]), sys.argv[2])
