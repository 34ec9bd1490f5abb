"""The arguments of `nflows-iresnet compare`, and the configuration they stand for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from typing import Any, TypeVar

from nflows_iresnet.compare.config import (
    DEFAULT_STEPS,
    IMAGE_DEFAULTS,
    RunConfig,
    resolve_device,
)
from nflows_iresnet.compare.imagemodels import DEFAULT_IMAGE_MODELS, IMAGE_MODELS
from nflows_iresnet.compare.models import DEFAULT_MODELS, MODELS

Number = TypeVar("Number", int, float)

DEFAULT_DATASETS = ("moons", "8-gaussians", "checkerboard")
DEFAULT_IMAGES = ("digits",)
DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(RunConfig)}

EPILOG = f"""\
models:
{chr(10).join(f"  {name:20}{spec.description}" for name, spec in MODELS.items())}

models with --images:
{chr(10).join(f"  {name:20}{spec.description}" for name, spec in IMAGE_MODELS.items())}

examples:
  nflows-iresnet compare                                  three toy densities, five models
  nflows-iresnet compare my.csv --steps 3000 --out here   your own rows (.csv or .npy)
  nflows-iresnet compare moons --models residual-flow normflows-residual --repeats 3
  nflows-iresnet compare digits --budget 60               one minute of training per model
  nflows-iresnet compare my.csv --steps 3000 --out here --resume    go on after an interruption
  nflows-iresnet compare digits --images                  multi-scale flows, bits per dimension
  nflows-iresnet compare mnist --images --data-dir data --device cuda --amp --budget 3600

Every model gets the same rows, the same batches and, within 10%, as many parameters as ResidualFlow
at --hidden-features and --num-layers. A training under way is saved every few minutes, and goes on
from there with --resume. The exit status is 0 when the comparison is complete (a model
that fails is a result), 2 for arguments or data that cannot work, 130 after Ctrl-C.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "datasets",
        nargs="*",
        metavar="DATASET",
        help="name (see --list), or path of a .csv or .npy file with a row per sample "
        f"(default: {' '.join(DEFAULT_DATASETS)}; with --images: {' '.join(DEFAULT_IMAGES)})",
    )
    parser.add_argument("--list", action="store_true", help="list data sets and models, and stop")
    _add_what(parser.add_argument_group("what is compared"))
    _add_images(parser.add_argument_group("images"))
    _add_how(parser.add_argument_group("how it is trained"))
    _add_where(parser.add_argument_group("where the results go"))


def _add_what(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help=f"models to compare (default: {' '.join(DEFAULT_MODELS)}; with --images: "
        f"{' '.join(DEFAULT_IMAGE_MODELS)})",
    )
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder that holds the real data sets (for images also: $NFLOWS_IRESNET_DATA)",
    )
    _add_number(group, "--hidden-features", positive_int, "width of ResidualFlow's networks")
    _add_number(group, "--num-layers", positive_int, "transforms in each flow, or scale")
    _add_number(group, "--num-blocks-per-layer", positive_int, "depth of each network")
    _add_number(group, "--repeats", positive_int, "train each model R times, seeds S, S+1, ...")
    _add_number(group, "--seed", natural_int, "reproduces data, weights, batches and samples")


def _add_images(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--images", action="store_true", help="the data sets are images: multi-scale models"
    )
    group.add_argument(
        "--num-train", type=positive_int, metavar="N", help="training images to keep (default: all)"
    )
    group.add_argument(
        "--amp",
        action="store_true",
        help="compute coupling networks in bfloat16 while training; log-determinants, and residual "
        "blocks, which need it, stay in full precision",
    )
    _add_number(group, "--num-scales", positive_int, "halvings of height and width")
    group.add_argument(
        "--exact-images",
        type=positive_int,
        metavar="N",
        help="test images that get the exact log-determinant where a model estimates it "
        "(default: 256, fewer where images are large)",
    )
    _add_number(group, "--dequantisations", positive_int, "draws of noise in tests")


def _add_how(group: argparse._ActionsContainer) -> None:
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=positive_int,
        metavar="N",
        help=f"optimiser steps per model (default: {DEFAULT_STEPS})",
    )
    length.add_argument(
        "--budget",
        type=positive_float,
        metavar="SECONDS",
        help="the same training time for every model instead of the same steps",
    )
    _add_number(group, "--batch-size", positive_int, "rows per step")
    _add_number(group, "--learning-rate", positive_float, "of Adam, annealed to zero by a cosine")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    _add_number(group, "--threads", positive_int, "CPU threads")


def _add_where(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--out",
        metavar="DIR",
        help="folder for results.json, pictures and report.html (default: results/compare-TIME)",
    )
    group.add_argument(
        "--resume", action="store_true", help="keep what is finished in --out and do the rest"
    )
    group.add_argument(
        "--checkpoint-minutes",
        type=positive_float,
        default=5.0,
        metavar="X",
        help="save the training under way this often (default: 5)",
    )
    group.add_argument("--quiet", action="store_true", help="print only the path of the report")


def _add_number(
    group: argparse._ActionsContainer, flag: str, kind: Callable[[str], float], text: str
) -> None:
    name = flag.strip("-").replace("-", "_")
    default = str(DEFAULTS[name])
    if name in IMAGE_DEFAULTS:
        default += f"; with --images: {IMAGE_DEFAULTS[name]}"
    group.add_argument(flag, type=kind, metavar="X", help=f"{text} (default: {default})")


def to_config(parsed: argparse.Namespace) -> RunConfig:
    """Turn parsed arguments into the configuration of a run.

    Raises:
        ValueError: a value cannot work here; the message names it.
    """
    defaults = {**DEFAULTS, **(IMAGE_DEFAULTS if parsed.images else {})}
    defaults["datasets"] = DEFAULT_IMAGES if parsed.images else DEFAULT_DATASETS
    defaults["models"] = DEFAULT_IMAGE_MODELS if parsed.images else DEFAULT_MODELS
    defaults["steps"] = DEFAULT_STEPS if parsed.budget is None else None
    given = {name: getattr(parsed, name) for name in DEFAULTS}
    chosen = {
        name: default if given[name] in (None, []) else given[name]
        for name, default in defaults.items()
    }
    for name in ("datasets", "models"):
        chosen[name] = tuple(dict.fromkeys(chosen[name]))
    return RunConfig(**{**chosen, "device": resolve_device(parsed.device)})


def positive_int(text: str) -> int:
    """Parse 1, 2, 3, ..."""
    return _parse(text, int, lambda value: value > 0, "a positive integer, such as 100")


def natural_int(text: str) -> int:
    """Parse 0, 1, 2, ..."""
    return _parse(text, int, lambda value: 0 <= value < 2**31, "an integer from 0 to 2147483647")


def positive_float(text: str) -> float:
    """Parse a positive, finite number."""
    return _parse(text, float, lambda value: 0 < value < math.inf, "a positive number, such as 0.5")


def _parse(
    text: str, kind: Callable[[str], Number], accept: Callable[[Number], bool], wanted: str
) -> Number:
    with suppress(ValueError):
        value = kind(text)
        if accept(value):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
