# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which instances of which VMs exist (pure)."""
