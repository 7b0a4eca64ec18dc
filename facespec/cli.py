"""What every command does alike: errors end in one line and exit code 1, optional packages are named when missing."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

from facespec.errors import MissingPackageError, RetinaFaceError


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults shown in --help, and errors of one line that end in exit code 1."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

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
            f"{why} needs {module}, which {found}: pip install 'retinaface-trt[{extra}]'"
        ) from error


def run(main: Callable[[], int]) -> NoReturn:
    """Call a command's main function and leave with its exit code; errors that a user can mend take one line."""
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
