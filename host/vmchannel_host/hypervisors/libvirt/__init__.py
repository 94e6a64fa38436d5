# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt as a source: it tells of QEMU processes that it runs, starts VMs, and keeps saved memory."""
