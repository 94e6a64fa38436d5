# SPDX-License-Identifier: LGPL-2.1-or-later
"""Puts a new file into `policy.d/`: checked with all the others first, then whole or not at all. Blocking."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from vmchannel_host.config.loading import POLICY_DIR, check_config


def problems_with(config: Path, name: str, text: str) -> list[str]:
    """What would be wrong with the configuration if `policy.d/NAME` had this text; empty when nothing.

    The real loader reads a copy; what it says names the real paths.

    Raises:
        OSError: a file cannot be copied.
    """
    with tempfile.TemporaryDirectory(prefix="vmchannel-setup-") as folder:
        copy = Path(folder) / config.name
        if config.is_file():
            shutil.copyfile(config, copy)
        fragments = Path(folder) / POLICY_DIR
        fragments.mkdir()
        folder_of_policy = config.parent / POLICY_DIR
        for one in sorted(folder_of_policy.glob("*.yaml")) if folder_of_policy.is_dir() else ():
            if one.is_file() and not one.name.startswith("."):
                shutil.copyfile(one, fragments / one.name)
        (fragments / name).write_text(text, "utf-8")
        return [str(one).replace(folder, str(config.parent)) for one in check_config(copy)]


def place(path: Path, text: str, *, replace: bool) -> None:
    """Write a file durably, in one step. Nobody sees half of it.

    Raises:
        FileExistsError: it exists, and `replace` is false.
        OSError: it cannot be written; nothing was changed.
    """
    path.parent.mkdir(mode=0o755, exist_ok=True)
    # The loader skips names that begin with a dot.
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    draft = Path(name)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, 0o644)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        if replace:
            draft.rename(path)
        else:
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
