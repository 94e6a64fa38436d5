# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Debian packages: what they hold, what they ask for, and that they work where they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from tests.integration.packaging.debian_root import DebianRoot, NoRoot, debian_root

CHECKOUT: Final = Path(__file__).parents[3]
LIBRARY: Final = "usr/lib/python3/dist-packages"
PARTS: Final = ("agent", "common", "guest", "host")
SOURCES: Final = {
    "common": CHECKOUT / "fence_vmchannel",
    "host": CHECKOUT / "host/vmchannel_host",
    "guest": CHECKOUT / "guest/vmchannel_guest",
    "agent": CHECKOUT / "agents/vmchannel_agents",
}
FILES: Final = {
    "common": {"usr/share/doc/fence-vmchannel-common/guides/ten-minutes-libvirt.md"},
    "host": {
        "etc/vmchannel/host.yaml",
        "etc/vmchannel/policy.d/",
        "usr/bin/vmchanneld",
        "usr/bin/vmchannelctl",
        "usr/lib/systemd/system/vmchanneld.service",
        "usr/lib/sysusers.d/vmchannel-host.conf",
        "usr/share/man/man5/vmchannel-host.yaml.5.gz",
        "usr/share/man/man8/vmchanneld.8.gz",
        "usr/share/man/man8/vmchannelctl.8.gz",
        "usr/share/doc/fence-vmchannel-host/README.Debian",
    },
    "guest": {
        "usr/bin/vmchannel",
        "usr/bin/vmchannel-guestd",
        "usr/lib/systemd/system/vmchannel-guestd.service",
        "usr/lib/systemd/system/pacemaker.service.d/50-vmchannel.conf",
        "usr/lib/udev/rules.d/60-vmchannel-guest.rules",
        "usr/share/man/man1/vmchannel.1.gz",
        "usr/share/man/man8/vmchannel-guestd.8.gz",
    },
    "agent": {"usr/sbin/fence_vmchannel", "usr/share/man/man8/fence_vmchannel.8.gz"},
}
"""What each package must hold beside its Python modules; /lib is /usr/lib."""

DEPENDS: Final = {
    "common": set[str](),
    "host": {"python3-aiohttp", "python3-cryptography", "python3-jsonschema", "python3-yaml"}
    | {"python3-prometheus-client"},
    "guest": set[str](),
    "agent": {"python3-pexpect", "python3-pycurl", "fence-agents"},
}


def _can_build() -> bool:
    if shutil.which("dpkg-checkbuilddeps") is None:
        return False
    command = ["dpkg-checkbuilddeps", "-I", str(CHECKOUT / "debian/control")]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _can_build(), reason="this is no Debian with what tools/install-deps installs"),
]


def _build(folder: Path) -> Mapping[str, Path]:
    done = subprocess.run(
        [str(CHECKOUT / "tools/build-deb"), str(folder)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {path.name.split("_")[0].removeprefix("fence-vmchannel-"): path for path in folder.glob("*.deb")}


@pytest.fixture(scope="module")
def debs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The packages, by the last part of their names."""
    return _build(tmp_path_factory.mktemp("debs"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DebianRoot]:
    """Debian 12 with what tools/install-deps installs."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a root and install in it")
    libraries = Path(sysconfig.get_path("purelib"))
    try:
        with debian_root(tmp_path_factory.mktemp("root"), libraries) as made:
            # The host daemon's libraries, which Debian's packages would bring, were they installed here.
            made.write("/usr/local/lib/python3.11/dist-packages/libraries.pth", f"{libraries}\n".encode())
            yield made
    except NoRoot as error:
        pytest.skip(f"no overlay can be mounted here: {error}")


@pytest.fixture(scope="module")
def installed(root: DebianRoot, debs: Mapping[str, Path]) -> DebianRoot:
    """The root in which common, guest and agent are installed, with all they depend on, and host unpacked."""
    needed = [root.copy(debs[part]) for part in ("common", "guest", "agent")]
    done = root.run("dpkg", "--install", *needed)
    assert done.status == 0, done.err
    done = root.run("dpkg", "--unpack", root.copy(debs["host"]))
    assert done.status == 0, done.err
    return root


def _fields(deb: Path) -> Mapping[str, str]:
    told = _dpkg_deb("--show", "--showformat=${Package}\\n${Version}\\n${Architecture}\\n${Depends}", deb)
    return dict(zip(("package", "version", "architecture", "depends"), told.split("\n"), strict=True))


def _content(deb: Path) -> Mapping[str, str]:
    """Mode of each file and folder, by its path; /lib is /usr/lib."""
    lines = [line.split(maxsplit=5) for line in _dpkg_deb("--contents", deb).splitlines()]
    assert {line[1] for line in lines} == {"root/root"}
    paths = {line[5].removeprefix("./"): line[0] for line in lines if line[5] != "./"}
    return {f"usr/{path}" if path.startswith("lib/") else path: mode for path, mode in paths.items()}


def _control(deb: Path, name: str) -> str:
    return _dpkg_deb("--info", deb, name)


def _dpkg_deb(*command: str | Path) -> str:
    action, *rest = map(str, command)
    deb = [word for word in rest if word.endswith(".deb")]
    others = [word for word in rest if not word.endswith(".deb")]
    options = [word for word in others if word.startswith("-")]
    names = [word for word in others if not word.startswith("-")]
    return subprocess.run(
        ["dpkg-deb", *options, action, *deb, *names], capture_output=True, text=True, timeout=60, check=True
    ).stdout


def test_there_are_four_packages_of_the_version_of_the_source(debs: Mapping[str, Path]) -> None:
    version = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
    assert sorted(debs) == list(PARTS)
    for part, deb in debs.items():
        fields = _fields(deb)
        assert fields["package"] == f"fence-vmchannel-{part}"
        assert (fields["version"], fields["architecture"]) == (version, "all")


@pytest.mark.parametrize("part", PARTS)
def test_a_package_holds_its_modules_commands_units_and_pages(debs: Mapping[str, Path], part: str) -> None:
    inside = _content(debs[part])
    source = SOURCES[part]
    modules = {
        f"{LIBRARY}/{path.relative_to(source.parent)}"
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {path for path in inside if path.startswith(LIBRARY) and not path.endswith("/")} == modules
    assert FILES[part] - set(inside) == set()
    programs = {path for path, mode in inside.items() if "x" in mode and mode[0] == "-"}
    assert programs == {path for path in FILES[part] if path.startswith(("usr/bin/", "usr/sbin/"))}


def test_no_file_is_in_two_packages(debs: Mapping[str, Path]) -> None:
    files = [path for deb in debs.values() for path in _content(deb) if not path.endswith("/")]
    assert len(files) == len(set(files))


@pytest.mark.parametrize("part", PARTS)
def test_a_package_asks_for_what_it_imports(debs: Mapping[str, Path], part: str) -> None:
    fields = _fields(debs[part])
    wanted = {name.strip() for field in fields["depends"].split(",") for name in field.split("|")}
    assert DEPENDS[part] - wanted == set()
    own = {name for name in wanted if name.startswith("fence-vmchannel-")}
    assert {name.partition(" ")[2] for name in own} <= {f"(= {fields['version']})"}
    assert {name.partition(" ")[0] for name in own} == {
        "common": set(),
        "host": {"fence-vmchannel-common"},
        "guest": {"fence-vmchannel-common"},
        "agent": {"fence-vmchannel-common", "fence-vmchannel-guest"},
    }[part]


def test_only_the_configuration_of_the_host_is_a_conffile(debs: Mapping[str, Path]) -> None:
    assert _control(debs["host"], "conffiles") == "/etc/vmchannel/host.yaml\n"
    for part in ("common", "guest", "agent"):
        assert not any(path.startswith("etc/") for path in _content(debs[part]))


def test_the_daemons_are_enabled_and_started_and_the_group_is_made_first(debs: Mapping[str, Path]) -> None:
    for part, unit in (("host", "vmchanneld"), ("guest", "vmchannel-guestd")):
        after = _control(debs[part], "postinst")
        assert f"deb-systemd-helper enable '{unit}.service'" in after
        assert f"deb-systemd-invoke $_dh_action '{unit}.service'" in after
        assert f"deb-systemd-invoke stop '{unit}.service'" in _control(debs[part], "prerm")
    after = _control(debs["host"], "postinst")
    assert after.index("vmchannel-host.conf") < after.index("deb-systemd-invoke")


def test_the_same_source_gives_the_same_bytes(
    debs: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    again = _build(tmp_path_factory.mktemp("again"))
    assert [part for part, deb in debs.items() if deb.read_bytes() != again[part].read_bytes()] == []


@pytest.mark.skipif(shutil.which("lintian") is None, reason="lintian (128 packages) is not installed")
def test_lintian_finds_no_error(debs: Mapping[str, Path]) -> None:
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on=error,warning", *map(str, debs.values())],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_installed_agent_tells_its_metadata(installed: DebianRoot) -> None:
    done = installed.run("fence_vmchannel", "-o", "metadata")
    assert done.status == 0, done.err
    assert '<resource-agent name="fence_vmchannel"' in done.out


def test_the_installed_commands_run_from_where_the_packages_put_them(installed: DebianRoot) -> None:
    assert installed.run("vmchannel", "--help").out.startswith("usage: vmchannel ")
    assert installed.run("vmchannel-guestd", "--help").out.startswith("usage: vmchannel-guestd ")
    for package in ("fence_vmchannel", "vmchannel_guest", "vmchannel_agents", "vmchannel_host"):
        told = installed.run("/usr/bin/python3", "-I", "-c", f"import {package}; print({package}.__file__)")
        assert told.out == f"/{LIBRARY}/{package}/__init__.py\n"


def test_nothing_in_the_environment_is_taken_for_a_module(installed: DebianRoot) -> None:
    installed.write("/root/trap/vmchannel_guest/__init__.py", b"raise SystemExit('trapped')\n")
    done = installed.run("env", "PYTHONPATH=/root/trap", "vmchannel", "--help")
    assert (done.status, done.err) == (0, "")


def test_the_configuration_as_installed_is_right_and_follows_libvirt(installed: DebianRoot) -> None:
    installed.run("cp", "/etc/vmchannel/host.yaml.dpkg-new", "/etc/vmchannel/host.yaml")  # not configured yet
    # in front of python3-libvirt, which may be missing where this runs
    installed.write("/usr/local/lib/python3.11/dist-packages/libvirt.py", b"")
    done = installed.run("vmchanneld", "--check-config", "/etc/vmchannel/host.yaml")
    assert (done.status, done.out) == (0, "/etc/vmchannel/host.yaml: no problem found\n"), done.err
    show = (
        "from vmchannel_host.config.loading import load_config\n"
        "print(load_config('/etc/vmchannel/host.yaml', host_name='hv1').hypervisors)\n"
        "print(load_config('/root/upstream.yaml', host_name='hv1').hypervisors)"
    )
    upstream = (CHECKOUT / "host/config/host.yaml").read_text()
    installed.write("/root/upstream.yaml", upstream.encode())
    told = installed.run("/usr/bin/python3", "-I", "-c", show)
    here, there = told.out.splitlines()
    assert here.startswith("(LibvirtConfig(uri='qemu:///system'"), told
    assert there.startswith("(QmpConfig("), told


def test_the_configuration_as_installed_is_upstreams_but_for_the_hypervisor(installed: DebianRoot) -> None:
    packaged = installed.run("cat", "/etc/vmchannel/host.yaml.dpkg-new").out
    upstream = (CHECKOUT / "host/config/host.yaml").read_text()

    def without_hypervisors(text: str) -> str:
        before, _, rest = text.partition("\nhypervisors:\n")
        return before + rest.partition("\npolicy:\n")[2]

    assert without_hypervisors(packaged) == without_hypervisors(upstream)
    assert len(without_hypervisors(upstream)) > 1000


def test_a_host_without_qemu_qmp_is_told_so_in_one_line(installed: DebianRoot) -> None:
    hide = "import sys; sys.modules['qemu'] = sys.modules['qemu.qmp'] = None\n"
    installed.write("/usr/local/lib/python3.11/dist-packages/hidden.pth", hide.encode())
    installed.write("/root/host.yaml", b"hypervisors: [{type: qmp}]\n")
    done = installed.run("vmchanneld", "--config", "/root/host.yaml")
    installed.run("rm", "/usr/local/lib/python3.11/dist-packages/hidden.pth")
    assert done.status == 2
    assert [line.partition(" qmp needs")[0] for line in done.err.splitlines()] == [
        "/root/host.yaml:1:22: hypervisors[0].type:"
    ]


def test_removal_keeps_the_journal_and_purge_ends_it(root: DebianRoot, debs: Mapping[str, Path]) -> None:
    root.run("dpkg", "--unpack", *(root.copy(debs[part]) for part in ("common", "host")))
    root.write("/var/lib/vmchannel/journal.db", b"evidence")
    root.write("/etc/vmchannel/policy.d/setup.yaml", b"groups: {}\n")
    root.write("/etc/vmchannel/policy.d/mine.yaml", b"groups: {}\n")
    done = root.run("dpkg", "--remove", "fence-vmchannel-host")
    assert done.status == 0, done.err
    assert root.has("/var/lib/vmchannel/journal.db")
    done = root.run("dpkg", "--purge", "fence-vmchannel-host")
    assert done.status == 0, done.err
    assert not root.has("/var/lib/vmchannel")
    assert not root.has("/etc/vmchannel/host.yaml")
    assert not root.has("/etc/vmchannel/policy.d/setup.yaml")
    assert root.has("/etc/vmchannel/policy.d/mine.yaml")
