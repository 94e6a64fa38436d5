# SPDX-License-Identifier: LGPL-2.1-or-later
"""System tests boot real guests: all fixtures of the rig."""

from tests.rig.fixtures import accel, attach, boot, boot_shared, debian, image, rig_dir, shared_rig_dir

__all__ = ["accel", "attach", "boot", "boot_shared", "debian", "image", "rig_dir", "shared_rig_dir"]
