# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration: `host.yaml` and `policy.d/`, read, checked and converted."""
