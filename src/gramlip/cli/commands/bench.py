"""`gramlip bench [ROW ...]`: certified intervals against the published method and the machine's limit, timed in one run."""

from __future__ import annotations

from argparse import Namespace, _SubParsersAction  # pyright: ignore[reportPrivateUsage]
from pathlib import Path
from typing import Any

import torch

from gramlip.cli.options import count, device
from gramlip.reports.output import check_output, emit, note, write_whole

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def add_parser(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "bench", help="certified intervals against the published method and the machine's limit, timed in one run"
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="some of the rows (default: all); an unknown name lists them")
    parser.add_argument("--quick", action="store_true", help="small layers that take seconds, to see that it works")
    parser.add_argument("--full", action="store_true", help="also what takes minutes: a weight of 8192x28672 with its memory")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; - for standard output, alone")
    parser.add_argument("--threads", type=count, default=2, metavar="N", help="CPU threads (default 2)")
    parser.add_argument("--trials", type=count, default=3, metavar="T", help="timed runs of each contender, after one dropped (default 3)")
    parser.add_argument("--device", type=device, default=torch.device("cpu"), metavar="D", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default float32); training stays in float32")
    parser.add_argument("--models", type=Path, default=Path("../shared/models"), metavar="DIR", help="resnet20/32-cifar10.safetensors")
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Measure, write, print; 0 whatever the numbers say."""
    from gramlip.lab.bench import Options, Result, bench

    file = check_output("--json", args.json)
    options = Options(args.device, DTYPES[args.dtype], args.trials, args.quick, args.full, args.models, say=note)

    def keep(result: Result) -> None:
        if file is not None:
            write_whole(file, result.to_json())

    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        found = bench(args.rows, options, keep)
    finally:
        torch.set_num_threads(before)
    emit(found.to_json() if args.json == "-" else f"{found}\n")
    return 0
