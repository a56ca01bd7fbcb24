"""The command line: a thin layer over the library. Exit code 0, 1 (a limit is exceeded), 2 (unusable input), 130 (interrupted)."""

from __future__ import annotations

import argparse
import pkgutil
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from gramlip import __version__, commands
from gramlip.errors import InputError, UnsupportedError
from gramlip.output import note


class _Parser(argparse.ArgumentParser):
    """Errors of usage are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        msg = f"{message}: type {self.prog} --help"
        raise InputError(msg)


def parser() -> argparse.ArgumentParser:
    """The parser with every command of `gramlip.commands`."""
    top = _Parser(prog="gramlip", description="How much a layer or a network can stretch its input, as an interval with a proof.")
    top.add_argument("--version", action="version", version=f"gramlip {__version__}")
    subparsers = top.add_subparsers(metavar="COMMAND", required=True)
    for module in pkgutil.iter_modules(commands.__path__):
        import_module(f"{commands.__name__}.{module.name}").add_parser(subparsers)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    try:
        args = parser().parse_args(argv)
        return int(args.run(args))
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    except (InputError, UnsupportedError) as error:
        note(f"error: {error}")
    except OSError as error:
        note(f"error: {error.filename or 'a file'}: {error.strerror or error}; expected it to be readable and writable: check the path")
    return 2
