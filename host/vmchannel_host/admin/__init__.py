# SPDX-License-Identifier: LGPL-2.1-or-later
"""The admin API over a unix socket, and the view of the daemon that it shows."""
