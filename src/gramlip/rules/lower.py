"""Program -> steps: every call through its rule, or all calls without one listed at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from gramlip.errors import InputError, UnsupportedError
from gramlip.graph import Program, arguments, is_random, module_path, mutations, op_name, place, shape_of
from gramlip.rules.registry import Call, Var, find
from gramlip.rules.shapes import OF_COMPLEX
from gramlip.steps import Input, Lipschitz, Network, Step, Unbounded, renumbered

_OF_SHAPE = {
    **dict.fromkeys(["aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.new_zeros", "aten.new_ones", "aten.new_full"], 0),
    **dict.fromkeys(["aten.expand_as", "aten.view_as", "aten.reshape_as", "aten.type_as", "aten.to.other"], 1),
}
"""Operation -> the place of the argument of which it reads the shape and the type alone."""


@dataclass(frozen=True)
class Lowered:
    """The network's steps, the calls that no rule covers, and the assumptions that were used."""

    network: Network
    unsupported: list[str]
    assumed: list[str]


def lower(program: Program, assume: Mapping[str, float] | None = None) -> Lowered:
    """Every call of the program as steps.

    Args:
        program: from `gramlip.graph.export`.
        assume: constants to believe, by module path, node name or operation name.
    """
    assume = dict(assume or {})
    unused, assumed, unsupported, refused = set(assume), list[str](), list[str](), ""
    values: dict[fx.Node, object] = dict(program.constants)
    steps: list[Step] = []
    try:
        overwritten = mutations(program.nodes)
    except UnsupportedError as error:
        overwritten, refused = {}, str(error)
        unsupported.append(refused)
    needed = _needed(program, overwritten)
    for node in program.nodes:
        if node in program.inputs:
            steps.append(Step(Input(), (), shape_of(node), node.name, "input"))
            values[node] = Var(len(steps) - 1, shape_of(node))
        if node.op != "call_function" or node not in needed:
            continue
        try:
            values[node] = _value(node, values, steps, assume, unused, assumed)
            if node in overwritten:
                values[overwritten[node]] = values[node]
        except (UnsupportedError, InputError) as error:
            unsupported.append(f"{place(node)}, in {module_path(node)}: {error}")
            steps.append(Step(Unbounded("no rule"), (), shape_of(node), module_path(node), op_name(node), place(node)))
            values[node] = Var(len(steps) - 1, shape_of(node))
    if unused:
        msg = f"assume={sorted(unused)} was given; expected names of modules, nodes or operations of the model"
        raise InputError(msg)
    ends = [values[n] for n in program.outputs]
    kept = [v for v in ends if isinstance(v, Var)]
    if refused:  # every later reader took what is overwritten for what it was before
        steps.append(Step(Unbounded(refused), (), (), "model", "overwritten"))
        kept = [Var(len(steps) - 1, ())]
    return Lowered(renumbered(steps, [v.step for v in kept], {}), unsupported, assumed)


def _needed(program: Program, overwritten: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """The calls that the outputs depend on, in-place calls on their sources included."""
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node, source in overwritten.items():
        writers.setdefault(source, []).append(node)
    seen, stack = set[fx.Node](), list(program.outputs)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [*node.all_input_nodes, *writers.get(node, [])]
    return seen


def _value(
    node: fx.Node, values: Mapping[fx.Node, object], steps: list[Step], assume: Mapping[str, float], unused: set[str], assumed: list[str]
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
            return torch.zeros((), dtype=n.meta["val"].dtype).expand(value.shape)
        return value

    given, dtype = arguments(node, resolve), getattr(node.meta.get("val"), "dtype", None)
    call = Call(op, given, shape_of(node), module_path(node), place(node), node.target, steps, dtype)  # type: ignore[arg-type]
    for name in (call.name, node.name, op, op.rsplit(".", 1)[0]):
        if name in assume and call.vars:
            unused.discard(name)
            assumed.append(f"{name} taken as {assume[name]:g}-Lipschitz by assumption ({call.place})")
            return call.then(Lipschitz(float(assume[name]), "assumed", assumed=True), *call.vars)
    if not call.vars:
        return _constant(node, call, resolve)
    schema = getattr(node.target, "_schema", None)
    if schema is not None and any(a.is_out for a in schema.arguments):
        msg = f"{op} writes into what is given as out, which no rule covers; expected the call's result"
        raise UnsupportedError(msg)
    if schema is not None and schema.is_mutable and not isinstance(next(iter(call.args.values())), Var):
        msg = f"{op} writes into a weight or buffer"
        raise UnsupportedError(msg)
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        return call.then(Unbounded(f"{op.removeprefix('aten.')} gives integers or truth values, which jump"), *call.vars)
    rule = find(op)
    if (
        op.startswith("aten.")
        and op.rsplit(".", 1)[0].rstrip("_") not in OF_COMPLEX
        and any(map(_is_complex, (node, *node.all_input_nodes)))
    ):
        msg = f"{op} of complex values, which no rule covers; expected their real and imaginary parts: type torch.view_as_real"
        raise UnsupportedError(msg)
    if rule is None:
        msg = f"{op} has no rule: type @gramlip.rules.register({op!r}) on a function (call) -> constant, or --assume {call.name}=1.0"
        raise UnsupportedError(msg)
    result = rule(call)
    if isinstance(result, Var):
        return result
    if isinstance(result, int | float):
        return call.then(Lipschitz(float(result), "the registered rule's constant"), *call.vars)
    return call.then(result, *call.vars)


def _is_complex(node: fx.Node) -> bool:
    return isinstance(value := node.meta.get("val"), Tensor) and value.is_complex()


def _constant(node: fx.Node, call: Call, resolve: object) -> object:
    """The value of a call on weights alone, as the model computes it."""
    if is_random(node):
        msg = f"{call.op} draws random numbers: expected a function of the input alone"
        raise UnsupportedError(msg)
    schema = getattr(node.target, "_schema", None)
    if call.op == "aten.detach_.default":  # on a constant written in the code; changes no value
        return next(iter(call.args.values()))
    if schema is not None and schema.is_mutable:
        msg = f"{call.op} writes into a weight or buffer"
        raise UnsupportedError(msg)
    args = map_arg(node.args, resolve)  # type: ignore[arg-type]
    kwargs = map_arg(node.kwargs, resolve)  # type: ignore[arg-type]
    with torch.no_grad():
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    return result.detach() if isinstance(result, Tensor) else result
