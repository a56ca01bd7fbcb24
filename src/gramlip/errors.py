"""Errors, each with one line: what was given, what was expected, what to type. Also Ctrl-C while torch is imported."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import PurePath
from types import FrameType
from typing import NoReturn


class InputError(ValueError):
    """Input that cannot be used: wrong values, shapes, files or options.

    >>> from gramlip.operators.interval import Bound
    >>> try:
    ...     Bound(2.0, 1.0, "given")
    ... except InputError as error:
    ...     print(error)
    the interval [2.0, 1.0] was given; expected 0 <= lower <= upper
    """


class UndefinedError(InputError):
    """A call whose result torch does not define: it must not be run, not even to look for a lower side."""


class UnsupportedError(TypeError):
    """A layer or operation that no rule covers; it is never guessed.

    >>> import gramlip
    >>> try:
    ...     gramlip.bound("a name")
    ... except UnsupportedError as error:
    ...     print(str(error).split(":")[0])
    str has no rule; expected a layer that gramlip knows
    """


def check_integers(least: int, **values: object) -> None:
    """InputError that names the first of the values which is no integer of at least `least`.

    >>> check_integers(1, steps=3, peaks=2)
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            msg = f"{name}={value!r} was given; expected an integer of at least {least}"
            raise InputError(msg)


class Terminated(SystemExit):
    """The process was asked to end while training, which ends its epoch first; the exit code is that of SIGTERM."""

    def __init__(self) -> None:
        super().__init__(143)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not so much memory; torch's own has no type on a CPU.

    >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    return isinstance(error, MemoryError) or "allocate" in str(error)


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------------
#
# Importing torch takes seconds. If the command line is interrupted meanwhile, it ends with one line and exit code 130, as it does
# later on. So this module is imported before torch.


def is_command() -> bool:
    """Whether this process is the `gramlip` script or `python -m gramlip`, and not a program that uses the library."""
    if sys.argv[:1] == ["-m"]:  # while a package is found that is to be run, no file has taken its place
        after = [following for word, following in zip(sys.orig_argv, sys.orig_argv[1:], strict=False) if word == "-m"]
        return after[:1] == ["gramlip"] or "-mgramlip" in sys.orig_argv
    return bool(sys.argv) and PurePath(sys.argv[0]).name in ("gramlip", "gramlip.exe")


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    """End at once: nothing is written yet, and an exception may end in the middle of a library's import."""
    with suppress(OSError):
        os.write(2, b"gramlip: interrupted\n")
    os._exit(130)


def ready() -> None:
    """From here on Ctrl-C is an exception, which the command line handles."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if (
    is_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a job in the background ignores it
):
    signal.signal(signal.SIGINT, _leave)
