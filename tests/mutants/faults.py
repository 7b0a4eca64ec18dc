"""What a fault is, and the lists of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent.parent
LISTS = sorted(Path(__file__).parent.glob("*.yaml"))
"""One list for each package."""

NATIVE_FOLDERS = ("plugins/src/", "plugins/include/")


@dataclass(frozen=True)
class Fault:
    """One wrong change of the code.

    Attributes:
        file: What is changed, relative to the project's root.
        fault: What is wrong then: one sentence.
        old: Text that stands in the file once.
        new: What takes its place.
        tests: Tests that must notice it, relative to tests/; where none are named, those that mirror the file.
    """

    file: str
    fault: str
    old: str
    new: str
    tests: tuple[str, ...] = ()

    @property
    def is_native(self) -> bool:
        """Whether it changes what the compiler sees."""
        return self.file.startswith(NATIVE_FOLDERS)

    def apply(self, root: Path) -> None:
        """Put it into the tree at `root`."""
        path = root / self.file
        path.write_text(self.changed(path.read_text(encoding="utf-8")), encoding="utf-8")

    def changed(self, text: str) -> str:
        """Return the text of the file with the fault in it.

        Raises:
            ValueError: `old` does not stand in it exactly once.
        """
        count = text.count(self.old)
        if count != 1 or self.old == self.new:
            raise ValueError(f"{self.file}: {self.old!r} stands there {count} times, and must once and be changed")
        return text.replace(self.old, self.new)

    def places(self) -> list[str]:
        """Return what pytest is called with: the tests that are named, or those that mirror the file."""
        if self.tests:
            return [f"tests/{test}" for test in self.tests]
        path = Path(self.file)
        for place in (Path("tests", path.parent, f"test_{path.stem}.py"), Path("tests", path.parent)):
            if (ROOT / place).exists():
                return [str(place)]
        return [f"tests/{path.parts[0]}"]


def read_faults(paths: Sequence[Path] = LISTS) -> list[Fault]:
    """Return the faults of some lists, in their order.

    Raises:
        ValueError: An entry lacks a key or has an unknown one.
    """
    faults = []
    for path in paths:
        for entry in yaml.safe_load(path.read_text(encoding="utf-8")) or []:
            try:
                faults.append(Fault(**{**entry, "tests": tuple(entry.get("tests") or ())}))
            except (TypeError, AttributeError) as error:
                raise ValueError(f"{path.name}: {entry}: {error}") from None
    return faults
