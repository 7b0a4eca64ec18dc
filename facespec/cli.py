"""What every command does alike, and `retinaface-trt`, which runs each of them from any folder.

Errors end in one line: exit code 2 for a wrong command line, 1 for everything else.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from itertools import takewhile
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NoReturn, TypeVar

from facespec.addresses import hide_secrets
from facespec.errors import MissingPackageError, RetinaFaceError, SpecError
from facespec.files import remove_unfinished, write_text
from facespec.log import tell_on_stderr

PROGRAM = "retinaface-trt"
DEVICE = re.compile("auto|cpu|cuda(:[0-9]{1,4})?")
"""Words of `--device`."""

_T = TypeVar("_T")

COMMANDS = {
    "detect": ("trt_runtime.detect", "find faces in images, videos and cameras"),
    "benchmark": ("trt_runtime.benchmark", "measure detectors side by side"),
    "fit": ("trainer.fit", "train a detector"),
    "evaluate": ("trainer.evaluate", "measure accuracy on labelled images"),
    "to-onnx": ("export.to_onnx", "checkpoint to ONNX"),
    "to-trt": ("export.to_trt", "checkpoint to TensorRT engine"),
    "inspect": ("export.inspect", "show what is inside a model file"),
    "verify": ("export.verify", "compare two models on images"),
    "sensitivity": ("export.sensitivity", "find the layers that INT8 hurts"),
    "train-int8": ("export.train_int8", "train weights for INT8"),
    "to-triton": ("export.to_triton", "model repository for Triton Inference Server"),
    "build-plugin": ("plugins.build", "compile the CUDA kernels"),
}
"""Names of the commands, the module of each, and what it does."""


def package_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    import importlib.metadata as metadata  # what few calls need does not slow the start of all

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def version() -> str:
    """Return the version of this project; files that were copied, without an installation, have none."""
    return package_version(PROGRAM) or "unknown"


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of an option that has one, unless its help already says it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults shown in --help, and errors of one line that say what may have been meant."""

    def __init__(self, prog: str, **options: Any) -> None:
        if sys.argv[0].startswith(f"{PROGRAM} "):
            prog = sys.argv[0]
        super().__init__(prog=prog, formatter_class=_HelpFormatter, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Name a mistyped or short option first: argparse would name another one that is missing because of it."""
        for word in takewhile(lambda word: word != "--", sys.argv[1:] if args is None else args):
            if word.startswith("--") and word.partition("=")[0] not in self._option_string_actions:
                self.error(f"unrecognized arguments: {word}")
        return super().parse_known_args(args, namespace)

    def add_json(self, what: str = "the result") -> None:
        """Add `--json FILE`, for `json_output`."""
        self.add_argument("--json", type=Path, metavar="FILE", help=f"write {what}; '-' prints it, the rest to stderr")

    def add_device(self) -> None:
        """Add `--device`, for `trt_runtime.load.load_detector`."""
        words = "cpu, cuda or cuda:N; auto is the GPU for engines"
        self.add_argument("--device", type=argument(parse_device), default="auto", help=words)

    def error(self, message: str) -> NoReturn:
        """Print one line and leave with exit code 2."""
        import difflib

        typed = re.search(r"unrecognized arguments: (--[\w-]+)|invalid choice: '([^']*)'", message)
        if typed:
            known = [str(word) for action in self._actions for word in action.option_strings]
            if typed[2] is not None:
                known = [str(word) for action in self._actions for word in action.choices or ()]
            close = difflib.get_close_matches(typed[1] or typed[2], known, 1)
            message += f": did you mean {close[0]}?" if close else ""
        self.exit(2, f"error: {hide_secrets(message)} ({self.prog} --help)\n")


def argument(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """Return `parse` as the `type` of an argument: its RetinaFaceError is an error of usage."""

    def checked(text: str) -> _T:
        try:
            return parse(text)
        except RetinaFaceError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def parse_device(text: str) -> str:
    """Return the word of `--device` as it is: auto, cpu, cuda, or cuda:N for the GPU of that index.

    Raises:
        SpecError: It is another word.
    """
    if not DEVICE.fullmatch(text):
        raise SpecError(f"device {text!r} is not one of auto, cpu, cuda and cuda:N")
    return text


@contextmanager
def json_output(file: Path | None) -> Iterator[Callable[[str], None]]:
    """Yield what takes the JSON text of a command: it writes the file of `--json FILE` and says so.

    For `--json -` it prints the text, and all that is printed otherwise goes to stderr. None: it does nothing.
    """
    stdout = sys.stdout
    printed = file == Path("-")

    def write(text: str) -> None:
        if printed:
            print(text, file=stdout)
        elif file:
            write_text(file, text + "\n")
            print(f"wrote {file}")

    with redirect_stdout(sys.stderr if printed else stdout):
        yield write


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return lines of aligned columns, two spaces apart: the first column to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def command(argv: Sequence[str] | None = None) -> NoReturn:
    """Run `retinaface-trt COMMAND ARGUMENTS`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    listed = "\n".join(f"  {name:13} {what}" for name, (_, what) in COMMANDS.items())
    parser = ArgumentParser(
        PROGRAM,
        usage=f"{PROGRAM} COMMAND ... | {PROGRAM} COMMAND --help",
        description="RetinaFace with TensorRT: train, export, verify, run.",
        epilog=f"commands:\n{listed}",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version()}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    name = parser.parse_args(arguments[:1]).command
    module = COMMANDS[name][0]
    sys.argv = [f"{PROGRAM} {name}", *arguments[1:]]

    def main() -> int:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in (module, module.split(".")[0]):
                raise MissingPackageError(
                    f"{PROGRAM} {name} needs {error.name}: in the project's folder, pip install -e ."
                ) from None
            raise MissingPackageError(f"{module.split('.')[0]} is not installed here: only the runtime is") from None
        code: int = found.main(arguments[1:])
        return code

    run(main)


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Let a loaded module, which has the name of its function, be called as that function: `export.verify(options)`."""
    loaded = sys.modules[module]
    loaded.__class__ = type("CallableModule", (ModuleType,), {"__call__": staticmethod(function)})


def require(module: str, extra: str, why: str) -> ModuleType:
    """Import an optional package, which an extra of this project brings; `why` says what needs it, for the message.

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


def counted(number: int, noun: str) -> str:
    """Return a number of things in words: 1 face, 2 faces."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


_quiet_lock = threading.Lock()
_quiet_depth = 0
_quiet_stderr = -1


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep C libraries from writing to stderr, as libjpeg and libpng do about files that are reported anyway.

    It acts on the whole process, so it is for commands, not for library code; threads may overlap in it. What Python
    prints to `sys.stderr` is seen: from the first call on, that is a stream of its own.
    """
    global _quiet_depth, _quiet_stderr
    with _quiet_lock:
        if not _quiet_depth:
            with suppress(OSError):  # stderr is closed: nothing to silence
                _quiet_stderr = os.dup(2)
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 2)
                os.close(null)
                if sys.stderr.fileno() == 2:
                    encoding = sys.stderr.encoding
                    sys.stderr = Harmless(open(os.dup(_quiet_stderr), "w", 1, encoding, errors="backslashreplace"))
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


_STEERING = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class Harmless:
    """A text stream on which nothing can steer a terminal or turn the order of letters round, as names of files may.

    Control characters but tab and line ends become escapes, those of JSON.
    """

    def __init__(self, stream: io.TextIOBase) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; return how many characters it has."""
        self._stream.write(_STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


GRACE_S = 4.0
"""How long a command may take to end by itself after SIGTERM or SIGHUP."""

_finishing = 0


@contextmanager
def finishing() -> Iterator[None]:
    """Within it a process is not ended before its time: a video is being finished, say, which may take a while."""
    global _finishing
    _finishing += 1
    try:
        yield
    finally:
        _finishing -= 1


@contextmanager
def _ended_in_time(numbers: Iterable[int]) -> Iterator[None]:
    """End this process `GRACE_S` after one of these signals, whatever it does: Python handles none while C code runs.

    What is half written goes.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    others = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget_signals)
    asked = set(numbers)

    def watch() -> None:
        while (came := os.read(reader, 64)) and asked.isdisjoint(came):
            pass
        if not came:
            os.close(reader)  # else it stays open: signals still come, and Python writes each to the pipe
            return
        left, before = GRACE_S, time.monotonic()
        while left > 0:
            time.sleep(0.1)
            now = time.monotonic()
            left, before = left - (0 if _finishing else now - before), now
        remove_unfinished()
        with suppress(OSError):
            print("interrupted: it did not end by itself", file=sys.stderr, flush=True)
        os._exit(130)

    threading.Thread(target=watch, name="ended in time", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(others)
        os.close(writer)


def _forget_signals() -> None:  # those of a child are not its parent's
    with suppress(ValueError):  # a thread has forked
        signal.set_wakeup_fd(-1)


def _tell_defect(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """Print a traceback without the passwords that messages of libraries may hold."""
    print(hide_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def run(main: Callable[[], int]) -> NoReturn:
    """Call a command's main function and leave with its exit code; errors that a user can mend take one line.

    SIGTERM and SIGHUP, as the end of a container or a terminal sends them, count as an interrupt: temporary files go, a
    video is finished. What does not end by itself is ended. A signal that the caller ignores stays ignored.
    """
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    for number in numbers:  # nohup has the other one ignored
        signal.signal(number, signal.default_int_handler)
    tell_on_stderr()
    sys.excepthook = _tell_defect
    threading.excepthook = lambda found: _tell_defect(found.exc_type, found.exc_value, found.exc_traceback)
    # a daemon may have closed them: what is printed must not end in another file, or in an error
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, Harmless(stream))
    try:
        with _ended_in_time(numbers):
            code = main()
        sys.stdout.flush()
    except RetinaFaceError as error:
        code = _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output has gone
        code = 1
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        code = _fail(f"{error.strerror or error}{name}")
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it, or there is no room: Python would try again, and end in another way
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _fail(message: str) -> int:
    print("error:", hide_secrets(" ".join(message.split())), file=sys.stderr)
    return 1
