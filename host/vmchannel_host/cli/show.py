# SPDX-License-Identifier: LGPL-2.1-or-later
"""How vmchannelctl shows each answer: documents in, lines out. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence

from vmchannel_host.cli.http_client import Doc
from vmchannel_host.cli.table import Column, facts, seconds, size, table, wrapped
from vmchannel_host.printable import printable


def status(doc: Doc, width: int) -> list[str]:
    """The daemon in one look."""
    pairs = [
        ("host", doc.text("host")),
        ("daemon", f"{doc.text('state')}, version {doc.text('version')}, pid {doc.count('pid')}"),
        ("up", _age(doc.number("uptime_s"))),
        ("bus", doc.text("bus")),
        ("VMs", str(doc.count("vms"))),
        ("ports", f"{doc.count('ports')}, {doc.count('ports_connected')} connected"),
        ("operations", f"{doc.count('operations_running')} running"),
        ("journal", f"{doc.text('journal')}, {doc.count('journal_seq')} records"),
    ]
    return facts(pairs, width) + _problems([("", text) for text in doc.texts("problems")], width)


def vms(docs: Sequence[Doc], width: int) -> list[str]:
    """All VMs; what is wrong with one stands below the table."""
    columns = [
        Column("NAME", shrink=True),
        Column("POWER"),
        Column("RUN STATE", shrink=True),
        Column("PORT"),
        Column("UUID"),
    ]
    rows = [
        [
            doc.text("name"),
            doc.text("power"),
            ",".join(instance.text("run_state") for instance in doc.docs("instances")),
            "yes" if doc.flag("connected") else "no",
            doc.text("uuid"),
        ]
        for doc in docs
    ]
    notes = [(_name(doc), note) for doc in docs for note in _vm_notes(doc)]
    return table(columns, rows, width) + _problems(notes, width)


def ports(docs: Sequence[Doc], width: int) -> list[str]:
    """All ports."""
    columns = [
        Column("VM", shrink=True),
        Column("PORT", shrink=True),
        Column("GUEST"),
        Column("SESSION"),
        Column("CHANNELS", right=True),
        Column("IN", right=True),
        Column("OUT", right=True),
    ]
    rows = [
        [
            _name(doc, "vm_name", "vm_uuid"),
            doc.text("name"),
            "open" if doc.flag("guest_open") else "closed",
            "open" if doc.flag("connected") else "none",
            str(doc.count("channels")),
            size(doc.count("received_bytes")),
            size(doc.count("sent_bytes")),
        ]
        for doc in docs
    ]
    notes = [
        (f"{_name(doc, 'vm_name', 'vm_uuid')} {doc.text('name')}", doc.text("problem"))
        for doc in docs
        if doc.text("problem")
    ]
    return table(columns, rows, width) + _problems(notes, width)


def hosts(docs: Sequence[Doc], width: int) -> list[str]:
    """All hosts that could hold a VM."""
    columns = [
        Column("HOST", shrink=True),
        Column("MEMBER"),
        Column("SYNCED"),
        Column("INSTANCES", right=True),
        Column("LAST WORD", right=True),
    ]
    rows = [
        [
            doc.text("name"),
            "yes" if doc.flag("member") else "no",
            "yes" if doc.flag("synced") else "no",
            str(doc.count("instances")),
            _age(doc.number("last_word_s")),
        ]
        for doc in docs
    ]
    notes = [(doc.text("name"), doc.text("problem")) for doc in docs if doc.text("problem")]
    return table(columns, rows, width) + _problems(notes, width)


def operations(docs: Sequence[Doc], width: int) -> list[str]:
    """Operations, newest first."""
    columns = [
        Column("ID"),
        Column("BEGUN"),
        Column("ACTION"),
        Column("VM", shrink=True),
        Column("RESULT", shrink=True),
        Column("TIME", right=True),
        Column("BY", shrink=True),
    ]
    rows = [
        [
            doc.text("id"),
            _clock(doc.number("begun_at")),
            doc.text("action"),
            _name(doc, "vm_name", "vm_uuid"),
            _result(doc),
            seconds(doc.number("elapsed_ms") or 0),
            doc.text("requester"),
        ]
        for doc in docs
    ]
    return table(columns, rows, width)


def operation(doc: Doc, width: int) -> list[str]:
    """One operation with its evidence and its steps."""
    pairs = [
        ("operation", doc.text("id")),
        ("action", doc.text("action")),
        ("VM", f"{doc.text('vm_name') or '-'} ({doc.text('vm_uuid') or '-'})"),
        ("by", doc.text("requester")),
        ("host", doc.text("host")),
        ("begun", _clock(doc.number("begun_at"), date=True)),
        ("result", _result(doc)),
        ("time", seconds(doc.number("elapsed_ms") or 0)),
    ]
    if doc.text("reason"):
        pairs.append(("reason", doc.text("reason")))
    lines = facts(pairs, width)
    lines += _block("evidence", [("  ", line) for line in doc.texts("evidence")], width)
    steps = [(f"  {_clock(step.number('at'))}  ", step.text("text")) for step in doc.docs("steps")]
    return lines + _block("steps", steps, width)


def answer(doc: Doc, width: int) -> list[str]:
    """The answer to a fence."""
    word = "done" if doc.flag("ok") else "FAILED"
    first = f"{word}: {_name(doc, 'vm_name', 'vm_uuid')} is {doc.text('state')}"
    if not doc.flag("ok"):
        first = f"{word} ({doc.text('code')}): {doc.text('reason')}"
    lines = wrapped("", first, width)
    lines += [line for text in doc.texts("evidence") for line in wrapped("  ", text, width)]
    if doc.text("operation"):
        place = f"op={doc.text('operation')} host={doc.text('host')}"
        lines += wrapped("  ", f"{place} time={seconds(doc.number('elapsed_ms') or 0)}", width)
    if not doc.flag("ok") and doc.text("remedy"):
        lines += wrapped("remedy: ", doc.text("remedy"), width)
    return lines


def plain(text: str, width: int) -> list[str]:
    """A sentence."""
    return wrapped("", text, width)


def confirm_question(vm: str, doc: Doc, meaning: str, width: int) -> list[str]:
    """What an operator reads before the word is given."""
    pairs = [
        ("VM", f"{doc.text('name') or vm} ({doc.text('uuid') or 'not a name of vmchannelctl vms'})"),
        ("power", doc.text("power")),
        ("problem", doc.text("problem") or "none"),
    ]
    return [*facts(pairs, width), *wrapped("", meaning, width)]


def confirmed(doc: Doc, width: int) -> list[str]:
    """What became of the operator's word."""
    name = _name(doc, "vm_name", "vm_uuid")
    if not doc.flag("ok"):
        lines = wrapped("", f"NOT CONFIRMED ({doc.text('code')}): {doc.text('reason')}", width)
        return lines + (wrapped("remedy: ", doc.text("remedy"), width) if doc.text("remedy") else [])
    lines = wrapped("", f"{doc.text('code')}: {name}: {doc.text('reason')}", width)
    return lines + [line for text in doc.texts("lines") for line in wrapped("  ", text, width)]


def plugged(doc: Doc, width: int) -> list[str]:
    """What became of an attach or detach. What is to be copied is not broken into lines."""
    name = _name(doc, "vm_name", "vm_uuid")
    lines = wrapped("", f"{doc.text('code')}: {name}: {doc.text('reason')}", width)
    return lines + [f"  {printable(text, 1000)}" for text in doc.texts("advice")]


def not_plugged(vm: Doc, doc: Doc, width: int) -> list[str]:
    """Why a VM, one of several, still has what was to be taken away."""
    lines = wrapped("", f"FAILED ({doc.text('code')}): {_name(vm)}: {doc.text('reason')}", width)
    return lines + (wrapped("  remedy: ", doc.text("remedy"), width) if doc.text("remedy") else [])


def can(doc: Doc, width: int) -> list[str]:
    """Whether a fence would be allowed, and could be proven now."""
    target = doc.text("target_name") or doc.text("target_uuid")
    pairs = [
        ("allowed", _yes(doc.flag("allowed"))),
        ("provable now", _yes(doc.flag("provable")) if doc.flag("allowed") else "-"),
        (
            "plug",
            f"{doc.text('plug')} is {target} ({doc.text('target_uuid')})" if target else doc.text("plug"),
        ),
        ("reason", doc.text("reason")),
    ]
    if doc.text("remedy"):
        pairs.append(("remedy", doc.text("remedy")))
    return facts(pairs, width)


def findings(docs: Sequence[Doc], width: int) -> list[str]:
    """What `doctor` found."""
    lines: list[str] = []
    for doc in docs:
        lines += wrapped(f"{doc.text('level'):<8} ", f"{doc.text('subject')}: {doc.text('text')}", width)
        if doc.text("remedy"):
            lines += wrapped("         remedy: ", doc.text("remedy"), width)
    return lines or ["nothing is wrong"]


def verified(doc: Doc, width: int) -> list[str]:
    """What a walk over the journal found."""
    if doc.flag("ok"):
        result = f"ok: {doc.count('records')} records, {doc.count('first_seq')} to {doc.count('last_seq')}"
    else:
        bad = doc.number("bad_seq")
        place = f" at record {bad:.0f}" if bad is not None else ""
        result = f"BAD{place}: {doc.text('problem')}"
    restored = doc.count("restored_seq")
    if restored:
        result += f"; restored from a backup at {restored}: what lies before is no evidence"
    pairs = [
        ("journal", result),
        ("last hash", doc.text("head_hash")),
        ("key", f"sha256:{doc.text('public_key')}"),
    ]
    return facts(pairs, width)


def event(doc: Doc, width: int) -> list[str]:
    """One line of the live view."""
    name = doc.text("vm_name") or doc.text("vm_uuid")
    words = [doc.text("kind"), name, doc.text("text")]
    lead = f"{_clock(doc.number('at'))}  "
    return wrapped(lead, "  ".join(word for word in words if word), width)


def _vm_notes(doc: Doc) -> list[str]:
    notes: list[str] = []
    if doc.texts("aliases"):
        notes.append(f"also known as {', '.join(doc.texts('aliases'))}")
    if doc.text("operation"):
        notes.append(f"operation {doc.text('operation')} runs")
    if doc.text("problem"):
        notes.append(doc.text("problem"))
    return notes


def _problems(notes: Sequence[tuple[str, str]], width: int) -> list[str]:
    lines = [
        line for name, text in notes for line in wrapped("  ", f"{name}: {text}" if name else text, width)
    ]
    return ["", *lines] if lines else []


def _block(title: str, rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    if not rows:
        return []
    return [f"{title}:", *(line for lead, text in rows for line in wrapped(lead, text, width))]


def _name(doc: Doc, name: str = "name", uuid: str = "uuid") -> str:
    return doc.text(name) or doc.text(uuid)


def _result(doc: Doc) -> str:
    if doc.flag("running"):
        return f"running: {doc.text('phase')}"
    if doc.flag("ok"):
        return doc.text("code") or "done"
    return f"FAILED: {doc.text('code') or 'unknown'}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _clock(at: float | None, *, date: bool = False) -> str:
    if at is None:
        return "-"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S" if date else "%m-%d %H:%M:%S", time.localtime(at))
    except (OverflowError, ValueError, OSError):
        return "-"


def _age(value: float | None) -> str:
    if value is None:
        return "-"
    whole = int(value)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
