"""`gramlip train RECIPE`: a recipe's network, trained, certified and written to a folder; resumed where it stopped."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from argparse import Namespace, _SubParsersAction  # pyright: ignore[reportPrivateUsage]
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from gramlip.cli.options import folder, whole
from gramlip.errors import InputError
from gramlip.reports.output import emit, note


def add_parser(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("train", help="train a recipe and certify what comes out; needs the extra gramlip[train]")
    parser.add_argument("recipe", metavar="RECIPE", help="such as resnet18-penalised or small-normalised; an unknown name lists them all")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of CIFAR-10's parquet files, or uoft-cs/cifar10 for the hub's")
    parser.add_argument(
        "--out", type=folder, required=True, metavar="DIR", help="folder of the run; one that holds a checkpoint is gone on with"
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of everything random (default 0)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the recipe: --set epochs=2")
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
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
