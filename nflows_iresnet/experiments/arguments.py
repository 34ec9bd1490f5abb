"""The arguments of `nflows-iresnet compare`, and the configuration they stand for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from typing import Any, TypeVar

from nflows_iresnet import datasets
from nflows_iresnet.experiments.config import (
    IMAGE_DEFAULTS,
    RACE_RATES,
    TRAINING_PRECISIONS,
    RunConfig,
    resolve_device,
)
from nflows_iresnet.experiments.models import IMAGE_MODELS, MODELS, SAME_START, with_same_start
from nflows_iresnet.experiments.presets import QUICK, Preset

Number = TypeVar("Number", int, float)

DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(RunConfig)}
MODELS_TEXT = f"""\
models:
{chr(10).join(f"  {name:27}{spec.description}" for name, spec in MODELS.items())}

models with --images:
{chr(10).join(f"  {name:27}{spec.description}" for name, spec in IMAGE_MODELS.items())}
"""
CLOSING = """\
Every model gets the same rows, the same batches and, within 10%, as many parameters as ResidualFlow
at --hidden-features and --num-layers. The validation rows choose all that is chosen: training stops
after --patience validations without a new best, the best state of the averaged weights is kept, and
of several --learning-rates the best one; the test rows choose nothing. `mnist --images` is
residual-flow alone unless other --models are named, with a size, a start and a time that suit the
device: ten minutes of training on a GPU, two on a CPU. On a GPU a training step is one CUDA graph
where that can be, and it is said where it cannot. A training under way is saved every few minutes,
and goes on from there with --resume. The exit status is 0 when the comparison is complete (a model
that fails is a result), 1 when a file cannot be written, 2 for arguments or data that cannot work,
130 after Ctrl-C, which saves the training under way at the end of its step (again, it stops at
once).
"""


def epilog(preset: Preset) -> str:
    """Return what `--help` shows after the arguments."""
    return "\n".join([MODELS_TEXT, preset.examples, CLOSING])


def add_arguments(parser: argparse.ArgumentParser, preset: Preset) -> None:
    """Declare the arguments of a subcommand."""
    parser.set_defaults(preset=preset)
    parser.add_argument(
        "datasets",
        nargs="*",
        metavar="DATASET",
        help="name (see --list), or path of a .csv or .npy file with a row per sample "
        f"(default: {_words(preset.datasets)}; with --images: {_words(preset.image_datasets)})",
    )
    parser.add_argument("--list", action="store_true", help="list data sets and models, and stop")
    _add_what(parser.add_argument_group("what is compared"), preset)
    _add_images(parser.add_argument_group("images"), preset)
    _add_how(parser.add_argument_group("how it is trained"), preset)
    _add_where(parser.add_argument_group("where the results go"), preset)


def _words(names: tuple[str, ...]) -> str:
    return " ".join(names)


def _add_what(group: argparse._ActionsContainer, preset: Preset) -> None:
    group.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help=f"models to compare (default: {_words(preset.models)}; with --images: "
        f"{_words(preset.image_models)})",
    )
    group.add_argument(
        "--same-start",
        action="store_true",
        help="compare every model twice, as it is and, as a row of its own, with the start of "
        "residual-flow in front of it (ActNorm, a spline of each feature, whitening, started from "
        "5,000 training rows; its parameters count): what differs then is what the blocks do. "
        "Models that have this start themselves stay one row, and with a name such as "
        f"maf{SAME_START} --models takes one alone; not for --images",
    )
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder that holds the real data sets (for images also: $NFLOWS_IRESNET_DATA)",
    )
    _add_number(
        group, preset, "--hidden-features", positive_int, "width of ResidualFlow's networks"
    )
    _add_number(group, preset, "--num-layers", positive_int, "transforms in each flow, or scale")
    _add_number(group, preset, "--num-blocks-per-layer", positive_int, "depth of each network")
    _add_number(
        group, preset, "--repeats", positive_int, "train each model R times, seeds S, S+1, ..."
    )
    _add_number(
        group, preset, "--seed", natural_int, "reproduces data, weights, batches and samples"
    )


def _add_images(group: argparse._ActionsContainer, preset: Preset) -> None:
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
    _add_number(group, preset, "--num-scales", positive_int, "halvings of height and width")
    _add_number(
        group, preset, "--alpha", positive_float, "distance from black and white of the logit"
    )
    _add_number(
        group,
        preset,
        "--marginal-bins",
        natural_int,
        "bins of a spline for each pixel in residual-flow, which then has 1x1 convolutions, too, "
        "and starts from training images; 0 for none of this",
    )
    _add_number(
        group,
        preset,
        "--num-terms",
        natural_int,
        "terms of the series that residual-flow is trained by, 0 for the roulette; examinations "
        "are unbiased in either case",
    )
    group.add_argument(
        "--exact-images",
        type=positive_int,
        metavar="N",
        help="test images that get the exact log-determinant where a model estimates it "
        "(default: 256, fewer where images are large)",
    )
    _add_number(group, preset, "--dequantisations", positive_int, "draws of noise in tests")


def _add_how(group: argparse._ActionsContainer, preset: Preset) -> None:
    group.add_argument(
        "--quick",
        action="store_true",
        help="few steps of small models, unless told otherwise: does it run?",
    )
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=positive_int,
        metavar="N",
        help=f"optimiser steps per model (default: {preset.steps})",
    )
    length.add_argument(
        "--budget",
        type=positive_float,
        metavar="SECONDS",
        help="the same training time for every model instead of the same steps",
    )
    length.add_argument(
        "--minutes",
        type=positive_float,
        metavar="X",
        help="--budget in minutes",
    )
    length.add_argument(
        "--race",
        type=duration,
        metavar="TIME",
        help="the same seconds of the CPU for every model and repeat, on a GPU of the clock, such "
        "as 150s or 2.5min: the schedule follows the time, validation does not count, and the "
        "table has means over the seeds, steps and learning rates",
    )
    group.add_argument(
        "--learning-rates",
        type=positive_float,
        nargs="+",
        metavar="X",
        help="train each model with each of these and the first seed, and keep the rate that "
        "validates best; the other trainings count nothing, but cost as much as one that does "
        f"(default: none; with --race: {' '.join(map(str, RACE_RATES))}, unless --learning-rate "
        "is given)",
    )
    _add_number(
        group,
        preset,
        "--patience",
        positive_int,
        "stop after so many of the 20 validations without a new best",
    )
    group.add_argument(
        "--jobs",
        type=positive_int,
        default=1,
        metavar="N",
        help="train so many models side by side, each in a process with --threads of its own "
        "(default: 1)",
    )
    group.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="train on the workers of the Dask cluster whose scheduler is there, such as "
        "tcp://scheduler:8786; workers load the data by the same names and paths",
    )
    _add_number(group, preset, "--batch-size", positive_int, "rows per step")
    _add_number(
        group, preset, "--learning-rate", positive_float, "of Adam, annealed to zero by a cosine"
    )
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    group.add_argument(
        "--training-precision",
        choices=TRAINING_PRECISIONS,
        help="tf32 allows TensorFloat-32 in training steps on a GPU, never in examinations "
        "(default: float32)",
    )
    _add_number(group, preset, "--threads", positive_int, "CPU threads")


def _add_where(group: argparse._ActionsContainer, preset: Preset) -> None:
    group.add_argument(
        "--out",
        metavar="DIR",
        help="folder for results.json, pictures and report.html "
        f"(default: results/{preset.command}-TIME)",
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
    group: argparse._ActionsContainer,
    preset: Preset,
    flag: str,
    kind: Callable[[str], float],
    text: str,
) -> None:
    name = flag.strip("-").replace("-", "_")
    default = str(preset.options.get(name, DEFAULTS[name]))
    if name in IMAGE_DEFAULTS:
        default += f"; with --images: {IMAGE_DEFAULTS[name]}"
    group.add_argument(flag, type=kind, metavar="X", help=f"{text} (default: {default})")


def to_config(parsed: argparse.Namespace) -> RunConfig:
    """Turn parsed arguments into the configuration of a run.

    Raises:
        ValueError: a value cannot work here; the message names it.
    """
    preset: Preset = parsed.preset
    images = parsed.images or (preset.finds_images and _are_images(parsed.datasets))
    defaults = {**DEFAULTS, **preset.options, **(IMAGE_DEFAULTS if images else {})}
    defaults["datasets"] = preset.image_datasets if images else preset.datasets
    defaults["models"] = preset.image_models if images else preset.models
    defaults["steps"] = preset.steps
    device = resolve_device(parsed.device)
    if images:
        defaults |= preset.tuned_to(parsed.datasets or defaults["datasets"], device)
    if parsed.quick:
        defaults |= {**QUICK, "budget": None}
    given = {name: getattr(parsed, name) for name in DEFAULTS}
    if parsed.minutes is not None:
        given["budget"] = 60 * parsed.minutes
    if any(given[name] is not None for name in ("steps", "budget", "race")):
        defaults |= {"steps": None, "budget": None, "race": None}
    if given["race"] is not None and given["learning_rate"] is None:
        defaults["learning_rates"] = RACE_RATES
    chosen = {
        name: default if given[name] in (None, []) else given[name]
        for name, default in defaults.items()
    }
    for name in ("datasets", "models", "learning_rates"):
        chosen[name] = tuple(dict.fromkeys(chosen[name]))
    if parsed.same_start:
        if images:
            raise ValueError("--same-start is for rows, and these are images: leave it out")
        chosen["models"] = with_same_start(chosen["models"])
    return RunConfig(**{**chosen, "images": images, "device": device})


def _are_images(names: list[str]) -> bool:
    """Whether every name is that of images, and of nothing else."""
    known = datasets.available_images().keys() - datasets.available().keys()
    return bool(names) and known.issuperset(names)


def positive_int(text: str) -> int:
    """Parse 1, 2, 3, ..."""
    return _parse(text, int, lambda value: value > 0, "a positive integer, such as 100")


def natural_int(text: str) -> int:
    """Parse 0, 1, 2, ..."""
    return _parse(text, int, lambda value: 0 <= value < 2**31, "an integer from 0 to 2147483647")


def positive_float(text: str) -> float:
    """Parse a positive, finite number."""
    return _parse(text, float, lambda value: 0 < value < math.inf, "a positive number, such as 0.5")


def duration(text: str) -> float:
    """Parse a time in seconds: 150, 150s or 2.5min."""
    units = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
    number = text.strip().rstrip("acehimnst ")
    unit = units.get(text.strip()[len(number) :].strip() or "s")
    with suppress(argparse.ArgumentTypeError):
        if unit is not None:
            return unit * positive_float(number)
    raise argparse.ArgumentTypeError(f"{text!r} is not a time, such as 150s or 2.5min")


def _parse(
    text: str, kind: Callable[[str], Number], accept: Callable[[Number], bool], wanted: str
) -> Number:
    with suppress(ValueError):
        value = kind(text)
        if accept(value):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
