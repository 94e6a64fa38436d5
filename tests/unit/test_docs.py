# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the documents point to exists: tests, modules, pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md"))
SOURCES = ("fence_vmchannel", "host/vmchannel_host", "guest/vmchannel_guest", "agents/vmchannel_agents")


def named(pattern: str, page: Path) -> list[str]:
    return re.findall(pattern, page.read_text("utf-8"))


@pytest.mark.parametrize("page", ["safety.md", "verification.md"])
def test_every_test_that_is_named_exists(page: str) -> None:
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    names = named(r"`(test_\w+)`", ROOT / "docs" / page)
    assert len(names) > 10
    assert [name for name in names if f"def {name}(" not in code] == []


@pytest.mark.parametrize("page", ["safety.md", "requirements.md", "verification.md"])
def test_every_test_file_that_is_named_exists(page: str) -> None:
    paths = named(r"\b((?:unit|integration|system)/[\w/]+\.py)\b", ROOT / "docs" / page)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / "tests" / path).is_file()] == []


@pytest.mark.parametrize("page", ["safety.md", "architecture.md", "requirements.md"])
def test_every_module_that_is_named_exists(page: str) -> None:
    modules = [path for source in SOURCES for path in (ROOT / source).rglob("*.py")]
    known = {str(path.relative_to(ROOT)) for path in modules}
    names = named(r"`([\w/]+\.py)`", ROOT / "docs" / page)
    assert [name for name in names if not any(f"/{path}".endswith(f"/{name}") for path in known)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = [link for link in named(r"\]\(([^)#]+)\)", page) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
