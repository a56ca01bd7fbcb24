"""Program -> steps: every call through its rule, or all calls without one listed at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from gramlip.errors import InputError, UndefinedError, UnsupportedError, first_line
from gramlip.network.graph import (
    RECURRENT,
    Program,
    arguments,
    evaluate,
    is_random,
    module_path,
    op_name,
    place,
    reads_memory,
    shape_of,
    tensors,
    widened,
)
from gramlip.network.rules.piecewise_linear import Entrywise, entrywise, merged
from gramlip.network.rules.registry import PATTERNS, Call, Known, Var, find
from gramlip.network.rules.shapes import PICKS
from gramlip.network.running_errors import running_error
from gramlip.network.steps import Input, Linear, Lipschitz, Network, Slice, Step, Unbounded, View, renumbered
from gramlip.operators.linear_maps import checked

_OF_SHAPE = {
    **dict.fromkeys(["aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.new_zeros", "aten.new_ones", "aten.new_full"], 0),
    **dict.fromkeys(["aten.expand_as", "aten.view_as", "aten.reshape_as", "aten.type_as", "aten.to.other"], 1),
}
"""Operation -> the place of the argument of which it reads the shape and the type alone."""


@dataclass(frozen=True)
class Lowered:
    """The network's steps, the calls that no rule covers, the assumptions that were used, and the values of calls on weights alone.

    `errors` are those of the computed values that have any and are read with the input; `taken` says where values are taken as float64
    gives them, without the error of its rounding.
    """

    network: Network
    unsupported: list[str]
    assumed: list[str]
    computed: dict[fx.Node, object]
    errors: dict[fx.Node, Tensor]
    taken: list[str]


def lower(program: Program, assume: Mapping[str, float] | None = None) -> Lowered:
    """Every call of the program as steps.

    Args:
        program: from `gramlip.network.graph.export`.
        assume: constants to believe, by module path, node name or operation name.
    """
    assume = dict(assume or {})
    unused, assumed, unsupported = set(assume), list[str](), list[str]()
    values: dict[fx.Node, object] = dict(program.constants)
    steps: list[Step] = []
    known = Known()
    needed = _needed(program)
    for node in program.nodes:
        if node in program.inputs:
            steps.append(Step(Input(), (), shape_of(node), node.name, "input"))
            values[node] = Var(len(steps) - 1, shape_of(node))
        if node.op != "call_function" or node not in needed:
            continue
        write = program.writes.get(node)
        changed = [node] if write is None else [node, *write.targets, *write.shared]
        try:
            if write is not None and write.refusal:
                msg = f"{op_name(node)}: {write.refusal}"
                raise UnsupportedError(msg)
            values |= dict.fromkeys(changed, _value(node, values, steps, known, assume, unused, assumed))
        except UndefinedError as error:
            msg = f"{place(node)}, in {module_path(node)}: {error}"
            raise InputError(msg) from error
        except (UnsupportedError, InputError) as error:
            unsupported.append(f"{place(node)}, in {module_path(node)}: {error}")
            for n in changed:
                steps.append(Step(Unbounded("no rule"), (), shape_of(n), module_path(node), op_name(node), place(node)))
                values[n] = Var(len(steps) - 1, shape_of(n))
    if unused:
        msg = f"assume={sorted(unused)} was given; expected names of modules, nodes or operations of the model"
        raise InputError(msg)
    ends = [values[n] for n in program.outputs]
    kept = [v for v in ends if isinstance(v, Var)]
    computed = {n: v for n, v in values.items() if n not in program.constants and not _depends(v)}
    read = {n for node in program.nodes if node not in computed for n in node.all_input_nodes}
    errors = {n: e for n, e in known.errors.items() if n in read and isinstance(e, Tensor)}
    return Lowered(renumbered(steps, [v.step for v in kept], {}), unsupported, assumed, computed, errors, sorted(known.taken))


def _depends(value: object) -> bool:
    """Whether a value, or a part of it, depends on the network's input."""
    return any(map(_depends, value)) if isinstance(value, list | tuple) else isinstance(value, Var)  # type: ignore[reportUnknownArgumentType]


def _needed(program: Program) -> set[fx.Node]:
    """The calls that the outputs depend on, in-place calls on what they read included."""
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node, write in program.writes.items():
        for n in (*write.targets, *write.shared):
            writers.setdefault(n, []).append(node)
    seen, stack = set[fx.Node](), list(program.outputs)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [*node.all_input_nodes, *writers.get(node, [])]
    return seen


def _value(
    node: fx.Node,
    values: Mapping[fx.Node, object],
    steps: list[Step],
    known: Known,
    assume: Mapping[str, float],
    unused: set[str],
    assumed: list[str],
) -> object:
    op = op_name(node)
    at = _OF_SHAPE.get(op, _OF_SHAPE.get(op.rsplit(".", 1)[0]))
    shaped = node.args[at] if at is not None and at < len(node.args) and node.args.count(node.args[at]) == 1 else None

    def resolve(n: fx.Node) -> object:
        if n not in values:
            msg = f"{op_name(node)} reads {n.name}, which is neither an input nor a weight"
            raise UnsupportedError(msg)
        value = values[n]
        if n is shaped and isinstance(value, Var):  # nothing of it is read but its shape and type
            return torch.zeros((), dtype=widened(n.meta["val"].dtype)).expand(value.shape)
        return value

    given, dtype = arguments(node, resolve), getattr(node.meta.get("val"), "dtype", None)
    errors = arguments(node, known.errors.get)
    call = Call(op, given, shape_of(node), module_path(node), place(node), node.target, steps, dtype, known, errors)  # type: ignore[arg-type]
    for name in (call.name, node.name, op, op.rsplit(".", 1)[0]):
        if name in assume and call.vars:
            unused.discard(name)
            assumed.append(f"{name} taken as {assume[name]:g}-Lipschitz by assumption ({call.place})")
            return call.then(Lipschitz(float(assume[name]), "assumed", assumed=True), *call.vars)
    if not call.vars:
        return _constant(node, call, resolve)
    _check(node, call)
    plain = op.startswith(("aten.", "getitem")) and not is_random(node) and not any(tensors(v) for v in given.values())
    told = f"{op} {call.args}" if plain else ""
    if told in known.values:  # the same call of the same value again
        return known.values[told]
    curve = entrywise(call)
    value = _made(node, call, curve)
    if call.unasked:
        known.taken.add(f"go into {op}")
    if isinstance(value, Var) and value not in call.vars:
        if curve is not None:
            known.curves[value.step] = curve
        if told:
            known.values[told] = value
    return value


def _made(node: fx.Node, call: Call, curve: Entrywise | None) -> Var | tuple[Var, ...]:
    """The value of a call: as a curve where several come together, by a pattern, or by its rule."""
    op, dtype = call.op, call.dtype
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable and not isinstance(next(iter(call.args.values())), Var):
        msg = f"{op} writes into a weight or buffer"
        raise UnsupportedError(msg)
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        return call.then(Unbounded(f"{op.removeprefix('aten.')} gives integers or truth values, which jump"), *call.vars)
    if curve is not None and (step := merged(call, curve)) is not None:
        curve.rely(call)
        return call.then(step, curve.base)
    for pattern in PATTERNS.get(op.rsplit(".", 1)[0].rstrip("_"), ()):
        if (value := pattern(call)) is not None:
            return value
    rule = find(op)
    if rule is None and is_random(node):
        msg = f"{op} draws random numbers; expected evaluation mode: type model.eval()"
        raise UnsupportedError(msg)
    if node.target in RECURRENT:
        msg = f"{op} is unrolled only where no other recurrent layer is random and no in-place call overwrites what others share"
        raise UnsupportedError(msg)
    if rule is None:
        msg = f"{op} has no rule: type @gramlip.rules.register({op!r}) on a function (call) -> constant, or --assume {call.name}=1.0"
        raise UnsupportedError(msg)
    result = rule(call)
    if isinstance(result, View | Lipschitz | Slice | Linear) and op.rsplit(".", 1)[0] in PICKS and len(call.vars) == 1:
        return call.then(replace(result, pick=call.run), *call.vars)
    if isinstance(result, Var | tuple):
        return result
    if isinstance(result, int | float):
        return call.then(Lipschitz(float(result), "the registered rule's constant"), *call.vars)
    return call.then(result, *call.vars)


_WEIGHTS = ("weight", "bias", "running_mean", "running_var", "negative_slope")  # what may not be infinite; a mask may


def _check(node: fx.Node, call: Call) -> None:
    """Refuse what no rule is meant for: complex values, values without entries, constants that are no numbers."""
    if any(t.is_complex() for t in tensors(node.meta.get("val"))):
        msg = f"{call.op} gives complex values, which no rule covers; expected real ones"
        raise UnsupportedError(msg)
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
    schema = getattr(node.target, "_schema", None)
    if call.op == "aten.detach_.default":  # on a constant written in the code; changes no value
        return next(iter(call.args.values()))
    if schema is not None and schema.is_mutable:
        msg = f"{call.op} writes into a weight or buffer"
        raise UnsupportedError(msg)
    if reads_memory(node):
        msg = f"{call.op} reads places or bits of memory instead of numbers; expected indexing, unfold or arithmetic"
        raise UnsupportedError(msg)
    read = lambda n: widened(resolve(n))  # noqa: E731
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
