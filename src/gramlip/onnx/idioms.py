"""Activations that exporters write as several nodes, put back into one: the same function, for which there is one rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from gramlip.onnx.files import Operation


def rewritten(operations: Iterable[Operation], constants: Mapping[str, Tensor]) -> list[Operation]:
    """The operations with idioms in one node each; those that only an idiom used stay, and are not needed any more.

    `where(b x > t, x, softplus(b x) / b)` is torch's softplus, `x tanh(softplus(x))` Mish.
    """
    graph = _Graph(constants)
    return [graph.add(operation) for operation in operations]


_OF_ONE = ("Softplus", "Tanh")


class _Graph:
    """Which operation makes a value."""

    def __init__(self, constants: Mapping[str, Tensor]) -> None:
        self.constants = dict(constants)
        self.makers: dict[str, Operation] = {}

    def add(self, operation: Operation) -> Operation:
        """The operation, or the one that it ends."""
        if operation.op == "Constant" and isinstance(held := operation.attributes.get("value"), Tensor):
            self.constants[operation.outputs[0]] = held
        idiom = {("Where", 3): self._softplus, ("Mul", 2): self._mish}.get((operation.op, len(operation.inputs)))
        found = (idiom and idiom(operation)) or operation
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
