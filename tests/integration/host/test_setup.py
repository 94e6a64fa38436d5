# SPDX-License-Identifier: LGPL-2.1-or-later
"""vmchannelctl setup: what it writes, what it refuses, and that it never leaves half a file."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio

from tests.integration.host.admin_rig import VM1, VM2, AdminRig, served
from vmchannel_host.cli.console import Console
from vmchannel_host.cli.main import run
from vmchannel_host.config.loading import load_config
from vmchannel_host.config.placing import place, problems_with

WEB1, WEB2 = replace(VM1, name="web1", groups=()), replace(VM2, name="web2")


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@dataclass
class Host:
    """A daemon and its configuration."""

    rig: AdminRig
    config: Path

    @property
    def file(self) -> Path:
        return self.config.parent / "policy.d" / "setup.yaml"

    async def setup(self, *words: str, answers: tuple[str, ...] | None = None) -> Ran:
        """Run the command, without a terminal unless there are answers."""
        out, err = io.StringIO(), io.StringIO()
        console = Console(out, err, 80, None if answers is None else scripted(answers))
        line = ["setup", "--socket", str(self.rig.path), "--config", str(self.config), *words]
        code = await asyncio.to_thread(run, line, console)
        return Ran(int(code), out.getvalue(), err.getvalue())


def scripted(answers: tuple[str, ...]) -> Callable[[str], str]:
    """A user who types these, then ends the input."""
    rest: Iterator[str] = iter(answers)

    def ask(_: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    return ask


@pytest_asyncio.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    config = tmp_path / "etc" / "host.yaml"
    config.parent.mkdir()
    config.write_text("host: hv1\n")
    async with served(tmp_path) as rig:
        rig.view.vms_now = [WEB1, WEB2]
        yield Host(rig, config)


async def test_groups_of_the_command_line_are_written_and_are_what_the_daemon_reads(host: Host) -> None:
    ran = await host.setup("--group", "pair=web1,web2")
    assert ran.code == 0, ran
    assert load_config(host.config).policy.groups["pair"].members == (WEB1.uuid, WEB2.uuid)
    assert "systemctl reload vmchanneld" in ran.out
    assert "pcs stonith create vmfence fence_vmchannel" in ran.out
    assert host.file.stat().st_mode & 0o777 == 0o644
    assert sorted(one.name for one in host.file.parent.iterdir()) == ["setup.yaml"]


async def test_what_is_proposed_is_written_with_yes_and_shown_with_dry_run(host: Host) -> None:
    ran = await host.setup("--dry-run")
    assert ran.code == 0
    assert f'"web":\n    members:\n      - {WEB1.uuid}  # web1\n' in ran.out
    assert not host.file.parent.exists()
    assert (await host.setup("--yes")).code == 0
    assert load_config(host.config).policy.groups["web"].members == (WEB1.uuid, WEB2.uuid)


async def test_on_a_terminal_each_proposal_is_asked_and_others_are_taken(host: Host) -> None:
    ran = await host.setup(answers=("", "both=web1", "", "y"))
    assert ran.code == 0, ran
    groups = load_config(host.config).policy.groups
    assert {name: len(group.members) for name, group in groups.items()} == {"web": 2, "both": 1}


@pytest.mark.parametrize(
    "answers",
    [("n", ""), ("", "", "n"), ("", "", ""), ("",), ("", ""), ()],
    ids=str,
)
async def test_whoever_does_not_agree_writes_nothing(host: Host, answers: tuple[str, ...]) -> None:
    assert (await host.setup(answers=answers)).code == 1
    assert not host.file.exists()


async def test_without_a_terminal_it_asks_for_options(host: Host) -> None:
    ran = await host.setup()
    assert ran.code == 2
    assert "web: web1, web2" in ran.err
    assert not host.file.exists()


async def test_an_existing_file_is_replaced_only_by_force(host: Host) -> None:
    assert (await host.setup("--yes")).code == 0
    ran = await host.setup("--group", "pair=web1,web2")
    assert ran.code == 1
    assert "--force" in ran.err
    assert set(load_config(host.config).policy.groups) == {"web"}
    assert (await host.setup("--group", "pair=web1,web2", "--force")).code == 0
    assert set(load_config(host.config).policy.groups) == {"pair"}


async def test_what_the_loader_would_refuse_is_never_put_in_place(host: Host) -> None:
    host.file.parent.mkdir()
    other = host.file.with_name("other.yaml")
    other.write_text(f"groups: {{web: {{members: [{WEB1.uuid}]}}}}\n")
    ran = await host.setup("--yes")
    assert ran.code == 2
    assert f"{host.config.parent}/policy.d/" in ran.err
    assert "web" in ran.err
    assert not host.file.exists()
    other.unlink()
    host.config.write_text("hots: hv1\n")
    ran = await host.setup("--yes")
    assert (ran.code, f"{host.config}:1:1: hots" in ran.err) == (2, True)
    host.config.unlink()
    ran = await host.setup("--yes")
    assert (ran.code, f"{host.config}: cannot be read" in ran.err) == (2, True)
    assert not host.file.exists()


@pytest.mark.parametrize("name", ["../host.yaml", "a/b.yaml", ".hidden.yaml", "policy", ""])
async def test_a_file_that_is_not_in_policy_d_is_refused(host: Host, name: str) -> None:
    assert (await host.setup("--yes", "--file", name)).code == 2


async def test_wrong_groups_are_refused(host: Host) -> None:
    ran = await host.setup("--group", "pair=web1,wed2")
    assert ran.code == 2
    assert "no VM is called 'wed2'" in ran.err


async def test_nothing_to_propose_is_a_failure_that_says_what_to_do(host: Host) -> None:
    host.rig.view.vms_now = [WEB1]
    ran = await host.setup("--yes")
    assert ran.code == 1
    assert "--group" in ran.err


async def test_json_tells_what_was_written(host: Host) -> None:
    ran = await host.setup("--yes", "--json")
    told = json.loads(ran.out)
    assert (told["file"], told["written"]) == (str(host.file), True)
    assert told["groups"] == {"web": [WEB1.uuid, WEB2.uuid]}
    assert host.file.read_text() == told["text"]


def test_of_two_who_write_at_once_one_is_told_that_the_file_exists(tmp_path: Path) -> None:
    path, results = tmp_path / "policy.d" / "a.yaml", list[str]()
    barrier = threading.Barrier(4)

    def write(number: int) -> None:
        barrier.wait()
        try:
            place(path, f"{number}\n" * 1000, replace=False)
        except FileExistsError:
            results.append("exists")
        else:
            results.append("written")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("written") == 1
    assert len(set(path.read_text().splitlines())) == 1


def test_a_draft_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "policy.d"
    path.write_text("a file in the folder's place")
    with pytest.raises(OSError, match=r"exists|Not a directory"):
        place(path / "a.yaml", "x", replace=True)
    assert [one.name for one in tmp_path.iterdir()] == ["policy.d"]


def test_checking_changes_nothing(tmp_path: Path) -> None:
    config = tmp_path / "host.yaml"
    config.write_text("host: hv1\n")
    assert problems_with(config, "a.yaml", "groups: {}\n") == []
    assert problems_with(config, "a.yaml", "groups: []\n") != []
    assert [one.name for one in tmp_path.iterdir()] == ["host.yaml"]
