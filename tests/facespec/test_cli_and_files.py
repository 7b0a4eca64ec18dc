from __future__ import annotations

import fcntl
import grp
import hashlib
import importlib.metadata
import json
import os
import pwd
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from facespec.cli import (
    COMMANDS,
    PROGRAM,
    ArgumentParser,
    argument,
    json_output,
    parse_device,
    quiet_libraries,
    require,
    run,
    text_table,
)
from facespec.errors import DataError, MissingPackageError, OutputError, SpecError
from facespec.files import _own_folder, atomic_path, cache_folder, cached_file, check_outputs, write_text
from facespec.spec import parse_size
from plugins.build import find_library
from trt_runtime.kernels import ensure_library


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "result.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError, match="half way"), atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("ne")
        raise RuntimeError("half way")
    assert target.read_text() == "old"
    assert os.listdir(target.parent) == ["result.txt"]
    write_text(target, "new")
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _run(body: str, setup: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    code = f"from facespec.cli import *\nfrom facespec.errors import *\n{setup}\ndef main():\n    {body}\nrun(main)"
    # where it is unbuffered, what is printed never waits for the end
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment, **options}
    return subprocess.run([sys.executable, "-c", code], text=True, cwd=Path(__file__).parents[2], **options)


@pytest.fixture
def ended(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[Callable[[], int]], tuple[object, str]]]:
    """Run a main function in this process; return the exit code and what stands on stderr."""
    names = (signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(name) for name in names]

    def call(main: Callable[[], int]) -> tuple[object, str]:
        with pytest.raises(SystemExit) as caught:
            run(main)
        return caught.value.code, capsys.readouterr().err

    yield call
    for name, handler in zip(names, handlers, strict=True):
        signal.signal(name, handler)


def _raise(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("main", "code", "message"),
    [
        (lambda: 0, 0, ""),
        (lambda: 3, 3, ""),
        (lambda: _raise(DataError("two\nlines")), 1, "error: two lines\n"),
        (lambda: _raise(SpecError("a value")), 1, "error: a value\n"),
        (lambda: open("/nonexistent/x").fileno(), 1, "error: No such file or directory: /nonexistent/x\n"),
        (lambda: _raise(OSError(28, "No space left on device")), 1, "error: No space left on device\n"),
        (lambda: _raise(OSError("of its own")), 1, "error: of its own\n"),
        (lambda: _raise(KeyboardInterrupt()), 130, "interrupted\n"),
        (lambda: len(vars(ArgumentParser(prog="tool").parse_args(["--wrong"]))), 2,
         "error: unrecognized arguments: --wrong (tool --help)\n"),
        (lambda: len(vars(require("no_such_module", "cpu", "this"))), 1,
         "error: this needs no_such_module, which is not installed: "
         "in the project's folder, pip install -e '.[cpu]'\n"),
    ],
)  # fmt: skip
def test_commands_end_in_one_line(
    ended: Callable[[Callable[[], int]], tuple[object, str]], main: Callable[[], int], code: int, message: str
) -> None:
    assert ended(main) == (code, message)


def test_a_process_ends_so_too() -> None:
    result = _run("raise DataError('two\\nlines')")
    assert (result.returncode, result.stderr) == (1, "error: two lines\n")


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    result = _run("raise ZeroDivisionError")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("name", "ignored", "expected"),
    [("SIGTERM", False, (130, "", "interrupted\n")), ("SIGHUP", False, (130, "", "interrupted\n")),
     ("SIGHUP", True, (5, "went on\n", ""))],
)  # fmt: skip
def test_the_end_of_a_terminal_is_an_interrupt(name: str, ignored: bool, expected: tuple[int, str, str]) -> None:
    """Unless it is ignored, as under nohup: then it stays so."""
    setup = f"import os, signal\nsignal.signal(signal.{name}, signal.SIG_{'IGN' if ignored else 'DFL'})"
    result = _run(f"os.kill(os.getpid(), signal.{name}); print('went on'); return 5", setup)
    assert (result.returncode, result.stdout, result.stderr) == expected


_BUSY = "hashlib.pbkdf2_hmac('sha1', b'', b'', (1 << 31) - 1)"  # C code that takes half an hour


@pytest.mark.parametrize("where", ["main", "thread"])
def test_sigterm_ends_what_c_code_keeps_busy(where: str, tmp_path: Path) -> None:
    """Python handles no signal while C code runs; nor does it end while a thread does."""
    busy = _BUSY if where == "main" else f"Thread(target=lambda: {_BUSY}).start(); time.sleep(1000)"
    setup = "import hashlib, time, facespec.cli\nfrom threading import Thread, Timer\nfrom facespec.files import *"
    setup += "\nfacespec.cli.GRACE_S = 0.5"
    body = f"""with atomic_path({str(tmp_path / "a")!r}), work_folder({str(tmp_path)!r}):
        Timer(0.5, print, ['x'], {{'flush': True}}).start()  # when it is busy
        {busy}"""
    code, said = _terminated(body, setup)
    assert code == 130
    assert said.splitlines()[-1] == "interrupted: it did not end by itself"
    assert os.listdir(tmp_path) == []


def test_what_is_being_finished_is_not_ended(tmp_path: Path) -> None:
    setup = "import time, facespec.cli\nfacespec.cli.GRACE_S = 0.2"
    body = f"""try:
        print('x', flush=True); time.sleep(1000)
    finally:
        with finishing(): time.sleep(1.5)
        open({str(tmp_path / "done")!r}, 'w')"""
    assert _terminated(body, setup) == (130, "interrupted\n")
    assert (tmp_path / "done").exists()


def test_a_signal_of_a_child_is_not_its_parent_s() -> None:
    """What a forked child gets would reach the parent by what they share."""
    setup = "import os, signal, time, facespec.cli\nfacespec.cli.GRACE_S = 0.2"
    body = """child = os.fork()
    if not child:
        try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(100)
        finally: os._exit(0)
    os.waitpid(child, 0); time.sleep(1); return 5"""
    assert _run(body, setup).returncode == 5


def _terminated(body: str, setup: str) -> tuple[int, str]:
    """Run a main function until it prints, and end it; return the exit code and what stands on stderr."""
    code = f"from facespec.cli import *\n{setup}\ndef main():\n    {body}\nrun(main)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], text=True, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout
        assert process.stdout.readline()
        process.terminate()
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    return process.returncode, said


def test_names_cannot_steer_a_terminal() -> None:
    name = "a\x1b]0;title\x07\x9b2J\u202egpj.\n\tb\u00e9"
    result = _run(f"print({name!r}); print({name!r}, file=sys.stderr); raise DataError({name!r})", "import sys")
    shown = "a\\u001b]0;title\\u0007\\u009b2J\\u202egpj."
    assert result.stdout == f"{shown}\n\tb\u00e9\n"
    assert result.stderr == f"{shown}\n\tb\u00e9\nerror: {shown} b\u00e9\n"
    body = "with quiet_libraries(): print('\\x1b[2J', file=sys.stderr)\n    return 0"
    assert _run(body, "import sys").stderr == "\\u001b[2J\n"
    text = json.dumps({"source": name}, ensure_ascii=False)
    assert json.loads(_run(f"print({text!r}); return 0").stdout) == {"source": name}


def test_output_that_cannot_be_written_or_encoded() -> None:
    with open("/dev/full", "w") as full:
        result = _run("print('x' * 100); return 0", stdout=full)
    assert (result.returncode, result.stderr) == (1, "error: No space left on device\n")
    for size in (1, 100_000):  # what is written at the end, and what is written at once
        reader, writer = os.pipe()
        os.close(reader)
        try:
            result = _run(f"print('x' * {size}); return 0", stdout=writer)
        finally:
            os.close(writer)
        assert (result.returncode, result.stderr) == (1, "")
    # a name that is no UTF-8
    result = _run("print('\\udcff'); print('\\udcff', file=sys.stderr); return 0", "import sys")
    assert (result.returncode, result.stdout, result.stderr) == (0, "\\udcff\n", "\\udcff\n")
    # where a daemon has closed them
    result = _run(
        "print('gone'); print('gone', file=sys.stderr); return 0", "import sys\nsys.stdout = sys.stderr = None"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_help_shows_each_default_once(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser(prog="tool")
    parser.add_argument("--number", type=int, default=7, help="a number")
    parser.add_argument("--zero", type=int, default=0, help="an index")
    parser.add_argument("--told", default=8, help="told (default: eight)")
    parser.add_argument("--none", help="nothing given")
    parser.add_argument("--flag", action="store_true", help="a switch")
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--help"])
    assert caught.value.code == 0
    lines = {line.split()[0]: " ".join(line.split()) for line in capsys.readouterr().out.splitlines() if "--" in line}
    assert lines["--number"].endswith("a number (default: 7)")
    assert lines["--zero"].endswith("an index (default: 0)")
    assert lines["--told"].endswith("told (default: eight)")
    assert lines["--none"].endswith("nothing given")
    assert lines["--flag"].endswith("a switch")


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is short of one option today may be short of another one tomorrow."""
    parser = ArgumentParser(prog="tool")
    parser.add_argument("--threads", type=int)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--thr", "1"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --thr: did you mean --threads? (tool --help)\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modle", "x"], "unrecognized arguments: --modle: did you mean --model?"),
        (["--modle=x", "--", "--y"], "unrecognized arguments: --modle=x: did you mean --model?"),
        (["--xyz"], "unrecognized arguments: --xyz"),
        (["--model", "m", "--on", "opnvino"], "argument --on: invalid choice: 'opnvino' (choose from 'openvino', "
         "'onnxruntime'): did you mean openvino?"),
        (["--model", "m", "--on", "x"], "argument --on: invalid choice: 'x' (choose from 'openvino', 'onnxruntime')"),
        (["--on", "openvino"], "the following arguments are required: --model"),
    ],
)  # fmt: skip
def test_what_is_mistyped_gets_a_suggestion(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser(prog="tool")
    parser.add_argument("--model", required=True)
    parser.add_argument("--on", choices=["openvino", "onnxruntime"])
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(words)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    # newer versions of argparse print the choices without quotes
    assert said.replace("'", "") == f"error: {message} (tool --help)\n".replace("'", "")


def test_one_command_reaches_all(tmp_path: Path) -> None:
    """From a folder whose modules have the names of ours, too."""
    (tmp_path / "plugins").mkdir()
    for name in ("export.py", "trainer.py"):
        (tmp_path / name).write_text("raise RuntimeError('this is the application')")
    program = Path(sys.executable).with_name(PROGRAM)

    def call(*words: str) -> tuple[int, str, str]:
        result = subprocess.run([program, *words], capture_output=True, text=True, cwd=tmp_path)
        return result.returncode, result.stdout, result.stderr

    listed = call("--help")[1]
    assert call("detect", "--help")[1].startswith(f"usage: {PROGRAM} detect ")
    for name, (_, what) in COMMANDS.items():
        assert f"  {name:13} {what}\n" in listed
        wrong = f"error: unrecognized arguments: --no-such-option ({PROGRAM} {name} --help)\n"
        assert call(name, "--no-such-option")[::2] == (2, wrong)
    assert call("--version")[:2] == (0, f"{PROGRAM} {importlib.metadata.version(PROGRAM)}\n")
    assert call("detcet")[2].endswith(f"did you mean detect? ({PROGRAM} --help)\n")
    assert call()[::2] == (2, f"error: the following arguments are required: COMMAND ({PROGRAM} --help)\n")
    assert call("inspect", "none.onnx")[::2] == (1, "error: none.onnx: no such file; give an engine or an ONNX file\n")


def test_a_package_is_returned_and_a_part_of_a_missing_one_is_missing() -> None:
    assert require("json.decoder", "cpu", "this").JSONDecoder is json.JSONDecoder
    with pytest.raises(MissingPackageError, match=r"^it needs no_such\.part, which is not installed: .*'\.\[gpu\]'$"):
        require("no_such.part", "gpu", "it")


def test_libraries_are_quiet_and_then_heard_again(capfd: pytest.CaptureFixture[str]) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(RuntimeError), quiet_libraries(), quiet_libraries():  # noqa: PT012
            os.write(2, b"noise")
            raise RuntimeError
        os.write(2, b"heard")
        with quiet_libraries():
            with quiet_libraries():
                pass
            os.write(2, b"noise")
    assert capfd.readouterr().err == "heard" * 3
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_package_that_fails_to_import_is_told_from_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("import a_dependency_that_is_missing")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingPackageError, match=r"cannot be imported .*a_dependency_that_is_missing"):
        require("broken_module", "cpu", "this")


def test_what_is_written_lies_beside_its_place_and_goes_whatever_happens(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "link.onnx").symlink_to("other/model.onnx")
    for error in (KeyboardInterrupt, SystemExit, RuntimeError):
        with pytest.raises(error), atomic_path(tmp_path / "link.onnx") as temporary:  # noqa: PT012
            assert temporary.parent == tmp_path / "other"  # of one file system, so that it can be renamed
            assert temporary.name.startswith(".link.")
            assert temporary.suffix == ".onnx"
            temporary.write_bytes(b"x")
            raise error
        assert not list((tmp_path / "other").iterdir())
    with pytest.raises(FileNotFoundError, match="none"), atomic_path(tmp_path / "a.txt"):
        open(tmp_path / "none")  # an error about another file is not about ours
    with pytest.raises(OutputError, match=r"a\.txt: cannot be written \(No such file"):  # noqa: PT012
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.unlink()
            open(temporary)
    long = tmp_path / f"{'é' * 60}{'x' * 120}.txt"
    write_text(long, "ünï")
    assert long.read_bytes() == "ünï".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["link.onnx", long.name, "other"])


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cached_file("x") is None
    assert not list(tmp_path.iterdir())
    assert cache_folder() == tmp_path / "cache" / "retinaface-trt"
    for unset in ("", None):
        monkeypatch.setenv("XDG_CACHE_HOME", "") if unset == "" else monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_folder() == tmp_path / "home" / ".cache" / "retinaface-trt"
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")  # a folder of whoever gave us the current folder
    assert cache_folder() == tmp_path / "home" / ".cache" / "retinaface-trt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    # they are made at once, by us: where anyone may make folders, another user would be quicker than what is kept first
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")} == {0o700}

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = cache_folder()
    assert own == tmp_path / f"retinaface-trt-{os.geteuid()}"
    assert own.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == own
    # another user has been there first
    other = tmp_path / "other"
    (other / own.name).mkdir(parents=True)
    (other / own.name).chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(other))
    _own_folder.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"{own.name} is not used"):
        last = cache_folder()
    assert (last.parent, last.stat().st_mode & 0o777) == (other, 0o700)
    assert last != other / own.name
    _own_folder.cache_clear()


@pytest.mark.parametrize("what", ["folder", "file", "link", "parent", "foreign", "sticky", "group"])
def test_a_cache_that_others_can_write_to_is_not_used(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library in it is what a stranger made of it, and the report beside it says that it is right."""
    report = json.loads(ensure_library("host").with_suffix(".json").read_text())
    home = tmp_path / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr("plugins.build.LIBRARY_FOLDER", tmp_path / "none")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library = home / "retinaface-trt" / "lib" / "libretinaface_host.so"
    write_text(library, "code")
    write_text(
        library.with_suffix(".json"), json.dumps({**report, "library_sha256": hashlib.sha256(b"code").hexdigest()})
    )
    (home / "retinaface-trt").chmod(0o755)
    place = {"file": library, "parent": home, "sticky": home}.get(what, library.parent)
    expected = None if what != "sticky" else library
    if what == "link":
        library.rename(tmp_path / "code")
        library.symlink_to(tmp_path / "code")
    elif what == "foreign":
        if os.geteuid():
            pytest.skip("only root can give a file to another user")
        os.chown(library, 12345, -1)
    elif what == "group":
        place.chmod(0o775)
        monkeypatch.setattr(grp, "getgrgid", lambda number: grp.struct_group(("staff", "x", number, ["a", "b"])))
    else:
        place.chmod(0o1777 if what == "sticky" else 0o777)
    if expected:
        assert find_library("host") == expected
        return
    with pytest.warns(RuntimeWarning, match=f"{home}/retinaface-trt is not used, because others could put code there"):
        assert find_library("host") is None
    own = cache_folder()
    assert (own, own.stat().st_mode & 0o777) == (tmp_path / f"retinaface-trt-{os.geteuid()}", 0o700)
    write_text(own / "lib" / library.name, "code")
    assert cached_file(f"lib/{library.name}") == own / "lib" / library.name


def test_the_group_of_a_user_alone_is_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    user = pwd.getpwuid(os.geteuid())
    (tmp_path / "retinaface-trt").mkdir()
    (tmp_path / "retinaface-trt").chmod(0o775)
    os.chown(tmp_path / "retinaface-trt", -1, user.pw_gid)
    alone = grp.struct_group((user.pw_name, "x", user.pw_gid, []))
    monkeypatch.setattr(grp, "getgrgid", lambda number: alone)
    assert cache_folder() == tmp_path / "retinaface-trt"


def test_a_link_of_another_user_where_everyone_writes_is_not_followed(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a link to another user")
    shared, victim = tmp_path / "shared", tmp_path / "victim"
    shared.mkdir()
    victim.mkdir()
    (victim / "out.json").write_text("precious")
    (shared / "out.json").symlink_to(victim / "out.json")
    (shared / "folder").symlink_to(victim)
    (tmp_path / "mine").symlink_to("shared/folder")
    for link in ("out.json", "folder"):
        os.chown(shared / link, 12345, -1, follow_symlinks=False)
    shared.chmod(0o1777)
    for path in ("shared/out.json", "shared/folder/out.json", "mine/out.json", "mine/../shared/out.json"):
        with pytest.raises(OutputError, match=r"shared/(out\.json|folder) is a link of another user"):
            write_text(tmp_path / path, "x")
        with pytest.raises(OutputError, match="is a link of another user"):
            check_outputs([("--out", tmp_path / path)], [])
    assert (victim / "out.json").read_text() == "precious"
    assert os.listdir(victim) == ["out.json"]
    shared.chmod(0o755)  # a folder in which only its owner makes links
    write_text(tmp_path / "mine" / "out.json", "x")
    assert (victim / "out.json").read_text() == "x"


def test_permissions_are_kept_and_those_of_new_files_are_the_umask_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    umask = _umask()

    def change(mask: int) -> int:
        raise AssertionError("another thread would write with this mask")

    monkeypatch.setattr(os, "umask", change)
    for mode in (0o600, 0o400, 0o640, 0o755):
        target = tmp_path / f"{mode:o}.txt"
        target.write_text("old")
        target.chmod(mode)
        with atomic_path(target) as temporary:
            assert temporary.stat().st_mode & 0o077 & ~mode == 0  # nor is it open to others while it is written
            temporary.unlink()  # as linkers do
            temporary.write_text("new")
        assert (target.read_text(), target.stat().st_mode & 0o777) == ("new", mode)
    write_text(tmp_path / "new.txt", "new")
    assert (tmp_path / "new.txt").stat().st_mode & 0o777 == 0o666 & ~umask
    if not os.geteuid():  # whoever put an open file there does not open what takes its place
        os.chown(tmp_path / "755.txt", 12345, -1)
        write_text(tmp_path / "755.txt", "new")
        assert (tmp_path / "755.txt").stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_a_killed_process_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is being written is not, nor what only looks like it."""
    body = f"""with atomic_path({str(tmp_path / "o.mp4")!r}) as a, work_folder({str(tmp_path)!r}) as b:
        (b / 'graph').write_text('x')
        print(a.name, b.name, flush=True)
        sys.stdin.read()
    return 0"""
    code = f"import sys\nfrom facespec.files import *\ndef main():\n    {body}\nmain()"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    names = [str(child.stdout.readline(), "utf-8").split() for child in children if child.stdout]
    assert set(names[0] + names[1]) == set(os.listdir(tmp_path))
    children[0].kill()
    children[0].wait()
    others = [".o.json", ".o.partial.mp4", ".o.0123456789abcdeg.partial", "o.0123456789abcdef.partial"]
    for name in others:
        (tmp_path / name).touch()
    write_text(tmp_path / "p.txt", "x")
    assert set(os.listdir(tmp_path)) == {*names[1], *others, "p.txt"}
    children[1].communicate(b"")
    assert set(os.listdir(tmp_path)) == {"o.mp4", *others, "p.txt"}


@pytest.mark.parametrize("step", ["open", "flock"])
def test_what_is_swept_before_it_is_locked_is_made_again(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = {"open": os, "flock": fcntl}[step]
    real, swept = getattr(module, step), []

    def sweep_first(*arguments: Any) -> Any:
        if not swept and arguments[-1] in (os.O_RDONLY, fcntl.LOCK_EX):
            swept.extend(tmp_path.glob(".o.*"))
            swept[0].unlink()
        return real(*arguments)

    monkeypatch.setattr(module, step, sweep_first)
    write_text(tmp_path / "o.txt", "x")
    assert len(swept) == 1
    assert os.listdir(tmp_path) == ["o.txt"]


def test_names_that_are_no_utf8_are_written_as_escapes(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xc3\xa9.jpg")
    write_text(tmp_path / "names.txt", name)
    assert (tmp_path / "names.txt").read_bytes() == b"caf\\udce9 \xc3\xa9.jpg"
    write_text(tmp_path / "names.json", json.dumps([name], ensure_ascii=False))
    assert json.loads((tmp_path / "names.json").read_bytes()) == [name]


def test_links_are_written_through_and_devices_left_alone(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "target.txt")
    write_text(tmp_path / "link.txt", "through")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real" / "target.txt").read_text() == "through"
    os.mkfifo(tmp_path / "pipe")
    for path, words in (("/dev/null", "device"), (tmp_path / "pipe", "device"), (tmp_path / "real", "folder")):
        with pytest.raises(OutputError, match=f"it is a {words}"):
            write_text(path, "x")
    with pytest.raises(OutputError, match=r"/proc/x/y\.txt: cannot be written"):
        write_text("/proc/x/y.txt", "x")


def test_a_full_disk_names_the_file_the_user_asked_for(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"big\.txt: cannot be written \(No space left on device\)"):
        with atomic_path(tmp_path / "big.txt"), open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_checked_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("x")
    (tmp_path / "link.txt").symlink_to("in.txt")
    check_outputs([("--a", tmp_path / "deep" / "a"), ("--b", tmp_path / "b"), ("--c", None)], [tmp_path / "in.txt"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "link.txt"]
    for outputs, words in (
        ([("--a", tmp_path / "in.txt")], "is a file that is read"),
        ([("--a", tmp_path / "link.txt")], "is a file that is read"),
        ([("--a", tmp_path / "x"), ("--b", tmp_path / "." / "x")], "is the file of --a, too"),
        ([("--a", "/proc/x")], "cannot be written"),
    ):
        with pytest.raises(OutputError, match=words):
            check_outputs(outputs, [tmp_path / "in.txt"])


def test_outputs_are_compared_by_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.txt").touch()
    monkeypatch.chdir(tmp_path)
    check_outputs([("--a", "out.txt")], ["", "none.txt", tmp_path / "in.txt"])  # no file given is not this folder
    check_outputs([("--a", None)], ["in.txt"])
    (tmp_path / "a").symlink_to("a")
    check_outputs([("--a", "out.txt")], ["a"])  # what cannot be found cannot be destroyed
    for output, source in (
        ("in.txt", tmp_path / "in.txt"),
        (tmp_path / "in.txt", "in.txt"),
        ("./x/../in.txt", "in.txt"),
    ):
        with pytest.raises(OutputError, match=r"^--out .*in\.txt is a file that is read: choose another name$"):
            check_outputs([("--out", output)], [source])
    with pytest.raises(OutputError, match=r"^--b out\.txt is the file of --a, too: choose another name$"):
        check_outputs([("--a", tmp_path / "out.txt"), ("--b", "out.txt")], [])
    with pytest.raises(OutputError, match="both a file and a folder"):
        check_outputs([("--a", "in.txt/x")], ["in.txt"])


def test_outputs_that_are_folders_or_loops_are_refused_early(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for outputs, words in (
        ([("--a", tmp_path / "folder")], "it is a folder"),
        ([("--a", tmp_path / "a")], "cannot be written"),
        ([("--a", tmp_path / "x"), ("--b", tmp_path / "x" / "y")], "both a file and a folder"),
        ([("--a", tmp_path / "x" / "y"), ("--b", tmp_path / "x")], "both a file and a folder"),
    ):
        with pytest.raises(OutputError, match=words):
            check_outputs(outputs, [])
    (tmp_path / "named.png").symlink_to(tmp_path / "without_suffix")
    with atomic_path(tmp_path / "named.png") as temporary:
        assert temporary.suffix == ".png"
        temporary.write_text("x")
    assert (tmp_path / "without_suffix").read_text() == "x"


def test_silence_ends_however_threads_overlap(capfd: pytest.CaptureFixture[str]) -> None:
    """The first to come leaves before the last; all are quiet to the end."""
    barriers = [threading.Barrier(3) for _ in range(4)]

    def work(enters: int, leaves: int) -> None:
        with ExitStack() as stack:
            for step, barrier in enumerate(barriers):
                if step == enters:
                    stack.enter_context(quiet_libraries())
                if step == leaves:
                    stack.close()
                elif enters <= step:
                    os.write(2, b"noise")
                barrier.wait(10)

    threads = [threading.Thread(target=work, args=times) for times in ((0, 2), (1, 3), (1, 9))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_python_is_heard_while_libraries_are_quiet() -> None:
    body = """
    for _ in range(2):
        with quiet_libraries():
            os.write(2, b'noise')
            print('ours \\u00e9', file=sys.stderr)
        os.write(2, b'heard ')
    return 0"""
    assert _run(body, "import os").stderr == "ours \u00e9\nheard " * 2


def test_silence_where_stderr_is_closed() -> None:
    body = "with quiet_libraries(): print('done')\n    return 0"
    result = _run(body, "import os\nos.close(2)")
    assert (result.returncode, result.stdout) == (0, "done\n")


def test_json_goes_to_a_file_or_to_stdout_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with json_output(tmp_path / "a.json") as write:
        print("text")
        write("{}")
    assert capsys.readouterr().out == f"text\nwrote {tmp_path / 'a.json'}\n"
    assert (tmp_path / "a.json").read_text() == "{}\n"
    with json_output(Path("-")) as write:
        print("text")
        write("{}")
    assert capsys.readouterr() == ("{}\n", "text\n")
    with json_output(None) as write:
        print("text")
        write("{}")
    assert capsys.readouterr() == ("text\n", "")


def test_a_value_that_cannot_be_parsed_is_an_error_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser("x")
    parser.add_argument("--size", type=argument(parse_size))
    with pytest.raises(SystemExit) as left:
        parser.parse_args(["--size", "7"])
    assert left.value.code == 2
    assert "argument --size: network size: 7 is not a multiple of 32; try 32" in capsys.readouterr().err


def test_the_words_for_a_device() -> None:
    for word in ("auto", "cpu", "cuda", "cuda:0", "cuda:12"):
        assert parse_device(word) == word
    for word in ("", "0", "gpu", "CPU", "cuda:", "cuda:-1", "cuda:x", "cuda:0 ", "cuda:\u0661", "cuda:0\n"):
        with pytest.raises(SpecError, match=re.escape(f"device {word!r} is not one of auto, cpu, cuda and cuda:N")):
            parse_device(word)


def test_columns_are_as_wide_as_their_widest_text() -> None:
    rows = [["a long name", "1.25", "7"], ["b", "10.50", ""]]
    assert text_table(["", "ms", "faces"], rows).splitlines() == [
        "                ms  faces",
        "a long name   1.25      7",
        "b            10.50",
    ]
    assert text_table(["only", "a header"], []) == "only  a header"
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        text_table(["a", "b"], [["too few"]])
