# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run the channel library as a user who may not even read this checkout (it may lie in /root)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NOBODY = 65_534
_LIBRARY = Path(__file__).parents[2] / "fence_vmchannel"


def run_as_nobody(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code that may import the library; needs root. Blocks for 60 s at most."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        copy = Path(folder) / _LIBRARY.name
        shutil.copytree(_LIBRARY, copy, ignore=shutil.ignore_patterns("__pycache__"))
        return subprocess.run(
            [os.path.realpath(sys.executable), "-c", program, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd=folder,
            env={"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"},
            check=False,
        )
