"""The arguments of `nflows-iresnet bench`."""

from __future__ import annotations

import argparse

from nflows_iresnet.experiments.arguments import natural_int, positive_float, positive_int
from nflows_iresnet.experiments.bench.items import describe_items
from nflows_iresnet.experiments.bench.measure import Settings

HELP = "Time this library, normflows and a plain network side by side."


EPILOG = f"""\
{describe_items()}

how times are taken:
  All contestants of a case run in one process, with a fixed number of threads, in rounds: each
  round times every contestant once, starting with another one. Tables show the median, the
  quartiles q1 and q3, and the ratio to normflows: that of each round, its median and quartiles.
  "cpu ratio" is that of processor time. With one thread it is the one to trust, and the one that
  targets are held against: other programs that take the processor away lengthen the wall time of
  whom they happen to hit, not the processor time. With more threads, and on a GPU (events of its
  stream), targets are held against the wall ratio. Columns "x" are how many times smaller a number
  is than normflows'.

examples:
  nflows-iresnet bench --quick                          a subset, minutes
  nflows-iresnet bench --only step-dimension inverse    two items in full
  nflows-iresnet bench --only quality --seconds 30      likelihood over training time
  nflows-iresnet bench --device cuda --out here         here/bench.json and here/bench.png

The exit status is 0 when everything was measured (a missed target is a result), 1 when a file
cannot be written, 2 for arguments that cannot work, 130 after Ctrl-C; what is measured by then is
kept.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--list", action="store_true", help="list items and contestants, and stop")
    parser.add_argument("--quick", action="store_true", help="fewer cases, fewer rounds")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="items to measure (default: all but quality)"
    )
    parser.add_argument(
        "--quality",
        action="store_true",
        help="also measure likelihood over training time: 2 models, 3 data sets, 3 seeds (1 with "
        "--quick), each for --seconds",
    )
    parser.add_argument(
        "--seconds",
        type=positive_float,
        metavar="S",
        help="training time per model for quality (default: 80; 10 with --quick)",
    )
    parser.add_argument(
        "--learning-rate",
        type=positive_float,
        default=Settings.learning_rate,
        metavar="X",
        help=f"of Adam for quality, constant (default: {Settings.learning_rate})",
    )
    parser.add_argument(
        "--repeats",
        type=positive_int,
        metavar="N",
        help="rounds per case (default: as many as fit into a few seconds, at least 5; "
        "3 with --quick)",
    )
    parser.add_argument("--seed", type=natural_int, default=0, metavar="X", help="(default: 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--threads", type=positive_int, default=1, metavar="X", help="CPU threads (default: 1)"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder for the results (default: results/bench-TIME)"
    )
    parser.add_argument("--quiet", action="store_true", help="print only the path of the results")
