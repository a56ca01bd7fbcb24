"""`gramlip train` and `gramlip certify`: a recipe's network trained, and the certified accuracy of a run or of any model."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from argparse import ArgumentTypeError, Namespace, _SubParsersAction  # pyright: ignore[reportPrivateUsage]
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gramlip import robust
from gramlip.cli.commands import Commands, count, folder, tolerance, whole
from gramlip.errors import InputError, first_line, out_of_memory
from gramlip.lab.training import recipes
from gramlip.lab.training.recipes import MEAN, STD, Recipe, build
from gramlip.network.audit import audit
from gramlip.operators.given import unwrapped
from gramlip.reports.output import aside, check_output, emit, note, write_whole
from gramlip.targets import called

# ---- certify -------------------------------------------------------------------------------------------------------------
#
# `gramlip certify TARGET --data DIR`: certified accuracy of a trained run, or of any model that an import path names.


def eps(text: str) -> float:
    """A radius in pixels of [0, 1]: a number or a fraction.

    >>> eps("36/255") == 36 / 255
    True
    """
    try:
        above, _, below = text.partition("/")
        value = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 <= value < math.inf:
        msg = f"{text!r} was given; expected a radius of at least 0 in pixels of [0, 1], such as 36/255"
        raise ArgumentTypeError(msg)
    return value


def add_certify(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("certify", help="certified accuracy of a classifier of 32x32 images on CIFAR-10")
    parser.add_argument("target", metavar="TARGET", help="a folder that gramlip train finished, or package.module:callable")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of CIFAR-10's parquet files, or uoft-cs/cifar10")
    parser.add_argument(
        "--eps", type=eps, nargs="+", default=list(robust.EPS), metavar="E", help="radii, pixels in [0, 1] (default 36/255 ...)"
    )
    parser.add_argument("--samples", type=count, metavar="N", help="only the first N test images")
    parser.add_argument("--normalised", action="store_true", help="the model takes pixels less CIFAR-10's mean, over its std")
    parser.add_argument("--attack", action="store_true", help="also the accuracy under attack at each radius; needs gramlip[attack]")
    parser.add_argument("--rtol", type=tolerance, default=1e-2, metavar="R", help="relative width of each layer's interval (default 1e-2)")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; - for standard output, alone")
    parser.set_defaults(run=run_certify)


def run_certify(args: Namespace) -> int:
    """Audit the network, certify every sample, print."""
    file = check_output("--json", args.json)
    model, mean, std = _model(args.target, args.normalised)
    images, labels = recipes.load(args.data, "test", args.samples)
    pixels = list(zip((images.float() / 255).split(500), labels.split(500), strict=True))
    with aside():
        _runs(args.target, model, recipes.normalised(pixels[0][0], mean, std))
        found = _certified(model, [(recipes.normalised(x, mean, std), y) for x, y in pixels], tuple(images.shape[1:]), args, std)
        result: dict[str, Any] = {"schema": 1, "target": args.target, **found.to_dict()}
        if args.attack:
            for entry in result["certified"]:
                entry["attacked"] = robust.attacked_accuracy(model, pixels, entry["eps"], mean=mean, std=std)
    text = json.dumps(result, indent=1) + "\n"
    if file is not None:
        write_whole(file, text)
    attacked = "".join(
        f"\nattacked  at eps = {255 * e['eps']:>7.4g}/255  {100 * e['attacked']:6.2f} %" for e in result["certified"] if args.attack
    )
    emit(text if args.json == "-" else f"{found}{attacked}\n")
    return 0


def _finished(folder: Path) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """The model of a run of `gramlip train`."""
    from safetensors.torch import load_file

    try:
        saved = json.loads((folder / "recipe.json").read_text())
        plan = Recipe(**{k: v for k, v in saved.items() if k not in ("recipe", "seed")})
        model = build(plan.model, "plain")
        model.load_state_dict(load_file(folder / "weights.safetensors"))
    except Exception as error:  # a damaged file shows in many ways
        msg = f"{folder}: {type(error).__name__}: {error}; expected a folder that gramlip train finished"
        raise InputError(msg.replace("\n", " ")) from error
    return model.eval(), plan.mean, plan.std


def _runs(target: str, model: nn.Module, images: Tensor) -> None:
    """InputError where the model, whose code is the user's, does not take a batch of images."""
    try:
        with torch.no_grad():
            model(images)
    except Exception as error:  # the user's own code: whatever it raises
        if isinstance(error, MemoryError | RuntimeError) and out_of_memory(error):
            raise
        given = f"{target} raised {type(error).__name__} ({first_line(error)}) for images of shape {tuple(images.shape)}"
        msg = f"{given}; expected a model that takes any batch of them: type --samples 1 for a batch of one"
        raise InputError(msg) from error


def _certified(model: nn.Module, batches: list[Any], shape: tuple[int, ...], args: Namespace, std: tuple[float, ...]) -> robust.Certified:
    """By pairs of classes where the network is a chain that ends in a linear layer."""
    if isinstance(model, nn.Sequential) and isinstance(last := model[-1], nn.Linear):
        return robust.certify(model, batches, audit(model[:-1], shape, rtol=args.rtol), args.eps, std=std, last=last)
    return robust.certify(model, batches, audit(model, shape, rtol=args.rtol), args.eps, std=std)


def _model(target: str, normalised: bool) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """The model in eval mode, with the mean and std of its input."""
    path = Path(target)
    if (path / "weights.safetensors").is_file():
        return _finished(path)
    place, colon, name = target.partition(":")
    if not (place and colon and name):
        msg = f"{target} was given; expected a folder that gramlip train finished, or package.module:callable"
        raise InputError(msg)
    model = called(target)
    if not isinstance(model, nn.Module):
        msg = f"{target} returned {type(model).__name__}; expected a torch.nn.Module"
        raise InputError(msg)
    model = unwrapped(model)
    return (model.eval(), MEAN, STD) if normalised else (model.eval(), (0.0,) * 3, (1.0,) * 3)


# ---- train ---------------------------------------------------------------------------------------------------------------
#
# `gramlip train RECIPE`: a recipe's network, trained, certified and written to a folder; resumed where it stopped.


def add_train(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("train", help="train a recipe and certify what comes out; needs the extra gramlip[train]")
    parser.add_argument("recipe", metavar="RECIPE", help="such as resnet18-penalised or small-normalised; an unknown name lists them all")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of CIFAR-10's parquet files, or uoft-cs/cifar10 for the hub's")
    parser.add_argument(
        "--out", type=folder, required=True, metavar="DIR", help="folder of the run; one that holds a checkpoint is gone on with"
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of everything random (default 0)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the recipe: --set epochs=2")
    parser.set_defaults(run=run_train)


def run_train(args: Namespace) -> int:
    """Train, write, print the results as JSON."""
    try:
        module = import_module("gramlip.lab.training.train")
    except ImportError as error:
        msg = f'training needs {error.name}, which is not installed; expected the extra: type pip install "gramlip[train]"'
        raise InputError(msg) from error
    changes = dict(_change(text) for text in args.set)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):  # the progress bar: standard output is for the results alone
        warnings.filterwarnings("ignore", module="lightning")  # its own use of what torch has deprecated, and advice on workers
        results = module.train(args.recipe, args.data, args.out, seed=args.seed, **changes)
    if "constant" not in results:
        note(f"stopped after {results['finished_epochs']} of {results['epochs']} epochs; the same command goes on")
    emit(json.dumps(results, indent=1) + "\n")
    return 0


def _change(text: str) -> tuple[str, Any]:
    """`epochs=2` as ("epochs", 2); the value is JSON, or a word.

    >>> _change("epochs=2"), _change("control=plain")
    (('epochs', 2), ('control', 'plain'))
    """
    field, equals, value = text.partition("=")
    if not equals:
        msg = f"--set {text} was given; expected FIELD=VALUE such as epochs=2"
        raise InputError(msg)
    try:
        return field, json.loads(value)
    except json.JSONDecodeError:
        return field, value


COMMANDS: Commands = {"certify": add_certify, "train": add_train}
