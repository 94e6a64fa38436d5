# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hub: owns the links to peers and applications, and joins them by channels."""
