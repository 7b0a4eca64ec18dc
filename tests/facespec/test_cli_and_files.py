from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from facespec.cli import require
from facespec.errors import MissingPackageError, OutputError
from facespec.files import atomic_path, check_outputs, write_text


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


def _run(body: str) -> subprocess.CompletedProcess[str]:
    code = f"from facespec.cli import *\nfrom facespec.errors import *\ndef main():\n    {body}\nrun(main)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("return 0", 0, ""),
        ("return 3", 3, ""),
        ("raise DataError('two\\nlines')", 1, "error: two lines\n"),
        ("open('/nonexistent/x')", 1, "error: No such file or directory: /nonexistent/x\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("ArgumentParser(prog='tool').parse_args(['--wrong'])", 1,
         "error: unrecognized arguments: --wrong (tool --help)\n"),
        ("require('no_such_module', 'cpu', 'this')", 1,
         "error: this needs no_such_module, which is not installed: "
         "in the project's folder, pip install -e '.[cpu]'\n"),
    ],
)  # fmt: skip
def test_commands_end_in_one_line(body: str, code: int, message: str) -> None:
    result = _run(body)
    assert (result.returncode, result.stderr) == (code, message)


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    result = _run("raise ZeroDivisionError")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_a_package_that_fails_to_import_is_told_from_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("import a_dependency_that_is_missing")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingPackageError, match=r"cannot be imported .*a_dependency_that_is_missing"):
        require("broken_module", "cpu", "this")


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


def test_silence_ends_however_threads_overlap() -> None:
    code = (
        "import os, threading, time\nfrom facespec.cli import quiet_libraries\n"
        "def work(enter, leave):\n    time.sleep(enter)\n    with quiet_libraries():\n        os.write(2, b'noise')\n"
        "        time.sleep(leave)\n"
        "threads = [threading.Thread(target=work, args=times) for times in ((0, .1), (.05, .2), (.1, .05))]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]; os.write(2, b'heard')"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stderr == "heard"
