# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests: `unit` does no I/O, `integration` uses sockets, `system` boots real guests; `rig` drives them."""
