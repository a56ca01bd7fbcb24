"""TARGET: what the user typed becomes a source of layers. One entry of `RESOLVERS` for each kind.

Running a user's module, or a library's, is the user's explicit choice by the form of the target; a file of weights never runs code.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, resources
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gramlip.demo import DemoNet
from gramlip.errors import InputError, first_line
from gramlip.network.audit import Example, audit, steps_of
from gramlip.network.graph import silent
from gramlip.network.steps import Linear
from gramlip.onnx import load as load_onnx
from gramlip.operators.given import program_inputs
from gramlip.operators.linear_maps import Conv, Dense
from gramlip.reports.checkpoint import Watch, Weights
from gramlip.reports.formats import check_file, read
from gramlip.reports.output import aside, note
from gramlip.reports.readers import read_bytes
from gramlip.reports.report import Report

# ---- models --------------------------------------------------------------------------------------------------------------
#
# Models that a TARGET names: a callable, an exported program, or an entry of timm, torchvision or the Hugging Face hub.
#
# Running a user's module, or a library's, is the user's explicit choice by the form of the target; a file of weights never runs code.
# What they print goes to standard error: standard output is the report's alone.

Program = nn.Module | torch.export.ExportedProgram


@dataclass(frozen=True)
class Options:
    """Options of an audit beside its target."""

    assume: Mapping[str, float] = field(default_factory=dict[str, float])
    domain: tuple[float, float] | None = None
    seed: int = 0
    effort: float = 1.0
    time_limit: float | None = None
    at: Tensor | None = None
    radius: float | None = None
    inputs: Sequence[int] | None = None
    outputs: Sequence[int] | None = None


@dataclass(frozen=True)
class Model:
    """A model and its inputs, or the shape of one sample, as a source of layers."""

    target: str
    program: Program
    example: Example
    options: Options = Options()

    def operators(self) -> Iterable[tuple[str, Dense | Conv]]:
        """Every linear map of the folded graph by name."""
        with aside():
            steps = steps_of(self.program, self.example).steps
        for step in steps:
            if isinstance(step.what, Linear) and isinstance(step.what.op, Dense | Conv):
                yield step.name, step.what.op

    def audit(self, *, rtol: float, watch: Watch) -> Report:
        """The report of the whole network."""
        o = self.options
        with aside():
            return audit(
                self.program,
                self.example,
                rtol=rtol,
                assume=o.assume,
                domain=o.domain,
                at=o.at,
                radius=o.radius,
                inputs=o.inputs,
                outputs=o.outputs,
                seed=o.seed,
                effort=o.effort,
                time_limit=o.time_limit,
                target=self.target,
                progress=watch,
            )


def read_input(path: Path) -> Tensor:
    """An input from a file: a tensor of .npy or .pt as it is, a picture as pixels in [0, 1] of shape (1, channels, height, width).

    Raises:
        InputError: a file of another kind, or that holds something else.
    """
    kinds: dict[str, Callable[[Path], object]] = {
        ".npy": lambda path: torch.from_numpy(np.load(path, allow_pickle=False)),
        ".pt": _of_torch,
        ".pth": _of_torch,
        **dict.fromkeys((".png", ".jpg", ".jpeg"), _of_picture),
    }
    if (read := kinds.get(path.suffix.lower())) is None:
        msg = f"{path} was given as an input; expected one of {', '.join(kinds)}"
        raise InputError(msg)
    try:
        value = read(path)
    except InputError:
        raise
    except Exception as error:  # a damaged file shows in many ways
        msg = f"{path}: {first_line(error)}; expected an input that {path.suffix} holds"
        raise InputError(msg) from error
    if not isinstance(value, Tensor) or value.is_complex() or not value.numel():
        msg = f"{path} holds {'no real entries' if isinstance(value, Tensor) else type(value).__name__}; expected one real tensor"
        raise InputError(msg)
    return value


def _of_torch(path: Path) -> Tensor:
    return torch.load(path, map_location="cpu", weights_only=True)


def _of_picture(path: Path) -> Tensor:
    try:
        image: Any = import_module("PIL.Image")
    except ImportError as error:
        msg = 'pictures need pillow, which is not installed; expected the extra: type pip install "gramlip[data]"'
        raise InputError(msg) from error
    with image.open(path) as opened:
        grey = opened.mode in ("1", "L", "LA", "I;16")
        pixels = np.asarray(opened.convert("L" if grey else "RGB"))
    return torch.from_numpy(pixels.copy()).double().reshape(*pixels.shape[:2], -1).permute(2, 0, 1)[None] / 255


def _sample(target: str, inputs: Shape | None) -> Shape:
    if inputs is None:
        msg = f"{target} was given without the shape of its input; expected it without the batch: type --input 3,224,224"
        raise InputError(msg)
    return inputs


def exists(module: str) -> bool:
    """Whether the top package of a module can be found, the current folder included; nothing is run."""
    top = module.split(".")[0]
    return find_spec(top) is not None or PathFinder.find_spec(top, [str(Path.cwd())]) is not None


def from_callable(target: str, inputs: Shape | None) -> Model:
    """`package.module:callable`: what the callable returns, in evaluation mode; found from the current folder."""
    example = _sample(target, inputs)
    return Model(target, _module(target, called(target)), example)


def called(target: str) -> Any:
    """The result of the callable of `package.module:callable`.

    Raises:
        InputError: there is none, or it raises whatever it may.
    """
    place, _, name = target.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        with aside():
            return getattr(import_module(place), name)()
    except (ImportError, AttributeError, TypeError, SyntaxError) as error:
        msg = f"{target}: {first_line(error)}; expected package.module:callable without arguments, found from the current folder"
        raise InputError(msg) from error
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises, in one line with its place
        last = traceback.extract_tb(error.__traceback__)[-1]
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        msg = f"{target} raised {type(error).__name__} ({first}) at {last.filename}:{last.lineno}; expected it to return a module"
        raise InputError(msg) from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _module(target: str, built: object) -> Program:
    if isinstance(built, torch.export.ExportedProgram):
        return built
    if not isinstance(built, nn.Module):
        msg = f"{target} returned {type(built).__name__}; expected a torch.nn.Module"
        raise InputError(msg)
    return built.eval()


def from_exported(target: str, inputs: Shape | None) -> Model:
    """A `.pt2` file; its input shape is its own. It is a program, not weights: torch's loader trusts it, as it trusts a module."""
    if inputs is not None:
        msg = f"--input was given, but {target} is an exported program that holds its input's shape; expected no --input"
        raise InputError(msg)
    check_file(Path(target))
    try:
        with silent(), aside():
            program = torch.export.load(target)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.export raises many types for files that it did not write
        reason = first_line(error).partition(" Please check the warnings")[0]  # which are silent, and say no more
        msg = f"{target} cannot be read as an exported program: {reason}; expected a file that torch.export.save wrote"
        raise InputError(msg) from error
    arguments = program_inputs(program)
    if not all(isinstance(value, torch.Tensor) for value in arguments):
        kinds = ", ".join(type(value).__name__ for value in arguments)
        msg = f"{target} takes {kinds}; expected tensors alone: export it with the others fixed"
        raise InputError(msg)
    zeros = (torch.zeros([int(n) for n in value.shape], dtype=value.dtype, device=value.device) for value in arguments)
    return Model(target, program, tuple(zeros))


def _library(target: str, package: str, extra: str) -> Any:
    try:
        with aside():
            return import_module(package)
    except (ImportError, OSError, RuntimeError) as error:
        msg = f"{target} needs {package}, which cannot be imported ({error}); expected it installed: type pip install {extra}"
        raise InputError(msg) from error


def _built(target: str, make: Callable[[], object], advice: str) -> Program:
    try:
        with aside():
            module = make()
    except Exception as error:  # a library's own errors for unknown names and for being offline have no common type
        msg = f"{target} cannot be loaded: {first_line(error)}; {advice}"
        raise InputError(msg) from error
    return _module(target, module)


def from_timm(target: str, inputs: Shape | None) -> Model:
    """`timm:NAME` with its pretrained weights; the input shape is the model's own unless given."""
    timm, name = _library(target, "timm", "timm"), target.partition(":")[2]
    advice = "expected a pretrained model of timm and its weights, in the cache or online: type python -m timm.models for names"
    model = _built(target, lambda: timm.create_model(name, pretrained=True), advice)
    size = inputs or tuple(getattr(model, "default_cfg", {}).get("input_size", ())) or None
    return Model(target, model, _sample(target, size))


def from_torchvision(target: str, inputs: Shape | None) -> Model:
    """`torchvision:NAME` with its default weights; 3x224x224 unless given."""
    _library(target, "torchvision", "torchvision")
    models, name = _library(target, "torchvision.models", "torchvision"), target.partition(":")[2]
    model = _built(
        target, lambda: models.get_model(name, weights="DEFAULT"), "expected a model of torchvision and its weights, in the cache or online"
    )
    return Model(target, model, inputs or (3, 224, 224))


def from_onnx(target: str, inputs: Shape | Mapping[str, Shape] | None) -> Source:
    """A file of ONNX: the whole model where the shape of its input is given, or of one of its inputs, else its weights alone."""
    if inputs is None:
        note(f"{target}: its weights alone are bounded, for every input size; type --input 3,224,224 for the whole model")
        return _weights(target, None)
    check_file(Path(target))
    model = load_onnx(target, inputs)
    return Model(target, model, model.example)


def from_hub(target: str, inputs: Shape | None) -> Weights:
    """`hf:OWNER/NAME`: the weights of a hub repository through its own client; weights alone, no code of the repository runs."""
    if inputs is not None:
        msg = f"--input was given, but {target} names weights alone, bounded for every input size; expected no --input"
        raise InputError(msg)
    repository, beside = target.partition(":")[2], ["*.index.json", "adapter_config.json"]
    folder = snapshot(target, repository, ["*.safetensors", *beside])
    if not any(folder.glob("*.safetensors")):
        folder = snapshot(target, repository, ["*.bin", *beside])
    return Weights(target, read(folder))


def snapshot(target: str, repository: str, patterns: list[str], kind: str = "model") -> Path:
    """The folder of a hub repository's files, by the hub's own client: downloaded, or from its cache where offline.

    Raises:
        InputError: no client, no such repository, or neither a network nor the files in the cache.
    """
    hub = _library(target, "huggingface_hub", "gramlip[hub]")
    try:
        return Path(hub.snapshot_download(repository, repo_type=kind, allow_patterns=patterns))
    except Exception as error:  # offline, unknown or private: the client's errors have no common type
        msg = f"{target} cannot be fetched: {first_line(error)}; expected a public repository, online or in the cache"
        raise InputError(msg) from error


# ---- targets -------------------------------------------------------------------------------------------------------------

Shape = tuple[int, ...]


class Source(Protocol):
    """A resolved target: operators by name, and an audit."""

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
        with torch.device("meta"):
            order = list(DemoNet().state_dict())
        return Weights(target, read_bytes((resources.files("gramlip") / "data" / f"{target}.safetensors").read_bytes(), order))
    return Weights(target, read(Path(target)))


DEMOS = ("demo", "demo-regularised")
"""Trained networks that the package holds."""

RESOLVERS: dict[str, Callable[[str, Shape | None], Source]] = {name: _weights for name in DEMOS} | {
    ".pt2": from_exported,
    ".onnx": from_onnx,
    "timm:": from_timm,
    "torchvision:": from_torchvision,
    "hf:": from_hub,
}
"""A whole name (`demo`), a file's suffix (`.pt2`) or a scheme (`timm:`) -> (target, input shape) -> source; other files are weights."""


def resolve(target: str, inputs: Shape | Mapping[str, Shape] | None = None) -> Source:
    """The source that a TARGET names, with the shape of its input, or those of its inputs by name.

    Raises:
        InputError: no such file, an unknown kind, or a file that cannot be used.
    """
    if not target:
        msg = "an empty TARGET was given; expected a file of weights, package.module:callable or a name such as demo"
        raise InputError(msg)
    if isinstance(inputs, Mapping) and Path(target).suffix != ".onnx":
        msg = f"--input {next(iter(inputs))}=... was given, but {target} is no ONNX model; expected one shape: type --input 3,224,224"
        raise InputError(msg)
    scheme, colon, _ = target.partition(":")
    shapes: Any = inputs  # by name for .onnx alone
    for key in (target, f"{scheme}:" if colon else target, Path(target).suffix):
        if key in RESOLVERS:
            return RESOLVERS[key](target, shapes)
    if colon and not Path(target).exists():
        if all(part.isidentifier() for part in target.replace(":", ".").split(".")) and exists(scheme):
            return from_callable(target, shapes)
        msg = (
            f"{target} is of an unknown kind; expected a file of weights, package.module:callable or one of {', '.join(sorted(RESOLVERS))}"
        )
        raise InputError(msg)
    return _weights(target, shapes)
