# SPDX-License-Identifier: LGPL-2.1-or-later
"""Running the handler of an offered service for one channel, so that its end is always told to the opener."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from fence_vmchannel.channel import Channel
from fence_vmchannel.errors import ChannelClosed, ChannelError, CloseCode

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())

Handler = Callable[[Channel], Awaitable[None]]
"""Serves one channel. It is closed when the handler returns; to refuse it, raise `ServiceRefused`."""


async def serve_channel(handler: Handler, channel: Channel) -> None:
    """Run `handler`, then close the channel with the code that fits how it ended."""
    code, reason = CloseCode.SHUTDOWN, "the service stops"
    try:
        await handler(channel)
        code, reason = CloseCode.NORMAL, ""
    except ChannelClosed as error:  # the opener left, or the handler refuses
        code, reason = error.code, error.reason
    except ChannelError as error:
        code, reason = CloseCode.PROTOCOL, str(error)
    except Exception:
        log.exception("service %s failed for %s", channel.target, channel.peer)
        code, reason = CloseCode.INTERNAL, "the service failed; its log says more"
    finally:
        channel.close(code, reason)
