# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports attached to domains and detached: both halves or neither, and what a time-out leaves."""

from __future__ import annotations

import asyncio

import pytest

from tests.fakes.libvirt_domain import FakeDomain
from tests.fakes.virtual_time import virtual_time
from vmchannel_host.hypervisors import PlugError, Plugged, PlugProblem
from vmchannel_host.hypervisors.libvirt.plug_words import channel_xml
from vmchannel_host.hypervisors.libvirt.plugging import LibvirtPlugging
from vmchannel_host.model import Migration, PortName, RunState, VmUuid

VM = VmUuid("aaaaaaaa-0000-4000-8000-000000000001")
PORT = PortName("org.vmchannel.0")
SECOND = PortName("org.vmchannel.1")
FOREIGN = f"<channel type='unix'><target type='virtio' name='{PORT}'/></channel>"
OURS = channel_xml(PORT)


async def attach(domain: FakeDomain, port: PortName = PORT) -> Plugged:
    return await LibvirtPlugging(domain, "/var/lib/libvirt").attach(domain.vm, port, timeout_s=5)


async def detach(domain: FakeDomain, port: PortName | None = PORT, *, force: bool = False) -> Plugged:
    return await LibvirtPlugging(domain, "/").detach(domain.vm, port, force=force, timeout_s=5)


def halves(domain: FakeDomain) -> tuple[list[str] | None, list[str] | None]:
    live, config = (None if half is None else sorted(half) for half in (domain.live, domain.config))
    return live, config


@virtual_time
async def test_a_port_goes_where_the_domain_is() -> None:
    for live, config, advice in [
        (True, True, ()),
        (False, True, ("next start",)),
        (True, False, ("transient",)),
    ]:
        domain = FakeDomain(VM, live=live, config=config)
        done = await attach(domain)
        assert (done.changed, done.ports) == (True, (PORT,))
        assert halves(domain) == ([PORT] if live else None, [PORT] if config else None)
        assert [word in line for word, line in zip(advice, done.advice, strict=True)] == [True] * len(advice)
        assert not (await attach(domain)).changed
        assert await detach(domain) == Plugged(True, (PORT,))
        assert halves(domain) == ([] if live else None, [] if config else None)
        assert await detach(domain) == Plugged(False, ())


@virtual_time
async def test_what_is_there_in_one_place_only_is_completed() -> None:
    for half in ("live", "config"):
        for xml in (OURS, FOREIGN):
            domain = FakeDomain(VM)
            getattr(domain, half)[PORT] = xml
            assert (await attach(domain)).changed
            assert halves(domain) == ([PORT], [PORT])
            assert domain.changes == ["attach config" if half == "live" else "attach live"]
            assert getattr(domain, half)[PORT] == xml


@virtual_time
async def test_when_the_definition_cannot_be_written_the_port_is_taken_out_of_what_runs_again() -> None:
    domain = FakeDomain(VM)
    domain.refuses["attach config"] = 0
    with pytest.raises(PlugError, match="attach config is refused") as caught:
        await attach(domain)
    assert caught.value.problem is PlugProblem.FAILED
    assert halves(domain) == ([], [])
    assert domain.changes == ["attach live", "detach live"]


@virtual_time
async def test_an_undo_takes_away_only_what_was_added() -> None:
    domain = FakeDomain(VM)
    assert domain.live is not None
    domain.live[PORT] = OURS
    domain.refuses["attach config"] = 0
    with pytest.raises(PlugError, match="refused"):
        await attach(domain)
    assert halves(domain) == ([PORT], [])


@virtual_time
async def test_when_what_runs_keeps_the_port_the_definition_gets_it_back() -> None:
    domain = FakeDomain(VM)
    await attach(domain)
    kept = dict(domain.config or {})
    domain.refuses["detach live"] = 0
    with pytest.raises(PlugError, match="detach live is refused"):
        await detach(domain)
    assert halves(domain) == ([PORT], [PORT])
    assert [one.split() for one in (domain.config or {}).values()] == [one.split() for one in kept.values()]


@virtual_time
async def test_an_undo_that_fails_is_told_as_unknown() -> None:
    domain = FakeDomain(VM)
    domain.refuses |= {"attach config": 0, "detach live": 0}
    with pytest.raises(PlugError, match="not known to be undone") as caught:
        await attach(domain)
    assert caught.value.problem is PlugProblem.DEADLINE
    domain.refuses.clear()
    assert (await attach(domain)).changed
    assert halves(domain) == ([PORT], [PORT])


@virtual_time
async def test_no_answer_before_anything_was_changed_is_told_so() -> None:
    for mute in ("read definitions", "state"):
        domain = FakeDomain(VM)
        domain.mute.add(mute)
        for act in (attach, detach):
            if (act, mute) == (detach, "state"):
                domain.live = domain.config = {PORT: OURS}
            with pytest.raises(PlugError, match="nothing was changed") as caught:
                await act(domain)
            assert caught.value.problem is PlugProblem.DEADLINE
        assert domain.changes == []
        domain.answer()
        await asyncio.sleep(0.1)


@virtual_time
async def test_a_change_that_hangs_is_unknown_and_until_it_has_returned_nothing_else_is_ordered() -> None:
    domain = FakeDomain(VM)
    plugging = LibvirtPlugging(domain, "/")
    domain.mute.add("attach")
    with pytest.raises(PlugError, match="unknown: attach: no answer") as caught:
        await plugging.attach(VM, PORT, timeout_s=5)
    assert caught.value.problem is PlugProblem.DEADLINE
    for order in (
        plugging.attach(VM, PORT, timeout_s=5),
        plugging.detach(VM, None, force=False, timeout_s=5),
    ):
        with pytest.raises(PlugError, match="has not returned") as caught:
            await order
        assert caught.value.problem is PlugProblem.BUSY
    domain.mute.clear()
    domain.answer()
    await asyncio.sleep(0.1)
    assert not (await plugging.attach(VM, PORT, timeout_s=5)).changed, "it took effect late"
    assert halves(domain) == ([PORT], [PORT])


@virtual_time
async def test_a_connection_that_is_lost_in_the_middle_leaves_it_unknown_and_the_next_order_ends_it() -> None:
    domain = FakeDomain(VM)
    domain.lost_after = "attach"
    with pytest.raises(PlugError, match="unknown: not connected") as caught:
        await attach(domain)
    assert caught.value.problem is PlugProblem.DEADLINE
    with pytest.raises(PlugError, match="not connected") as caught:
        await attach(domain)
    assert caught.value.problem is PlugProblem.NO_MONITOR


@virtual_time
async def test_a_qemu_that_does_not_let_go_is_unknown() -> None:
    domain = FakeDomain(VM)
    await attach(domain)
    domain.lets_go = False
    with pytest.raises(PlugError, match="has not let the port go") as caught:
        await detach(domain)
    assert caught.value.problem is PlugProblem.DEADLINE
    domain.lets_go = True
    assert (await detach(domain)).changed
    assert halves(domain) == ([], [])


@virtual_time
async def test_nothing_is_plugged_while_the_domain_migrates_or_is_saved() -> None:
    for state in (
        (RunState.RUNNING, Migration.OUTGOING),
        (RunState.PAUSED, Migration.INCOMING),
        (RunState.SAVE_VM, Migration.NONE),
    ):
        domain = FakeDomain(VM)
        await attach(domain, SECOND)
        domain.state = state
        domain.changes.clear()
        for act in (attach(domain), detach(domain, SECOND)):
            with pytest.raises(PlugError, match="migrates") as caught:
                await act
            assert caught.value.problem is PlugProblem.MIGRATING
        assert domain.changes == []


@virtual_time
async def test_a_port_of_another_hand_goes_by_force_only_wherever_it_is() -> None:
    for live, config in ((FOREIGN, FOREIGN), (OURS, FOREIGN), (FOREIGN, OURS)):
        domain = FakeDomain(VM)
        assert domain.live is not None
        assert domain.config is not None
        domain.live[PORT], domain.config[PORT] = live, config
        domain.live[SECOND] = domain.config[SECOND] = channel_xml(SECOND)
        with pytest.raises(PlugError, match="by another hand") as caught:
            await detach(domain)
        assert caught.value.problem is PlugProblem.NOT_OURS
        assert (await detach(domain, force=True)).ports == (PORT,)
        assert halves(domain) == ([SECOND], [SECOND])


@virtual_time
async def test_a_detach_of_all_takes_what_is_ours_and_leaves_the_rest() -> None:
    domain = FakeDomain(VM)
    assert domain.live is not None
    assert domain.config is not None
    domain.live[PORT], domain.config[PORT] = OURS, FOREIGN
    domain.live[SECOND] = domain.config[SECOND] = channel_xml(SECOND)
    assert sorted((await detach(domain, None)).ports) == [PORT, SECOND]
    assert halves(domain) == ([], [PORT])


@virtual_time
async def test_a_domain_without_a_controller_is_told_what_to_do() -> None:
    domain = FakeDomain(VM)
    domain.controller = False
    with pytest.raises(PlugError, match="without a virtio-serial controller") as caught:
        await attach(domain)
    assert caught.value.problem is PlugProblem.NO_SLOT
    domain.live = None
    assert (await attach(domain)).changed, "libvirt adds one to a definition"


@virtual_time
async def test_a_channel_that_cannot_be_served_is_named_and_left() -> None:
    domain = FakeDomain(VM)
    assert domain.config is not None
    domain.config[PORT] = FOREIGN.replace("'unix'", "'pty'")
    with pytest.raises(PlugError, match="no unix socket") as caught:
        await attach(domain)
    assert caught.value.problem is PlugProblem.UNSUITABLE
    assert domain.changes == []


@virtual_time
async def test_saved_memory_is_told_of_for_it_knows_nothing_of_the_port() -> None:
    domain = FakeDomain(VM, live=False)
    domain.saved = True
    assert "managed save" in (await attach(domain)).advice[0]


@virtual_time
async def test_a_domain_that_was_undefined_meanwhile_is_not_there() -> None:
    plugging = LibvirtPlugging(FakeDomain(VM), "/")
    with pytest.raises(PlugError) as caught:
        await plugging.attach(VmUuid("aaaaaaaa-0000-4000-8000-000000000002"), PORT, timeout_s=5)
    assert caught.value.problem is PlugProblem.NOT_RUNNING
