"""Writing files whole or not at all, and never over what is being read."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from facespec.errors import OutputError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, with its suffix; on success it becomes `path`, otherwise it is removed.

    The folder is created if need be; a symbolic link is written through.

    Raises:
        OutputError: The folder or the file cannot be written, or `path` is a folder or a device.
    """
    path = Path(path)
    target = _destination(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:60]}.", suffix=path.suffix, dir=target.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None
    os.close(handle)
    temporary = Path(name)
    try:
        try:
            yield temporary
        except OSError as error:
            if error.filename not in (None, name):
                raise
            raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from None
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _destination(path: Path) -> Path:
    """Return where writing to `path` ends up, links followed; refuse what is no file."""
    try:
        target = path.resolve()
        if target.is_symlink():  # before Python 3.13 resolve() itself refuses
            raise OutputError(f"{path}: cannot be written, its links lead in a circle")
        if target.exists() and not target.is_file():
            raise OutputError(f"{path}: cannot be written, it is a {'folder' if target.is_dir() else 'device'}")
    except (OSError, RuntimeError) as error:  # a loop of links
        raise OutputError(f"{path}: cannot be written ({error})") from None
    return target


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_outputs(outputs: Iterable[tuple[str, str | Path | None]], inputs: Iterable[str | Path]) -> None:
    """Refuse, before any work, outputs that cannot be written or would destroy an input or each other.

    Args:
        outputs: Option and file to write; None and "-", which is stdout, are left out.
        inputs: Files that are read.

    Raises:
        OutputError: An output is an input, two outputs are one file, or a folder cannot be written to.
    """
    wanted = [(option, Path(path)) for option, path in outputs if path is not None and str(path) != "-"]
    if not wanted:
        return
    taken: dict[Path, str] = {}
    folders: set[Path] = set()  # that hold what is in `taken`
    writable: set[Path] = set()

    def take(place: Path, what: str) -> None:
        taken[place] = what
        folders.update(place.parents)

    for source in filter(str, inputs):
        with suppress(OSError, RuntimeError):  # what cannot be found cannot be destroyed
            take(Path(source).resolve(), "is a file that is read")
    for option, path in wanted:
        place = _destination(path)
        if place in taken:
            raise OutputError(f"{option} {path} {taken[place]}: choose another name")
        if place in folders or not taken.keys().isdisjoint(place.parents):
            raise OutputError(f"{option} {path} is both a file and a folder: choose another name")
        take(place, f"is the file of {option}, too")
        folder = next(parent for parent in place.parents if parent.exists())
        if folder not in writable:
            try:
                with tempfile.TemporaryFile(dir=folder):
                    writable.add(folder)
            except OSError as error:
                raise OutputError(f"{option} {path}: cannot be written ({error.strerror})") from None


def widerface_root() -> Path:
    """Return where WIDER FACE lies unless a command is told: $WIDERFACE_ROOT, or data/widerface."""
    return Path(os.environ.get("WIDERFACE_ROOT") or "data/widerface")


def cache_folder() -> Path:
    """Return where what can be made again is kept: $XDG_CACHE_HOME/retinaface-trt, or ~/.cache/retinaface-trt."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(home or Path.home() / ".cache") / "retinaface-trt"
    except RuntimeError:  # a user without a home gets a folder of this process: others could have made a known one
        return _own_folder()


@functools.cache
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="retinaface-trt-"))
