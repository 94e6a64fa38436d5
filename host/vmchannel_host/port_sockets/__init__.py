# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unix sockets on which the daemon listens for the ports of VMs whose QEMU connects (decision 0014)."""
