# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory of `make test-all`: a row that passed is not run again for the same commit, any other is."""

from __future__ import annotations

from pathlib import Path

from tests.verification import BEGIN, END, Done, Memory

PAGE = f"# Verification\n\n{BEGIN}\n{END}\n\nmore words\n"
GOOD = Done("100 loops", "passed, 7 s", "abc")


def page(folder: Path, text: str = PAGE) -> Path:
    path = folder / "verification.md"
    path.write_text(text, "utf-8")
    return path


def test_a_row_that_passed_is_finished_for_its_commit_only(tmp_path: Path) -> None:
    state = tmp_path / "cache" / "state.json"
    memory = Memory(page(tmp_path), state)
    assert not memory.finished("soak", "abc")
    memory.add("soak", GOOD, ["soak"])
    for one in (memory, Memory(tmp_path / "verification.md", state)):
        assert one.finished("soak", "abc")
        assert not one.finished("soak", "def")
        assert not one.finished("soak", "")


def test_a_row_that_failed_is_run_again(tmp_path: Path) -> None:
    memory = Memory(page(tmp_path), tmp_path / "cache" / "state.json")
    memory.add("soak", Done("100 loops", "FAILED, 7 s", "abc"), ["soak"])
    assert not memory.finished("soak", "abc")


def test_the_page_keeps_its_words_and_the_rows_of_other_machines(tmp_path: Path) -> None:
    path = page(tmp_path)
    order = ["unit tests", "soak", "fuzz: frames"]
    Memory(path, tmp_path / "one" / "state.json").add("unit tests", GOOD, order)
    Memory(path, tmp_path / "two" / "state.json").add("soak", Done("1 h", "passed, 9 s", "def"), order)
    text = path.read_text("utf-8")
    assert text.startswith("# Verification\n")
    assert text.endswith(f"{END}\n\nmore words\n")
    assert "| unit tests | 100 loops | passed, 7 s | abc |\n| soak | 1 h | passed, 9 s | def |\n" in text
    assert "Not run yet: fuzz: frames." in text
    third = Memory(path, tmp_path / "three" / "state.json")
    assert third.done == {"unit tests": GOOD, "soak": Done("1 h", "passed, 9 s", "def")}
