"""What exporters write as several nodes, put back into one: the same function of real numbers, for which there is one rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from gramlip.onnx.files import Operation


def rewritten(operations: Iterable[Operation], constants: Mapping[str, Tensor]) -> list[Operation]:
    """The operations with idioms in one node each; those that only an idiom used stay, and are not needed any more.

    `where(b x > t, x, softplus(b x) / b)` is torch's softplus, `x tanh(softplus(x))` Mish, `x (1 / sqrt(v))` a quotient, `x W + b` a
    linear layer, and a softmax whose NaN are replaced is the softmax: it has none but where all of a row is masked, whatever the input.
    """
    graph = _Graph(constants)
    return [graph.add(operation) for operation in operations]


_OF_ONE = ("Softplus", "Tanh", "IsNaN", "Softmax", "Sqrt", "Reciprocal")


class _Graph:
    """Which operation makes a value."""

    def __init__(self, constants: Mapping[str, Tensor]) -> None:
        self.constants = dict(constants)
        self.makers: dict[str, Operation] = {}

    def add(self, operation: Operation) -> Operation:
        """The operation, or the one that it ends."""
        if operation.op == "Constant" and isinstance(held := operation.attributes.get("value"), Tensor):
            self.constants[operation.outputs[0]] = held
        idioms = {
            ("Where", 3): (self._softplus, self._softmax),
            ("Mul", 2): (self._mish, self._quotient),
            ("Add", 2): (self._linear,),
        }.get((operation.op, len(operation.inputs)), ())
        found = next((made for idiom in idioms if (made := idiom(operation)) is not None), operation)
        self.makers |= dict.fromkeys(operation.outputs, found)
        return found

    def _made(self, name: str, op: str) -> tuple[str, ...]:
        """The inputs of the operation of this kind that makes a value; nothing where another makes it."""
        maker = self.makers.get(name)
        return maker.inputs if maker is not None and maker.op == op and len(maker.inputs) == (1 if op in _OF_ONE else 2) else ()

    def _number(self, name: str) -> float | None:
        held = self.constants.get(name)
        return float(held) if held is not None and held.numel() == 1 else None

    def _softplus(self, operation: Operation) -> Operation | None:
        condition, x, smooth = operation.inputs
        greater = self._made(condition, "Greater")
        if not greater or (threshold := self._number(greater[1])) is None:
            return None
        argument, beta = greater[0], 1.0
        divided = self._made(smooth, "Div")
        if divided:
            beta = self._number(divided[1])
            factors = self._made(argument, "Mul")
            if beta is None or not factors or factors[0] != x or self._number(factors[1]) != beta:
                return None
            smooth = divided[0]
        elif argument != x:
            return None
        if self._made(smooth, "Softplus") != (argument,):
            return None
        return replace(operation, op="Softplus", inputs=(x,), attributes={"beta": beta, "threshold": threshold})

    def _mish(self, operation: Operation) -> Operation | None:
        for x, gate in (operation.inputs, operation.inputs[::-1]):
            tanh = self._made(gate, "Tanh")
            if tanh and self._made(tanh[0], "Softplus") == (x,) and not self.makers[tanh[0]].attributes:
                return replace(operation, op="Mish", inputs=(x,))
        return None

    def _softmax(self, operation: Operation) -> Operation | None:
        condition, _, x = operation.inputs
        if self._made(condition, "IsNaN") == (x,) and self._made(x, "Softmax"):
            return replace(operation, op="Identity", inputs=(x,))
        return None

    def _quotient(self, operation: Operation) -> Operation | None:
        for x, inverse in (operation.inputs, operation.inputs[::-1]):
            one = self._made(inverse, "Div")
            root = one[1:] if one and self._number(one[0]) == 1 else self._made(inverse, "Reciprocal")
            if root and self._made(root[0], "Sqrt"):
                return replace(operation, op="Div", inputs=(x, root[0]))
        return None

    def _linear(self, operation: Operation) -> Operation | None:
        for product, bias in (operation.inputs, operation.inputs[::-1]):
            if (factors := self._made(product, "MatMul")) and self._axes(factors[1]) == 2 and self._axes(bias) == 1:
                return replace(self.makers[product], inputs=(*factors, bias), outputs=operation.outputs)
        return None

    def _axes(self, name: str) -> int | None:
        held = self.constants.get(name)
        return None if held is None else held.ndim
