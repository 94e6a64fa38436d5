# SPDX-License-Identifier: LGPL-2.1-or-later
"""A writer to be killed: appends without end and prints each number after the journal said that it is stored.

Run as a program: journal_writer.py DIRECTORY.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from vmchannel_host.journal.journal import Journal
from vmchannel_host.model import BootId, OperationId


async def main(directory: Path) -> None:
    journal = await Journal.open(directory / "journal.db", directory / "journal.key", boot_id=BootId("boot"))
    while True:
        pair = await asyncio.gather(
            *(journal.append("fence.intent", OperationId(f"op-{n}"), {"pad": "x" * 500}) for n in range(2))
        )
        os.write(1, b"".join(b"%d\n" % seq for seq in pair))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
