"""The site: executed pages, strictly built. `python -m sphinx -W --keep-going docs site`."""

from __future__ import annotations

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

from nflows_iresnet import __version__

project = "nflows_iresnet"
author = copyright = "The nflows_iresnet developers"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["README.md"]
default_role = "code"
myst_enable_extensions = ["dollarmath", "colon_fence", "fieldlist"]
myst_heading_anchors = 4
myst_dmath_double_inline = True

nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_use_ivar = True

html_theme = "furo"
html_title = "nflows_iresnet"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
html_math_renderer = "mathml"


SPECIAL = re.compile(r"^ *\* |\\.|`[^`]*`|\*\*|[*|]")


def setup(app: Sphinx) -> None:
    """Write formulas as MathML, which browsers draw without scripts, fonts or a network."""
    app.add_html_math_renderer("mathml", (write_inline, None), (write_block, None))
    app.connect("autodoc-process-docstring", escape, priority=400)


def write_inline(writer: HTML5Translator, node: nodes.math) -> None:
    """Write a formula within a line."""
    writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def write_block(writer: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula of its own lines."""
    writer.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def escape(
    app: Sphinx, what: str, name: str, item: object, options: object, lines: list[str]
) -> None:
    """Let `(B, *)` and `|x|` in docstrings be what they are, and not markup."""
    in_program = False
    for index, line in enumerate(lines):
        in_program = line.lstrip().startswith(">>>") or (in_program and line.strip() != "")
        if not in_program:
            lines[index] = SPECIAL.sub(escaped, line)


def escaped(found: re.Match[str]) -> str:
    """Return code and strong emphasis as they are, and a single character escaped."""
    text = found.group()
    return text if len(text) > 1 else f"\\{text}"
