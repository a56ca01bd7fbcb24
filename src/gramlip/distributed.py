"""Work shared over the ranks of `torch.distributed`: each bounds its share of the layers, and all get every result."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gramlip.norm.certify import certify_sum
from gramlip.norm.gram_symbol import Part, SummedGram
from gramlip.norm.methods import bound, check_rtol
from gramlip.numerics import rounding as rd
from gramlip.operators.describe import describe
from gramlip.operators.given import is_flat, is_sharded, unwrapped
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Conv, Dense, Ints, Operator

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
IN_PARTS = 1 << 22  # matrices in shards with more entries stay in shards; smaller ones are gathered


# ---- ranks ---------------------------------------------------------------------------------------------------------------


def world() -> int:
    """Number of ranks; 1 where no process group is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def ranked() -> int:
    """This rank; 0 where no process group is initialised."""
    return dist.get_rank() if world() > 1 else 0


def backends(*, cuda: bool) -> str:
    """The backends of the group that `joined` forms: tensors are sent from where they lie, reports over gloo.

    >>> backends(cuda=False), backends(cuda=True)
    ('gloo', 'cpu:gloo,cuda:nccl')
    """
    return "cpu:gloo,cuda:nccl" if cuda else "gloo"


@contextmanager
def joined() -> Generator[None, None, None]:
    """The ranks that `torchrun` started form a group; nothing where there are none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available() or dist.is_initialized():
        yield
        return
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group(backends(cuda=cuda), timeout=timedelta(days=30))  # a rank waits as long as another works
    try:
        yield
    finally:
        dist.destroy_process_group()


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


def everywhere(make: Callable[[], T]) -> list[T]:
    """The results of `make` on all ranks, in their order, on every rank; the first error of any rank is raised on all."""
    value: Any = None
    error: Exception | None = None
    try:
        value = make()
    except Exception as caught:  # whatever it is, it is raised again, on every rank
        error = caught
    return gathered(value, error)


def share(costs: Sequence[float], ranks: int | None = None, rank: int | None = None, busy: Sequence[float] = ()) -> list[int]:
    """Indices of this rank's share: the next dearest item always goes to the rank with least so far. The same on every rank.

    `busy` is the work that each rank has already.

    >>> share([1.0, 5.0, 3.0, 2.0], ranks=2, rank=0), share([1.0, 5.0, 3.0, 2.0], ranks=2, rank=1)
    ([1, 0], [2, 3])
    """
    ranks = world() if ranks is None else ranks
    rank = ranked() if rank is None else rank
    load = list(busy) or [0.0] * ranks
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


# ---- bounds --------------------------------------------------------------------------------------------------------------


def bounds(items: Sequence[Any], **options: Any) -> list[Bound]:
    """`gramlip.bound` of every item, the work shared over the ranks: every rank gets all intervals, in order.

    Args:
        items: modules, operators or matrices, or pairs of one and its input size; the same on every rank. Matrices that are DTensors
            of more than `IN_PARTS` entries stay in their shards: the Gram matrices of the shards are added up. Other weights that are
            DTensors, or inside `FullyShardedDataParallel`, are gathered one layer at a time, and kept by the rank that bounds them.
        **options: those of `gramlip.bound`.

    Raises:
        Exception: the first error that any rank met, on every rank.

    >>> import torch
    >>> [b.upper >= 1.0 for b in bounds([torch.eye(3), (nn.Conv2d(1, 1, 3), 8)], rtol=1e-3)][0]
    True
    """
    pairs: list[tuple[Any, Ints | None]] = [item if isinstance(item, tuple) else (item, None) for item in items]
    apart = {i: op for i, (x, size) in enumerate(pairs) if (op := _in_parts(x, size, options)) is not None}
    done, busy = _bounded_in_parts(apart, options.get("rtol", 1e-2))
    rest = [i for i in range(len(pairs)) if i not in apart]
    mine = {rest[k] for k in share([cost(pairs[i][0]) for i in rest], busy=busy)}
    error: Exception | None = None
    for i in rest:
        op = _gathered(*pairs[i])  # every rank takes part, whoever bounds it
        if i in mine and error is None:
            try:
                done[i] = op if isinstance(op, Bound) else bound(op, **options)
            except Exception as caught:  # whatever it is, it is raised again, on every rank
                error = caught
    merged = {i: b for part in gathered(done, error) for i, b in part.items()}
    return [merged[i] for i in range(len(pairs))]


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


# ---- matrices in parts ---------------------------------------------------------------------------------------------------
#
# A matrix whose rows lie on several ranks: each rank forms the Gram matrix of its rows, the sum is that of the matrix, and one
# rank certifies it. docs/theory.md#matrices-in-parts; the rounding of the sum: docs/rounding.md#r11-sums-over-ranks.


def sharded(shape: tuple[int, int], read: Callable[[int, int, int], Tensor]) -> Tensor:
    """A matrix as a DTensor: every rank has its part of the longer axis, `read(axis, start, stop)`, on its GPU if it has one.

    Raises:
        Exception: the first error that any rank met in reading, on every rank.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    axis = 0 if shape[0] >= shape[1] else 1
    counts, rank = _chunks(shape[axis], world()), ranked()
    start, kind, local = sum(counts[:rank]), "cuda" if torch.cuda.is_available() else "cpu", list[Tensor]()
    everywhere(lambda: local.append(read(axis, start, start + counts[rank]).contiguous().to(kind)))
    mesh = init_device_mesh(kind, (world(),))
    return DTensor.from_local(local[0], mesh, [Shard(axis)], run_check=False, shape=torch.Size(shape), stride=(shape[1], 1))


def _in_parts(x: Any, input_size: Ints | None, options: Mapping[str, Any]) -> Dense | None:
    """The matrix, if it is large and in shards, and its interval is to be certified."""
    if is_flat(x) or options.get("method", "certify") != "certify":
        return None
    layer = unwrapped(x) if isinstance(x, nn.Module) else x
    if not is_sharded(layer if isinstance(layer, Tensor) else getattr(layer, "weight", None)):
        return None
    described: list[Operator | Bound] = []
    everywhere(lambda: described.append(describe(x) if input_size is None else describe(x, input_size)))
    op = described[0]
    if not isinstance(op, Dense) or not is_sharded(op.weight) or not _axes(op.weight):
        return None
    weight: Any = op.weight
    return op if weight.numel() > IN_PARTS or weight.device_mesh.size() < world() else None


def _axes(weight: Any) -> list[int]:
    """The axes of the mesh along which ranks hold different parts of a DTensor."""
    return [j for j, placed in enumerate(weight.placements) if not placed.is_replicate()]


def _bounded_in_parts(ops: Mapping[int, Dense], rtol: float) -> tuple[dict[int, Bound], list[float]]:
    """The intervals that this rank certifies, and the work of every rank. Ranks certify at the same time, each one matrix at most."""
    check_rtol(rtol)
    done, busy = dict[int, Bound](), [0.0] * world()
    order = sorted(ops, key=lambda i: (-cost(ops[i]), i))
    for batch in (order[k : k + len(busy)] for k in range(0, len(order), len(busy))):
        mine: dict[int, SummedGram] = {}
        for k, i in enumerate(batch):
            owner = _owner(ops[i].weight, k)
            busy[owner] += float(min(ops[i].weight.shape)) ** 3
            gram = _summed(ops[i].weight)
            if owner == ranked() and gram is not None:
                mine[i] = gram
        done |= everywhere(lambda mine=mine: {i: certify_sum(gram, rtol, _because(ops[i])) for i, gram in mine.items()})[ranked()]
    return done, busy


def _owner(weight: Any, number: int) -> int:
    """The rank that certifies a matrix: the one of that number, or another one if that holds no part of it."""
    members: list[int] = weight.device_mesh.mesh.flatten().tolist()
    return number if number in members else members[number % len(members)]


def _because(op: Dense) -> str:
    weight: Any = op.weight
    parts = math.prod(weight.device_mesh.size(j) for j in _axes(weight))
    return f"{op.because}; Gram matrices of {parts} ranks, added (theorem 16, R11)"


def _summed(weight: Any) -> SummedGram | None:
    """The symbol of a matrix from its shards, on all ranks; None on those that are not of its mesh."""
    mesh, axes = weight.device_mesh, _axes(weight)
    place = mesh.get_coordinate()
    part = None if place is None else Part(_tall_rows(weight.detach()))
    first = place is not None and not any(at for j, at in enumerate(place) if j not in axes)  # of those that hold the same rows
    exponent = max((e for e in everywhere(lambda: None if part is None else part.exponent()) if e is not None), default=0)
    grams: list[Tensor] = []

    def norm() -> float:
        if part is None:
            return 0.0
        gram, size = part.gram(exponent)
        grams.append(gram)
        return size if first else 0.0

    size = rd.hypot_up(everywhere(norm))
    if part is None:
        return None
    (gram,) = grams
    for j in axes:
        dist.all_reduce(torch.view_as_real(gram) if gram.is_complex() else gram, group=mesh.get_group(j))
    return SummedGram(gram, max(weight.shape) + world(), size, exponent)


def _tall_rows(weight: DTensor) -> Tensor:
    """This rank's rows of the matrix, or of its adjoint if that is taller; the rows of all ranks along `_axes` are all rows."""
    from torch.distributed.tensor import Replicate, Shard

    long, axes = (0 if weight.shape[0] >= weight.shape[1] else 1), _axes(weight)
    if all(getattr(weight.placements[j], "dim", None) == long for j in axes):  # plain shards or strided ones: whole rows, in any order
        local = weight.to_local()
    elif [weight.placements[j] for j in axes] == [Shard(1 - long)]:
        local = _exchanged(weight, long, weight.device_mesh.get_group(axes[0]))
    else:
        placements = [Shard(long) if j in axes else Replicate() for j in range(weight.device_mesh.ndim)]
        local = weight.redistribute(placements=placements).to_local()
    return local if long == 0 else local.mH


def _exchanged(weight: DTensor, long: int, group: dist.ProcessGroup) -> Tensor:
    """The shard along axis `long` from the ranks' shards along the other one; each rank sends to the others what they are to hold.

    torch gathers the whole tensor over gloo for this.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    tall = weight.to_local().movedim(long, 0)
    rows, columns = (_chunks(weight.shape[axis], ranks) for axis in (long, 1 - long))
    flat, size = tall.new_empty(tall.numel()).copy_(tall.flatten()), tall.element_size()
    out = tall.new_empty(rows[rank] * sum(columns))
    received, sent = ([rows[rank] * k * size for k in columns], [k * tall.shape[1] * size for k in rows])
    dist.all_to_all_single(out.view(torch.uint8), flat.view(torch.uint8), received, sent, group=group)
    pieces = out.split([rows[rank] * k for k in columns])
    return torch.cat([piece.view(rows[rank], k) for piece, k in zip(pieces, columns, strict=True)], 1).movedim(0, long)


def _chunks(count: int, ranks: int) -> list[int]:
    """How many of these rows each rank holds, as DTensor places them."""
    each = -(-count // ranks)
    return [max(0, min(each, count - k * each)) for k in range(ranks)]
