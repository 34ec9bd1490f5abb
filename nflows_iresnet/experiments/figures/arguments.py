"""The arguments of `nflows-iresnet figures`."""

from __future__ import annotations

import argparse

from nflows_iresnet.experiments.arguments import natural_int, positive_int
from nflows_iresnet.experiments.figures import DESCRIPTIONS

HELP = "Train small models and draw what the method does."

EPILOG = f"""\
figures:
{chr(10).join(f"  {name:12}{text}" for name, text in DESCRIPTIONS.items())}

examples:
  nflows-iresnet figures                            all, in minutes on a laptop
  nflows-iresnet figures --quick --out here         small models, trained briefly
  nflows-iresnet figures --only dynamics --seed 1   one figure

Writes a PNG per figure, figures.json with every number shown, and report.html with captions. The
exit status is 0 when all was drawn, 1 when a training diverged or a file could not be written, 2
for arguments that cannot work, 130 after Ctrl-C.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--out", metavar="DIR", help="folder for the figures (default: results/figures-TIME)"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="figures to draw (default: all)")
    parser.add_argument(
        "--steps",
        type=positive_int,
        metavar="N",
        help="optimiser steps per model (default: what each figure needs)",
    )
    parser.add_argument("--seed", type=natural_int, default=0, metavar="X", help="(default: 0)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer and smaller models, fewer steps"
    )
    parser.add_argument("--quiet", action="store_true", help="print only the path of the report")
