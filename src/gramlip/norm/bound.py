"""`bound`: the one verb."""

from __future__ import annotations

from numpy.typing import ArrayLike
from torch import Tensor, nn

from gramlip.errors import InputError
from gramlip.norm.methods import METHODS
from gramlip.operators.describe import describe
from gramlip.operators.given import GATHER, is_sharded
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Ints, Operator

WIDEST = 1e6  # a relative width beyond this asks for no proof at all


def bound(
    x: nn.Module | Tensor | Operator | ArrayLike,
    input_size: Ints | None = None,
    *,
    rtol: float = 1e-2,
    method: str = "certify",
    finite: bool | str = "auto",
) -> Bound:
    """Interval that holds the l2 norm of a layer: `lower <= ||A||_2 <= upper`, rounding included.

    Args:
        x: a layer (`nn.Linear`, `nn.Conv*d`, `nn.ConvTranspose*d`, or registered), an operator, or a matrix: a tensor, an array,
            nested lists, a sparse matrix of torch or SciPy, or a `LinearOperator` of SciPy one side of which is small.
        input_size: spatial size of the input; None holds for every size.
        rtol: close the interval to `upper / lower - 1 <= rtol` where the geometry allows it.
        method: a name in `METHODS`; a published method that is only a lower estimate leaves `upper` infinite.
        finite: True closes on the finite zero-padded layer itself, False never, "auto" where it is cheap.

    Raises:
        InputError: weights, sizes or options that cannot be used.
        UnsupportedError: a layer without a rule.

    Reference: docs/theory.md; arXiv 2305.16173.

    >>> import torch
    >>> bound(torch.diag(torch.tensor([3.0, 4.0]))).upper >= 4.0
    True
    """
    check_rtol(rtol)
    if not isinstance(method, str) or method not in METHODS:
        msg = f"method={method!r} is unknown; expected one of {sorted(METHODS)}"
        raise InputError(msg)
    if not isinstance(finite, bool) and not (isinstance(finite, str) and finite == "auto"):
        msg = f"finite={finite!r} was given; expected True, False or 'auto'"
        raise InputError(msg)
    op = describe(x) if input_size is None else describe(x, input_size)
    if is_sharded(getattr(op, "weight", None)):
        msg = f"a weight in shards was given, a DTensor; expected a whole one: {GATHER}"
        raise InputError(msg)
    return op if isinstance(op, Bound) else METHODS[method](op, rtol=rtol, finite=finite)


def check_rtol(rtol: float) -> None:
    """InputError for a relative width that is no positive number of at most `WIDEST`."""
    if not isinstance(rtol, float | int) or isinstance(rtol, bool) or not 0 < rtol <= WIDEST:
        msg = f"rtol={rtol!r} was given; expected a positive number such as 1e-2, and at most {WIDEST:g}"
        raise InputError(msg)
