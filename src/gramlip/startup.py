"""Ctrl-C while the command line imports torch, which takes seconds: one line and 130, as later on. Imported before torch, for that."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import PurePath
from types import FrameType
from typing import NoReturn


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
