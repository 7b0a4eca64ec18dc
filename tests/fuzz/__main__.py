"""Send mutated inputs to what reads strangers' files, in child processes with limits of time and memory.

python -m tests.fuzz                                    the short form: some thousand cases of every kind
python -m tests.fuzz --minutes 30                       round after round with other seeds
python -m tests.fuzz --kinds image --only 17 --seed 3   one case again, in this process
"""

from __future__ import annotations

import argparse
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from facespec.errors import RetinaFaceError
from tests.fuzz.kinds import KINDS, case

SECONDS, FIRST_SECONDS = 10, 180
"""Of a case; the first of a process imports what it needs."""

GROWTH_MIB, IMPORTS_MIB = 700, 300
"""What a case may take, and what the first one imports."""

ADDRESS_SPACE = 12 << 30
OUT = Path("build/fuzz")


def work(name: str, seed: int, first: int, last: int) -> None:
    """Take the cases of a kind in this process; print the number of each before it, and what is wrong with it after."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # libraries write what they think of the inputs
    os.dup2(null, 2)
    grown = _peak_mib() + IMPORTS_MIB
    with tempfile.TemporaryDirectory(prefix="retinaface-fuzz-") as folder:
        for number in range(first, last):
            print(number, file=answers)
            try:
                KINDS[name].take(case(name, seed, number), Path(folder))
            except RetinaFaceError as error:
                if "\n" in str(error) or len(str(error)) > 2000:
                    print(f"a message of several lines, or a long one: {str(error)[:200]!r}", file=answers)
            except BaseException as error:
                print(f"{type(error).__name__}: {str(error)[:200]!r}", file=answers)
            peak = _peak_mib()
            if peak > grown + GROWTH_MIB:
                print(f"{peak - grown} MiB of memory", file=answers)
            grown = max(peak, grown)


def _peak_mib() -> int:
    """Return the most memory that this process has had; getrusage would count that of the one that started it, too."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


def run(name: str, seed: int, count: int, until: float) -> list[str]:
    """Take cases in child processes; return what was wrong, a line for each, and keep those cases in `OUT`."""
    found: list[str] = []
    number = 0
    while number < count and time.monotonic() < until:
        line = [sys.executable, "-m", "tests.fuzz", "--kinds", name, "--seed", str(seed), "--work", f"{number}:{count}"]
        child = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(child, answers), daemon=True).start()
        first, number, wrong = number, number - 1, ""
        while True:
            try:
                answer = answers.get(timeout=FIRST_SECONDS if number <= first else SECONDS)
            except queue.Empty:
                wrong = f"not done after {SECONDS} s"
                child.kill()
                break
            if answer is None:
                break
            if answer.isdecimal():
                number = int(answer)
                if time.monotonic() > until:
                    child.kill()
                    break
            else:
                found.append(_keep(name, seed, number, answer))
        code = child.wait()
        if code and not wrong and time.monotonic() < until:
            wrong = f"it ended the process ({code})"
        if wrong:
            found.append(_keep(name, seed, number, wrong))
        number += 1
    return found


def _read(child: subprocess.Popen[str], answers: queue.Queue[str | None]) -> None:
    for line in child.stdout or ():
        answers.put(line.strip())
    answers.put(None)


def _keep(name: str, seed: int, number: int, wrong: str) -> str:
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}-{seed}-{number}"
    path.write_bytes(case(name, seed, number))
    line = f"{name}, seed {seed}, case {number}: {wrong}; kept as {path}"
    print(line, flush=True)
    return line


def main() -> int:
    """Run the command; exit code 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="go on with other seeds for so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", default=",".join(name for name, kind in KINDS.items() if kind.count), help="some of %(default)s"
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of the short form")
    parser.add_argument("--only", type=int, help="this case, in this process")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.kinds.split(",")
    if options.work:
        first, last = map(int, options.work.split(":"))
        work(names[0], options.seed, first, last)
        return 0
    if options.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(KINDS[names[0]].take(case(names[0], options.seed, options.only), Path(folder)))
        return 0
    start = time.monotonic()
    until = start + 60 * options.minutes if options.minutes else float("inf")
    seed, done, found = options.seed, 0, list[str]()
    while True:
        for name in names:
            count = round(KINDS[name].count * options.share)
            found += run(name, seed, count, until)
            done += count
            print(f"{time.monotonic() - start:6.0f} s  {name}: {count} cases of seed {seed}", flush=True)
        seed += 1
        if not options.minutes or time.monotonic() > until:
            break
    print(f"{done} cases, {len(found)} wrong" + "".join(f"\n{line}" for line in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
