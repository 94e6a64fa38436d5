# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may fence whom, and which VM a plug means (pure)."""
