"""What every command does alike: errors end in one line and exit code 1, optional packages are named when missing."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn

from facespec.errors import MissingPackageError, RetinaFaceError


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of an option that has one, unless its help already says it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults shown in --help, and errors of one line that end in exit code 1."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Print one line and leave."""
        self.exit(1, f"error: {message} ({self.prog} --help)\n")


def require(module: str, extra: str, why: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: Name to import.
        extra: The extra of this project that brings it.
        why: What needs it, for the message.

    Raises:
        MissingPackageError: Not installed, or its own import fails.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == module.split(".")[0]
        found = "is not installed" if missing else f"cannot be imported ({error})"
        raise MissingPackageError(
            f"{why} needs {module}, which {found}: in the project's folder, pip install '.[{extra}]'"
        ) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep C libraries from writing to stderr, as libjpeg and libpng do about files that are reported anyway.

    It acts on the whole process, so it is for commands, not for library code.
    """
    try:
        kept = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    if sys.stderr:
        sys.stderr.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def run(main: Callable[[], int]) -> NoReturn:
    """Call a command's main function and leave with its exit code; errors that a user can mend take one line.

    SIGTERM, as a container's end sends it, counts as an interrupt: temporary files go, a video is finished.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not so where a daemon has closed it
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main()
        if sys.stdout:
            sys.stdout.flush()
    except RetinaFaceError as error:
        code = _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        code = _fail(f"{error.strerror or error}{name}")
    sys.exit(code)


def _fail(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 1
