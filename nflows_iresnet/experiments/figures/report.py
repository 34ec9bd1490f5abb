"""report.html: the figures with their captions, in one file that needs nothing else."""

from __future__ import annotations

from typing import Any

from nflows_iresnet.experiments.figures.drawing import Drawing
from nflows_iresnet.experiments.report import Page, Section


def render(content: dict[str, Any], drawings: dict[str, Drawing]) -> str:
    """Render the page.

    Args:
        content: what figures.json holds.
        drawings: the figures by name.
    """
    arguments = content["arguments"]
    return Page(
        "nflows-iresnet figures",
        "Invertible residual networks in pictures",
        [
            Section(each.title, pictures=[(name, each.picture, each.caption)])
            for name, each in drawings.items()
        ],
        content,
        command_line(arguments),
        meta=[f"seed {arguments['seed']}"],
        numbers="figures.json",
    ).render()


def command_line(arguments: dict[str, Any]) -> str:
    """Return the command that repeats the run."""
    words = ["nflows-iresnet figures", "--only", *arguments["only"]]
    words += [] if arguments["steps"] is None else ["--steps", str(arguments["steps"])]
    words += ["--seed", str(arguments["seed"])]
    return " ".join(words + (["--quick"] if arguments["quick"] else []))
