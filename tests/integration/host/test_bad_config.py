# SPDX-License-Identifier: LGPL-2.1-or-later
"""A wrong configuration, as the operator meets it: file, line, key, expectation; exit 2 (S10)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from vmchannel_host.config.model import HostConfig
from vmchannel_host.daemon import Daemon
from vmchannel_host.main import EXIT_USAGE, main, reload

# what is wrong: the text of host.yaml, where it is told, and the words of key, finding and expectation
WRONG = {
    "unknown key": (
        "host: hv1\nfencing:\n  quit_timout: 1s\n",
        "host.yaml:3:3: fencing.quit_timout: ",
        ["unknown key 'quit_timout'", "did you mean 'quit_timeout'", "expected quit_timeout, timeout"],
    ),
    "wrong type": (
        "host: hv1\nlimits:\n  channels: many\n",
        "host.yaml:3:13: limits.channels: ",
        ["found 'many'", "expected a whole number"],
    ),
    "section that is a list": (
        "host: hv1\npolicy:\n  groups: [web]\n",
        "host.yaml:3:11: policy.groups: ",
        ["found a list", "expected a mapping"],
    ),
    "duplicate key": (
        "host: hv1\nlog: {level: info}\nlog: {level: debug}\n",
        "host.yaml:3:1: log: ",
        ["duplicate key", "first at line 2, column 1"],
    ),
    "duplicate group": (
        "policy:\n  groups:\n    web: {members: [a, b]}\n    web: {members: [c, d]}\n",
        "host.yaml:4:5: policy.groups.web: ",
        ["duplicate key", "first at line 3, column 5"],
    ),
    "off as another tool wrote it": (
        "policy:\n  groups:\n    web:\n      actions:\n        - false\n",
        "host.yaml:5:11: policy.groups.web.actions[0]: ",
        ["found false", "expected off, on, reboot, status or list"],
    ),
    "off where a boolean is meant": (
        "cluster:\n  standalone: off\n",
        "host.yaml:2:15: cluster.standalone: ",
        ["found 'off'", "expected true or false", "did you mean false"],
    ),
    "yes where a boolean is meant": (
        "cluster:\n  standalone: yes\n",
        "host.yaml:2:15: cluster.standalone: ",
        ["found 'yes'", "expected true or false", "did you mean true"],
    ),
    "missing file": (None, "host.yaml: ", ["cannot be read", "No such file or directory"]),
}


@pytest.mark.parametrize("how", ["--check-config", "--config"])
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_exits_with_2_and_says_where_what_and_what_was_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, how: str
) -> None:
    text, place, words = WRONG[what]
    path = tmp_path / "host.yaml"
    if text is not None:
        path.write_text(text)
    assert main([how, str(path)]) == EXIT_USAGE == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"{tmp_path}/{place}"), told.err
    assert [word for word in words if word not in told.err] == [], told.err
    assert len(told.err.splitlines()) == 1


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_fragment_of_policy_d_exits_with_2_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    (tmp_path / "host.yaml").write_text("host: hv1\n")
    fragments = tmp_path / "policy.d"
    fragments.mkdir()
    text, _, _ = WRONG[what]
    (fragments / "a.yaml").write_text((text or "x: 1\n").replace("policy:", "polcy:"))
    assert main(["--check-config", str(tmp_path / "host.yaml")]) == EXIT_USAGE
    assert f"{fragments}/a.yaml:" in capsys.readouterr().err


def test_a_file_without_a_fault_exits_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "host.yaml"
    path.write_text("host: hv1\n")
    assert main(["--check-config", str(path)]) == 0
    assert "no problem found" in capsys.readouterr().out


WITHOUT_QMP = """
import sys
sys.modules["qemu"] = sys.modules["qemu.qmp"] = None  # what importing them meets where they are not installed
from vmchannel_host.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", ["--config", "--check-config"])
@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hypervisors:\n  - type: qmp\n", "host.yaml:2:11: hypervisors[0].type: "),
        ("host: hv1\n", "host.yaml:1:1: hypervisors: the default, "),
    ],
)
def test_bare_qemu_without_its_module_is_one_line_with_the_remedy(
    tmp_path: Path, how: str, text: str, place: str
) -> None:
    path = tmp_path / "host.yaml"
    path.write_text(text)
    done = _run(WITHOUT_QMP, how, str(path))
    assert (done.returncode, done.stdout) == (EXIT_USAGE, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"{tmp_path}/{place}")
    assert "python3-qemu-qmp" in line
    assert "vmchanneld(8)" in line


def test_a_host_without_bare_qemu_is_not_asked_for_its_module(tmp_path: Path) -> None:
    path = tmp_path / "host.yaml"
    path.write_text("host: hv1\nhypervisors: []\n")
    done = _run(WITHOUT_QMP, "--check-config", str(path))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_daemon_for_libvirt_alone_is_built_without_the_library_of_qmp() -> None:
    built = """
import sys
sys.modules["qemu"] = sys.modules["qemu.qmp"] = None
from vmchannel_host.config.model import HostConfig, LibvirtConfig, QmpConfig
from vmchannel_host.model import HostName
from vmchannel_host.daemon import build
build(HostConfig(host=HostName("hv1"), hypervisors=(LibvirtConfig(),)))
try:
    build(HostConfig(host=HostName("hv1"), hypervisors=(QmpConfig(),)))
except ImportError:
    print("only QMP asks for it")
"""
    done = _run(built)
    assert (done.returncode, done.stdout, done.stderr) == (0, "only QMP asks for it\n", "")


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    roots = [str(Path(__file__).parents[3] / folder) for folder in (".", "host")]
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[0:0] = {roots!r}\n{program}", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class _Running:
    """A daemon that remembers what it was given."""

    def __init__(self) -> None:
        self.taken: list[HostConfig] = []

    def reload(self, config: HostConfig) -> None:
        self.taken.append(config)


@pytest.mark.parametrize("what", WRONG)
def test_a_reload_of_a_wrong_or_missing_file_changes_nothing_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    text, place, _ = WRONG[what]
    path = tmp_path / "host.yaml"
    if text is not None:
        path.write_text(text)
    daemon = _Running()
    reload(cast("Daemon", daemon), path)
    assert daemon.taken == []
    assert f"configuration not taken over: {tmp_path}/{place}" in caplog.text
    path.write_text("host: hv1\n")
    reload(cast("Daemon", daemon), path)
    assert [config.host for config in daemon.taken] == ["hv1"]
