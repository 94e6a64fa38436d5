# SPDX-License-Identifier: LGPL-2.1-or-later
"""What users install: four import packages and nothing else, each importing only what it may."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.image import LAUNCHERS
from tests.rig.programs import MODULES

CHECKOUT = Path(__file__).parents[2]
ROOTS = {
    "fence_vmchannel": CHECKOUT,
    "vmchannel_host": CHECKOUT / "host",
    "vmchannel_guest": CHECKOUT / "guest",
    "vmchannel_agents": CHECKOUT / "agents",
}
HOST_LIBRARIES = frozenset({"qemu", "yaml", "jsonschema", "cryptography", "aiohttp", "prometheus_client"})
ALLOWED = {  # DESIGN section 2, last column, and the libraries that pyproject.toml gives to the host alone
    "fence_vmchannel": frozenset[str](),
    "vmchannel_host": HOST_LIBRARIES | {"fence_vmchannel"},
    "vmchannel_guest": frozenset({"fence_vmchannel"}),
    "vmchannel_agents": frozenset({"fence_vmchannel", "vmchannel_guest", "fencing"}),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources in which `setup.py build` and `setup.py sdist` have run."""
    copy = tmp_path_factory.mktemp("sources") / "checkout"
    skip = shutil.ignore_patterns(
        ".git", ".venv", ".cache", "*_cache", ".hypothesis", "__pycache__", "*.egg-info"
    )
    shutil.copytree(CHECKOUT, copy, ignore=skip)
    script = "from setuptools import setup; setup()"
    for command in (["build", "--build-lib", "library"], ["sdist", "--formats", "gztar"]):
        subprocess.run(
            [sys.executable, "-c", script, "-q", *command],
            cwd=copy,
            check=True,
            capture_output=True,
            timeout=120,
        )
    return copy


def test_an_installation_brings_no_top_level_name_but_the_four(built: Path) -> None:
    assert sorted(p.name for p in (built / "library").iterdir()) == sorted(ROOTS)


def test_every_module_and_type_marker_is_installed(built: Path) -> None:
    installed = {str(p.relative_to(built / "library")) for p in (built / "library").rglob("*") if p.is_file()}
    wanted = {str(p.relative_to(root)) for name, root in ROOTS.items() for p in (root / name).rglob("*.py")}
    assert wanted | {f"{name}/py.typed" for name in ROOTS} <= installed


def test_the_source_archive_has_the_deployment_files_and_licences(built: Path) -> None:
    [archive] = (built / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as content:
        inside = {name.partition("/")[2] for name in content.getnames()}
    beside = {
        str(p.relative_to(CHECKOUT))
        for folder in ("host", "guest", "agents", "docs", "tests/rig")
        for p in (CHECKOUT / folder).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and not any(d.endswith(".egg-info") for d in p.parts)
    }
    assert beside | {"LICENSE", "LICENSES/LGPL-2.1-or-later.txt", "agents/LICENSE", "Makefile"} <= inside


def test_both_licence_texts_travel_with_what_is_installed(built: Path) -> None:
    [facts] = built.glob("*.egg-info/PKG-INFO")
    named = [line for line in facts.read_text().splitlines() if line.startswith("License-File: ")]
    assert named == ["License-File: LICENSE", "License-File: agents/LICENSE"]


@pytest.mark.parametrize("package", ROOTS)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    wrong = [
        f"{path.relative_to(CHECKOUT)}: {name}"
        for path in (ROOTS[package] / package).rglob("*.py")
        for name in _imported_names(path)
        if name not in sys.stdlib_module_names and name not in ALLOWED[package] | {package}
    ]
    assert wrong == []


def test_the_readme_names_only_what_exists() -> None:
    text = (CHECKOUT / "README.md").read_text()
    linked = re.findall(r"\]\(([^)]+)\)", text)
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, re.MULTILINE)
    modules = [f"{folder}{name}" for folder, what in rows for name in re.findall(r"`(\S+\.py)`", what)]
    missing = [p for p in (*linked, *(folder for folder, _ in rows), *modules) if not (CHECKOUT / p).exists()]
    assert rows
    assert missing == []


def test_the_rig_runs_the_commands_that_an_installation_brings() -> None:
    facts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    installed = {name: target.removesuffix(":main") for name, target in facts["project"]["scripts"].items()}
    assert installed == MODULES
    in_guests = {Path(path).name: module for path, module in LAUNCHERS.items()}
    assert in_guests == {name: installed[name] for name in in_guests}


def test_every_source_file_names_its_licence() -> None:
    for package, root in ROOTS.items():
        licence = "GPL-2.0-or-later" if package == "vmchannel_agents" else "LGPL-2.1-or-later"
        for path in (root / package).rglob("*.py"):
            head = path.read_text().splitlines()[:2]  # a program's first line is its interpreter
            assert not head or f"# SPDX-License-Identifier: {licence}" in head, path


def _imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name.partition(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.partition(".")[0]
            case _:
                pass
