"""What is no tensor as one, exactly: NumPy arrays, nested lists, other libraries' arrays, SciPy's sparse matrices and linear operators.

SciPy is never imported here: an object of one of its classes says itself that it is there.
"""

from __future__ import annotations

import sys
from numbers import Complex, Number, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gramlip.errors import InputError, first_line

FLOATS, LONG_DOUBLES = "efdFD", "gG"  # NumPy's letters for the types that torch shares, and for those that it does not
SIDE = 1 << 13  # a linear operator whose columns or rows are at most so many
ENTRIES = 1 << 26  # and whose matrix has at most so many entries is formed as a whole
COLUMNS = 256  # unit vectors that it is applied to at a time


def is_array_like(x: object) -> bool:
    """Whether x is a nested list, or an array by NumPy's protocol; no tensor, and nothing sparse.

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
    """The array as a tensor of the same numbers; it shares their memory where it can.

    Raises:
        InputError: no numbers, integers or truth values in an array, numbers that float64 does not hold, or a mask.

    >>> as_tensor([[1, 0.5], [0, 2]])
    tensor([[1.0000, 0.5000],
            [0.0000, 2.0000]], dtype=torch.float64)
    """
    if isinstance(x, np.ma.MaskedArray):
        msg = f"{name} is a masked array; expected entries alone: type {name}.filled(0.0), if what is masked is zero"
        raise InputError(msg)
    try:
        array = np.array(x, dtype=object) if isinstance(x, list | tuple) else np.asarray(x)
    except Exception as error:  # other libraries' arrays raise what they like: one on a GPU, or a file that is closed
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
    """Python's numbers, of any type, as float64 or complex128; refused where that rounds one of them."""
    flat: list[Any] = list(cells.flat)
    for cell in flat:
        if not isinstance(cell, Number) or isinstance(cell, bool):
            msg = f"{name} holds a {type(cell).__name__}; expected nested lists of numbers, all rows of the same length"
            raise InputError(msg)
    complex_ = any(isinstance(cell, Complex) and not isinstance(cell, Real) for cell in flat)
    try:
        wide = cells.astype(np.complex128 if complex_ else np.float64)
        lost = [cell for cell, found in zip(flat, wide.ravel().tolist(), strict=True) if cell == cell and found != cell]
    except (ArithmeticError, TypeError, ValueError) as error:
        msg = f"{name} holds a number that float64 does not ({first_line(error)}); expected floats: type float(x) for each"
        raise InputError(msg) from error
    if lost:
        raise _rounded(name, lost[0])
    return wide


def _narrowed(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Long doubles as doubles, where nothing is lost."""
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
    """A sparse matrix of SciPy as a sparse tensor, entry by entry, with its duplicates."""
    coo = x.tocoo()
    values = as_tensor(coo.data, name)
    places = torch.from_numpy(np.stack([np.asarray(axis, dtype=np.int64) for axis in coo.coords]))
    return torch.sparse_coo_tensor(places, values, tuple(map(int, coo.shape)), check_invariants=True)


def held(x: Any) -> object | None:
    """The matrix, dense or sparse, that a linear operator of SciPy is made of, by `aslinearoperator`; None for others."""
    made = type(x).__name__ == "MatrixLinearOperator" and type(x).__module__.startswith("scipy.sparse.linalg")
    return x.A if made else None


def formed(x: Any, name: str = "operator") -> NDArray[Any]:
    """The matrix of a linear operator: the images of the unit vectors under it, or under its adjoint.

    Raises:
        InputError: too large for that, or rows are needed and it has no adjoint.
    """
    m, n = map(int, x.shape)
    if min(m, n) > SIDE or m * n > ENTRIES:
        msg = (
            f"{name} is a LinearOperator of shape {(m, n)}, which shows no entries, so that nothing bounds it from above; expected "
            f"at most {SIDE} rows or columns and {ENTRIES} entries: type its matrix, dense or sparse, or the layer that it is"
        )
        raise InputError(msg)
    dtype = np.result_type(np.float64 if x.dtype is None else x.dtype, np.float32)
    if n <= SIDE:
        return np.concatenate([np.asarray(x.matmat(_units(n, start, dtype))) for start in range(0, n, COLUMNS)], 1)
    try:
        rows = np.concatenate([np.asarray(x.rmatmat(_units(m, start, dtype))) for start in range(0, m, COLUMNS)], 1)
    except (NotImplementedError, TypeError) as error:  # SciPy calls what is None
        msg = f"{name} is a LinearOperator of shape {(m, n)} without an adjoint; expected one, for its few rows: pass rmatvec=..."
        raise InputError(msg) from error
    return rows.conj().T


def _units(size: int, start: int, dtype: Any) -> NDArray[Any]:
    """Some columns of the identity."""
    return np.eye(size, min(COLUMNS, size - start), -start, dtype=dtype)
