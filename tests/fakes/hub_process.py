# SPDX-License-Identifier: LGPL-2.1-or-later
"""Both hubs in a process of their own, so that their memory can be measured: `DIRECTORY BYTE_LIMIT`.

Says "ready" when they have greeted, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from fence_vmchannel.hub.terms import peer_terms
from tests.fakes.hub_pair import hub_pair


async def main(directory: str, byte_limit: str) -> None:
    """Run until nobody needs it any more."""
    async with hub_pair(Path(directory), terms=peer_terms(int(byte_limit))):
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
