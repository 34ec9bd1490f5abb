"""report.html: the figures with their captions, in one file that needs nothing else."""

from __future__ import annotations

from html import escape
from typing import Any

from nflows_iresnet.experiments.figures.drawing import Drawing
from nflows_iresnet.experiments.report import STYLE, embed

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>nflows-iresnet figures</title>
<style>{style}</style>
</head>
<body>
<h1>Invertible residual networks in pictures</h1>
<p class="meta">{started} · {device} · nflows-iresnet {version} · torch {torch} · seed {seed}</p>
{sections}
<h2>Reproduce it</h2>
<pre>{command}</pre>
<p>Every number of this page is in <code>figures.json</code>.</p>
</body>
</html>
"""


def render(content: dict[str, Any], drawings: dict[str, Drawing]) -> str:
    """Render the page.

    Args:
        content: what figures.json holds.
        drawings: the figures by name.
    """
    environment, arguments = content["environment"], content["arguments"]
    return _PAGE.format(
        style=STYLE,
        started=escape(content["started"]),
        device=escape(str(environment["device_name"])),
        version=environment["versions"]["nflows-iresnet"],
        torch=environment["versions"]["torch"],
        seed=arguments["seed"],
        sections="\n".join(_section(name, drawing) for name, drawing in drawings.items()),
        command=escape(command_line(arguments)),
    )


def _section(name: str, drawing: Drawing) -> str:
    return (
        f"<h2>{escape(drawing.title)}</h2>\n<figure>{embed(drawing.picture, name)}"
        f"<figcaption>{escape(drawing.caption)}</figcaption></figure>"
    )


def command_line(arguments: dict[str, Any]) -> str:
    """Return the command that repeats the run."""
    words = ["nflows-iresnet figures", "--only", *arguments["only"]]
    words += [] if arguments["steps"] is None else ["--steps", str(arguments["steps"])]
    words += ["--seed", str(arguments["seed"])]
    return " ".join(words + (["--quick"] if arguments["quick"] else []))
