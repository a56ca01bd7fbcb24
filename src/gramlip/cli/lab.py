"""Commands that measure and train: `gramlip bench`, `certify`, `compare`, `reproduce` and `train`."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from argparse import ArgumentTypeError, BooleanOptionalAction, Namespace, _SubParsersAction  # pyright: ignore[reportPrivateUsage]
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gramlip import onnx, robust
from gramlip.cli.options import Commands, add_inputs, count, device, examples, folder, model_inputs, tolerance, whole
from gramlip.errors import InputError, UnsupportedError, first_line, out_of_memory
from gramlip.lab import recipes
from gramlip.lab.compare import compare, error_against_time
from gramlip.lab.layer_experiments import EXPERIMENTS
from gramlip.lab.recipes import MEAN, STD, Recipe, build
from gramlip.lab.reproduce import Options, reproduce
from gramlip.network.audit import audit
from gramlip.operators.given import hooks, unwrapped
from gramlip.operators.linear_maps import Conv, Dense
from gramlip.reports.output import aside, check_output, check_outputs, emit, note, watched, write_whole
from gramlip.reports.pictures import check_picture, save
from gramlip.targets import called, resolve

# ---- bench ---------------------------------------------------------------------------------------------------------------

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def add_bench(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "bench",
        help="certified intervals against the published method and the machine's limit, timed in one run",
        epilog=examples(
            {
                "gramlip bench --quick": "small layers, in seconds",
                "gramlip bench --full --json bench.json": "every row, including those that take minutes, and the result in a file",
            }
        ),
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows to run (default: all); an unknown name lists them")
    parser.add_argument("--quick", action="store_true", help="small layers that take seconds, as a check that it works")
    parser.add_argument("--full", action="store_true", help="also rows that take minutes, such as a weight of 8192x28672 with its memory")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; - for standard output, alone")
    parser.add_argument("--threads", type=count, default=2, metavar="N", help="CPU threads (default 2)")
    parser.add_argument("--trials", type=count, default=3, metavar="T", help="timed runs of each contender, after one dropped (default 3)")
    parser.add_argument("--device", type=device, default=torch.device("cpu"), metavar="D", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default float32); training stays in float32")
    parser.add_argument("--models", type=Path, default=Path("../shared/models"), metavar="DIR", help="resnet20/32-cifar10.safetensors")
    parser.set_defaults(run=run_bench)


def run_bench(args: Namespace) -> int:
    """Measure, write and print; return 0 whatever the result."""
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
        benchmark = bench(args.rows, options, keep)
    finally:
        torch.set_num_threads(before)
    emit(benchmark.to_json() if args.json == "-" else f"{benchmark}\n")
    return 0


# ---- compare -------------------------------------------------------------------------------------------------------------


def add_compare(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "compare",
        help="every method on every layer: value, side of the truth, error, time",
        epilog=examples(
            {
                "gramlip compare demo": "every method on every layer of the demo",
                "gramlip compare demo --methods gram,power --circular 32": "two methods, each layer as circular at input size 32",
                "gramlip compare model.safetensors --plot compare.png": "error against time as a picture; needs gramlip[plots]",
            }
        ),
    )
    parser.add_argument("target", metavar="TARGET", help="as for audit")
    add_inputs(parser)
    parser.add_argument("--circular", type=count, metavar="N", help="treat each convolution as circular, with stride 1, at input size N")
    parser.add_argument("--methods", type=names, default=(), metavar="A,B", help="methods to run (default: all)")
    parser.add_argument("--rtol", type=tolerance, default=1e-4, metavar="R", help="relative width of the reference interval (default 1e-4)")
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
    operators: Iterable[tuple[str, Dense | Conv]] = resolve(args.target, model_inputs(args.input)).operators()
    if args.circular is not None:
        operators = _circular(operators, args.circular)
    comparison = compare(args.target, operators, args.methods, rtol=args.rtol, trials=args.trials, watch=watched)
    if plot is not None:
        save(error_against_time(comparison), plot)
    if json is not None:
        write_whole(json, comparison.to_json())
    emit(comparison.to_json() if args.json == "-" else f"{comparison}\n")
    return 0


def names(text: str) -> tuple[str, ...]:
    """Names joined by commas.

    >>> names("gram,power")
    ('gram', 'power')
    """
    if not all(listed := tuple(text.split(","))):
        msg = f"{text!r} was given; expected names joined by commas: gram,power"
        raise ArgumentTypeError(msg)
    return listed


def _circular(operators: Iterable[tuple[str, Dense | Conv]], size: int) -> Iterator[tuple[str, Dense | Conv]]:
    """The layer as the published methods assume it: circular padding, stride 1, and an output of the size of the input."""
    for name, op in operators:
        if isinstance(op, Dense):
            yield name, op
        else:
            half = [((span - 1) // 2, span - 1 - (span - 1) // 2) for span in op.spans]
            flags = {"stride": 1, "padding_mode": "circular", "transposed": False, "output_padding": 0}
            yield name, replace(op, input_size=size, padding=half, **flags)  # type: ignore[arg-type]


# ---- reproduce -----------------------------------------------------------------------------------------------------------


def add_reproduce(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "reproduce",
        help="run an experiment of the paper: table, figure and summary in a folder",
        epilog=examples(
            {
                "gramlip reproduce dense --quick": "a small version, in seconds, into runs/dense",
                "gramlip reproduce resnet18 --weights resnet18.pth --out runs/pretrained": "the layers of torchvision's ResNet-18",
            }
        ),
    )
    titles = "; ".join(f"{name}: {experiment.title}" for name, experiment in EXPERIMENTS.items())
    parser.add_argument("experiment", choices=list(EXPERIMENTS), metavar="EXPERIMENT", help=titles.replace("%", "%%"))
    parser.add_argument(
        "--out", type=folder, metavar="DIR", help="folder of the results; an existing one is resumed (default runs/EXPERIMENT)"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="resnet18: torchvision's state dict (default: random He weights)")
    parser.add_argument("--data", metavar="DIR", help="training: folder of CIFAR-10's parquet files, or uoft-cs/cifar10 for the hub's")
    parser.add_argument("--preset", choices=("paper", "small"), help="training: ResNet-18 for 200 epochs, or minutes on a CPU (by device)")
    parser.add_argument("--trials", type=count, default=5, metavar="T", help="timed runs, after one dropped (default 5)")
    parser.add_argument("--seed", type=whole, default=0, metavar="S", help="seed of random weights (default 0)")
    parser.add_argument("--device", type=device, default=torch.device("cpu"), metavar="D", help="cpu or cuda (default cpu)")
    parser.add_argument("--quick", action="store_true", help="a small version that takes seconds, as a check that it works")
    parser.set_defaults(run=run_reproduce)


def run_reproduce(args: Namespace) -> int:
    """Run what is left, draw, print the summary."""
    out: Path = args.out or Path("runs") / args.experiment
    options = Options(args.device, args.trials, args.seed, args.quick, args.weights, args.data, args.preset)
    files = reproduce(EXPERIMENTS[args.experiment], out, options, watched)
    emit(f"{files['summary.md'].read_text(encoding='utf-8')}\n{', '.join(str(path) for path in files.values())}\n")
    return 0


# ---- certify -------------------------------------------------------------------------------------------------------------


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
    parser = subparsers.add_parser(
        "certify",
        help="certified accuracy of a classifier of 32x32 images on CIFAR-10",
        epilog=examples(
            {
                "gramlip certify runs/small --data cifar10": "a folder that gramlip train finished",
                "gramlip certify gramlip.demo:demo --data cifar10 --samples 500 --eps 36/255 1": "500 images, two radii",
                "gramlip certify model.onnx --data cifar10 --samples 500": "a file of ONNX",
                "gramlip certify runs/small --data cifar10 --samples 9 --local --no-executed": "and near each of 9 images, of real numbers",
            }
        ),
    )
    parser.add_argument("target", metavar="TARGET", help="a folder that gramlip train finished, a file of ONNX, or package.module:callable")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of CIFAR-10's parquet files, or uoft-cs/cifar10")
    parser.add_argument(
        "--eps", type=eps, nargs="+", default=list(robust.EPS), metavar="E", help="radii, pixels in [0, 1] (default 36/255 ...)"
    )
    parser.add_argument("--samples", type=count, metavar="N", help="only the first N test images")
    parser.add_argument("--normalised", action="store_true", help="the model takes pixels less CIFAR-10's mean, over its std")
    parser.add_argument("--local", action="store_true", help="also constants around each image, which take up to minutes each")
    parser.add_argument("--attack", action="store_true", help="also the accuracy under attack at each radius; needs gramlip[attack]")
    parser.add_argument("--rtol", type=tolerance, default=1e-2, metavar="R", help="relative width of each layer's interval (default 1e-2)")
    parser.add_argument(
        "--executed",
        action=BooleanOptionalAction,
        default=True,
        help="take what rounding may do off the margins, for pixels in [0, 1] (default); --no-executed takes logits for real numbers",
    )
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
        certified = _certified(model, [(recipes.normalised(x, mean, std), y) for x, y in pixels], args, mean, std)
        result: dict[str, Any] = {"schema": 1, "target": args.target, **certified.to_dict()}
        if args.attack:
            for entry in result["certified"]:
                entry["attacked"] = robust.attacked_accuracy(model, pixels, entry["eps"], mean=mean, std=std)
    text = json.dumps(result, indent=1) + "\n"
    if file is not None:
        write_whole(file, text)
    attacked = "".join(
        f"\nattacked  at eps = {255 * e['eps']:>7.4g}/255  {100 * e['attacked']:6.2f} %" for e in result["certified"] if args.attack
    )
    emit(text if args.json == "-" else f"{certified}{attacked}\n")
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


def parts(model: nn.Module) -> tuple[nn.Module, nn.Linear | None]:
    """The chain before a last linear layer, and that layer; the whole model and None where it may compute anything else.

    >>> parts(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))[1]
    Linear(in_features=2, out_features=2, bias=True)
    """
    if not isinstance(model, nn.Sequential) or not len(model) or not isinstance(last := model[-1], nn.Linear):
        return model, None
    plain = all(type(m).forward is kind.forward and "forward" not in vars(m) for m, kind in ((model, nn.Sequential), (last, nn.Linear)))
    return (model[:-1], last) if plain and not hooks(model) and not hooks(last) else (model, None)


def _certified(model: nn.Module, batches: list[Any], args: Namespace, mean: tuple[float, ...], std: tuple[float, ...]) -> robust.Certified:
    """By pairs of classes where the network is a chain that ends in a linear layer."""
    ends = [recipes.normalised(torch.full((1, len(std), 1, 1), end), mean, std) for end in (0.0, 1.0)]
    shape = tuple(batches[0][0].shape[1:])
    options: dict[str, Any] = {
        "std": std,
        "local": "eps" if args.local else False,
        "executed": args.executed,
        "domain": tuple(ends) if args.executed else None,
    }
    body, last = parts(model)
    loader = watched([pair for x, y in batches for pair in zip(x.split(1), y.split(1), strict=True)]) if args.local else batches
    try:
        return robust.certify(model, loader, audit(body, shape, rtol=args.rtol), args.eps, last=last, **options)
    except UnsupportedError as error:
        if not args.executed or "rounding" not in str(error):
            raise
        msg = f"{error}; type --no-executed for radii of real numbers"
        raise UnsupportedError(msg) from error


def _model(target: str, normalised: bool) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """The model in eval mode, with the mean and std of its input."""
    path = Path(target)
    if (path / "weights.safetensors").is_file():
        return _finished(path)
    model = onnx.load(target, (3, 32, 32)) if path.suffix == ".onnx" else _called(target)
    return (model.eval(), MEAN, STD) if normalised else (model.eval(), (0.0,) * 3, (1.0,) * 3)


def _called(target: str) -> nn.Module:
    place, colon, name = target.partition(":")
    if not (place and colon and name):
        msg = f"{target} was given; expected a folder that gramlip train finished, a file of ONNX, or package.module:callable"
        raise InputError(msg)
    model = called(target)
    if not isinstance(model, nn.Module):
        msg = f"{target} returned {type(model).__name__}; expected a torch.nn.Module"
        raise InputError(msg)
    return unwrapped(model)


# ---- train ---------------------------------------------------------------------------------------------------------------


def add_train(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "train",
        help="train a recipe and certify the result; needs the extra gramlip[train]",
        epilog=examples(
            {
                "gramlip train small --data cifar10 --out runs/small": "a small network, minutes on a CPU; repeat the command to resume",
                "gramlip train small-penalised --data cifar10 --out runs/two --set epochs=2": "with a penalty, for two epochs",
            }
        ),
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name such as resnet18-penalised or small-normalised; an unknown name lists all")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of CIFAR-10's parquet files, or uoft-cs/cifar10 for the hub's")
    parser.add_argument("--out", type=folder, required=True, metavar="DIR", help="folder of the run; a run with a checkpoint is resumed")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="seed of all random numbers (default 0)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the recipe: --set epochs=2")
    parser.set_defaults(run=run_train)


def run_train(args: Namespace) -> int:
    """Train, write, print the results as JSON."""
    try:
        module = import_module("gramlip.lab.train")
    except ImportError as error:
        msg = f'training needs {error.name}, which is not installed; expected the extra: type pip install "gramlip[train]"'
        raise InputError(msg) from error
    changes = dict(_change(text) for text in args.set)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with (
        warnings.catch_warnings(),
        redirect_stdout(sys.stderr),
    ):  # the progress bar goes to standard error: standard output is for the results alone
        warnings.filterwarnings("ignore", module="lightning")  # for its use of deprecated functions of torch, and advice on workers
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


COMMANDS: Commands = {"bench": add_bench, "certify": add_certify, "compare": add_compare, "reproduce": add_reproduce, "train": add_train}
