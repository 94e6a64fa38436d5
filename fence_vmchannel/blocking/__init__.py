# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client for programs that start fast: no asyncio."""
