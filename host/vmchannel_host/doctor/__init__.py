# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is wrong with this host and what to do about it: facts (`facts`) in, findings (`rules`) out.

`machine` and `unix_sockets` collect what the machine tells, `daemon_facts` what the daemon knows.
"""
