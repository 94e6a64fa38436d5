# SPDX-License-Identifier: LGPL-2.1-or-later
"""What starts vmchannel-guestd: a unit that systemd understands, and a udev rule for the ports it serves."""

from __future__ import annotations

import re
import shutil
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from fence_vmchannel.addresses import DEFAULT_PORT

GUEST = Path(__file__).parents[3] / "guest"
UNIT = GUEST / "systemd" / "vmchannel-guestd.service"
RULE = GUEST / "udev" / "60-vmchannel-guest.rules"

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def verify(folder: Path, text: str) -> tuple[int, str]:
    """What systemd says of the unit with that text."""
    copy = folder / UNIT.name
    copy.write_text(text.replace("/usr/bin/vmchannel-guestd", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = (done.stdout + done.stderr).splitlines()
    return done.returncode, "\n".join(line for line in lines if UNIT.name in line)


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    assert verify(tmp_path, UNIT.read_text()) == (0, "")


@needs_systemd
def test_a_mistake_in_the_unit_would_show(tmp_path: Path) -> None:
    _, said = verify(tmp_path, UNIT.read_text().replace("Type=notify", "Type=nonsense"))
    assert "Failed to parse" in said


def setting(key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)


def test_the_hub_is_ready_before_the_cluster_starts() -> None:
    assert setting("Type") == ["notify"]
    assert "pacemaker.service" in setting("Before")[0].split()


def test_no_network_is_waited_for() -> None:
    ordering = setting("After") + setting("Wants") + setting("Requires")
    assert not [one for one in ordering if "network" in one]


def test_stopping_the_hub_leaves_the_sockets_of_a_host_daemon_alone() -> None:
    assert setting("RuntimeDirectoryPreserve") == ["yes"]


def test_the_host_name_is_seen_when_it_changes() -> None:
    assert setting("ProtectHostname") == []  # with it the unit would keep the name of its start


def test_the_udev_rule_starts_the_unit_for_the_ports_that_the_hub_serves() -> None:
    (rule,) = [line for line in RULE.read_text().splitlines() if line and not line.startswith("#")]
    pattern = re.search(r'ATTR\{name\}=="([^"]+)"', rule)
    assert pattern is not None
    assert fnmatchcase(DEFAULT_PORT, pattern[1])
    assert not fnmatchcase("org.qemu.guest_agent.0", pattern[1])
    assert f'ENV{{SYSTEMD_WANTS}}+="{UNIT.name}"' in rule
    assert 'TAG+="systemd"' in rule
    assert 'ACTION!="remove"' in rule  # the name comes with `change`, not always with `add`
