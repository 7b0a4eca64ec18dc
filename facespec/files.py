"""Writing files whole or not at all, and never over what is being read."""

from __future__ import annotations

import atexit
import fcntl
import functools
import grp
import os
import pwd
import re
import secrets
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from facespec.errors import OutputError

_UNFINISHED = re.compile(r"\..*\.[0-9a-f]{16}\.partial(\..*)?", re.DOTALL)
"""Names of what is being written. A lock is held on it: what has none was left behind by a process that was killed."""

_under_way: set[Path] = set()
"""What this process is writing."""

_MAX_LINKS = 40  # as in Linux


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, with its suffix; on success it becomes `path`, otherwise it is removed.

    The folder is created if need be; a symbolic link is written through, unless it is one that the kernel would not
    follow: of another user, in a folder like /tmp. A file of this user that was there keeps its permissions. What a
    killed process has left in the folder is removed.

    Raises:
        OutputError: The folder or the file cannot be written, or `path` is a folder or a device.
    """
    path = Path(path)
    target = _destination(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        mode = _permissions(target)

        def create(place: Path) -> None:
            os.close(os.open(place, os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode | 0o600))

        temporary, lock = _unfinished(target.parent, path.stem[:60], path.suffix, create)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        if mode is None:
            mode = stat.S_IMODE(os.fstat(lock).st_mode)  # what the umask leaves
        try:
            yield temporary
        except OSError as error:
            if error.filename not in (None, str(temporary)):
                raise
            raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from None
        temporary.chmod(mode)  # linkers change it
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
        _done(temporary, lock)


@contextmanager
def work_folder(parent: str | Path | None = None) -> Iterator[Path]:
    """Yield a new folder that only this user can enter, in `parent` or where temporary files go; it is removed after.

    What a killed process has left in `parent` is removed.

    Raises:
        OSError: It cannot be made.
    """
    parent = Path(parent or tempfile.gettempdir())
    _sweep(parent)
    folder, lock = _unfinished(parent, "retinaface", "", functools.partial(os.mkdir, mode=0o700))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _done(folder, lock)


def _unfinished(folder: Path, stem: str, suffix: str, create: Callable[[Path], None]) -> tuple[Path, int]:
    """Create a file or folder under a name of `_UNFINISHED`; return it, and a descriptor that holds the lock on it."""
    while True:
        place = folder / f".{stem}.{secrets.token_hex(8)}.partial{suffix}"
        create(place)
        try:
            lock = os.open(place, os.O_RDONLY)
        except FileNotFoundError:  # swept by another process, before it was locked
            continue
        with suppress(OSError):  # a file system without locks: nothing there is ever swept
            fcntl.flock(lock, fcntl.LOCK_EX)
        if place.exists():
            _under_way.add(place)
            return place, lock
        os.close(lock)


def _done(place: Path, lock: int) -> None:
    _under_way.discard(place)
    os.close(lock)


def remove_unfinished() -> None:
    """Remove what this process is writing, because it is about to end without further ado."""
    for place in tuple(_under_way):
        shutil.rmtree(place, ignore_errors=True)
        with suppress(OSError):
            place.unlink()


@functools.lru_cache(1024)
def _sweep(folder: Path) -> None:
    """Remove, once for each folder, what killed processes of this user have left in it."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _UNFINISHED.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                _remove_if_unlocked(Path(entry.path))


def _remove_if_unlocked(place: Path) -> None:
    with suppress(OSError):
        lock = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if place.is_dir():
                shutil.rmtree(place, ignore_errors=True)
            else:
                place.unlink()
        finally:
            os.close(lock)


def _permissions(target: Path) -> int | None:
    """Return the permissions a file keeps when it is written anew, None if it is not there or another user's."""
    with suppress(FileNotFoundError):
        found = target.stat()
        if found.st_uid == os.geteuid():
            return found.st_mode & 0o777
    return None


def _destination(path: Path) -> Path:
    """Return where writing to `path` ends up, links followed; refuse what is no file."""
    try:
        target = _followed(path)
        if target.exists() and not target.is_file():
            raise OutputError(f"{path}: cannot be written, it is a {'folder' if target.is_dir() else 'device'}")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error})") from None
    return target


def _followed(path: Path) -> Path:
    """Return the place without links that `path` leads to, by no link that the kernel would not follow.

    That is one of another user in a sticky folder that everyone can write to: anyone may have put it there. (See
    protected_symlinks in proc_sys_fs(5); it does not protect who reads a link and then goes where it says.)

    Raises:
        OutputError: There is such a link, or the links lead in a circle.
    """
    done, parts, links = Path("/"), list(reversed(path.absolute().parts[1:])), 0
    while parts:
        part = parts.pop()
        place = done.parent if part == ".." else done / part
        if not place.is_symlink():
            done = place
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OutputError(f"{path}: cannot be written, its links lead in a circle")
        folder = done.stat()
        shared = folder.st_mode & stat.S_ISVTX and folder.st_mode & stat.S_IWOTH
        if shared and place.lstat().st_uid not in (os.geteuid(), folder.st_uid):
            raise OutputError(
                f"{path}: cannot be written, {place} is a link of another user: remove it, or go elsewhere"
            )
        leads = Path(os.readlink(place))
        if leads.is_absolute():
            done = Path("/")
        parts += reversed(leads.parts[leads.is_absolute() :])
    return done


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8; what UTF-8 has no bytes for, as in names of files, becomes an escape.

    In JSON such an escape is read as what it stands for.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


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
    """Return where what can be made again is kept: $XDG_CACHE_HOME/retinaface-trt, or ~/.cache/retinaface-trt.

    Code is loaded from there. So it must be this user's, with all that is in it, and out of reach for others; otherwise
    a warning names it. Then, as where it cannot be made or written, a folder of this user among the temporary files
    serves, or one of this process, which is removed at its end. XDG_CACHE_HOME counts if it is an absolute path, as its
    specification asks.
    """
    kept = (_trusted(place) for place in _cache_places())
    return next((folder for folder in kept if folder and os.access(folder, os.W_OK)), None) or _own_folder()


def is_own_folder(folder: Path) -> bool:
    """Whether `cache_folder` returned a folder that goes with this process."""
    return _own_folder.cache_info().currsize > 0 and folder == _own_folder()


def cached_file(name: str) -> Path | None:
    """Return a file in the cache folder, or None if there is none; a look makes no folder."""
    kept = [_trusted(place) for place in _cache_places() if place.exists()]
    own = _own_folder() if _own_folder.cache_info().currsize else None
    places = [folder / name for folder in (*kept, own) if folder]
    return next((place for place in places if place.is_file()), None)


def _cache_places() -> Iterator[Path]:
    home = os.environ.get("XDG_CACHE_HOME", "")
    with suppress(RuntimeError):  # a user without a home
        yield Path(home if os.path.isabs(home) else Path.home() / ".cache") / "retinaface-trt"
    yield Path(tempfile.gettempdir()) / f"retinaface-trt-{os.geteuid()}"


@functools.cache
def _trusted(folder: Path) -> Path | None:
    """Return the folder, links followed, if nobody but this user and root can write to it; it is made if need be."""
    try:
        folder = folder.resolve()
        for missing in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
            missing.mkdir(0o700, exist_ok=True)
        places = [*((place, False) for place in (folder, *folder.rglob("*"))), *((up, True) for up in folder.parents)]
        foreign = next((place for place, above in places if not _is_ours(place, above)), None)
    except (OSError, RuntimeError):  # it cannot be made, or read
        return None
    if foreign is None:
        return folder
    warnings.warn(
        f"the cache {folder} is not used, because others could put code there (look at {foreign}): it must be yours "
        "alone. Delete it, or set XDG_CACHE_HOME to a folder that only you can write to",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def _is_ours(place: Path, above: bool) -> bool:
    """Whether only this user and root can change what is there; to a folder above, others may add what is theirs."""
    try:
        found = place.lstat()
    except FileNotFoundError:  # another process has just finished writing
        return True
    writers = found.st_mode & (stat.S_IWOTH | stat.S_IWGRP)
    if writers & stat.S_IWGRP and _is_private_group(found.st_gid):
        writers &= ~stat.S_IWGRP
    protected = above and found.st_mode & stat.S_ISVTX
    return found.st_uid in (os.geteuid(), 0) and not stat.S_ISLNK(found.st_mode) and (not writers or bool(protected))


def _is_private_group(number: int) -> bool:
    """Whether a group has this user alone, as systems make one for each user: umask 002 lets it write everywhere."""
    with suppress(KeyError):
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(number)
        return group.gr_gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
    return False


@functools.cache
def _own_folder() -> Path:
    stack, process = ExitStack(), os.getpid()
    atexit.register(lambda: stack.close() if os.getpid() == process else None)  # not by a child that was forked
    return stack.enter_context(work_folder())
