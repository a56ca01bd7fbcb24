"""Linear maps with weights, sums, and products: of constants, of two values, attention, `einsum`. docs/network.md#affine-maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from gramlip.errors import UnsupportedError
from gramlip.network.in_place import tensors
from gramlip.network.rules.activations import gated, quotient
from gramlip.network.rules.registry import Call, Var, register
from gramlip.network.running_errors import inverse_error
from gramlip.network.steps import Attention, Linear, LinearAction, Lipschitz, Product, Step, Sum, Unbounded, View, rough_norm
from gramlip.norm.methods import bound
from gramlip.numerics import rounding as rd
from gramlip.numerics.precision import exponent_of, to_float64
from gramlip.numerics.rounding import frobenius_up, row_norms_up
from gramlip.operators.interval import Bound
from gramlip.operators.linear_maps import Conv, Dense, Scale

# ---- products of two values, and attention: docs/network.md#attention -----------------------------------------------------


def product(call: Call, left: Var, right: Var) -> Var:
    """The matrix product of two values; attention where the left one is a softmax of another such product.

    Batch axes that are broadcast repeat the factor.
    """
    pair = [spread(call, v, (*call.shape[:-2], *v.shape[-2:]), "matrix") for v in (left, right)]
    scores = _scores(call, left)
    if scores is not None and pair[0] is left and pair[1] is right:
        queries, keys = (Var(at, call.steps[at].shape) for at in scores[:2])
        return call.then(Attention(scores[2], transposed=True), queries, keys, right)
    return call.then(Product("matrix"), *pair)


def _unviewed(call: Call, step: Step) -> Step:
    """The step before views that only split or join the axes in front of the last two."""
    while isinstance(step.what, View) and step.what.flat and step.shape[-2:] == call.steps[step.sources[0]].shape[-2:]:
        step = call.steps[step.sources[0]]
    return step


def _scores(call: Call, weights: Var) -> tuple[int, int, float] | None:
    """Queries, keys (transposed) and scale where the value is `softmax(scale Q K' + constants)` over its last axis."""
    step = _unviewed(call, call.steps[weights.step])
    if "softmax" not in step.op or "log" in step.op or not isinstance(step.what, Lipschitz) or step.what.row != 1.0:
        return None
    inner, scale = _unviewed(call, call.steps[step.sources[0]]), 1.0
    while isinstance(inner.what, Linear) and isinstance(inner.what.op, Scale):
        scale = rd.mul_up(scale, rd.add_up(float(inner.what.op.weight.abs().max()), inner.what.error))
        inner = _unviewed(call, call.steps[inner.sources[0]])
    if not isinstance(inner.what, Product) or inner.what.kind != "matrix" or inner.shape[-2:] != weights.shape[-2:]:
        return None
    return inner.sources[0], inner.sources[1], rd.mul_up(scale, inner.what.scale)


@register("aten.scaled_dot_product_attention")
def _attention(call: Call) -> Var:
    q, k, v = (call[n] for n in ("query", "key", "value"))
    if float(call.const("dropout_p")) > 0:
        msg = f"{call.op} with dropout is random; expected evaluation mode: type model.eval()"
        raise UnsupportedError(msg)
    scale = call.const("scale")
    factor = rd.up(1 / rd.sqrt_down(q.shape[-1])) if scale is None else abs(float(scale))
    if isinstance(k, Tensor) and isinstance(v, Tensor):  # a matrix, a softmax of rows and another matrix
        sides = [largest(x.detach().reshape(-1, *x.shape[-2:])) for x in (k, v)]
        repeats = math.prod(call.shape[:-2]) // math.prod(q.shape[:-2])
        upper = rd.mul_up(rd.mul_up(rd.mul_up(factor, sides[0]), rd.mul_up(0.5, sides[1])), rd.sqrt_up(float(repeats)))
        return call.then(Lipschitz(upper, "attention to fixed keys and values: half the product of their norms"), q)
    q, k, v = (_still(call, x) if isinstance(x, Tensor) else x for x in (q, k, v))
    if call.args.get("enable_gqa"):
        k, v = (_grouped(call, x, q.shape[-3]) for x in (k, v))
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        msg = f"attention of shapes {q.shape}, {k.shape} and {v.shape}; expected equal axes before the last two"
        raise UnsupportedError(msg)
    mask = call.const("attn_mask")
    empty = isinstance(mask, Tensor) and bool(((~mask if mask.dtype == torch.bool else mask == -math.inf).all(-1)).any())
    return call.then(Attention(factor, empty=empty), q, k, v)


def _still(call: Call, fixed: Tensor) -> Var:
    """A constant as a value that does not move."""
    wide = to_float64(fixed)
    row = float(row_norms_up(wide.reshape(-1, wide.shape[-1])).max())
    what = Lipschitz(0.0, "a constant", (float(wide.min()), float(wide.max())), row=row)
    return call.then(what, call.vars[0], shape=tuple(wide.shape))


def _grouped(call: Call, x: Var, heads: int) -> Var:
    """Each head repeated for the queries that share it."""
    times = heads // x.shape[-3]
    what = Lipschitz(rd.sqrt_up(float(times)), f"each head repeated {times} times", same_range=True, row_layout="rows")
    return x if times == 1 else call.then(what, x, shape=(*x.shape[:-3], heads, *x.shape[-2:]))


@register("aten.linalg_cross", "aten.cross")
def _cross(call: Call) -> Var:
    """With a fixed vector v linear, of norm |v|; of two values the difference of two products of entries."""
    sides = ["self" if "self" in call.args else "input", "other"]
    fixed = next((name for name in sides if isinstance(call[name], Tensor)), None)
    if fixed is not None:
        return _cross_with(call, fixed)
    a, b = (spread(call, call[name], call.shape) for name in sides)
    (a1, b1), (a2, b2) = ([call.then(View(), x) for x in (a, b)] for _ in (1, 2))  # turned by one place, and by two
    minus = _times(call, call.then(Product("entries"), a2, b1), torch.tensor(-1.0, dtype=torch.float64), known=_ONE)
    return call.then(Sum((1, 1)), call.then(Product("entries"), a1, b2), minus)


def _cross_with(call: Call, fixed: str) -> Var:
    dim, errors = call.args.get("dim"), call.error_of(fixed)
    axis = call.shape.index(3) if dim is None else int(dim)
    vectors = to_float64(call[fixed]).abs() + (0.0 if errors is None else errors)
    longest = float(row_norms_up(vectors.broadcast_to(call.shape).movedim(axis, -1).reshape(-1, 3)).max())
    what = Lipschitz(longest, "a cross product with fixed vectors: the longest of them")
    return call.then(what, spread(call, call.vars[0], call.shape))


@register("aten.bilinear")
def _bilinear(call: Call) -> Var:
    """`x W_k y + b_k`: for a fixed side a batch of matrices, else the matrices W_k y, linear in y, times x."""
    x, y, bias = call["input1"], call["input2"], call.const("bias")
    value = _both(call, x, y) if isinstance(x, Var) and isinstance(y, Var) else _one_side(call)
    return value if bias is None else _summed(call, value, to_float64(bias), bias_error=most(call.error_of("bias")))


def _both(call: Call, x: Var, y: Var) -> Var:
    weight, errors, batch = call.const("weight").detach(), call.error_of("weight"), call.shape[:-1]
    outputs, m, n = weight.shape
    dense = up_to(Dense(weight.reshape(outputs * m, n)), None if errors is None else errors.reshape(outputs * m, n))
    matrices = call.then(View(True), call.then(dense, y, shape=(*batch, outputs * m)), shape=(*batch, outputs, m))
    column = call.then(View(True), x, shape=(*batch, m, 1))
    return call.then(View(True), product(replace(call, shape=(*batch, outputs, 1)), matrices, column))


def _one_side(call: Call) -> Var:
    weight, x = to_float64(call.const("weight")), call.vars[0]
    fixed, equation = (call["input2"], "kij,...j->...ki") if x is call["input1"] else (call["input1"], "kij,...i->...kj")
    matrices = torch.einsum(equation, weight, to_float64(fixed))
    lost = frobenius_up(torch.einsum(equation, weight.abs(), to_float64(fixed).abs()))
    return call.then(matrix_product(call, matrices, x, rd.mul_up(rd.gamma(float(sum(weight.shape))), lost)), x)


# ---- einsum --------------------------------------------------------------------------------------------------------------
#
# Of one or two operands: sums, a constant matrix for each shared index, or a product of two values.


@dataclass(frozen=True)
class _Operand:
    """A value or a constant, and the index of each of its axes."""

    x: Var | Tensor
    term: str

    def size(self, letters: str) -> int:
        """The number of entries along these indices."""
        return math.prod(self.x.shape[self.term.index(c)] for c in letters)

    def grouped(self, call: Call, groups: Sequence[str]) -> Var:
        """The value with its indices in the order of the groups, each group an axis of a new shape."""
        assert isinstance(self.x, Var)
        layout = "rows" if groups[-1] == self.term[-1] else "columns" if groups[-2] == self.term[-1] else ""
        return call.then(View(self.term == "".join(groups), layout), self.x, shape=tuple(map(self.size, groups)))


def _letters(call: Call, operands: Sequence[Var | Tensor]) -> tuple[list[str], str]:
    """The indices of each operand and of the result, the ellipsis spelled out.

    Raises:
        UnsupportedError: an index that the result has twice.
    """
    left, arrow, result = call["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in left]
    hidden = [len(x.shape) - len(term.replace("...", "")) if "..." in term else 0 for x, term in zip(operands, terms, strict=True)]
    stand = "".join(free[: max(hidden)])
    terms = [term.replace("...", stand[len(stand) - n :]) for term, n in zip(terms, hidden, strict=True)]
    once = "".join(sorted(c for c in set("".join(terms)) if "".join(terms).count(c) == 1 and c not in stand))
    result = result.replace("...", stand) if arrow else stand + once
    if len(set(result)) < len(result):
        msg = f"einsum {call['equation']!r} with an index twice in its result, which no rule covers"
        raise UnsupportedError(msg)
    return terms, result


def _plain(call: Call, operands: Sequence[Var | Tensor], terms: Sequence[str]) -> list[_Operand]:
    """Each index once in an operand, by its diagonal, and everywhere of one size, by repeats."""
    sizes: dict[str, int] = {}
    for x, term in zip(operands, terms, strict=True):
        for c, n in zip(term, x.shape, strict=True):
            sizes[c] = max(n, sizes.get(c, 1))
    reduced: list[_Operand] = []
    for x, term in zip(operands, terms, strict=True):
        letters = "".join(dict.fromkeys(term))
        shape, alike = tuple(sizes[c] for c in letters), all(n == sizes[c] for c, n in zip(term, x.shape, strict=True))
        if letters == term and alike:
            reduced.append(_Operand(x, term))
        elif isinstance(x, Tensor):
            reduced.append(_Operand(torch.einsum(f"{term}->{letters}", x).expand(shape), letters))
        else:
            diagonal, own = Lipschitz(1.0, "a diagonal", same_range=True), tuple(x.shape[term.index(c)] for c in letters)
            reduced.append(_Operand(spread(call, x if letters == term else call.then(diagonal, x, shape=own), shape), letters))
    return reduced


@register("aten.einsum")
def _einsum(call: Call) -> Var:
    terms, result = _letters(call, call["tensors"])
    operands, error = _plain(call, call["tensors"], terms), 0.0
    if len(operands) == 1:
        return _sums(call, operands[0], result)
    if len(operands) > 2:
        operands, error = _contracted(call, operands, result)
    left, right = operands
    if isinstance(left.x, Var) and isinstance(right.x, Var):
        return _product(call, left, right, result)
    constant, variable = (left, right) if isinstance(right.x, Var) else (right, left)
    assert isinstance(variable.x, Var)
    plain = len(call["tensors"]) == 2
    if plain:
        error = sum(frobenius_up(e) if bool(e.isfinite().all()) else math.inf for e in tensors(call.error_of("tensors")))
    action, count = _matrices(constant, variable, result, error)
    if plain and variable.x == call.vars[0]:
        action = replace(action, linear=call.linear(_moduli(call, action.upper), rd.mul_up(error, count)))
    return call.then(action, variable.x)


def _sums(call: Call, operand: _Operand, result: str) -> Var:
    """Sums over the indices that the result has not."""
    assert isinstance(operand.x, Var)
    count = operand.size("".join(c for c in operand.term if c not in result))
    root = rd.sqrt_up(float(count))
    linear = call.linear(root) if operand.x == call.vars[0] else None
    return call.then(Lipschitz(root, f"sums over {count} entries: the root of their number", linear=linear), operand.x)


def _moduli(call: Call, upper: float) -> float:
    """Upper bound of the norm of the moduli of a linear map of norm `upper`: that of Frobenius is at most the root of its rank times it."""
    return rd.mul_up(upper, rd.sqrt_up(float(min(math.prod(call.vars[0].shape), math.prod(call.shape)))))


def _contracted(call: Call, operands: Sequence[_Operand], result: str) -> tuple[list[_Operand], float]:
    """The one variable and the product of all constants, over the indices that it or the result has; a bound of the product's rounding."""
    fixed = [(to_float64(o.x), o.term) for o in operands if isinstance(o.x, Tensor)]
    moving = [o for o in operands if isinstance(o.x, Var)]
    if len(moving) != 1:
        msg = f"einsum of {len(operands)} operands, {len(moving)} of which depend on the input; expected one: multiply them two by two"
        raise UnsupportedError(msg)
    letters = "".join(sorted({c for _, term in fixed for c in term}))
    kept = "".join(c for c in letters if c in moving[0].term or c in result)
    equation = ",".join(term for _, term in fixed) + "->" + kept
    sizes = {c: n for x, term in fixed for c, n in zip(term, x.shape, strict=True)}
    moduli = torch.einsum(equation, *(x.abs() for x, _ in fixed))
    roundings, error = float(math.prod(sizes.values()) + 4 * len(fixed)), 0.0
    if bool(moduli.any()):
        error = rd.add_up(rd.mul_up(rd.gamma(roundings), frobenius_up(moduli)), rd.mul_up(roundings * moduli.numel(), rd.TINY))
    return [moving[0], _Operand(torch.einsum(equation, *(x for x, _ in fixed)), kept)], error


def _matrices(constant: _Operand, variable: _Operand, result: str, error: float) -> tuple[Lipschitz, float]:
    """The largest of the constant's matrices, one for each index that all three share; sums over what only the variable has.

    With it the root of how many of the variable's entries are summed so.
    """
    w, v = constant.term, variable.term
    assert isinstance(constant.x, Tensor)
    if any(c not in v and c not in result for c in w):
        msg = f"einsum sums the constant over {w!r} alone; expected the sum taken before"
        raise UnsupportedError(msg)
    shared, inner = "".join(c for c in w if c in v and c in result), "".join(c for c in w if c in v and c not in result)
    new = "".join(c for c in w if c not in v)
    weight = constant.x.detach().permute([w.index(c) for c in shared + new + inner])
    top = rd.add_up(largest(weight.reshape(-1, constant.size(new), constant.size(inner))), error)
    root = rd.sqrt_up(float(variable.size("".join(c for c in v if c not in w and c not in result))))
    return Lipschitz(rd.mul_up(top, root), "einsum with a constant: the largest of its matrices"), root


def _product(call: Call, left: _Operand, right: _Operand, result: str) -> Var:
    """Two values as matrices over what they share, what one has alone, and what is summed."""
    a, b = left.term, right.term
    shared = "".join(c for c in result if c in a and c in b)
    inner = "".join(c for c in a if c in b and c not in result)
    rows, columns = "".join(c for c in result if c not in b), "".join(c for c in result if c not in a)
    if set(a) - set(shared + inner + rows) or set(b) - set(shared + inner + columns):
        msg = f"einsum {call['equation']!r} sums over an index of one of two values that depend on the input, which no rule covers"
        raise UnsupportedError(msg)
    x, y = left.grouped(call, (shared, rows, inner)), right.grouped(call, (shared, inner, columns))
    value = product(replace(call, shape=(*x.shape[:2], y.shape[2])), x, y)
    return call.then(View(shared + rows + columns == result), value)


def largest(matrices: Tensor) -> float:
    """Upper bound of the largest norm among matrices (count, m, n); complex ones as real ones of twice the size.

    The norms are taken in the order of the Frobenius norms, until none that is left can be larger.
    """
    if matrices.is_complex():
        matrices = matrices.resolve_conj()
        re, im = matrices.real, matrices.imag
        matrices = torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
    sizes, top = row_norms_up(to_float64(matrices).flatten(1)).tolist(), 0.0
    for size, i in sorted(((size, i) for i, size in enumerate(sizes)), reverse=True):
        if size <= top:
            break
        top = max(top, min(size, float(bound(Dense(matrices[i]), rtol=1e-6).upper)))
    return top


# ---- maps with weights: docs/network.md#affine-maps -----------------------------------------------------------------------


def entries_of(value: object) -> Tensor | None:
    """A real number or tensor as float64; None for anything else."""
    if isinstance(value, bool | int | float):
        value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    return to_float64(value) if isinstance(value, Tensor) and not value.is_complex() else None


def _constant(call: Call, value: object) -> Tensor:
    """The entries of a constant; UnsupportedError for one of another type than real numbers."""
    entries = entries_of(value)
    if entries is None:
        msg = f"{call.op} with a constant of another type, which no rule covers"
        raise UnsupportedError(msg)
    return entries


def _along(bias: Tensor | None, axis: int, ndim: int) -> Tensor | float:
    return 0.0 if bias is None else to_float64(bias).reshape([-1 if j == axis else 1 for j in range(ndim)])


def most(errors: Tensor | None) -> float:
    """The largest of the errors of a constant."""
    return 0.0 if errors is None else float(errors.max())


def up_to(op: Dense | Conv, errors: Tensor | None, bias: Tensor | float = 0.0, bias_error: float = 0.0) -> Linear:
    """The linear map whose weight is known up to `errors`: they are a map of the same kind, whose norm bounds what they change."""
    if errors is None:
        return Linear(op, bias=bias, bias_error=bias_error)
    return Linear(op, rough_norm(replace(op, weight=errors)) if bool(errors.isfinite().all()) else math.inf, bias, bias_error=bias_error)


@register("aten.linear")
def _linear(call: Call) -> Linear:
    call.var("input")
    bias = _along(call.const("bias"), len(call.shape) - 1, len(call.shape))
    return up_to(Dense(call.const("weight").detach()), call.error_of("weight"), bias, most(call.error_of("bias")))


@register("aten.addmm")
def _addmm(call: Call) -> Linear:
    call.var("mat1")
    beta, alpha, weight = float(call.const("beta")), float(call.const("alpha")), call.const("mat2").mT
    bias, errors = to_float64(call.const("self")) * beta, call.error_of("mat2")
    bias_error = rd.add_up(rd.mul_up(most(call.error_of("self")), abs(beta)), 0.0 if beta == 1 else _bias_error(bias))
    given = up_to(Dense(weight), None if errors is None else errors.mT, bias, bias_error)
    if alpha == 1:
        return given
    wide = to_float64(weight) * alpha
    lost = rd.mul_up(rd.TINY, float(wide.numel())) if exponent_of(weight) is not None else 0.0  # where all of them underflow
    return Linear(
        Dense(wide),
        rd.add_up(rd.mul_up(given.error, abs(alpha)), rd.mul_up(rd.gamma(3), frobenius_up(wide)), lost),
        bias,
        bias_error=bias_error,
    )


def _bias_error(constant: Tensor | Var, roundings: int = 1, largest: float = 1.0) -> float:
    """The error of entries after so many `roundings`; `largest` bounds the factor after one that underflows."""
    if isinstance(constant, Var):
        return 0.0
    return rd.add_up(rd.mul_up(rd.gamma(roundings + 1), float(constant.abs().max())), rd.mul_up(2.0 * rd.TINY, max(1.0, largest)))


@register("aten.matmul", "aten.mm", "aten.bmm", "aten.mv")
def _matmul(call: Call) -> Linear | Var | Lipschitz:
    return _product_of(call, *list(call.args.values())[:2])


@register("aten.baddbmm")
def _baddbmm(call: Call) -> Var:
    """A constant plus a product of matrices."""
    shift = entries_of(call.const("self"))
    if shift is None or call.const("alpha") != 1:
        msg = f"baddbmm with alpha={call['alpha']!r}, which no rule covers"
        raise UnsupportedError(msg)
    product = _product_of(call, call["batch1"], call["batch2"])
    value = product if isinstance(product, Var) else call.then(product, *call.vars)
    return _summed(call, value, shift, (1.0, float(call.const("beta"))), most(call.error_of("self")))


def _product_of(call: Call, left: Any, right: Any) -> Linear | Var | Lipschitz:
    if isinstance(left, Var) and isinstance(right, Var):
        if min(len(left.shape), len(right.shape)) < 2:
            msg = "matmul of a variable vector, which no rule covers"
            raise UnsupportedError(msg)
        return product(call, left, right)
    constant: Tensor = right if isinstance(left, Var) else left
    errors = call.error_of(next(name for name, value in call.args.items() if value is constant))
    if isinstance(left, Var) and constant.ndim == 2:
        return up_to(Dense(constant.mT.detach()), None if errors is None else errors.mT)
    if constant.ndim == 2 and len(right.shape) == 1:
        return up_to(Dense(constant.detach()), errors)
    return matrix_product(call, left, right, 0.0 if errors is None else up_to(Dense(errors.reshape(1, -1)), errors.reshape(1, -1)).error)


def matrix_product(call: Call, left: Var | Tensor, right: Var | Tensor, lost: float = 0.0) -> Lipschitz:
    """A batch of constant matrices, known up to an error: the largest of them, applied to each slice; a vector meets all of them."""
    constant, variable = (right, left) if isinstance(left, Var) else (left, right)
    assert isinstance(constant, Tensor)
    matrices = constant.detach().reshape(-1, *constant.shape[-2:]) if constant.ndim >= 2 else constant.detach()[None, None]
    batch, samples = (call.shape[:-1], 1) if len(variable.shape) == 1 else (call.shape[:-2], math.prod(variable.shape[:-2]))
    repeats = rd.sqrt_up(float(max(1, math.prod(batch) // max(1, samples))))
    upper = rd.mul_up(rd.add_up(largest(matrices), lost), repeats)
    linear = call.linear(_moduli(call, upper), rd.mul_up(lost, repeats))
    terms = constant.detach() if isinstance(right, Var) or constant.ndim < 2 else constant.detach().mT
    reach = None if terms.is_complex() else partial(_sums_of, to_float64(terms), lost)
    return Lipschitz(upper, "matrix product with a constant", linear=linear, reach=reach)


def _sums_of(rows: Tensor, lost: float, low: float, high: float) -> tuple[float, float]:
    """Interval of the sums of numbers in an interval by the weights of a row, which have errors of a norm of at most `lost`."""
    size = max(abs(low), abs(high))
    if size == math.inf:
        return -math.inf, math.inf
    plus, minus, count = rows.clamp_min(0).sum(-1), rows.clamp_max(0).sum(-1), float(rows.shape[-1])
    moduli = rd.add_up(float(rows.abs().sum(-1).max()) * (1.0 + rd.gamma(count + 8.0)), rd.mul_up(lost, rd.sqrt_up(count)))
    strays = rd.mul_up(rd.add_up(rd.mul_up(rd.gamma(8.0 * count + 64.0), moduli), rd.mul_up(lost, rd.sqrt_up(count))), size)
    room = rd.add_up(strays, (count + 8.0) * rd.TINY)
    return float((plus * low + minus * high).min()) - room, float((plus * high + minus * low).max()) + room


@register("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution")
@register("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
def _conv(call: Call) -> Linear | Var:
    x = call.var("input")
    weight: Tensor = call.const("weight").detach()
    dims = weight.ndim - 2
    if len(x.shape) == dims + 1:
        return call.batched(_conv)
    if len(x.shape) != dims + 2:
        msg = f"a convolution of an input of shape {x.shape}; expected {dims + 2} axes: pass the example with a batch axis"
        raise UnsupportedError(msg)
    transposed = bool(call.args.get("transposed", "conv_transpose" in call.op))

    def axes(name: str, default: int) -> Any:
        value = call.args.get(name, default)
        if isinstance(value, str | int):
            return value
        return list(value) * (dims if len(value) == 1 else 1)

    op = Conv(
        weight,
        input_size=x.shape[2:],
        stride=axes("stride", 1),
        padding=axes("padding", 0),
        dilation=axes("dilation", 1),
        groups=int(call.const("groups")),
        transposed=transposed,
        output_padding=axes("output_padding", 0) if transposed else 0,
    )
    return up_to(op, call.error_of("weight"), _along(call.const("bias"), 1, len(call.shape)), most(call.error_of("bias")))


def spread(call: Call, x: Var, shape: tuple[int, ...], part: str = "entry") -> Var:
    """The variable broadcast to a shape: each entry, or each part of another kind, repeated, so the root of the repeats."""
    if x.shape == shape:
        return x
    repeats = math.prod(shape) // math.prod(x.shape)
    root = rd.sqrt_up(float(repeats))
    linear = LinearAction(lambda value: value.expand(shape), root)
    return call.then(Lipschitz(root, f"each {part} repeated {repeats} times", same_range=True, linear=linear), x, shape=shape)


def _times(
    call: Call, x: Var, weight: Tensor, bias: Tensor | float = 0.0, error: float = 0.0, known: Bound | None = None, bias_error: float = 0.0
) -> Var:
    wide = spread(call, x, call.shape)
    lead = len(call.shape) - weight.ndim
    return call.then(Linear(Scale(weight.reshape([1] * lead + list(weight.shape))), error, bias, known, bias_error), wide)


_ONE = Bound(1.0, 1.0, "a shift by a constant, or a change of sign")


def added(call: Call) -> Var:
    """A sum or a difference of two values, or of one and a constant."""
    alpha = float(call.args.get("alpha", 1))
    signs = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[call.op.split(".")[1]]
    return _summed(call, call["self"], call["other"], signs, max(most(call.error_of("self")), most(call.error_of("other"))))


register("aten.add", "aten.sub", "aten.rsub")(added)


def _summed(call: Call, left: Any, right: Any, signs: tuple[float, float] = (1.0, 1.0), bias_error: float = 0.0) -> Var:
    """Two values, or one and a constant known up to `bias_error`, each times its sign, added."""
    terms = [(v, s) for v, s in zip((left, right), signs, strict=True) if isinstance(v, Var)]
    if len(terms) == 1:
        x, sign = terms[0]
        other, at = (right, signs[1]) if isinstance(left, Var) else (left, signs[0])
        bias = _constant(call, other) * at
        bias_error = rd.add_up(rd.mul_up(bias_error, abs(at)), 0.0 if abs(at) == 1 else _bias_error(bias))
        known = _ONE if abs(sign) == 1 else None
        return _times(call, x, torch.tensor(sign, dtype=torch.float64), bias, known=known, bias_error=bias_error)
    signed = [
        v if s == 1 else _times(_shaped(call, v.shape), v, torch.tensor(s, dtype=torch.float64), known=_ONE if s == -1 else None)
        for v, s in terms
    ]
    return call.then(Sum((1,) * len(signed)), *(spread(call, v, call.shape) for v in signed))


def _shaped(call: Call, shape: tuple[int, ...]) -> Call:
    return Call(call.op, call.args, shape, call.name, call.place, call.target, call.steps)


@register("aten.mul", "aten.div", "aten.true_divide")
def _mul(call: Call) -> Var | Unbounded:
    left, right = call["self"], call["other"]
    divides = "mul" not in call.op
    if call.args.get("rounding_mode") is not None:
        return Unbounded("division with rounding jumps")
    if isinstance(left, Var) and isinstance(right, Var):
        for value, gate in () if divides else ((left, right), (right, left)):
            if (known := gated(call, value, gate)) is not None:
                return call.then(known, value)
        left, right = spread(call, left, call.shape), spread(call, right, call.shape)
        return quotient(call, left, right) if divides else call.then(Product("entries"), left, right)
    if divides and isinstance(right, Var):
        return _times(call, quotient(call, None, right), _constant(call, left), error=most(call.error_of("self")))
    x, other = (left, right) if isinstance(left, Var) else (right, left)
    constant, errors = _constant(call, other), call.error_of("other" if x is left else "self")
    if not divides:
        return _times(call, x, constant, error=most(errors))
    if not bool((constant != 0).all()):
        return Unbounded("division by zero")
    inverse = 1.0 / constant
    return _times(call, x, inverse, error=_bias_error(inverse) if errors is None else most(inverse_error(constant, errors)))


def _by(call: Call, rule: Callable[[Call], Any], op: str, left: Any, right: Any) -> Any:
    """A product or quotient of two arguments as a part of the call: a value, or a constant where both are."""
    pair = {"self": left, "other": right}
    if not any(isinstance(v, Var) for v in pair.values()):
        left_entries, right_entries = (cast("Tensor", entries_of(v)) for v in (left, right))
        return {"aten.mul": torch.mul, "aten.div": torch.div}[op](left_entries, right_entries)
    shape = torch.broadcast_shapes(*(v.shape if isinstance(v, Var | Tensor) else () for v in (left, right)))
    part = replace(call, op=op, args=pair, shape=tuple(shape), errors={}, asked=set())
    result = rule(part)
    return result if isinstance(result, Var) else part.then(result, *part.vars)


@register("aten.addcmul", "aten.addcdiv")
def _addc(call: Call) -> Var:
    factors = _by(call, _mul, "aten.mul" if "mul" in call.op else "aten.div", call["tensor1"], call["tensor2"])
    added = _by(call, _mul, "aten.mul", factors, call.const("value"))
    return _summed(call, call["self"], added, bias_error=_bias_error(added, 2, abs(float(call.const("value")))))


@register("aten.lerp")
def _lerp(call: Call) -> Var:
    weight, x = cast("Tensor", entries_of(call.const("weight"))), call["self"]  # real: complex values are refused before
    keep = 1.0 - weight
    kept = _times(call, x, keep, error=_bias_error(keep)) if isinstance(x, Var) else to_float64(x) * keep
    moved = _by(call, _mul, "aten.mul", call["end"], weight)
    return _summed(call, kept, moved, bias_error=rd.add_up(_bias_error(kept, 2), _bias_error(moved)))


@register("aten.neg")
def _neg(call: Call) -> Var:
    return _times(call, call.var("self"), torch.tensor(-1.0, dtype=torch.float64), known=_ONE)
