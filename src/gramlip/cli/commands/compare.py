"""`gramlip compare TARGET`: every method on every layer, with its side of the truth, its error and its time."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace, _SubParsersAction  # pyright: ignore[reportPrivateUsage]
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gramlip.cli.options import count, shape, tolerance
from gramlip.lab.compare import compare
from gramlip.operators.linear_maps import Conv, Dense
from gramlip.reports.figures import check_picture, error_against_time, save
from gramlip.reports.output import check_outputs, emit, watched, write_whole
from gramlip.targets import resolve


def add_parser(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("compare", help="every method on every layer: value, side of the truth, error, time")
    parser.add_argument("target", metavar="TARGET", help="as for audit")
    parser.add_argument("--input", type=shape, metavar="3,224,224", help="shape of the model's input without the batch")
    parser.add_argument("--circular", type=count, metavar="N", help="take each convolution as circular, stride 1, at input size N")
    parser.add_argument("--methods", type=names, default=(), metavar="A,B", help="some of the methods (default: all)")
    parser.add_argument(
        "--rtol", type=tolerance, default=1e-4, metavar="R", help="width of the interval that all are held against (default 1e-4)"
    )
    parser.add_argument("--trials", type=count, default=3, metavar="T", help="timed runs of each method (default 3)")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON; - for standard output, alone")
    parser.add_argument("--plot", metavar="FILE", help="draw error against time to a .png, .pdf or .svg")
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Compare, write, print."""
    files = check_outputs({"--json": args.json, "--plot": args.plot})
    json, plot = files.get("--json"), files.get("--plot")
    if args.plot is not None:
        check_picture(plot or Path(args.plot))
    operators: Iterable[tuple[str, Dense | Conv]] = resolve(args.target, args.input).operators()
    if args.circular is not None:
        operators = _circular(operators, args.circular)
    found = compare(args.target, operators, args.methods, rtol=args.rtol, trials=args.trials, watch=watched)
    if plot is not None:
        save(error_against_time(found), plot)
    if json is not None:
        write_whole(json, found.to_json())
    emit(found.to_json() if args.json == "-" else f"{found}\n")
    return 0


def names(text: str) -> tuple[str, ...]:
    """Names joined by commas.

    >>> names("gram,power")
    ('gram', 'power')
    """
    if not all(found := tuple(text.split(","))):
        msg = f"{text!r} was given; expected names joined by commas: gram,power"
        raise ArgumentTypeError(msg)
    return found


def _circular(operators: Iterable[tuple[str, Dense | Conv]], size: int) -> Iterator[tuple[str, Dense | Conv]]:
    """The published methods' own case: the output as large as the input, nothing lost at the edges."""
    for name, op in operators:
        if isinstance(op, Dense):
            yield name, op
        else:
            half = [((span - 1) // 2, span - 1 - (span - 1) // 2) for span in op.spans]
            flags = {"stride": 1, "padding_mode": "circular", "transposed": False, "output_padding": 0}
            yield name, replace(op, input_size=size, padding=half, **flags)  # type: ignore[arg-type]
