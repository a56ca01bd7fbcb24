"""`gramlip bench`, `gramlip compare` and `gramlip reproduce`: what measures."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace, _SubParsersAction  # pyright: ignore[reportPrivateUsage]
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gramlip.cli.commands import Commands, count, device, folder, shape, tolerance, whole
from gramlip.lab.compare import compare, error_against_time
from gramlip.lab.reproduce import EXPERIMENTS, Options, reproduce
from gramlip.operators.linear_maps import Conv, Dense
from gramlip.reports.output import check_output, check_outputs, emit, note, watched, write_whole
from gramlip.reports.pictures import check_picture, save
from gramlip.targets import resolve

# ---- bench ---------------------------------------------------------------------------------------------------------------
#
# `gramlip bench [ROW ...]`: certified intervals against the published method and the machine's limit, timed in one run.

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def add_bench(subparsers: _SubParsersAction[Any]) -> None:
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
    parser.set_defaults(run=run_bench)


def run_bench(args: Namespace) -> int:
    """Measure, write, print; 0 whatever the numbers say."""
    from gramlip.lab.bench import Options as BenchOptions
    from gramlip.lab.bench import Result, bench

    file = check_output("--json", args.json)
    options = BenchOptions(args.device, DTYPES[args.dtype], args.trials, args.quick, args.full, args.models, say=note)

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


# ---- compare -------------------------------------------------------------------------------------------------------------
#
# `gramlip compare TARGET`: every method on every layer, with its side of the truth, its error and its time.


def add_compare(subparsers: _SubParsersAction[Any]) -> None:
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
    parser.set_defaults(run=run_compare)


def run_compare(args: Namespace) -> int:
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


# ---- reproduce -----------------------------------------------------------------------------------------------------------
#
# `gramlip reproduce EXPERIMENT`: the paper's experiments, each a folder with a table, a figure and a summary.


def add_reproduce(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("reproduce", help="run an experiment of the paper: table, figure and summary in a folder")
    titles = "; ".join(f"{name}: {experiment.title}" for name, experiment in EXPERIMENTS.items())
    parser.add_argument("experiment", choices=list(EXPERIMENTS), metavar="EXPERIMENT", help=titles.replace("%", "%%"))
    parser.add_argument(
        "--out", type=folder, metavar="DIR", help="folder of the results, resumed where it exists (default runs/EXPERIMENT)"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="resnet18: torchvision's state dict (default: random He weights)")
    parser.add_argument("--data", metavar="DIR", help="training: folder of CIFAR-10's parquet files, or uoft-cs/cifar10 for the hub's")
    parser.add_argument("--preset", choices=("paper", "small"), help="training: ResNet-18 for 200 epochs, or minutes on a CPU (by device)")
    parser.add_argument("--trials", type=count, default=5, metavar="T", help="timed runs, after one dropped (default 5)")
    parser.add_argument("--seed", type=whole, default=0, metavar="S", help="seed of random weights (default 0)")
    parser.add_argument("--device", type=device, default=torch.device("cpu"), metavar="D", help="cpu or cuda (default cpu)")
    parser.add_argument("--quick", action="store_true", help="a small version that takes seconds, to see that it works")
    parser.set_defaults(run=run_reproduce)


def run_reproduce(args: Namespace) -> int:
    """Run what is left, draw, print the summary."""
    out: Path = args.out or Path("runs") / args.experiment
    options = Options(args.device, args.trials, args.seed, args.quick, args.weights, args.data, args.preset)
    files = reproduce(EXPERIMENTS[args.experiment], out, options, watched)
    emit(f"{files['summary.md'].read_text(encoding='utf-8')}\n{', '.join(str(path) for path in files.values())}\n")
    return 0


COMMANDS: Commands = {"bench": add_bench, "compare": add_compare, "reproduce": add_reproduce}
