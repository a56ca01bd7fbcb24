"""`gramlip reproduce EXPERIMENT`: the paper's experiments, each a folder with a table, a figure and a summary."""

from __future__ import annotations

from argparse import Namespace, _SubParsersAction  # pyright: ignore[reportPrivateUsage]
from pathlib import Path
from typing import Any

import torch

from gramlip.cli.options import count, device, folder, whole
from gramlip.lab.reproduce import EXPERIMENTS, Options, reproduce
from gramlip.reports.output import emit, watched


def add_parser(subparsers: _SubParsersAction[Any]) -> None:
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
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    """Run what is left, draw, print the summary."""
    out: Path = args.out or Path("runs") / args.experiment
    options = Options(args.device, args.trials, args.seed, args.quick, args.weights, args.data, args.preset)
    files = reproduce(EXPERIMENTS[args.experiment], out, options, watched)
    emit(f"{files['summary.md'].read_text(encoding='utf-8')}\n{', '.join(str(path) for path in files.values())}\n")
    return 0
