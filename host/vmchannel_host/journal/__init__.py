# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal: what was asked, done and proven, on the disk before any answer leaves."""
