"""What pages and docstrings refer to is there: tests, headings, files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import nflows_iresnet

ROOT = Path(nflows_iresnet.__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"(tests/)?(test_\w+)\.py(?:::(\w+))?", page.read_text())
    for _, file, function in named:
        source = (ROOT / "tests" / f"{file}.py").read_text()
        assert not function or f"def {function}(" in source, f"{file}.py::{function}"


def test_headings_that_docstrings_point_to_exist() -> None:
    sources = [*(ROOT / "nflows_iresnet").rglob("*.py"), ROOT / "README.md", *PAGES]
    for source in sources:
        for page, anchor in re.findall(r"docs/(\w+\.md)(?:#([\w\-]+))?", source.read_text()):
            path = ROOT / "docs" / page
            assert path.exists(), f"{source.name} names docs/{page}"
            assert not anchor or anchor in anchors(path), f"{source.name}: {page}#{anchor}"
