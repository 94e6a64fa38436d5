# SPDX-License-Identifier: GPL-2.0-or-later
"""The metadata that Pacemaker and pcs read: valid, and the same as before."""

from __future__ import annotations

import asyncio
import re
import shutil
import xml.etree.ElementTree as ET
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

import vmchannel_agents
from tests.integration.agents.agent_rig import Agent, Site
from vmchannel_agents.entry import LIBRARY_VERSION, stored_metadata, wants_metadata
from vmchannel_agents.library import FENCE_LIBRARY

GOLDEN = Path(vmchannel_agents.__file__).with_name("metadata.xml")
GOLDEN_OF = "4.12.1"
"""The library's version that made the golden file. Of another one only our own parts are compared."""

RELAXNG = Path("/usr/share/cluster/relaxng/metadata.rng")
OURS = ("plug", "port", "port_name", "socket", "timeout")


async def metadata(agent: Agent, way: str) -> str:
    match way:
        case "stdin":
            ran = await agent.run(stdin=b"action=metadata\n")
        case "short":
            ran = await agent.run("-o", "metadata")
        case _:
            ran = await agent.run("--action=metadata")
    assert (ran.code, ran.err) == (0, "")
    return ran.out


def own_parts(text: str) -> list[str]:
    """What does not come from the library."""
    root = ET.fromstring(text)
    parameters = [one for one in root.iter("parameter") if one.get("name") in OURS]
    rest = [one for one in (root.find("longdesc"), root.find("actions")) if one is not None]
    head = [str(root.get("name")), str(root.get("shortdesc"))]
    return head + [re.sub(r"\s+", " ", ET.tostring(one, "unicode")) for one in (*parameters, *rest)]


def library_version() -> str:
    text = Path(FENCE_LIBRARY, "fencing.py").read_text(errors="replace")
    found = re.search(r'^RELEASE_VERSION\s*=\s*"(.*)"', text, re.MULTILINE)
    return found[1] if found else ""


@pytest.mark.parametrize("way", ["stdin", "short", "long"])
async def test_the_metadata_is_the_golden_one(place: Site, way: str) -> None:
    text = await metadata(place.agent, way)
    assert own_parts(text) == own_parts(GOLDEN.read_text())
    if library_version() == GOLDEN_OF:
        assert text == GOLDEN.read_text()


@pytest.mark.skipif(
    not RELAXNG.exists() or shutil.which("xmllint") is None,
    reason="metadata.rng or xmllint is missing: install fence-agents and libxml2-utils",
)
async def test_the_metadata_is_valid_for_the_librarys_schema(place: Site, tmp_path: Path) -> None:
    path = tmp_path / "metadata.xml"
    path.write_text(await metadata(place.agent, "long"))
    checker = await asyncio.create_subprocess_exec(
        "xmllint", "--noout", "--relaxng", str(RELAXNG), str(path), stderr=PIPE
    )
    _, err = await checker.communicate()
    assert checker.returncode == 0, err.decode()


def test_the_stored_metadata_is_for_that_version_of_the_library_only(tmp_path: Path) -> None:
    library = tmp_path / "fencing.py"
    assert stored_metadata(str(tmp_path)) == b""
    library.write_bytes(LIBRARY_VERSION.replace(b"4.", b"5.") + b"\n")
    assert stored_metadata(str(tmp_path)) == b""
    library.write_bytes(LIBRARY_VERSION + b"\n")
    assert stored_metadata(str(tmp_path)) == GOLDEN.read_bytes()
    assert GOLDEN_OF.encode() in LIBRARY_VERSION


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (b"action=metadata\n", True),
        (b"plug=a\n  action=metadata", True),
        (b"action=off\naction=metadata\n", True),
        (b"action=metadata\naction=off\n", False),
        (b"plug=metadata\n", False),
        (b"action=metadata2\n", False),
        (b"", False),
        (b"\xff=\xfe\n", False),
    ],
)
def test_the_last_action_counts(given: bytes, wanted: bool) -> None:
    assert wants_metadata(given) is wanted


async def test_no_parameter_is_required_but_the_action(place: Site) -> None:
    root = ET.fromstring(await metadata(place.agent, "long"))
    required = [one.get("name") for one in root.iter("parameter") if one.get("required") == "1"]
    assert required == ["action"]


async def test_every_promised_action_is_declared(place: Site) -> None:
    root = ET.fromstring(await metadata(place.agent, "long"))
    declared = {one.get("name") for one in root.iter("action")}
    promised = "on off reboot status monitor list list-status metadata validate-all"
    assert set(promised.split()) <= declared


async def test_a_missing_vm_can_never_be_declared_off(place: Site) -> None:
    root = ET.fromstring(await metadata(place.agent, "long"))
    assert "missing_as_off" not in {one.get("name") for one in root.iter("parameter")}


@pytest.mark.parametrize("lines", [(), ("plug=node1",), ("timeout=55", "port_name=org.vmchannel.1")])
async def test_validate_all_passes_with_any_valid_parameters_without_a_host(
    place: Site, lines: tuple[str, ...]
) -> None:
    ran = await place.agent.run(stdin="\n".join(("action=validate-all", *lines, "")).encode())
    assert (ran.code, ran.out) == (0, ""), ran.err
    assert not place.service.requests


@pytest.mark.parametrize("line", ["timeout=soon", "timeout=0", "port_name=", "plug_separator="])
async def test_validate_all_refuses_what_would_not_work(place: Site, line: str) -> None:
    ran = await place.agent.run(stdin=f"action=validate-all\n{line}\n".encode())
    assert ran.code == 1
    assert ran.reason.endswith("op=- host=-")


@pytest.mark.parametrize("option", ["-h", "--help", "-V", "--version"])
async def test_help_and_version_need_nothing_else(place: Site, option: str) -> None:
    ran = await place.agent.run(option)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out
