# SPDX-License-Identifier: LGPL-2.1-or-later
"""The protocol core: bytes, numbers and time in; bytes and events out. No I/O."""
