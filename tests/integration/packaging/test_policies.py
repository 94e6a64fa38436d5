# SPDX-License-Identifier: LGPL-2.1-or-later
"""The example policies of docs/guides/policy are what their compilers take. Nothing here enforces them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

POLICY = Path(__file__).parents[3] / "docs/guides/policy"


def _run(*command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(shutil.which("checkmodule") is None, reason="checkpolicy is not installed")
@pytest.mark.parametrize("module", sorted(path.name for path in POLICY.glob("*.te")))
def test_an_selinux_module_compiles_and_a_mistake_in_it_would_show(tmp_path: Path, module: str) -> None:
    text = (POLICY / module).read_text()
    out = tmp_path / module.replace(".te", ".mod")  # of the module's own name, or it is refused
    wrong = tmp_path / module
    wrong.write_text(text.replace("allow {", "allow { nobody_t", 1))
    for source, good in ((POLICY / module, True), (wrong, False)):
        done = _run("checkmodule", "-M", "-m", "-o", str(out), str(source))
        assert (done.returncode == 0) == good, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("apparmor_parser") is None, reason="apparmor is not installed")
def test_the_apparmor_lines_parse_and_a_mistake_in_them_would_show() -> None:
    lines = (POLICY / "libvirt-qemu.apparmor").read_text()
    for text, good in ((lines, True), (lines.replace(" rw,", " nonsense,"), False)):
        done = _run("apparmor_parser", "-Q", "-K", "-T", text=f"profile vm {{\n{text}}}\n")
        assert (done.returncode == 0) == good, done.stdout + done.stderr
