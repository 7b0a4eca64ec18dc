"""What every command does alike: errors end in one line and exit code 1, optional packages are named when missing."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any, NoReturn

from facespec.errors import MissingPackageError, RetinaFaceError


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of an option that has one, unless its help already says it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "(default" in (action.help or ""):
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
            f"{why} needs {module}, which {found}: in the project's folder, pip install -e '.[{extra}]'"
        ) from error


_quiet_lock = threading.Lock()
_quiet_depth = 0
_quiet_stderr = -1


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep C libraries from writing to stderr, as libjpeg and libpng do about files that are reported anyway.

    It acts on the whole process, so it is for commands, not for library code; threads may overlap in it.
    """
    global _quiet_depth, _quiet_stderr
    with _quiet_lock:
        if not _quiet_depth:
            with suppress(OSError):  # stderr is closed: nothing to silence
                _quiet_stderr = os.dup(2)
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 2)
                os.close(null)
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if not _quiet_depth and _quiet_stderr >= 0:
                os.dup2(_quiet_stderr, 2)
                os.close(_quiet_stderr)
                _quiet_stderr = -1


def run(main: Callable[[], int]) -> NoReturn:
    """Call a command's main function and leave with its exit code; errors that a user can mend take one line.

    SIGTERM and SIGHUP, as the end of a container or a terminal sends them, count as an interrupt: temporary files go, a
    video is finished. What the caller has told to be ignored stays so.
    """
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, signal.default_int_handler)
    # where a daemon has closed them, nothing that is printed may go astray
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main()
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
