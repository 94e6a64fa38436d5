# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fuzz one target, guided by coverage: `python -m tests.fuzz.driver TARGET SECONDS FOLDER`.

FOLDER keeps what was found to be worth trying, for the next run, and an input that broke the target. The exit
code is 0 when nothing broke.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tests.fuzz.target import Target

PACKAGES: Final = ["fence_vmchannel", "vmchannel_host", "tests.fuzz.planted"]
"""What is instrumented. Nothing of these may be imported before."""

MAX_INPUT: Final = 8_192


def main(name: str, seconds: float, folder: Path) -> None:
    """Does not return: the fuzzer ends the process."""
    atheris: Any = importlib.import_module("atheris")  # no types, and only there where it was installed
    with atheris.instrument_imports(include=PACKAGES):
        catalogue = importlib.import_module("tests.fuzz.catalogue")
    target: Target = {**catalogue.TARGETS, "planted": catalogue.PLANTED}[name]
    corpus = folder / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
        target.run(seed)
    options = [
        f"-max_total_time={max(1, round(seconds))}",
        f"-max_len={max(MAX_INPUT, *(len(seed) for seed in target.seeds))}",
        f"-artifact_prefix={folder}/{name}-",
        "-timeout=25",  # seconds for one input: a parser that hangs is broken too
        "-rss_limit_mb=1024",
        "-print_final_stats=1",
        str(corpus),
    ]
    if name == "planted":
        options.insert(
            0, "-seed=1"
        )  # the same way each time: whether it sees is asked, not whether it is lucky
    atheris.Setup([sys.argv[0], *options], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]))
