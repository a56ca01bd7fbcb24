"""User input in one form: examples and shapes as inputs, modules without wrappers, arrays as tensors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from numbers import Complex, Number, Real
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from gramlip.errors import InputError, UnsupportedError, first_line
from gramlip.numerics.precision import DTYPES

# ---- examples ------------------------------------------------------------------------------------------------------------


def example_inputs(model: nn.Module | torch.export.ExportedProgram, example: Any, *, real: bool = False) -> tuple[Any, ...]:
    """The arguments of a forward pass. A shape gives one sample of zeros, (1, *shape), in the dtype and on the device of the model.

    Args:
        model: a module or an exported program.
        example: a tensor, a tuple of inputs, or a shape.
        real: a shape gives real zeros, even if the weights of the model are complex.

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
    """For each input of the program its value in the graph: a tensor without data, or a number."""
    values: dict[str, Any] = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return [values.get(name) for name in program.graph_signature.user_inputs if isinstance(name, str)]


def _like(model: nn.Module | torch.export.ExportedProgram) -> Tensor:
    """A tensor with the dtype and device that the model expects: the first input of a program, or the first weight of a module.

    Weights in 8-bit floats are skipped: torch does not compute in these types, so the input has another one.
    """
    if isinstance(model, nn.Module):
        return next((t for t in chain(model.parameters(), model.buffers()) if t.dtype in DTYPES), torch.empty(0))
    return next((value for value in program_inputs(model) if isinstance(value, Tensor)), torch.empty(0))


# ---- wrappers ------------------------------------------------------------------------------------------------------------
#
# Modules that run another module unchanged: compiled, replicated over devices, or recomputed in the backward pass.

# By name, since importing these classes would import torch's compiler, which takes seconds. Subclasses are excluded: they may
# override the forward pass.
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
    """The module inside `torch.compile`, `DataParallel`, `DistributedDataParallel` or activation checkpointing.

    Any other module is returned unchanged. So is a wrapper with a hook or an overridden forward pass, which may change the result, and
    one that splits an axis other than the batch.

    Raises:
        InputError: `FullyShardedDataParallel`, whose weights are split into shards.

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
    """Whether this module runs another module unchanged."""
    return _name(type(module)) in _INNER


def is_flat(module: object) -> bool:
    """Whether this is `FullyShardedDataParallel`, which joins the wrapped weights into one tensor and shards it."""
    return any(_name(kind) == _FLAT for kind in type(module).__mro__)


def is_sharded(weight: object) -> bool:
    """Whether this is a DTensor, of which a rank may hold only a part."""
    if not isinstance(weight, Tensor) or type(weight) in (Tensor, nn.Parameter) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether somebody replaced the forward pass of this instance; torch's compiler marks its own replacements."""
    forward = vars(module).get("forward")
    return forward is not None and not hasattr(forward, "_torchdynamo_orig_callable")


def hooks(module: nn.Module) -> list[Any]:
    """The forward hooks of a module, without those of torch.distributed, which gather and shard weights."""
    registered = (*vars(module)["_forward_pre_hooks"].values(), *vars(module)["_forward_hooks"].values())
    return [hook for hook in registered if not str(getattr(hook, "__module__", "")).startswith("torch.distributed.")]


def hooked(module: nn.Module, hook: Any) -> UnsupportedError:
    """The error for an unknown hook."""
    name = getattr(hook, "__qualname__", type(hook).__name__)
    return UnsupportedError(
        f"{type(module).__name__} has a forward hook, {name}, which may change what it computes; "
        f"expected a layer without: type handle.remove() on what registered it, or gramlip.Conv(weight, ...) for the plain map"
    )


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# ---- Arrays of other libraries ---------------------------------------------------------------------------------------


FLOATS, LONG_DOUBLES = "efdFD", "gG"  # NumPy's type codes: those that torch also has, and those that it lacks
SIDE = 1 << 13  # form the matrix of a linear operator with at most this many rows or columns
ENTRIES = 1 << 26  # and at most this many entries
COLUMNS = 256  # unit vectors per application


def is_array_like(x: object) -> bool:
    """Whether x is a nested list or an array by NumPy's protocol, but neither a tensor nor sparse.

    >>> is_array_like([[1.0]]), is_array_like(np.eye(2)), is_array_like("text"), is_array_like(np.ndarray)
    (True, True, False, False)
    """
    return isinstance(x, list | tuple) or (hasattr(x, "__array__") and not isinstance(x, type | Tensor) and not is_sparse(x))


def is_sparse(x: object) -> bool:
    """Whether x is a sparse matrix or array of SciPy."""
    scipy = sys.modules.get("scipy.sparse")
    return scipy is not None and scipy.issparse(x)


def is_linear_operator(x: object) -> bool:
    """Whether x is a `LinearOperator` of SciPy."""
    scipy = sys.modules.get("scipy.sparse.linalg")
    return scipy is not None and isinstance(x, scipy.LinearOperator)


def as_tensor(x: object, name: str = "weight") -> Tensor:
    """The array as a tensor of the same numbers; it shares memory if possible.

    Raises:
        InputError: entries that are not numbers, an array of integers or booleans, numbers that float64 cannot hold, or a masked array.

    >>> as_tensor([[1, 0.5], [0, 2]])
    tensor([[1.0000, 0.5000],
            [0.0000, 2.0000]], dtype=torch.float64)
    """
    if isinstance(x, np.ma.MaskedArray):
        msg = f"{name} is a masked array; expected a plain array: type {name}.filled(0.0) if the masked entries are zero"
        raise InputError(msg)
    try:
        array = np.array(x, dtype=object) if isinstance(x, list | tuple) else np.asarray(x)
    except Exception as error:  # arrays of other libraries raise any exception, for instance on a GPU or from a closed file
        msg = f"{name} is a {type(x).__name__} that is no array ({first_line(error)}); expected a matrix: type numpy.asarray({name})"
        raise InputError(msg) from error
    if array.dtype == object:
        array = _numbers(array, name)
    elif array.dtype.char in LONG_DOUBLES:
        array = _narrowed(array, name)
    if array.dtype.char not in FLOATS:
        msg = f"{name} is an array of {array.dtype}; expected floating or complex entries: type {name}.astype(float)"
        raise InputError(msg)
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _numbers(cells: NDArray[Any], name: str) -> NDArray[Any]:
    """Python numbers of any type as float64 or complex128; InputError if that rounds one of them."""
    flat: list[Any] = list(cells.flat)
    for cell in flat:
        if not isinstance(cell, Number) or isinstance(cell, bool):
            msg = f"{name} holds a {type(cell).__name__}; expected nested lists of numbers, all rows of the same length"
            raise InputError(msg)
    complex_ = any(isinstance(cell, Complex) and not isinstance(cell, Real) for cell in flat)
    try:
        wide = cells.astype(np.complex128 if complex_ else np.float64)
        lost = [cell for cell, rounded in zip(flat, wide.ravel().tolist(), strict=True) if cell == cell and rounded != cell]
    except (ArithmeticError, TypeError, ValueError) as error:
        msg = f"{name} holds a number that float64 does not ({first_line(error)}); expected floats: type float(x) for each"
        raise InputError(msg) from error
    if lost:
        raise _rounded(name, lost[0])
    return wide


def _narrowed(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Long doubles as doubles; InputError if that rounds one of them."""
    with np.errstate(over="ignore"):
        narrow = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
    lost = array[(narrow != array) & (array == array)]
    if lost.size:
        raise _rounded(name, lost.flat[0])
    return narrow


def _rounded(name: str, number: object) -> InputError:
    how = f"type numpy.asarray({name}, dtype=float) to bound the rounded matrix"
    return InputError(f"{name} holds {number!r}, which float64 rounds; expected floats: {how}")


def sparse_tensor(x: Any, name: str = "weight") -> Tensor:
    """A sparse matrix of SciPy as a sparse tensor with the same entries, duplicates included."""
    coo = x.tocoo()
    values = as_tensor(coo.data, name)
    places = torch.from_numpy(np.stack([np.asarray(axis, dtype=np.int64) for axis in coo.coords]))
    return torch.sparse_coo_tensor(places, values, tuple(map(int, coo.shape)), check_invariants=True)


def held(x: Any) -> object | None:
    """The dense or sparse matrix inside a linear operator made by SciPy's `aslinearoperator`; None for other operators."""
    from_matrix = type(x).__name__ == "MatrixLinearOperator" and type(x).__module__.startswith("scipy.sparse.linalg")
    return x.A if from_matrix else None


def formed(x: Any, name: str = "operator") -> NDArray[Any]:
    """The matrix of a linear operator, from its images of unit vectors, or from those of its adjoint.

    Raises:
        InputError: the operator is too large, or its rows are needed and it has no adjoint.
    """
    m, n = map(int, x.shape)
    if min(m, n) > SIDE or m * n > ENTRIES:
        msg = (
            f"{name} is a LinearOperator of shape {(m, n)}, which shows no entries, so no upper bound can be proved; expected "
            f"at most {SIDE} rows or columns and {ENTRIES} entries: type its matrix, dense or sparse, or the layer itself"
        )
        raise InputError(msg)
    dtype = np.result_type(np.float64 if x.dtype is None else x.dtype, np.float32)
    if n <= SIDE:
        return np.concatenate([np.asarray(x.matmat(_units(n, start, dtype))) for start in range(0, n, COLUMNS)], 1)
    try:
        rows = np.concatenate([np.asarray(x.rmatmat(_units(m, start, dtype))) for start in range(0, m, COLUMNS)], 1)
    except (NotImplementedError, TypeError) as error:  # SciPy calls a missing adjoint
        msg = f"{name} is a LinearOperator of shape {(m, n)} without an adjoint, which its few rows need; expected one: pass rmatvec=..."
        raise InputError(msg) from error
    return rows.conj().T


def _units(size: int, start: int, dtype: Any) -> NDArray[Any]:
    """A range of columns of the identity."""
    return np.eye(size, min(COLUMNS, size - start), -start, dtype=dtype)
