"""The command line: a thin layer over the library. Exit code 0, 1 (a limit is exceeded), 2 (unusable input), 130 or 143 (interrupted)."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from gramlip import __version__
from gramlip.cli import audit, lab
from gramlip.cli.options import examples
from gramlip.errors import InputError, Terminated, UnsupportedError, first_line, out_of_memory, ready
from gramlip.reports.output import note, settle


class _Parser(argparse.ArgumentParser):
    """A parser whose usage errors are one line, like all errors; options must be written in full, and `-1,2` is a value."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        self._negative_number_matcher = re.compile(r"-[.\d]")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Refuse unknown arguments in the parser of the command, so that the error names the help of that command."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        msg = f"{message}: type {self.prog} --help"
        raise InputError(msg)


def parser() -> argparse.ArgumentParser:
    """The parser with the commands of `gramlip.cli.audit` and `gramlip.cli.lab`."""
    top = _Parser(
        prog="gramlip",
        description="How much a layer or a network can stretch its input, as an interval with a proof.",
        epilog=examples(
            {
                "gramlip audit demo": "the layers of a small trained network that ships with the package",
                "gramlip audit model.safetensors": "the layers of a file of weights",
                "gramlip audit gramlip.demo:demo --input 3,32,32": "a whole model: its layers and its Lipschitz constant",
                "gramlip audit --help": "the options of a command, with examples",
            }
        ),
    )
    top.add_argument("--version", action="version", version=f"gramlip {__version__}")
    subparsers = top.add_subparsers(metavar="COMMAND", required=True)
    commands = audit.COMMANDS | lab.COMMANDS
    for name in sorted(commands):
        commands[name](subparsers)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    try:
        ready()
        args = parser().parse_args(argv)
        return int(args.run(args))
    except KeyboardInterrupt:
        note("interrupted")
        return 130
    except Terminated as ended:
        note("terminated")
        return int(str(ended))
    except (InputError, UnsupportedError) as error:
        note(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        note(f"error: {' '.join(map(str, argv or sys.argv[1:]))}: {first_line(error)}; expected what fits into memory: type smaller sizes")
    except OSError as error:
        given = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        note(f"error: {given}; expected files that can be read and written: check the path and the disk")
    finally:
        settle()
    return 2


def run() -> NoReturn:
    """Run a command and end the process. A rank ends at once: threads of gloo abort an interpreter that takes itself apart."""
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)
