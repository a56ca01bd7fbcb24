"""`gramlip audit TARGET`: an interval for every layer, and for the network where the model is known."""

from __future__ import annotations

import sys
from argparse import Namespace, _SubParsersAction  # pyright: ignore[reportPrivateUsage]
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gramlip.cli.commands import Commands, assumption, effort, examples, interval, limit, seconds, shape, tolerance
from gramlip.errors import InputError
from gramlip.reports.output import check_outputs, emit, note, watched, write_whole
from gramlip.reports.pictures import page
from gramlip.reports.report import Report
from gramlip.reports.text import Screen
from gramlip.targets import Model, Options, resolve

FORMATS: dict[str, Callable[[Report], str]] = {"--json": Report.to_json, "--html": page}
"""Option -> how the report is written to its FILE."""


def add_audit(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "audit",
        help="an interval for every layer, and for the network where the model is known",
        description="Prove an interval for the norm of every layer and, where the model is known, for its Lipschitz constant.",
        epilog=examples(
            {
                "gramlip audit demo": "a small trained network that ships with the package",
                "gramlip audit model.safetensors --rtol 1e-3": "every layer of a file of weights, each interval at most 0.1% wide",
                "gramlip audit package.module:make --input 3,224,224": "the model that make() returns: layers and network",
                "gramlip audit model.safetensors --fail-above 10": "exit code 1 unless every layer is proved to be at most 10",
                "gramlip audit model.safetensors --json - --rtol 1e-4": "the report as JSON, alone on standard output",
                "gramlip audit demo --verbose": "every reason, and every tensor that is left out",
            }
        ),
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="weights (.safetensors, checkpoint, demo) or a model (package.module:callable, .pt2, timm:, torchvision:, hf:)",
    )
    parser.add_argument("--input", type=shape, metavar="3,224,224", help="shape of the model's input without the batch")
    parser.add_argument("--rtol", type=tolerance, default=1e-2, metavar="R", help="relative width upper/lower - 1 to reach (default 1e-2)")
    for name in FORMATS:
        parser.add_argument(name, metavar="FILE", help=f"write the report as {name[2:].upper()}; - for standard output, alone")
    parser.add_argument(
        "--assume", type=assumption, action="append", default=[], metavar="NAME=L", help="believe a constant; stands in the report"
    )
    parser.add_argument("--domain", type=interval, metavar="LOW,HIGH", help="every input entry lies there; makes products of values finite")
    parser.add_argument(
        "--effort", type=effort, default=1.0, metavar="E", help="search for coupled bounds (default 1; 0: closed forms; -1: none)"
    )
    parser.add_argument("--time-limit", type=seconds, metavar="S", help="seconds after which nothing more is searched for (default: none)")
    parser.add_argument("--verbose", action="store_true", help="print the reasons of every row and every name that is left out")
    parser.add_argument("--fail-above", type=limit, metavar="X", help="exit 1 unless every upper side is at most X")
    parser.set_defaults(run=run_audit)


def run_audit(args: Namespace) -> int:
    """Audit, write, print; 1 where `--fail-above` is exceeded."""
    files = check_outputs({name: getattr(args, name[2:]) for name in FORMATS})
    source = resolve(args.target, args.input)
    if isinstance(source, Model):
        source = replace(source, options=Options(dict(args.assume), args.domain, effort=args.effort, time_limit=args.time_limit))
    elif args.assume or args.domain is not None:
        msg = f"{args.target} holds weights alone; expected a model for --assume and --domain: type package.module:callable"
        raise InputError(msg)
    report = source.audit(rtol=args.rtol, watch=watched)
    for name, path in files.items():
        if path is not None:
            write_whole(path, FORMATS[name](report))
    alone = [name for name, path in files.items() if path is None]
    emit(FORMATS[alone[0]](report) if alone else f"{report.text(Screen.of(sys.stdout), verbose=args.verbose)}\n")
    if args.fail_above is None:
        return 0
    above = report.above(args.fail_above)
    if above:
        note(f"above {args.fail_above}: {', '.join(above)}")
    return 1 if above else 0


COMMANDS: Commands = {"audit": add_audit}
