"""`python -m tests.planted`: plant each fault in a copy, and see whether a test turns red.

A fault is killed if one of the files of tests that it names fails with it, and that same test
passes without it. What lives shows what no test looks at. Exit code 1 if any lives, 2 if the list
or the tests are broken.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.planted.fault import PACKAGE, ROOT, Fault, LostFaultError
from tests.planted.faults import FAULTS

COPIED = (PACKAGE, "tests", "docs", "examples", "pyproject.toml", "README.md", "CHANGELOG.md")
PLUGINS = ("tests.planted.quickest",)
PATIENCE = 900.0
"""Seconds after which tests that hang are taken for a sign."""


@dataclass(frozen=True)
class Outcome:
    """What the tests say of a fault: `killed`, `lives`, or `broken`, and by what."""

    verdict: str
    by: str
    seconds: float = 0.0


@contextmanager
def copy_of_the_tree() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        root = Path(folder)
        for name in COPIED:
            place = ROOT / name
            if place.is_dir():
                shutil.copytree(place, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif place.exists():
                shutil.copy2(place, root / name)
        yield root


@contextmanager
def planted(fault: Fault, root: Path) -> Iterator[None]:
    """Let a tree have the fault."""
    path = fault.path(root)
    healthy = path.read_text()
    path.write_text(fault.planted_in(healthy))
    try:
        yield
    finally:
        path.write_text(healthy)


def run_tests(root: Path, tests: Sequence[str], *options: str) -> tuple[int | None, str]:
    """Return the exit code of pytest, None if it hangs, and what it said."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider"]
    for plugin in PLUGINS:
        command += ["-p", plugin]
    if all("::" in each for each in tests):
        command += ["-m", ""]  # a test that is named is run, slow or not
    environment = {"PLANTED_DURATIONS": str(root.parent / "planted-durations.json")} | os.environ
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(root),
    }
    try:
        done = subprocess.run(
            [*command, *options, *tests],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr


def outcome_of(fault: Fault, root: Path, tests: Sequence[str]) -> Outcome:
    started = time.monotonic()
    try:
        with planted(fault, root):
            code, said = run_tests(root, tests, "-x")
    except LostFaultError as error:
        return Outcome("broken", str(error))
    seconds = time.monotonic() - started
    if code is None:
        return Outcome("killed", "tests that hang", seconds)
    failed = re.search(r"^FAILED (\S+::.+?)(?: - .*)?$", said, re.MULTILINE)
    if code == 1 and failed is not None:
        return Outcome("killed", failed[1], seconds)
    if code == 0:
        return Outcome("lives", "", seconds)
    return Outcome("broken", said.strip()[-500:], seconds)


def outcomes(faults: Sequence[Fault], jobs: int, tests: Sequence[str]) -> dict[Fault, Outcome]:
    """Return what becomes of each fault, and say it as it is known."""
    found: dict[Fault, Outcome] = {}
    roots: SimpleQueue[Path] = SimpleQueue()

    def work(fault: Fault) -> Outcome:
        root = roots.get()
        try:
            return outcome_of(fault, root, tests or fault.test_files)
        finally:
            roots.put(root)

    with _several_copies(jobs) as copies, ThreadPoolExecutor(jobs) as pool:
        for copy in copies:
            roots.put(copy)
        waiting = {pool.submit(work, fault): fault for fault in faults}
        for future in as_completed(waiting):
            fault, outcome = waiting[future], future.result()
            found[fault] = outcome
            print(f"{outcome.verdict:7}{outcome.seconds:6.0f} s  {fault.name}  {outcome.by}")
            sys.stdout.flush()
    return found


@contextmanager
def _several_copies(count: int) -> Iterator[list[Path]]:
    if count == 0:
        yield []
        return
    with copy_of_the_tree() as first, _several_copies(count - 1) as rest:
        yield [first, *rest]


def red_without_a_fault(tests: Sequence[str]) -> list[str]:
    """Return the tests that fail in a healthy tree, too: what they say of a fault is nothing."""
    if not tests:
        return []
    with copy_of_the_tree() as root:
        code, said = run_tests(root, tests)
    if code == 0:
        return []
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE) or [said.strip()[-500:]]


def chosen(only: Sequence[str], *, sample: bool) -> list[Fault]:
    """Return the faults whose name or file holds one of the texts; a sample has one of each room.

    Raises:
        SystemExit: if a text is found in none.
    """
    for text in only:
        if not any(text in fault.name or text in fault.file for fault in FAULTS):
            raise SystemExit(f"no fault's name or file holds {text!r}: see --list")
    found = [
        fault
        for fault in FAULTS
        if not only or any(text in fault.name or text in fault.file for text in only)
    ]
    return list({fault.room: fault for fault in reversed(found)}.values()) if sample else found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description=__doc__)
    parser.add_argument("--list", action="store_true", help="show the faults, and plant none")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="faults whose name or file holds it"
    )
    parser.add_argument("--sample", action="store_true", help="one fault of each room")
    parser.add_argument("--all-tests", action="store_true", help="run all fast tests for each")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time; 1 by default")
    options = parser.parse_args(arguments)
    faults = chosen(options.only, sample=options.sample)
    if options.list:
        for fault in faults:
            print(f"{fault.file}: {fault.name}  [{fault.tests}]")
        return 0
    found = outcomes(faults, max(1, options.jobs), ["tests"] if options.all_tests else [])
    killers = sorted({each.by for each in found.values() if "::" in each.by})
    red = red_without_a_fault(killers)
    counts = [sum(each.verdict == kind for each in found.values()) for kind in _VERDICTS]
    print(", ".join(f"{count} {kind}" for count, kind in zip(counts, _VERDICTS, strict=True)))
    for kind in _VERDICTS[1:]:
        for fault in [each for each, outcome in found.items() if outcome.verdict == kind]:
            print(f"{kind}: {fault.file}: {fault.name}")
    for test in red:
        print(f"red without a fault: {test}")
    if red or counts[2]:
        return 2
    return 1 if counts[1] else 0


_VERDICTS = ("killed", "lives", "broken")

if __name__ == "__main__":
    sys.exit(main())
