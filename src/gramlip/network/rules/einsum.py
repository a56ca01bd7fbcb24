"""`einsum` of one or two operands: sums, a constant matrix for each shared index, or a product of two values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gramlip.errors import UnsupportedError
from gramlip.network.in_place import tensors
from gramlip.network.rules.products import product
from gramlip.network.rules.registry import Call, Var, register
from gramlip.network.steps import Lipschitz, View
from gramlip.numerics import rounding as rd
from gramlip.numerics.exact_cast import exact
from gramlip.numerics.lengths import length
from gramlip.operators.linear_maps import Dense


def _letters(call: Call, operands: Sequence[Var | Tensor]) -> tuple[list[str], str]:
    """The indices of each operand and of the result, the ellipsis spelled out.

    Raises:
        UnsupportedError: an index that an operand has twice, or whose sizes differ.
    """
    left, arrow, result = call["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in left]
    hidden = [len(x.shape) - len(term.replace("...", "")) if "..." in term else 0 for x, term in zip(operands, terms, strict=True)]
    stand = "".join(free[: max(hidden)])
    terms = [term.replace("...", stand[len(stand) - n :]) for term, n in zip(terms, hidden, strict=True)]
    once = "".join(sorted(c for c in set("".join(terms)) if "".join(terms).count(c) == 1 and c not in stand))
    result = result.replace("...", stand) if arrow else stand + once
    sizes: dict[str, int] = {}
    for x, term in zip(operands, terms, strict=True):
        doubled = len(set(term)) < len(term) or any(sizes.setdefault(c, n) != n for c, n in zip(term, x.shape, strict=True))
        if doubled or len(set(result)) < len(result):
            msg = f"einsum {call['equation']!r} with an index twice in one operand or broadcast, which no rule covers"
            raise UnsupportedError(msg)
    return terms, result


def _viewed(call: Call, x: Var, term: str, groups: Sequence[str], shape: tuple[int, ...]) -> Var:
    """The value with its indices in the order of the groups, each group an axis of a new shape."""
    lines = "rows" if groups[-1] == term[-1] else "columns" if groups[-2] == term[-1] else ""
    return call.then(View(term == "".join(groups), lines), x, shape=shape)


def _size(x: Var | Tensor, term: str, letters: str) -> int:
    return math.prod(x.shape[term.index(c)] for c in letters)


@register("aten.einsum")
def _einsum(call: Call) -> Var | Lipschitz:
    operands: list[Var | Tensor] = list(call["tensors"])
    terms, result = _letters(call, operands)
    if len(operands) == 1:
        count = _size(operands[0], terms[0], "".join(c for c in terms[0] if c not in result))
        return Lipschitz(rd.sqrt_up(float(count)), f"sums over {count} entries: the root of their number")
    error = 0.0
    if len(operands) > 2:
        operands, terms, error = _contracted(call, operands, terms, result)
    (one, other), (a, b) = operands, terms
    if isinstance(one, Var) and isinstance(other, Var):
        return _product(call, (one, other), (a, b), result)
    constant, variable = ((one, a), (other, b)) if isinstance(other, Var) else ((other, b), (one, a))
    assert isinstance(constant[0], Tensor)
    if len(call["tensors"]) == 2:
        error = sum(length(e) if bool(e.isfinite().all()) else math.inf for e in tensors(call.error_of("tensors")))
    return _matrices(constant[0], constant[1], variable[0], variable[1], result, error)


def _contracted(
    call: Call, operands: Sequence[Var | Tensor], terms: Sequence[str], result: str
) -> tuple[list[Var | Tensor], list[str], float]:
    """The one variable and the product of all constants, over the indices that it or the result has; a bound of the product's rounding."""
    fixed = [(exact(x), term) for x, term in zip(operands, terms, strict=True) if isinstance(x, Tensor)]
    moving = [(x, term) for x, term in zip(operands, terms, strict=True) if isinstance(x, Var)]
    if len(moving) != 1:
        msg = f"einsum of {len(operands)} operands, {len(moving)} of which depend on the input; expected one: multiply them two by two"
        raise UnsupportedError(msg)
    letters = "".join(sorted({c for _, term in fixed for c in term}))
    kept = "".join(c for c in letters if c in moving[0][1] or c in result)
    equation = ",".join(term for _, term in fixed) + "->" + kept
    sizes = {c: n for x, term in fixed for c, n in zip(term, x.shape, strict=True)}
    moduli = torch.einsum(equation, *(x.abs() for x, _ in fixed))
    roundings = float(math.prod(sizes.values()) + 4 * len(fixed))
    error = (
        0.0
        if not bool(moduli.any())
        else rd.add_up(rd.mul_up(rd.gamma(roundings), length(moduli)), rd.mul_up(roundings * moduli.numel(), rd.TINY))
    )
    return [moving[0][0], torch.einsum(equation, *(x for x, _ in fixed))], [moving[0][1], kept], error


def _matrices(weight: Tensor, w: str, x: Var | Tensor, v: str, result: str, error: float) -> Lipschitz:
    """The largest of the constant's matrices, one for each index that all three share; sums over what only the variable has."""
    from gramlip.norm.bound import bound

    if any(c not in v and c not in result for c in w):
        msg = f"einsum sums the constant over {w!r} alone; expected the sum taken before"
        raise UnsupportedError(msg)
    weight = weight.detach()
    shared, inner, new = (
        "".join(c for c in w if c in v and c in result),
        "".join(c for c in w if c in v and c not in result),
        "".join(c for c in w if c not in v),
    )
    rows, columns = _size(weight, w, new), _size(weight, w, inner)
    matrices = weight.permute([w.index(c) for c in shared + new + inner]).reshape(-1, rows, columns)
    top = rd.add_up(max(float(bound(Dense(m), rtol=1e-6).upper) for m in matrices), error)
    count = _size(x, v, "".join(c for c in v if c not in w and c not in result))
    return Lipschitz(rd.mul_up(top, rd.sqrt_up(float(count))), "einsum with a constant: the largest of its matrices")


def _product(call: Call, pair: tuple[Var, Var], terms: tuple[str, str], result: str) -> Var:
    """Two values as matrices over what they share, what one has alone, and what is summed."""
    (x, y), (a, b) = pair, terms
    shared = "".join(c for c in result if c in a and c in b)
    inner = "".join(c for c in a if c in b and c not in result)
    rows, columns = "".join(c for c in result if c not in b), "".join(c for c in result if c not in a)
    if set(a) - set(shared + inner + rows) or set(b) - set(shared + inner + columns):
        msg = f"einsum {call['equation']!r} sums over an index of one of two values that depend on the input, which no rule covers"
        raise UnsupportedError(msg)
    batch, m, k, n = _size(x, a, shared), _size(x, a, rows), _size(x, a, inner), _size(y, b, columns)
    left = _viewed(call, x, a, (shared, rows, inner), (batch, m, k))
    right = _viewed(call, y, b, (shared, inner, columns), (batch, k, n))
    value = product(replace(call, shape=(batch, m, n)), left, right)
    return call.then(View(shared + rows + columns == result), value)
