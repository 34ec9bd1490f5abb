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
autodoc_preserve_defaults = True
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


FUNCTION = re.compile(r"<m[io]([^>]*)>(log|exp|sin|cos|det|max|min|sup|inf|diag)</m[io]>")
SPECIAL = re.compile(r"^ *\* |\\.|`[^`]*`|\*\*|[*|]")


def setup(app: Sphinx) -> None:
    """Write formulas as MathML, which browsers draw without scripts, fonts or a network."""
    app.add_html_math_renderer("mathml", (write_inline, None), (write_block, None))
    app.connect("autodoc-process-docstring", escape, priority=400)


def write_inline(writer: HTML5Translator, node: nodes.math) -> None:
    """Write a formula within a line."""
    writer.body.append(spaced(convert(node.astext())))
    raise nodes.SkipNode


def write_block(writer: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula of its own lines."""
    formula = spaced(convert(node.astext(), display="block"))
    writer.body.append(f'<div class="formula">{formula}</div>')
    raise nodes.SkipNode


def spaced(formula: str) -> str:
    """Set thin spaces about names of functions as TeX does: `log p(x)` and `log(1 - L)`."""
    return FUNCTION.sub(with_spaces, formula)


def with_spaces(found: re.Match[str]) -> str:
    """Return the name of a function with a space where a letter or a number is its neighbour."""
    options, name = found.groups()
    before = found.string[: found.start()].rpartition("<")[2]
    after = found.string[found.end() :]
    left = 0.167 if before.startswith("/m") and before != "/mo>" else 0
    right = 0 if after.startswith(("</", "<mo>", "<mo ")) else 0.167
    return f'<mo{options} form="prefix" lspace="{left}em" rspace="{right}em">{name}</mo>'


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
