"""What pages and docstrings refer to is there: tests, headings, files."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

import nflows_iresnet

ROOT = Path(nflows_iresnet.__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
PROGRAMS = [
    pytest.param(program, id=f"{page.stem}-{index}")
    for page in PAGES
    for index, program in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


ORDER = ["References", "Args", "Attributes", "Returns", "Raises", "Example"]


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


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_of_a_page_runs_alone(program: str) -> None:
    exec(program, {"__name__": "__main__"})


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.name)
def test_files_and_headings_that_a_page_links_to_exist(text: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text.read_text()):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = text.parent / file if file else text
        assert target.exists(), f"{text.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{text.name} links to {link}"


@pytest.mark.parametrize("name", nflows_iresnet.__all__)
def test_what_is_public_is_on_a_page_of_the_api(name: str) -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    room = getattr(getattr(nflows_iresnet, name), "__module__", "").split(".")[:2]
    documented = set(re.findall(r":: ([\w.]+)\n", pages))
    assert f"nflows_iresnet.{name}" in documented or ".".join(room) in documented


@pytest.mark.parametrize(
    ("formula", "left", "right"),
    [
        (r"\log p(x)", 0, 0.167),
        (r"\log (1 - L)", 0, 0),
        (r"2 \log \tilde p", 0.167, 0.167),
        (r"\log_2 b", 0, 0.167),
    ],
)
def test_names_of_functions_in_formulas_keep_their_distance(
    formula: str, left: float, right: float
) -> None:
    pytest.importorskip("sphinx")
    pytest.importorskip("latex2mathml")
    conf = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    written = conf["spaced"](conf["convert"](formula))
    assert f'lspace="{left}em" rspace="{right}em">log</mo>' in written


def test_the_readme_can_be_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200


@pytest.mark.parametrize(
    "source", sorted((ROOT / "nflows_iresnet").rglob("*.py")), ids=lambda source: source.name
)
def test_docstrings_have_one_order(source: Path) -> None:
    """What it is, maths and cost come first, then where it is from, then how to use it."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            found = re.findall(rf"^({'|'.join(ORDER)}):$", text, flags=re.MULTILINE)
            assert found == sorted(found, key=ORDER.index), getattr(node, "name", source.name)
