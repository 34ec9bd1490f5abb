"""The arguments of `nflows-iresnet table1`."""

from __future__ import annotations

import argparse
from typing import Any

from nflows_iresnet import datasets
from nflows_iresnet.experiments.arguments import natural_int, positive_float, positive_int
from nflows_iresnet.experiments.config import TRAINING_PRECISIONS
from nflows_iresnet.experiments.table1 import DEFAULT_COEFFS, Settings, described_rows

HELP = "Test errors of invertible classifiers for five bounds, a free one and a ResNet."
_ROWS = "\n".join(f"  {name:10}{text}" for name, text in described_rows(DEFAULT_COEFFS).items())
EPILOG = f"""\
rows:
{_ROWS}

examples:
  nflows-iresnet table1                                   digits, minutes on a CPU
  nflows-iresnet table1 --quick                           does it run? half a minute
  nflows-iresnet table1 mnist --data-dir data --device cuda       five minutes on a GPU
  nflows-iresnet table1 fashion-mnist --num-train 6000 --num-scales 2 --repeats 1
  nflows-iresnet table1 cifar10 --data-dir data --device cuda --num-scales 2 --num-blocks 8 \\
      --padding 5 --hidden-channels 64 --steps 40000 --repeats 1
  nflows-iresnet table1 --out here --resume               go on after an interruption

"guaranteed inverse" is read off the certified bound of the trained weights. The published columns
are what the i-ResNet paper reports: hundreds of layers. mnist has a size and a training time of its
own: five minutes for all rows on a GPU, two, and the tests, on a CPU. On a GPU a training step is
one CUDA graph where that can be, and it is said where it cannot. The exit status is 0 when the
table is complete (a row that fails is a result), 1 when a file cannot be written, 2 for arguments
or data that cannot work, 130 after Ctrl-C, which saves the training under way at the end of its
step; again, it stops at once.
"""
_NUMBERS: dict[str, tuple[Any, str]] = {
    "repeats": (positive_int, "train each model R times: seeds and splits S, S+1, ..."),
    "seed": (natural_int, "of splits, weights and batches"),
    "batch_size": (positive_int, "images per step"),
    "learning_rate": (positive_float, "of Adam, annealed to zero by a cosine"),
    "hidden_channels": (positive_int, "channels of the hidden layers of each branch g"),
    "num_blocks": (positive_int, "residual blocks per scale"),
    "num_scales": (positive_int, "how often the images are squeezed"),
    "padding": (natural_int, "channels of zeros that are appended to the images"),
    "num_train": (positive_int, "training images to keep"),
    "shift": (natural_int, "largest random shift of training images, in pixels"),
    "threads": (positive_int, "CPU threads"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    defaults = Settings()
    parser.add_argument(
        "dataset",
        nargs="?",
        default=defaults.dataset,
        metavar="DATASET",
        help=f"{', '.join(datasets.available_images())} (default: {defaults.dataset})",
    )
    parser.add_argument(
        "--coeffs",
        nargs="+",
        type=positive_float,
        metavar="C",
        help=f"bounds of Lip(g) (default: {' '.join(map(str, DEFAULT_COEFFS))})",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=positive_int,
        metavar="X",
        help=f"optimiser steps per model (default: {defaults.steps}; mnist: a time)",
    )
    length.add_argument(
        "--budget", type=positive_float, metavar="SECONDS", help="training time per model instead"
    )
    length.add_argument("--minutes", type=positive_float, metavar="X", help="--budget in minutes")
    for name, (kind, text) in _NUMBERS.items():
        default = getattr(defaults, name)
        shown = "all" if default is None else default
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, metavar="X", help=f"{text} (default: {shown})")
    parser.add_argument("--data-dir", metavar="DIR", help="folder that holds the data sets")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--training-precision",
        choices=TRAINING_PRECISIONS,
        help="tf32 allows TensorFloat-32 in training steps on a GPU, never in examinations "
        "(default: float32)",
    )
    parser.add_argument("--quick", action="store_true", help="few steps of a small table")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for results.json, table1.png and report.html (default: results/table1-TIME)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what is finished in --out and do the rest"
    )
    parser.add_argument("--quiet", action="store_true", help="print only the path of the report")
