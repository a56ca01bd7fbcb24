"""Work shared over the ranks of `torch.distributed`: each bounds its share of the layers, and all get every result."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from gramlip.norm.methods import bound
from gramlip.operators.describe import describe
from gramlip.operators.given import is_flat, is_sharded, unwrapped
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Conv, Dense, Ints, Operator

T = TypeVar("T")


def world() -> int:
    """Number of ranks; 1 where no process group is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(costs: Sequence[float], ranks: int | None = None, rank: int | None = None) -> list[int]:
    """Indices of this rank's share: the next dearest item always goes to the rank with least so far. The same on every rank.

    >>> share([1.0, 5.0, 3.0, 2.0], ranks=2, rank=0), share([1.0, 5.0, 3.0, 2.0], ranks=2, rank=1)
    ([1, 0], [2, 3])
    """
    ranks = world() if ranks is None else ranks
    rank = ranked() if rank is None else rank
    load = [0.0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = load.index(min(load))
        load[least] += costs[i]
        shares[least].append(i)
    return shares[rank]


def cost(x: Any) -> float:
    """Work of bounding a layer, in arbitrary units: the blocks of a weight (m, n, *k) are of order min(m, n)."""
    if is_flat(x):
        return 1.0  # its weight may have another shape on each rank
    layer = unwrapped(x) if isinstance(x, nn.Module) else x
    weight = layer if isinstance(layer, Tensor) else getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return 1.0
    m, n = weight.shape[:2]
    return float(m * n * min(m, n) * math.prod(weight.shape[2:]))


def bounds(items: Sequence[Any], **options: Any) -> list[Bound]:
    """`gramlip.bound` of every item, the work shared over the ranks: every rank gets all intervals, in order.

    Args:
        items: modules, operators or matrices, or pairs of one and its input size; the same on every rank. Weights that are DTensors, or
            inside `FullyShardedDataParallel`, are gathered one layer at a time, and kept by the rank that bounds them.
        **options: those of `gramlip.bound`.

    Raises:
        Exception: the first error that any rank met, on every rank.

    >>> import torch
    >>> [b.upper >= 1.0 for b in bounds([torch.eye(3), (nn.Conv2d(1, 1, 3), 8)], rtol=1e-3)][0]
    True
    """
    pairs: list[tuple[Any, Ints | None]] = [item if isinstance(item, tuple) else (item, None) for item in items]
    mine = set(share([cost(x) for x, _ in pairs]))
    done: dict[int, Bound] = {}
    error: Exception | None = None
    for i, (x, size) in enumerate(pairs):
        op = _gathered(x, size)  # every rank takes part, whoever bounds it
        if i in mine and error is None:
            try:
                done[i] = op if isinstance(op, Bound) else bound(op, **options)
            except Exception as caught:  # whatever it is, it is raised again, on every rank
                error = caught
    merged = {i: b for part in gathered(done, error) for i, b in part.items()}
    return [merged[i] for i in range(len(pairs))]


def gathered(value: T, error: Exception | None = None) -> list[T]:
    """The values of all ranks, in their order, on every rank; the first error of any rank is raised on all."""
    every: list[Any] = [(value, error)]
    if world() > 1:
        every = [None] * world()
        dist.all_gather_object(every, (value, error))
    for _, failure in every:
        if failure is not None:
            raise failure
    return [value for value, _ in every]


def ranked() -> int:
    """This rank; 0 where no process group is initialised."""
    return dist.get_rank() if world() > 1 else 0


@contextmanager
def joined() -> Generator[None, None, None]:
    """The ranks that `torchrun` started form a group, over gloo since reports are gathered on the CPU; nothing where there are none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available() or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=timedelta(days=30))  # a rank waits as long as another works
    try:
        yield
    finally:
        dist.destroy_process_group()


def _gathered(x: Any, input_size: Ints | None) -> Operator | Bound:
    """The operator with its whole weight."""
    if is_flat(x):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(x, writeback=False):
            op = _gathered(x.module, input_size)
            return replace(op, weight=op.weight.detach().clone()) if isinstance(op, Dense | Conv) else op
    op = describe(x) if input_size is None else describe(x, input_size)
    weight = getattr(op, "weight", None)
    if not isinstance(weight, Tensor) or whole(weight) is weight:
        return op
    return replace(op, weight=whole(weight))  # type: ignore[type-var]


def whole(weight: Tensor) -> Tensor:
    """The full tensor of a DTensor, a collective operation; a plain tensor is returned as it is."""
    return weight.full_tensor() if is_sharded(weight) else weight  # type: ignore[attr-defined]
