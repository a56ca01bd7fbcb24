"""`gramlip audit TARGET...`: an interval for every layer, and for the network if the model is known; `gramlip diff A B`."""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser, Namespace, _SubParsersAction  # pyright: ignore[reportPrivateUsage]
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gramlip import __version__
from gramlip.cli.options import (
    Commands,
    add_inputs,
    assumption,
    effort,
    examples,
    interval,
    limit,
    model_inputs,
    numbers,
    radius,
    seconds,
    tolerance,
)
from gramlip.distributed import joined, ranked
from gramlip.errors import InputError
from gramlip.numerics import rounding as rd
from gramlip.operators.interval import Bound, decimals
from gramlip.reports.checkpoint import Weights
from gramlip.reports.output import Screen, aligned, check_output, check_outputs, emit, note, printable, watched, write_whole
from gramlip.reports.pictures import page
from gramlip.reports.report import Report, finite, short_name
from gramlip.targets import Model, Options, Source, read_input, resolve

Limit = Decimal | None


def _json(reports: Sequence[Report], _: Limit) -> str:
    if len(reports) == 1:
        return reports[0].to_json()
    return json.dumps({"schema": 1, "reports": [report.to_dict() for report in reports]}, indent=2, allow_nan=False) + "\n"


def _html(reports: Sequence[Report], _: Limit) -> str:
    if len(reports) > 1:
        msg = f"--html was given with {len(reports)} targets; expected one of them for a page: type one TARGET"
        raise InputError(msg)
    return page(reports[0])


# ---- for continuous integration ------------------------------------------------------------------------------------------


def _cases(report: Report, limit: Limit) -> list[tuple[str, str, str, float]]:
    """Each layer, each weight without a bound, and the network: name, interval, failure or None, seconds."""
    rows = [(row.name, str(row.bound), row.upper, row.seconds or 0.0) for row in report.layers if row.weight_shape]
    rows += [(row.name, f"no bound: {row.reason}", math.inf, 0.0) for row in report.left_out if row.is_weight]
    if report.network is not None:
        rows.append(("network", str(report.network), float(report.network.upper), 0.0))
    cases: list[tuple[str, str, str, float]] = []
    for name, known, upper, took in rows:
        over = limit is not None and not upper <= limit
        cases.append((printable(name), printable(known), f"upper {decimals(upper, upward=True)} above {limit}" if over else "", took))
    return cases


def junit(reports: Sequence[Report], limit: Limit) -> str:
    """JUnit XML: a suite for each target, a case for each layer; it fails unless the norm is proved to be at most the limit."""
    root = ElementTree.Element("testsuites", name="gramlip audit")
    for report in reports:
        cases = _cases(report, limit)
        target, wrong = printable(report.target), sum(bool(problem) for _, _, problem, _ in cases)
        suite = ElementTree.SubElement(root, "testsuite", name=target, tests=str(len(cases)), failures=str(wrong), errors="0")
        for name, known, problem, took in cases:
            case = ElementTree.SubElement(suite, "testcase", classname=target, name=name, time=f"{took:.3f}")
            if problem:
                ElementTree.SubElement(case, "failure", message=problem).text = known
            else:
                ElementTree.SubElement(case, "system-out").text = known
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


_RULES = {"above-limit": "The norm is not proved to be at most the limit.", "interval": "The interval that holds the norm."}


def sarif(reports: Sequence[Report], limit: Limit) -> str:
    """SARIF 2.1.0: a result for each layer; an error unless the norm is proved to be at most the limit."""
    results = [
        {
            "ruleId": "above-limit" if problem else "interval",
            "kind": "fail" if problem else "informational" if limit is None else "pass",
            "level": "error" if problem else "none",
            "message": {"text": f"{name}: {'; '.join(filter(None, (problem, known)))}"},
            "locations": [
                {
                    "physicalLocation": {"artifactLocation": {"uri": Path(report.target).as_posix()}},
                    "logicalLocations": [{"fullyQualifiedName": name, "kind": "member"}],
                }
            ],
        }
        for report in reports
        for name, known, problem, _ in _cases(report, limit)
    ]
    rules = [{"id": name, "shortDescription": {"text": text}} for name, text in _RULES.items()]
    driver = {"name": "gramlip", "version": __version__, "rules": rules}
    runs = [{"tool": {"driver": driver}, "results": results}]
    log = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": runs}
    return json.dumps(log, indent=2, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Sequence[Report], Limit], str]] = {"--json": _json, "--html": _html, "--junit": junit, "--sarif": sarif}
"""Option -> function that turns the reports into the text of its FILE."""


# ---- audit ---------------------------------------------------------------------------------------------------------------

TARGET = (
    "weights (.safetensors, checkpoint, .npz, .onnx, .gguf, .keras, a folder of them, demo) "
    "or a model (package.module:callable, .pt2, .onnx with --input, timm:, torchvision:, hf:)"
)


def _model_options(parser: ArgumentParser) -> None:
    add_inputs(parser)
    parser.add_argument("--rtol", type=tolerance, default=1e-2, metavar="R", help="relative width upper/lower - 1 to reach (default 1e-2)")
    parser.add_argument(
        "--assume",
        type=assumption,
        action="append",
        default=[],
        metavar="NAME=L",
        help="assume this constant for a module or operation; the report says so",
    )
    parser.add_argument(
        "--domain", type=interval, metavar="LOW,HIGH", help="range of every input entry; gives products of values a finite constant"
    )
    parser.add_argument(
        "--at", type=Path, metavar="FILE", help="local constant around this input: .npy, .pt, or a picture (pixels in [0, 1])"
    )
    parser.add_argument("--radius", type=radius, metavar="R", help="with --at: l2 radius of the ball around it, in the model's input units")
    for side in ("inputs", "outputs"):
        parser.add_argument(f"--{side}", type=numbers, metavar="0,2", help=f"count only these entries of the flattened {side[:-1]}")
    parser.add_argument(
        "--effort", type=effort, default=1.0, metavar="E", help="search for coupled bounds (default 1; 0: closed forms; -1: none)"
    )
    parser.add_argument(
        "--time-limit", type=seconds, metavar="S", help="begin no new search, or layer of a file, after S seconds (default: no limit)"
    )


def add_audit(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "audit",
        help="an interval for every layer, and for the network if the model is known",
        description="Prove an interval for the norm of every layer and, if the model is known, for its Lipschitz constant.",
        epilog=examples(
            {
                "gramlip audit demo": "a small trained network that ships with the package",
                "gramlip audit model.safetensors --rtol 1e-3": "every layer of a file of weights, each interval at most 0.1% wide",
                "gramlip audit package.module:make --input 3,224,224": "the model that make() returns: layers and network",
                "gramlip audit model.onnx --input 3,224,224": "the graph of an ONNX file: layers and network",
                "gramlip audit package.module:make --input 3,32,32 --at image.png --radius 0.25": "the local constant around one input",
                "gramlip audit model.safetensors --fail-above 10": "exit code 1 unless every layer is proved to be at most 10",
                "gramlip audit model.safetensors --json - --rtol 1e-4": "the report as JSON, alone on standard output",
                "gramlip audit model.safetensors --resume audit.journal": "resumes an interrupted audit",
                "gramlip audit demo demo-regularised --verbose": "two targets, with every reason and every tensor that is left out",
            }
        ),
    )
    parser.add_argument("targets", nargs="+", metavar="TARGET", help=TARGET)
    _model_options(parser)
    names = {"--json": "JSON", "--html": "a page", "--junit": "JUnit's XML", "--sarif": "SARIF"}
    for name in FORMATS:
        parser.add_argument(name, metavar="FILE", help=f"write the report as {names[name]}; - for standard output, alone")
    parser.add_argument("--resume", metavar="JOURNAL", help="store finished layers in this file, and resume from it")
    parser.add_argument(
        "--verbose", action="store_true", help="print the reasons of every row, and the names of all tensors that are left out"
    )
    parser.add_argument("--fail-above", type=limit, metavar="X", help="exit with code 1 unless every upper bound is at most X")
    parser.set_defaults(run=run_audit)


def source_of(target: str, args: Namespace) -> Source:
    """The source for a target, with the options that only models accept."""
    source = resolve(target, model_inputs(args.input))
    if isinstance(source, Model):
        at = None if args.at is None else read_input(args.at)
        options = Options(dict(args.assume), args.domain, effort=args.effort, time_limit=args.time_limit)
        return replace(source, options=replace(options, at=at, radius=args.radius, inputs=args.inputs, outputs=args.outputs))
    given = [name for name in ("domain", "at", "radius", "inputs", "outputs") if getattr(args, name) is not None]
    if args.assume or given:
        named = " and ".join(f"--{name}" for name in (["assume"] if args.assume else []) + given)
        msg = f"{target} holds weights alone; expected a model for {named}: type package.module:callable"
        raise InputError(msg)
    return replace(source, time_limit=args.time_limit) if isinstance(source, Weights) else source


def _journal(args: Namespace, sources: Sequence[Source]) -> Path | None:
    if args.resume is not None and (len(sources) > 1 or not isinstance(sources[0], Weights) or args.resume == "-"):
        msg = f"--resume {args.resume} was given for {' '.join(args.targets)}; expected a file, and one TARGET that holds weights alone"
        raise InputError(msg)
    return check_output("--resume", args.resume)


def run_audit(args: Namespace) -> int:
    """Audit, write and print; return 1 if `--fail-above` is exceeded. With several ranks, only the first writes and prints."""
    files = check_outputs({name: getattr(args, name[2:]) for name in FORMATS})
    if len(args.targets) > 1 and args.html is not None:
        _html([None] * len(args.targets), None)  # type: ignore[list-item]
    with joined():
        sources = [source_of(target, args) for target in args.targets]
        journal = _journal(args, sources)
        first = ranked() == 0
        watch = watched if first else iter
        reports = [
            source.audit(rtol=args.rtol, watch=watch, journal=journal)
            if isinstance(source, Weights)
            else source.audit(rtol=args.rtol, watch=watch)
            for source in sources
        ]
    above = [] if args.fail_above is None else [name for report in reports for name in report.above(args.fail_above)]
    if first:
        texts = {name: FORMATS[name](reports, args.fail_above) for name in files}
        for name, path in files.items():
            if path is not None:
                write_whole(path, texts[name])
        alone = [name for name, path in files.items() if path is None]
        screen = Screen.of(sys.stdout)
        emit(texts[alone[0]] if alone else "\n\n".join(report.text(screen, verbose=args.verbose) for report in reports) + "\n")
        if above:
            note(f"above {args.fail_above}: {', '.join(above)}")
    return 1 if above else 0


# ---- diff ----------------------------------------------------------------------------------------------------------------


def add_diff(subparsers: _SubParsersAction[Any]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "diff",
        help="the intervals of two targets side by side, and the growth of each layer",
        epilog=examples(
            {
                "gramlip diff before.safetensors after.safetensors": "the layers of two files",
                "gramlip diff gramlip.demo:demo gramlip.demo:demo_regularised --input 3,32,32": "two models, with their networks",
            }
        ),
    )
    parser.add_argument("a", metavar="A", help=TARGET)
    parser.add_argument("b", metavar="B", help="the target to compare with A")
    _model_options(parser)
    parser.add_argument("--json", metavar="FILE", help="write the comparison as JSON; - for standard output, alone")
    parser.set_defaults(run=run_diff)


def ratio(a: Bound, b: Bound) -> tuple[float, float]:
    """The interval of the norm of b divided by that of a, rounded outward; the ratio of two zero maps is 1.

    >>> ratio(Bound(1.0, 2.0, "a"), Bound(4.0, 4.0, "b"))
    (1.9999999999999998, 4.000000000000001)
    """
    if float(a.upper) == float(b.upper) == 0.0:
        return 1.0, 1.0
    low = rd.down(b.lower / float(a.upper)) if 0.0 < float(a.upper) < math.inf else 0.0
    return low, rd.up(float(b.upper) / a.lower) if a.lower > 0.0 else math.inf


def diff(a: Report, b: Report) -> dict[str, Any]:
    """The comparison of two reports as JSON types: common layers with their ratio, and names that only one report has."""
    before, after = ({row.name: row.bound for row in report.layers} for report in (a, b))
    if a.network is not None and b.network is not None:
        before["network"], after["network"] = a.network, b.network
    sides = {name: (before[name], after[name], ratio(before[name], after[name])) for name in before if name in after}
    rows = [
        {"name": name, "a": [x.lower, finite(float(x.upper))], "b": [y.lower, finite(float(y.upper))], "ratio": [low, finite(high)]}
        for name, (x, y, (low, high)) in sides.items()
    ]
    only = {
        f"only_in_{side}": [name for name in mine if name not in other]
        for side, mine, other in (("a", before, after), ("b", after, before))
    }
    return {"schema": 1, "target": [a.target, b.target], "layers": rows, **only}


def _shown(pair: Sequence[float | None]) -> str:
    low, high = pair
    return f"[{decimals(low or 0.0, upward=False, digits=5)}, {decimals(math.inf if high is None else high, upward=True, digits=5)}]"


def _diff_text(pair: dict[str, Any]) -> str:
    a, b = pair["target"]
    rows = [
        ("layer", "A", "B", "B / A"),
        *((short_name(row["name"]), *(_shown(row[key]) for key in ("a", "b", "ratio"))) for row in pair["layers"]),
    ]
    parts = [f"A  {printable(a)}\nB  {printable(b)}", aligned(rows)]
    parts += [printable(f"only in {side.upper()}: {', '.join(pair[f'only_in_{side}'])}") for side in "ab" if pair[f"only_in_{side}"]]
    return "\n\n".join(parts) + "\n"


def run_diff(args: Namespace) -> int:
    """Audit both, print the table."""
    path = check_output("--json", args.json)
    with joined():
        reports = [source_of(target, args).audit(rtol=args.rtol, watch=watched) for target in (args.a, args.b)]
        first = ranked() == 0
    comparison = diff(*reports)
    text = json.dumps(comparison, indent=2, allow_nan=False) + "\n"
    if first:
        if path is not None:
            write_whole(path, text)
        emit(text if args.json == "-" else _diff_text(comparison))
    return 0


COMMANDS: Commands = {"audit": add_audit, "diff": add_diff}
