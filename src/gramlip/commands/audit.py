"""`gramlip audit TARGET`: an interval for every layer, and for the network where the model is known."""

from __future__ import annotations

from argparse import Namespace, _SubParsersAction  # pyright: ignore[reportPrivateUsage]
from collections.abc import Callable
from typing import Any

from gramlip.errors import InputError
from gramlip.options import limit, shape, tolerance
from gramlip.output import check_output, emit, note, watched, write_whole
from gramlip.report import Report
from gramlip.targets import resolve

FORMATS: dict[str, Callable[[Report], str]] = {"json": Report.to_json}
"""Option -> how the report is written to its FILE."""


def add_parser(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("audit", help="an interval for every layer, and for the network where the model is known")
    parser.add_argument("target", metavar="TARGET", help="a .safetensors file or index, a torch checkpoint, demo or demo-regularised")
    parser.add_argument("--input", type=shape, metavar="3,224,224", help="shape of the model's input without the batch")
    parser.add_argument("--rtol", type=tolerance, default=1e-2, metavar="R", help="relative width upper/lower - 1 to reach (default 1e-2)")
    for name in FORMATS:
        parser.add_argument(f"--{name}", metavar="FILE", help=f"write the report as {name.upper()}; - for standard output, alone")
    parser.add_argument("--fail-above", type=limit, metavar="X", help="exit 1 unless every upper side is at most X")
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Audit, write, print; 1 where `--fail-above` is exceeded."""
    names: dict[str, str] = {name: getattr(args, name) for name in FORMATS if getattr(args, name) is not None}
    files = {name: check_output(f"--{name}", file) for name, file in names.items()}
    if len(set(files.values())) < len(files):
        msg = f"{' and '.join(f'--{name}' for name in files)} name the same file; expected one file each"
        raise InputError(msg)
    report = resolve(args.target, args.input).audit(rtol=args.rtol, watch=watched)
    for name, path in files.items():
        if path is not None:
            write_whole(path, FORMATS[name](report))
    alone = [name for name, path in files.items() if path is None]
    emit(FORMATS[alone[0]](report) if alone else f"{report}\n")
    if args.fail_above is None:
        return 0
    above = report.above(args.fail_above)
    if above:
        note(f"above {args.fail_above}: {', '.join(above)}")
    return 1 if above else 0
