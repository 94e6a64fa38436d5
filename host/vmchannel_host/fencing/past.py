# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a restart asks of an operation's records: had it begun, how far had it got, has it ended?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vmchannel_host.fencing import codec
from vmchannel_host.journal.types import Record
from vmchannel_host.model import OperationId, VmUuid


@dataclass(frozen=True, slots=True)
class PastOperation:
    """An operation as the journal holds it."""

    operation: OperationId
    vm: VmUuid  # "" when the intent cannot be read
    body: codec.Body  # of the intent
    begun: int  # number of the record that says that it began; 0: none does
    phases: tuple[str, ...]  # the first says that it began
    outcome: Record | None

    @classmethod
    def read(cls, operation: OperationId, records: Sequence[Record]) -> PastOperation:
        """An operation's records, in order; the first is its intent."""
        body, vm = records[0].body, records[0].body.get("vm")
        phases = [one for one in records if one.kind == codec.PHASE]
        return cls(
            operation,
            VmUuid(vm if isinstance(vm, str) else ""),
            body,
            phases[0].seq if phases else 0,
            tuple(str(one.body.get("phase")) for one in phases),
            next((one for one in records if one.kind == codec.OUTCOME), None),
        )

    def order(self) -> int:
        """Sorts operations by when they began."""
        return self.begun
