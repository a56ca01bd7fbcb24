"""RULES: name of a graph operation -> how a difference of two inputs passes through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from gramlip.errors import InputError, UnsupportedError
from gramlip.network.graph import in_float64
from gramlip.network.in_place import tensors
from gramlip.network.steps import LinearAction, Step, Sum, View, What
from gramlip.operators.linear_maps import Shape


@dataclass(frozen=True)
class Var:
    """A value that depends on the network's input: the number of the step that makes it, and its shape."""

    step: int
    shape: Shape


class Radius(NamedTuple):
    """A value that is at least `factor` times, and proportional to, the l2 norms of groups of entries of step `of`.

    Where it is `centred`, the groups less their means are meant.
    """

    of: int
    factor: float
    centred: bool = False


@dataclass
class Known:
    """State kept from call to call: curves (`entrywise`) by the number of the step, and values by the call.

    `radii` are the steps that are norms of groups, `roots` those that are `sqrt(norm^2 + eps)`, `centred` those that are a value less
    its means: the step of the value, and the shape of the means.
    `radial` are the steps that are a value times or over functions of the lengths of its groups: the step of the value, and for each
    function its step and 1, or -1 where it divides. `functions` are what was found of functions of one number (`enclosures`),
    `written` the steps that several calls are together, and the last of the steps of these calls.
    `halves` are what is known of half spectra (`fourier`), by the number of the step; `errors` are those of computed weights
    (`running_errors`); `taken` says which of them come or go where errors are not followed.
    """

    curves: dict[int, Any] = field(default_factory=dict[int, Any])
    radii: dict[int, Radius] = field(default_factory=dict[int, Radius])
    roots: dict[int, tuple[Radius, float]] = field(default_factory=dict[int, tuple[Radius, float]])
    centred: dict[int, tuple[int, Shape]] = field(default_factory=dict[int, tuple[int, Shape]])
    radial: dict[int, tuple[int, tuple[tuple[int, int], ...]]] = field(default_factory=dict[int, tuple[int, tuple[tuple[int, int], ...]]])
    functions: dict[Any, Any] = field(default_factory=dict[Any, Any])
    written: dict[int, int] = field(default_factory=dict[int, int])
    values: dict[str, Var] = field(default_factory=dict[str, Var])
    halves: dict[int, Any] = field(default_factory=dict[int, Any])
    errors: dict[fx.Node, Any] = field(default_factory=dict[fx.Node, Any])
    taken: set[str] = field(default_factory=set[str])


@dataclass(frozen=True)
class Call:
    """One call of the graph as a rule sees it.

    `call["name"]` is an argument by its name in torch's own schema, defaults filled in: a `Var` for what depends on the
    network's input, tensors and Python values for the rest. `shape` is the result's (the first one's where there are several),
    `dtype` its type, `known` what calls before it left. A constant may have been computed from weights: a rule that does not
    ask for its error (`error_of`) takes it as float64 gives it, and the report says so.
    """

    op: str
    args: Mapping[str, Any]
    shape: Shape
    name: str
    place: str
    target: Callable[..., Any]
    steps: list[Step]
    dtype: torch.dtype | None = None
    known: Known = field(default_factory=Known)
    errors: Mapping[str, Any] = field(default_factory=dict[str, Any])
    asked: set[str] = field(default_factory=set[str])

    def error_of(self, name: str) -> Tensor | None:
        """The error of a constant argument, entry by entry; None if it is exact. The rule that asks must carry it."""
        self.asked.add(name)
        return self.inexact.get(name)

    @property
    def inexact(self) -> dict[str, Any]:
        """The errors of the constant arguments that have any, by name; lists of such where the argument is a list."""
        return {name: error for name, error in self.errors.items() if tensors(error)}

    @property
    def unasked(self) -> bool:
        """Whether a constant argument has an error that no rule asked for."""
        return any(name not in self.asked for name in self.inexact)

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    @property
    def vars(self) -> list[Var]:
        """The arguments that depend on the input, in order, those inside lists too."""
        variables: list[Var] = []
        for value in self.args.values():
            items: Sequence[Any] = value if isinstance(value, list | tuple) else [value]  # type: ignore[reportUnknownVariableType]
            variables += [v for v in items if isinstance(v, Var)]
        return variables

    def var(self, name: str) -> Var:
        """The argument as a variable."""
        value = self.args[name]
        if not isinstance(value, Var):
            msg = f"{self.op} has a constant for {name!r}, which no rule covers"
            raise UnsupportedError(msg)
        return value

    def const(self, name: str) -> Any:
        """The argument as a constant."""
        value = self.args[name]
        if isinstance(value, Var):
            msg = f"{self.op} has a {name!r} that depends on the input, which no rule covers"
            raise UnsupportedError(msg)
        return value

    def then(self, what: What, *sources: Var, shape: Shape | None = None) -> Var:
        """Write a step and return its value; `shape` is the call's unless given.

        Raises:
            InputError: a sum that repeats an entry of a source more often than it says.
        """
        shape = self.shape if shape is None else shape
        if isinstance(what, Sum):
            repeats = tuple(-(-math.prod(shape) // max(1, math.prod(s.shape))) for s in sources)
            if len(what.repeats) != len(repeats) or any(said < least for said, least in zip(what.repeats, repeats, strict=True)):
                msg = f"{what} was given for sources of {[s.shape for s in sources]} and a result of {shape}; expected Sum({repeats})"
                raise InputError(msg)
        self.steps.append(Step(what, tuple(s.step for s in sources), shape, self.name, self.op, self.place))
        return Var(len(self.steps) - 1, self.steps[-1].shape)

    def batched(self, rule: Rule) -> Var:
        """The call's one variable as a batch of one through a rule, and out of the batch again."""
        x = self.vars[0]
        wide = self.then(View(True, "rows"), x, shape=(1, *x.shape))
        part = replace(self, args={k: wide if v is x else v for k, v in self.args.items()}, shape=(1, *self.shape))
        result = rule(part)
        return self.then(View(True, "rows"), result if isinstance(result, Var) else part.then(result, wide))  # type: ignore[arg-type]

    def run(self, *values: Tensor) -> Tensor:
        """The call, out of place, on float64 tensors instead of its variables, in order; its constants too are float64."""
        rest = [value.contiguous() for value in values]  # a view of values whose strides are not the program's could fail

        def given(v: Any) -> Any:
            return rest.pop(0) if isinstance(v, Var) else [given(item) for item in v] if isinstance(v, list | tuple) else in_float64(v)

        target: Any = _out_of_place(self.target)
        args = {name: given(v) for name, v in self.args.items()}
        positional = [a.name for a in target._schema.arguments if not a.kwarg_only]
        first = [args.pop(name) for name in positional]
        return target(*first, **args)

    def linear(self, moduli: float, error: float | None = None, shifted: bool = False, averages: bool = False) -> LinearAction | None:
        """The call as a linear map of its variables, less what it makes of zeros where it is `shifted`: see `LinearAction`.

        None where its constants have errors of which `error` says nothing, or are complex.
        """
        imaginary = any(t.is_complex() for value in self.args.values() for t in tensors(value))
        if (self.inexact and error is None) or imaginary or not moduli < math.inf:
            return None
        run = self.run if not shifted else lambda *values: self.run(*values) - self.run(*map(torch.zeros_like, values))
        return LinearAction(run, moduli, error or 0.0, averages and not self.inexact)


def _out_of_place(target: Any) -> Any:
    """The same operation without writing into its argument."""
    packet, _, overload = str(target).removeprefix("aten.").partition(".")
    written = getattr(getattr(target, "_schema", None), "is_mutable", False)
    return getattr(getattr(torch.ops.aten, packet.rstrip("_")), overload) if written else target


Rule = Callable[[Call], "What | Var | tuple[Var, ...] | float"]
RULES: dict[str, Rule] = {}


def register(*operations: Any) -> Callable[[Rule], Rule]:
    """Decorator that makes a function the rule of graph operations.

    Args:
        operations: `torch.ops` entries or their names, with or without the overload.

    The rule takes a `Call` and returns a number (the Lipschitz constant, l2 norm, in all variable arguments joined: it is
    believed, so prove it), a step from `gramlip.network.steps`, or a `Var` for a value that it built with `call.then`, one for each
    result where there are several.

    >>> from gramlip.rules import RULES, register
    >>> @register("mylib.soft_clip")
    ... def soft_clip(call):
    ...     return 1.0
    >>> RULES.pop("mylib.soft_clip") is soft_clip
    True
    """

    def keep(rule: Rule) -> Rule:
        for operation in operations:
            RULES[str(operation)] = rule
        return rule

    return keep


Pattern = Callable[[Call], "Var | None"]
PATTERNS: dict[str, list[Pattern]] = {}


def pattern(*operations: str) -> Callable[[Pattern], Pattern]:
    """Decorator for a function that is asked before the rule of these operations; it returns None where its pattern is not met."""

    def keep(rule: Pattern) -> Pattern:
        for operation in operations:
            PATTERNS.setdefault(operation, []).append(rule)
        return rule

    return keep


def find(op: str) -> Rule | None:
    """The rule of `aten.relu.default`: its own, else its packet's."""
    packet = op.rsplit(".", 1)[0] if op.count(".") > 1 else op
    return RULES.get(op) or RULES.get(packet)
