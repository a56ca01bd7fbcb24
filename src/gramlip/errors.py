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
    """A call whose result torch does not define. It must not be run, not even to search for a lower bound."""


class UnsupportedError(TypeError):
    """A layer or operation without a rule; its constant is never guessed.

    >>> import gramlip
    >>> try:
    ...     gramlip.bound("a name")
    ... except UnsupportedError as error:
    ...     print(str(error).split(":")[0])
    str has no rule; expected a layer that gramlip knows
    """


def check_integers(least: int, **values: object) -> None:
    """Raise an InputError for the first value that is not an integer of at least `least`.

    >>> check_integers(1, steps=3, peaks=2)
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            msg = f"{name}={value!r} was given; expected an integer of at least {least}"
            raise InputError(msg)


class Terminated(SystemExit):
    """The process received SIGTERM during training, which finished its epoch; the exit code is that of SIGTERM."""

    def __init__(self) -> None:
        super().__init__(143)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if the message is empty."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error reports a lack of memory; on a CPU, torch raises a plain RuntimeError.

    >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    return isinstance(error, MemoryError) or "allocate" in str(error)


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------------
#
# Importing torch takes seconds. If the command line is interrupted meanwhile, it ends with one line and exit code 130, as it does
# later on. So this module is imported before torch.


def is_command() -> bool:
    """Whether this process is the `gramlip` script or `python -m gramlip`, rather than a program that uses the library."""
    if sys.argv[:1] == ["-m"]:  # `python -m` sets argv[0] to "-m" until it has found the package
        after = [following for word, following in zip(sys.orig_argv, sys.orig_argv[1:], strict=False) if word == "-m"]
        return after[:1] == ["gramlip"] or "-mgramlip" in sys.orig_argv
    return bool(sys.argv) and PurePath(sys.argv[0]).name in ("gramlip", "gramlip.exe")


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    """End the process at once: nothing is written yet, and an exception could leave a library half imported."""
    with suppress(OSError):
        os.write(2, b"gramlip: interrupted\n")
    os._exit(130)


def ready() -> None:
    """Turn Ctrl-C back into an exception, which the command line handles from here on."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if (
    is_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a job in the background ignores it
):
    signal.signal(signal.SIGINT, _leave)
