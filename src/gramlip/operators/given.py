"""What users give, made plain: examples and shapes as inputs, modules out of their wrappers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from numbers import Real
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gramlip.errors import InputError, UnsupportedError
from gramlip.operators.linear_maps import DTYPES

# ---- examples ------------------------------------------------------------------------------------------------------------
#
# The example that a verb is given: an input, a tuple of inputs, or the shape of one sample.


def example_inputs(model: nn.Module | torch.export.ExportedProgram, example: Any, *, real: bool = False) -> tuple[Any, ...]:
    """The arguments of a forward pass; a shape stands for one sample of zeros, (1, *shape), in the model's own dtype and on its device.

    Args:
        model: a module or an exported program.
        example: a tensor, a tuple of inputs, or a shape.
        real: a shape stands for real numbers, even if the model's weights are complex.

    Raises:
        InputError: no tensor, no tuple of inputs and no shape.

    >>> example_inputs(nn.Linear(3, 2).double(), (3,))
    (tensor([[0., 0., 0.]], dtype=torch.float64),)
    """
    if isinstance(example, Tensor):
        return (example,)
    items: tuple[Any, ...] = tuple(cast("Sequence[Any]", example)) if isinstance(example, tuple | list) else ()
    shape = all(isinstance(n, Real) for n in items)
    if not items or (shape and not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in items)):
        given = repr(example) if shape and items else f"a {type(example).__name__}"
        msg = f"example={given} was given; expected a tensor, a tuple of inputs, or the shape of one sample such as (3, 224, 224)"
        raise InputError(msg)
    if not shape:
        return items
    like = _like(model)
    return (torch.zeros(1, *items, dtype=like.dtype.to_real() if real else like.dtype, device=like.device),)


def program_inputs(program: torch.export.ExportedProgram) -> list[Any]:
    """What stands for the program's own inputs in its graph: a tensor without values, or a number, each."""
    values: dict[str, Any] = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return [values.get(name) for name in program.graph_signature.user_inputs if isinstance(name, str)]


def _like(model: nn.Module | torch.export.ExportedProgram) -> Tensor:
    """A tensor of the dtype and on the device that the model takes: a program's own first input, or a module's first weight.

    torch computes in no 8-bit float: such a weight is stored beside the numbers that the model works with.
    """
    if isinstance(model, nn.Module):
        return next((t for t in chain(model.parameters(), model.buffers()) if t.dtype in DTYPES), torch.empty(0))
    return next((value for value in program_inputs(model) if isinstance(value, Tensor)), torch.empty(0))


# ---- wrappers ------------------------------------------------------------------------------------------------------------
#
# Modules that run another module as it is: compiled, replicated over devices, or recomputed in the backward pass.

# By name, since to import these classes takes torch's compiler seconds. A subclass may have a forward pass of its own.
_INNER = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": "_checkpoint_wrapped_module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.OffloadWrapper": "_checkpoint_wrapped_module",
}
_FLAT = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"
GATHER = (
    "type gramlip.distributed.bounds([layer]) on every rank for a layer, or load torch.distributed.checkpoint.state_dict."
    "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) into a plain model"
)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DataParallel`, `DistributedDataParallel` and activation checkpointing; others as they are.

    So is a wrapper that has a hook or a forward pass of its own, which may change what is computed, or that splits another axis than
    the batch's.

    Raises:
        InputError: `FullyShardedDataParallel`, inside of which no weight is whole.

    >>> layer = nn.Linear(2, 2)
    >>> unwrapped(nn.DataParallel(layer)) is unwrapped(layer) is layer
    True
    """
    while is_wrapper(module) and not hooks(module) and not _has_own_forward(module) and vars(module).get("dim", 0) == 0:
        module = getattr(module, _INNER[_name(type(module))])
    if any(map(is_flat, module.modules())):
        msg = f"FullyShardedDataParallel keeps its weights in shards; expected whole weights: {GATHER}"
        raise InputError(msg)
    return module


def is_wrapper(module: object) -> bool:
    """Whether this runs another module as it is."""
    return _name(type(module)) in _INNER


def is_flat(module: object) -> bool:
    """Whether this is `FullyShardedDataParallel`, which joins the weights of what it wraps in one tensor and shards that."""
    return any(_name(kind) == _FLAT for kind in type(module).__mro__)


def is_sharded(weight: object) -> bool:
    """Whether this is a DTensor, of which a rank may hold a part."""
    if not isinstance(weight, Tensor) or type(weight) in (Tensor, nn.Parameter) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a forward pass was put on this one instance, by someone other than torch's compiler, which marks its own."""
    forward = vars(module).get("forward")
    return forward is not None and not hasattr(forward, "_torchdynamo_orig_callable")


def hooks(module: nn.Module) -> list[Any]:
    """The forward hooks of a module, but for those of torch.distributed, which gather and shard weights."""
    found = (*vars(module)["_forward_pre_hooks"].values(), *vars(module)["_forward_hooks"].values())
    return [hook for hook in found if not str(getattr(hook, "__module__", "")).startswith("torch.distributed.")]


def hooked(module: nn.Module, hook: Any) -> UnsupportedError:
    """The error for a hook of which nothing is known."""
    name = getattr(hook, "__qualname__", type(hook).__name__)
    return UnsupportedError(
        f"{type(module).__name__} has a forward hook, {name}, which may change what it computes; "
        f"expected a layer without: type handle.remove() on what registered it, or gramlip.Conv(weight, ...) for the plain map"
    )


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
