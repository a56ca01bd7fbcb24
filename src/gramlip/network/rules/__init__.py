"""Rules: how a difference of two inputs passes through each operation of a graph.

`lower` turns a program into steps, each call by its rule; calls without a rule are listed, all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from gramlip.errors import InputError, UndefinedError, UnsupportedError, first_line
from gramlip.network.graph import RECURRENT, Program, arguments, evaluate, in_float64, is_random, module_path, place
from gramlip.network.in_place import op_name, reads_memory, shape_of, tensors
from gramlip.network.rules import activations, affine, patterns, shapes, statistics
from gramlip.network.rules.entrywise import Entrywise, entrywise, merged
from gramlip.network.rules.fourier import complex_value, keep_half
from gramlip.network.rules.registry import PATTERNS, RULES, Call, Known, Pattern, Rule, Var, find, register
from gramlip.network.rules.shapes import PICKS, RISING
from gramlip.network.running_errors import running_error
from gramlip.network.steps import Input, Linear, Lipschitz, Network, Slice, Step, Unbounded, View, What, numbering, renumbered
from gramlip.operators.linear_maps import checked

__all__ = ["RULES", "Call", "Lowered", "Rule", "Var", "activations", "affine", "lower", "patterns", "register", "shapes", "statistics"]

_OF_SHAPE = {
    **dict.fromkeys(["aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.new_zeros", "aten.new_ones", "aten.new_full"], 0),
    **dict.fromkeys(["aten.expand_as", "aten.view_as", "aten.reshape_as", "aten.type_as", "aten.to.other"], 1),
}
"""Operation -> the place of the argument of which it reads the shape and the type alone."""


@dataclass(frozen=True)
class Lowered:
    """The network's steps, the calls that no rule covers, the assumptions that were used, and the values of calls on weights alone.

    `errors` are those of the computed values that have any and are read with the input; `taken` says where values are taken as float64
    gives them, without the error of its rounding. `places` are the numbers of the steps that make the values of calls, lists of such
    where a call makes several.
    """

    network: Network
    unsupported: list[str]
    assumed: list[str]
    computed: dict[fx.Node, object]
    errors: dict[fx.Node, Tensor]
    taken: list[str]
    places: dict[fx.Node, Any]


def lower(program: Program, assume: Mapping[str, float] | None = None, *, literal: bool = False) -> Lowered:
    """Every call of the program as steps.

    Args:
        program: from `gramlip.network.graph.export`.
        assume: constants to believe, by module path, node name or operation name.
        literal: each call by its own rule, none taken together with those before.
    """
    lowering = _Lowering(program, dict(assume or {}), literal)
    needed = _needed(program)
    for node in program.nodes:
        if node in program.inputs:
            lowering.add_input(node)
        if node.op == "call_function" and node in needed:
            lowering.add_call(node)
    return lowering.done()


class _Lowering:
    """The steps so far, the value of each node, and what is known of values from the calls before."""

    def __init__(self, program: Program, assume: Mapping[str, float], literal: bool) -> None:
        self._program, self._assume, self._literal = program, assume, literal
        self._values: dict[fx.Node, object] = dict(program.constants)
        self._steps, self._known = list[Step](), Known()
        self._unused, self._assumed, self._unsupported = set(assume), list[str](), list[str]()

    def add_input(self, node: fx.Node) -> None:
        """One of the network's inputs."""
        self._values[node] = self._new(node, Step(Input(), (), shape_of(node), node.name, "input"))

    def add_call(self, node: fx.Node) -> None:
        """The steps of a call; where no rule covers it, unbounded ones, and the reason."""
        refused = self._program.refused.get(node)
        try:
            if refused is not None:
                msg = f"{op_name(node)}: {refused.reason}"
                raise UnsupportedError(msg)
            self._values[node] = self._value(node)
        except UndefinedError as error:
            msg = f"{place(node)}, in {module_path(node)}: {error}"
            raise InputError(msg) from error
        except (UnsupportedError, InputError) as error:
            self._unsupported.append(f"{place(node)}, in {module_path(node)}: {error}")
            for n in (node, *(refused.spoiled if refused else ())):
                self._values[n] = self._new(n, Step(Unbounded("no rule"), (), shape_of(n), module_path(node), op_name(node), place(node)))

    def done(self) -> Lowered:
        """The network of the steps that the outputs depend on.

        Raises:
            InputError: an assumption of a name that the model does not have.
        """
        if self._unused:
            msg = f"assume={sorted(self._unused)} was given; expected names of modules, nodes or operations of the model"
            raise InputError(msg)
        ends = [value.step for n in self._program.outputs if isinstance(value := self._values[n], Var)]
        computed = {n: v for n, v in self._values.items() if n not in self._program.constants and not _depends(v)}
        read = {n for node in self._program.nodes if node not in computed for n in node.all_input_nodes}
        errors = {n: e for n, e in self._known.errors.items() if n in read and isinstance(e, Tensor)}
        network = renumbered(self._steps, ends, {})
        number = numbering(self._steps, ends, {})
        places = {n: place for n, v in self._values.items() if _depends(v) and (place := _places(v, number)) is not None}
        return Lowered(network, self._unsupported, self._assumed, computed, errors, sorted(self._known.taken), places)

    def _new(self, node: fx.Node, step: Step) -> Var:
        self._steps.append(step)
        return Var(len(self._steps) - 1, shape_of(node))

    def _call(self, node: fx.Node, resolve: Callable[[fx.Node], object]) -> Call:
        """The call as a rule sees it."""
        given, dtype = arguments(node, resolve), getattr(node.meta.get("val"), "dtype", None)
        errors = arguments(node, self._known.errors.get)
        target = cast("Callable[..., Any]", node.target)
        return Call(op_name(node), given, shape_of(node), module_path(node), place(node), target, self._steps, dtype, self._known, errors)

    def _value(self, node: fx.Node) -> object:
        """The value of a call: assumed, a number, that of the same call before, or what its rule makes."""
        call = self._call(node, resolve := self._resolver(node))
        if (value := self._assumed_value(node, call)) is not None:
            return value
        if not call.vars:
            return _constant(node, call, resolve)
        _check(call)
        plain = call.op.startswith(("aten.", "getitem")) and not is_random(node) and not any(tensors(v) for v in call.args.values())
        text = f"{call.op} {call.args}" if plain else ""
        if text in self._known.values:  # the same call of the same value again
            return self._known.values[text]
        alone = self._literal or _is_complex(node)
        curve = None if alone else entrywise(call)
        value = _made(node, call, curve, () if alone else PATTERNS.get(call.op.rsplit(".", 1)[0].rstrip("_"), ()))
        if call.unasked:
            self._known.taken.add(f"go into {call.op}")
        if isinstance(value, Var) and value not in call.vars:
            if curve is not None:
                self._known.curves[value.step] = curve
            if text:
                self._known.values[text] = value
            keep_half(call, value)
        return value

    def _resolver(self, node: fx.Node) -> Callable[[fx.Node], object]:
        """The values that a call reads; of what it reads the shape and the type alone, a placeholder."""
        op = op_name(node)
        at = _OF_SHAPE.get(op, _OF_SHAPE.get(op.rsplit(".", 1)[0]))
        shaped = node.args[at] if at is not None and at < len(node.args) and node.args.count(node.args[at]) == 1 else None

        def resolve(n: fx.Node) -> object:
            if n not in self._values:
                msg = f"{op} reads {n.name}, which is neither an input nor a weight"
                raise UnsupportedError(msg)
            value = self._values[n]
            if n is shaped and isinstance(value, Var):
                return torch.zeros((), dtype=in_float64(n.meta["val"].dtype)).expand(value.shape)
            return value

        return resolve

    def _assumed_value(self, node: fx.Node, call: Call) -> Var | None:
        """The value of a call whose constant is to be believed."""
        for name in (call.name, node.name, call.op, call.op.rsplit(".", 1)[0]):
            if name in self._assume and call.vars:
                self._unused.discard(name)
                self._assumed.append(f"{name} taken as {self._assume[name]:g}-Lipschitz by assumption ({call.place})")
                return call.then(Lipschitz(float(self._assume[name]), "assumed", assumed=True), *call.vars)
        return None


def _places(value: Any, number: Mapping[int, int]) -> Any:
    """The numbers of the steps of a value, None for those that no output depends on."""
    if isinstance(value, list | tuple):
        return [_places(item, number) for item in value]  # type: ignore[reportUnknownVariableType]
    return number.get(value.step) if isinstance(value, Var) else None


def _depends(value: object) -> bool:
    """Whether a value, or a part of it, depends on the network's input."""
    return any(map(_depends, value)) if isinstance(value, list | tuple) else isinstance(value, Var)  # type: ignore[reportUnknownArgumentType]


def _needed(program: Program) -> set[fx.Node]:
    """The calls that the outputs depend on, in-place calls on what they read included."""
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node, refused in program.refused.items():
        for n in refused.spoiled:
            writers.setdefault(n, []).append(node)
    seen, stack = set[fx.Node](), list(program.outputs)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [*node.all_input_nodes, *writers.get(node, [])]
    return seen


def _made(node: fx.Node, call: Call, curve: Entrywise | None, known: Sequence[Pattern]) -> Var | tuple[Var, ...]:
    """The value of a call: as a curve where several come together, by a pattern, or by its rule."""
    op, dtype = call.op, call.dtype
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        return call.then(Unbounded(f"{op.removeprefix('aten.')} gives integers or truth values, which jump"), *call.vars)
    if curve is not None and (step := merged(call, curve)) is not None:
        curve.rely(call)
        return call.then(step, curve.base)
    for pattern in known:
        if (value := pattern(call)) is not None:
            return value
    rule = find(op)
    if rule is None and is_random(node):
        msg = f"{op} draws random numbers; expected evaluation mode: type model.eval()"
        raise UnsupportedError(msg)
    if node.target in RECURRENT:
        alone = "no other recurrent layer is random and no in-place call overwrites what others share"
        msg = f"{op} is unrolled only where {alone}; expected the call out of place"
        raise UnsupportedError(msg)
    if rule is None:
        msg = f"{op} has no rule: type @gramlip.rules.register({op!r}) on a function (call) -> constant, or --assume {call.name}=1.0"
        raise UnsupportedError(msg)
    return _written(call, complex_value(call) if _is_complex(node) else rule(call))


def _written(call: Call, result: What | Var | tuple[Var, ...] | float) -> Var | tuple[Var, ...]:
    """The value of what a rule returned, with the call itself where that copies or chooses entries of one value."""
    packet = call.op.rsplit(".", 1)[0]
    if isinstance(result, View | Lipschitz | Slice | Linear) and packet in PICKS and len(call.vars) == 1:
        return call.then(replace(result, copy_entries=call.run), *call.vars)
    if isinstance(result, Lipschitz) and packet in RISING:
        return call.then(replace(result, monotone=call.run), *call.vars)
    if isinstance(result, Var | tuple):
        return result
    if isinstance(result, int | float):
        return call.then(Lipschitz(float(result), "the registered rule's constant"), *call.vars)
    return call.then(result, *call.vars)


def _is_complex(node: fx.Node) -> bool:
    """Whether the call reads or makes complex values."""
    return any(t.is_complex() for n in (node, *node.all_input_nodes) for t in tensors(n.meta.get("val")))


_WEIGHTS = ("weight", "bias", "running_mean", "running_var", "negative_slope")  # what may not be infinite; a mask may


def _check(call: Call) -> None:
    """Refuse what no rule is meant for: values without entries, constants that are no numbers."""
    if any(0 in shape for shape in (call.shape, *(v.shape for v in call.vars))):
        msg = f"{call.op} of values without entries, which no rule covers"
        raise UnsupportedError(msg)
    for name, value in call.args.items():
        for t in tensors(torch.tensor(value) if isinstance(value, float) else value):
            if name in _WEIGHTS:
                checked(t, name)
            elif bool(torch.isnan(t).any()):
                msg = f"{name} holds NaN; expected numbers"
                raise InputError(msg)


def _constant(node: fx.Node, call: Call, resolve: Callable[[fx.Node], object]) -> object:
    """The value of a call on weights alone, as float64 computes it from them: docs/network.md#computed-weights."""
    if is_random(node):
        msg = f"{call.op} draws random numbers: expected a function of the input alone"
        raise UnsupportedError(msg)
    if reads_memory(node):
        msg = f"{call.op} reads places or bits of memory instead of numbers; expected indexing, unfold or arithmetic"
        raise UnsupportedError(msg)

    def read(n: fx.Node) -> Any:
        return in_float64(resolve(n))

    try:
        with torch.no_grad():
            result = evaluate(node, read)
            error, proved = running_error(node, result, read, call.known.errors)
    except (RuntimeError, TypeError) as error:
        msg = f"{call.op} of weights alone, which torch does not compute in float64: {first_line(error)}"
        raise UnsupportedError(msg) from error
    if any(bool(t.any()) for t in tensors(error)):
        call.known.errors[node] = error
    if not proved:
        call.known.taken.add(f"come from {call.op}")
    return result
