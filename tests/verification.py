# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make test-all`: every test, the counts in full and the fuzzing, row by row, with a memory of what is done.

A row that passed is not run again for the same commit. What each row came to stands in docs/verification.md.
`--list` names the rows; arguments name the rows to run, by any part of their names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs" / "verification.md"
STATE: Final = ROOT / ".cache" / "verification.json"
BEGIN: Final = "<!-- begin results -->"
END: Final = "<!-- end results -->"
HEAD: Final = ("| row | count | result | commit |", "|---|---|---|---|")

ROW_TIMEOUT_S: Final = 4 * 3_600
"""No row takes so long; one that hangs is failed."""

TEST_TIMEOUT_S: Final = 3_600
"""For one test with its full count."""

_RESULT = re.compile(r"^\| (?P<name>.+?) \| (?P<count>.*?) \| (?P<result>.*?) \| (?P<commit>.*?) \|$")


@dataclass(frozen=True, slots=True)
class Row:
    """One thing to run."""

    name: str
    command: tuple[str, ...]
    junit: bool = True  # it is pytest: how much was done stands in its record


@dataclass(frozen=True, slots=True)
class Done:
    """What a row came to."""

    count: str
    result: str
    commit: str

    @property
    def good(self) -> bool:
        return self.result.startswith("passed")


def rows() -> list[Row]:
    """All rows: suites, tests with counts, fuzz targets."""
    found = [
        Row("unit tests", _pytest("tests/unit", "-m", "not counted")),
        Row(
            "integration tests",
            _pytest("tests/integration", "-m", "not counted and not cluster and not peer"),
        ),
        Row("seeds of the fuzz targets", _pytest("tests/fuzz")),
    ]
    found += [
        Row(f"{kind}: {path.stem.removeprefix('test_')}", _pytest(_relative(path), "-m", "not counted"))
        for kind in ("system", "cluster")
        for path in sorted((ROOT / "tests" / kind).glob("test_*.py"))
    ]
    found += [
        Row(
            f"counted: {test.rpartition('::')[2]}",
            _pytest(test, "--full-counts", f"--timeout={TEST_TIMEOUT_S}"),
        )
        for test in _counted()
    ]
    found += [
        Row(f"fuzz: {name}", (sys.executable, "-m", "tests.fuzz", name), junit=False) for name in _fuzzed()
    ]
    return found


def _pytest(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", *arguments)


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _counted() -> list[str]:
    """The tests that repeat something, by their node ids."""
    command = _pytest("--collect-only", "-m", "counted", "tests/unit", "tests/integration", "tests/system")
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout
    return [line for line in said.splitlines() if "::" in line]


def _fuzzed() -> list[str]:
    command = (sys.executable, "-m", "tests.fuzz", "--list")
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True, env=_environment()
    ).stdout.split()


def _environment() -> dict[str, str]:
    paths = ":".join(str(ROOT / part) for part in (".", "host", "guest", "agents"))
    return {"PYTHONPATH": paths, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


# --- what is tested ---


def commit() -> str:
    """The last commit that touched more than the page of results, and what is changed since."""
    others = ("--", ".", f":!{_relative(PAGE)}")
    last = _git("log", "-1", "--format=%h", "--abbrev=12", *others)
    if not last:
        return ""
    changed = _git("status", "--porcelain", *others)
    if not changed:
        return last
    text = changed + _git("diff", "HEAD", *others)
    return f"{last} and changes {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ("git", *arguments), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


# --- running ---


def run(row: Row, now: str) -> Done:
    """Run one row; its output goes to the terminal."""
    record = ROOT / ".cache" / "verification.xml"
    record.parent.mkdir(exist_ok=True)
    record.unlink(missing_ok=True)
    command = (*row.command, f"--junitxml={record}") if row.junit else row.command
    began = time.monotonic()
    try:
        code = subprocess.run(
            command, cwd=ROOT, timeout=ROW_TIMEOUT_S, check=False, env=None if row.junit else _environment()
        ).returncode
    except subprocess.TimeoutExpired:
        code = -1
    took = f"{time.monotonic() - began:,.0f} s"
    count, skipped = _what_was_done(record) if row.junit else ("60 s, planted bug found first", "")
    return Done(count, f"passed{skipped}, {took}" if code == 0 else f"FAILED, {took}", now)


def _what_was_done(record: Path) -> tuple[str, str]:
    """The count that a test recorded, else how many tests ran; and how many were skipped."""
    try:
        suite = ElementTree.parse(record).getroot().find("testsuite")
    except (OSError, ElementTree.ParseError):
        return "nothing", ""
    if suite is None:
        return "nothing", ""
    counts = [item.get("value", "") for item in suite.iter("property") if item.get("name") == "count"]
    skipped = int(suite.get("skipped", 0))
    ran = int(suite.get("tests", 0)) - skipped
    return "; ".join(counts) or f"{ran:,} tests", f", {skipped} skipped" if skipped else ""


# --- remembering ---


class Memory:
    """What rows came to, now and in earlier runs."""

    def __init__(self, page: Path = PAGE, state: Path = STATE) -> None:
        """The page's rows, and over them those of this machine."""
        self._page = page
        self._state = state
        self.done: dict[str, Done] = {}
        table = page.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]
        for found in filter(None, map(_RESULT.match, table.splitlines())):
            if found["name"] != "row":
                self.done[found["name"]] = Done(found["count"], found["result"], found["commit"])
        self._recall()

    def _recall(self) -> None:
        """Take in what this machine knows, also from another run at the same time."""
        if self._state.exists():
            kept = json.loads(self._state.read_text("utf-8"))
            self.done |= {name: Done(**fields) for name, fields in kept.items()}

    def finished(self, name: str, now: str) -> bool:
        """Whether the row has passed for that commit. Without a repository nothing has."""
        known = self.done.get(name)
        return bool(now) and known is not None and known.good and known.commit == now

    def add(self, name: str, done: Done, order: Sequence[str]) -> None:
        """Keep what a row came to, on this machine and on the page; rows that are not in `order` go."""
        self._recall()
        self.done[name] = done
        self._state.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: asdict(one) for name, one in self.done.items() if name in order}
        self._state.write_text(json.dumps(kept, indent=1), "utf-8")
        known = [(name, self.done[name]) for name in order if name in self.done]
        lines = [*HEAD, *(f"| {name} | {one.count} | {one.result} | {one.commit} |" for name, one in known)]
        if missing := [name for name in order if name not in self.done]:
            lines += ["", f"Not run yet: {', '.join(missing)}."]
        before, _, rest = self._page.read_text("utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        self._page.write_text("\n".join((before + BEGIN, *lines, END)) + after, "utf-8")


def main() -> int:
    """0 when every row that was asked for has passed for this commit."""
    parser = argparse.ArgumentParser(prog="python -m tests.verification", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the rows, and what is known of them")
    parser.add_argument("names", nargs="*", help="parts of names of rows; all rows if none")
    options = parser.parse_args()
    everything, memory, now = rows(), Memory(), commit()
    order = [row.name for row in everything]
    failed = 0
    for row in everything:
        if options.names and not any(part in row.name for part in options.names):
            continue
        if options.list or memory.finished(row.name, now):
            known = memory.done.get(row.name)
            print(f"=== {row.name}: {f'{known.result}, {known.commit}' if known else 'not run'}", flush=True)
            continue
        print(f"=== {row.name}", flush=True)
        done = run(row, now)
        memory.add(row.name, done, order)
        failed += not done.good
        print(f"=== {row.name}: {done.count}, {done.result}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
