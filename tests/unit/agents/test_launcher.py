# SPDX-License-Identifier: GPL-2.0-or-later
"""The file that Pacemaker runs."""

from __future__ import annotations

import stat
from pathlib import Path

from vmchannel_agents.launcher import install, launcher_text, package_roots


def test_the_agent_is_an_executable_file_of_the_right_name(tmp_path: Path) -> None:
    path = install(str(tmp_path), ["/a", "/b"])
    assert path.name == "fence_vmchannel"
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert [entry.name for entry in tmp_path.iterdir()] == ["fence_vmchannel"]


def test_it_runs_under_the_systems_python_in_isolated_mode() -> None:
    assert launcher_text(["/a"]).splitlines()[0] == "#!/usr/bin/python3 -I"


def test_paths_are_data_and_not_code(tmp_path: Path) -> None:
    path = f"{tmp_path}/a'b\n\\"
    compile(launcher_text([path]), "launcher", "exec")
    assert repr(path) in launcher_text([path])


def test_the_roots_hold_all_packages_that_the_agent_needs() -> None:
    for package in ("fence_vmchannel", "vmchannel_guest", "vmchannel_agents"):
        assert any((Path(root) / package).is_dir() for root in package_roots())
