# SPDX-License-Identifier: LGPL-2.1-or-later
"""The test rig: builds the guest image, starts QEMU, drives guests. For tests and the demo, not for users."""
