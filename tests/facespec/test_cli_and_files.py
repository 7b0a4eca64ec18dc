from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from facespec.cli import require
from facespec.errors import MissingPackageError
from facespec.files import atomic_path, write_text


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
         "error: this needs no_such_module, which is not installed: in the project's folder, pip install '.[cpu]'\n"),
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
