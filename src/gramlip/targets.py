"""TARGET: what the user typed becomes a source of layers. One entry of `RESOLVERS` for each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import Protocol

from gramlip import sources
from gramlip.errors import InputError
from gramlip.operators.linear_maps import Conv, Dense
from gramlip.reports.checkpoint import read, read_bytes
from gramlip.reports.output import note
from gramlip.reports.report import Report
from gramlip.reports.state_dict import Watch, Weights

Shape = tuple[int, ...]


class Source(Protocol):
    """What a target turns out to be: operators by name, and an audit."""

    def operators(self) -> Iterable[tuple[str, Dense | Conv]]:
        """Every linear map by name."""
        ...

    def audit(self, *, rtol: float, watch: Watch) -> Report:
        """The report; `watch` may show progress."""
        ...


def _weights(target: str, inputs: Shape | None) -> Source:
    if inputs is not None:
        given = ",".join(map(str, inputs))
        msg = f"--input {given} was given, but {target} holds weights alone, bounded for every input size; expected no --input"
        raise InputError(msg)
    if target in DEMOS:
        if Path(target).exists():
            note(f"{target} is the package's own network; the file of that name is not read: type ./{target} for it")
        return Weights(target, read_bytes((resources.files("gramlip") / "data" / f"{target}.safetensors").read_bytes()))
    return Weights(target, read(Path(target)))


DEMOS = ("demo", "demo-regularised")
"""Trained networks that the package holds."""

RESOLVERS: dict[str, Callable[[str, Shape | None], Source]] = {name: _weights for name in DEMOS} | {
    ".pt2": sources.from_exported,
    "timm:": sources.from_timm,
    "torchvision:": sources.from_torchvision,
    "hf:": sources.from_hub,
}
"""A whole name (`demo`), a file's suffix (`.pt2`) or a scheme (`timm:`) -> (target, input shape) -> source; files are weights."""


def resolve(target: str, inputs: Shape | None = None) -> Source:
    """The source that a TARGET names.

    Raises:
        InputError: no such file, an unknown kind, or a file that cannot be used.
    """
    if not target:
        msg = "an empty TARGET was given; expected a file of weights, package.module:callable or a name such as demo"
        raise InputError(msg)
    scheme, colon, _ = target.partition(":")
    for key in (target, f"{scheme}:" if colon else target, Path(target).suffix):
        if key in RESOLVERS:
            return RESOLVERS[key](target, inputs)
    if colon and not Path(target).exists():
        if all(part.isidentifier() for part in target.replace(":", ".").split(".")) and sources.exists(scheme):
            return sources.from_callable(target, inputs)
        msg = (
            f"{target} is of an unknown kind; expected a file of weights, package.module:callable or one of {', '.join(sorted(RESOLVERS))}"
        )
        raise InputError(msg)
    return _weights(target, inputs)
