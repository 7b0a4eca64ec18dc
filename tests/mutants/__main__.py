"""Put faults into copies of the project, one at a time, and see whether the tests notice.

python -m tests.mutants                        every fault of tests/mutants/*.yaml
python -m tests.mutants trt_runtime/media/live.py    those whose file or description contains the words
python -m tests.mutants --every 12             a twelfth of them, over all packages
python -m tests.mutants --list FILE --whole    faults of a list without tests: their mirror, then the whole suite
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import DATA
from tests.mutants.faults import LISTS, ROOT, Fault, read_faults

TIMEOUT_S, TEST_TIMEOUT_S = 600, 120
"""For one fault, and for one test with a fault in the code: many a fault makes a test hang."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Verdict:
    """What the tests said of one fault: `noticed`, `survived`, or `broken`, an entry that says nothing."""

    word: str
    by: str
    seconds: float


class Copy:
    """A copy of the project's files, in which faults are put and taken out again.

    Args:
        folder: Where it is made.
        core: Core that its tests run on; two at once on all cores get in each other's way.
    """

    def __init__(self, folder: Path, core: int) -> None:
        self._root = folder / "project"
        self._core = core
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (self._root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self._root / name)
        if (ROOT / ".venv").exists():
            (self._root / ".venv").symlink_to(ROOT / ".venv")
        self._restore_libraries()

    def try_out(self, fault: Fault, whole: bool) -> Verdict:
        """Put a fault in, run its tests, take it out."""
        kept = (self._root / fault.file).read_bytes()
        start = time.perf_counter()
        try:
            fault.apply(self._root)
            verdict = self.run(fault.places(), start)
            if whole and verdict.word == "survived":
                verdict = self.run(["tests"], start)
            return verdict
        except (OSError, ValueError) as error:
            return Verdict("broken", str(error), 0.0)
        finally:
            (self._root / fault.file).write_bytes(kept)
            if fault.is_native:
                self._restore_libraries()

    def run(self, places: list[str], start: float) -> Verdict:
        """Run tests until the first fails."""
        environment = {
            **os.environ,
            **dict.fromkeys(THREADS, "1"),
            "PYTHONPATH": str(self._root),
            "PYTHONDONTWRITEBYTECODE": "1",  # two versions of a file may have one size and one time
            "RETINAFACE_DATA": str(DATA),
        }
        options = f"-x -v -p no:cacheprovider --timeout={TEST_TIMEOUT_S}"
        command = [sys.executable, "-m", "pytest", *options.split(), *places]
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {self._core})  # of this thread, and so of its children
        with subprocess.Popen(
            command, cwd=self._root, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                output, _ = process.communicate(timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return Verdict("noticed", f"no end after {TIMEOUT_S} s", TIMEOUT_S)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        seconds = time.perf_counter() - start
        failed = re.findall(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", output, re.MULTILINE)
        begun = re.findall(r"^tests/(\S+::.+?) ", output, re.MULTILINE)
        last = (output.strip().splitlines() or ["nothing was printed"])[-1]
        if process.returncode == 0 and " passed" in last:
            return Verdict("survived", last.strip("= "), seconds)
        if failed:
            return Verdict("noticed", failed[0], seconds)
        if begun and (process.returncode < 0 or "+ Timeout +" in output):  # it died, or hung and was ended
            return Verdict("noticed", f"{begun[-1]}, which ended the process", seconds)
        return Verdict("broken", last, seconds)

    def _restore_libraries(self) -> None:
        """Put the compiled kernels of the unchanged sources back, where there are any."""
        library = self._root / "trt_runtime" / "lib"
        shutil.rmtree(library, ignore_errors=True)
        if (ROOT / "trt_runtime" / "lib").is_dir():
            shutil.copytree(ROOT / "trt_runtime" / "lib", library)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only faults whose file or description contains one of these")
    parser.add_argument("--list", type=Path, action="append", help="lists to take instead of tests/mutants/*.yaml")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th fault")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="faults at once")
    parser.add_argument("--whole", action="store_true", help="run the whole suite on what a fault's own tests miss")
    args = parser.parse_args()
    faults = read_faults(args.list or LISTS)
    if args.words:
        faults = [fault for fault in faults if any(word in f"{fault.file} {fault.fault}" for word in args.words)]
    faults = faults[:: max(1, args.every)]
    if not faults:
        parser.error("no such fault")
    cores = sorted(os.sched_getaffinity(0))
    jobs = max(1, min(args.jobs, len(faults)))
    places = sorted({place for fault in faults for place in fault.places()})
    files = sorted({place.partition("::")[0] for place in places})
    shares = [[place for place in places if place.partition("::")[0] in files[i::jobs]] for i in range(jobs)]
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="retinaface-mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        copies: queue.Queue[Copy] = queue.Queue()
        for index in range(jobs):
            copies.put(Copy(Path(folder, str(index)), cores[index % len(cores)]))

        @contextmanager
        def lent() -> Iterator[Copy]:
            copy = copies.get()
            try:
                yield copy
            finally:
                copies.put(copy)

        def without_a_fault(places: list[str]) -> Verdict:
            with lent() as copy:
                return copy.run(places, time.perf_counter())

        def with_a_fault(fault: Fault) -> tuple[Fault, Verdict]:
            with lent() as copy:
                return fault, copy.try_out(fault, args.whole)

        print(f"{len(faults)} faults; first their {len(places)} tests without any", flush=True)
        for verdict in pool.map(without_a_fault, filter(None, shares)):
            if verdict.word != "survived":
                print(f"error: the tests fail without a fault: {verdict.by}", file=sys.stderr)
                return 1
        for done in as_completed([pool.submit(with_a_fault, fault) for fault in faults]):
            fault, verdict = done.result()
            counts[verdict.word] += 1
            number = f"{sum(counts.values()):4}/{len(faults)}"
            print(
                f"{number} {verdict.word:8} {verdict.seconds:4.0f} s  {fault.file}: {fault.fault}  [{verdict.by}]",
                flush=True,
            )
    print(f"{counts['noticed']} of {len(faults)} noticed, {counts['survived']} survived, {counts['broken']} broken")
    return 0 if counts["noticed"] == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
