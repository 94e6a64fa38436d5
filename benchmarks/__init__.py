# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measurements. Figures come from here, never from asserts on time; `make bench` prints them."""
