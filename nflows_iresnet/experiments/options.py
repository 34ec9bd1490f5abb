"""The options of every command: dataclasses, from which their command lines are generated.

By argparse and not by tyro, whose errors are frames of five to fifteen lines that show the types'
repr, which takes `None` for a number and nothing for `--models`, and is missing without the extra.
Nothing here imports torch, so that a help and the remark on a mistake are there at once.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from nflows_iresnet import __version__
from nflows_iresnet.experiments import names
from nflows_iresnet.experiments.bench.items import describe_items
from nflows_iresnet.experiments.config import (
    IMAGE_DEFAULTS,
    RACE_RATES,
    TRAINING_PRECISIONS,
    RunConfig,
    UsageError,
    resolve_device,
    suggest,
)
from nflows_iresnet.experiments.names import listed
from nflows_iresnet.experiments.presets import COMPARE, QUICK, TABLE2, Preset
from nflows_iresnet.experiments.table1 import DEFAULT_COEFFS, Settings, described_rows

PROGRAM = "nflows-iresnet"
Number = TypeVar("Number", int, float)

# --- values ---------------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    """Parse 1, 2, 3, ..."""
    wanted = "a positive integer below 2147483648, such as 100"
    return _parse(text, int, lambda value: 0 < value < 2**31, wanted)


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


def address(text: str) -> str:
    """Parse the address of a scheduler."""
    protocol, _, place = text.partition("://")
    host, _, port = place.rpartition(":")
    if protocol and host and port.isdecimal():
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not an address, such as tcp://scheduler:8786")


def nonempty(text: str) -> str:
    """Refuse what an unset variable of a shell leaves of a name."""
    if text.strip():
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not a name")


def _one_of(*known: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text in known:
            return text
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")

    return parse


def _parse(
    text: str, kind: Callable[[str], Number], accept: Callable[[Number], bool], wanted: str
) -> Number:
    with suppress(ValueError):
        value = kind(text)
        if accept(value):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")


# --- options --------------------------------------------------------------------------------------

WHAT, IMAGES = "what is done", "images"
HOW, WHERE = "how it is done", "where the results go"
_LENGTH = "length"


def option(
    text: str,
    kind: Callable[[str], object] | None = None,
    metavar: str = "N",
    *,
    group: str = WHAT,
    default: Any = None,
    many: bool = False,
    is_length: bool = False,
) -> Any:
    """Declare a field as an option: of a kind of values, or a flag; one length excludes another."""
    how: dict[str, Any] = {"type": kind, "metavar": metavar, "default": argparse.SUPPRESS}
    if kind is None:
        how, default = {"action": "store_true", "default": argparse.SUPPRESS}, False
    elif many:
        how |= {"nargs": "+", "action": "extend"}
    told = {"help": text, "group": group, "is_length": is_length, "how": how}
    return field(default=default, metadata=told)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command can be told; None is for what was not, and depends on the rest."""

    list: bool = option("list what can be named, and stop")
    seed: int = option("reproduces data, weights, batches and samples", natural_int, default=0)
    quick: bool = option(
        "few steps of small models, unless told otherwise: does it run?", group=HOW
    )
    out: str | None = option(
        "folder for numbers, pictures and report (default: results/COMMAND-TIME)",
        nonempty,
        "DIR",
        group=WHERE,
    )
    quiet: bool = option("print only the path of the report", group=WHERE)

    def default_of(self, name: str) -> object:
        """Return what the help says of an option that was not given."""
        return getattr(self, name)

    def closing(self) -> str:
        """Return what the help says at its end."""
        raise NotImplementedError

    def catalogue(self) -> str:
        """Return what `--list` prints."""
        raise NotImplementedError

    def check(self) -> None:
        """Find the mistakes that can be found at once.

        Raises:
            UsageError: one was found; the message says what to do about it.
            ValueError: likewise.
        """


@dataclass(frozen=True, kw_only=True)
class OnDevice(Options):
    """What commands can be told that run on a GPU, too."""

    device: str = option(
        "where it is done; auto is cuda where there is a GPU",
        _one_of("auto", "cpu", "cuda"),
        "{auto,cpu,cuda}",
        group=HOW,
        default="auto",
    )
    threads: int = option("CPU threads", positive_int, group=HOW, default=1)


@dataclass(frozen=True, kw_only=True)
class Training(OnDevice):
    """What commands can be told that train one model after the other, and can be resumed."""

    data_dir: str | None = option(
        "folder that holds the data sets (default: $NFLOWS_IRESNET_DATA, where that is set)",
        nonempty,
        "DIR",
    )
    repeats: int | None = option("train each model N times, with seeds S, S+1, ...", positive_int)
    num_train: int | None = option(
        "training images to keep (default: all)", positive_int, group=IMAGES
    )
    num_scales: int | None = option(
        "halvings of height and width of images", positive_int, group=IMAGES
    )
    steps: int | None = option("optimiser steps per model", positive_int, group=HOW, is_length=True)
    budget: float | None = option(
        "the same training time for every model instead of the same steps",
        positive_float,
        "SECONDS",
        group=HOW,
        is_length=True,
    )
    minutes: float | None = option(
        "--budget in minutes", positive_float, "X", group=HOW, is_length=True
    )
    batch_size: int | None = option("rows or images per step", positive_int, group=HOW)
    learning_rate: float | None = option(
        "of Adam, annealed to zero by a cosine", positive_float, "X", group=HOW
    )
    training_precision: str | None = option(
        "tf32 allows TensorFloat-32 in training steps on a GPU, never in examinations",
        _one_of(*TRAINING_PRECISIONS),
        f"{{{','.join(TRAINING_PRECISIONS)}}}",
        group=HOW,
    )
    jobs: int = option(
        "train so many models side by side, each in a process with --threads of its own",
        positive_int,
        group=HOW,
        default=1,
    )
    dask: str | None = option(
        "train on the workers of this Dask scheduler, such as tcp://scheduler:8786",
        address,
        "ADDRESS",
        group=HOW,
    )
    resume: bool = option("keep what is finished in --out and do the rest", group=WHERE)
    checkpoint_minutes: float = option(
        "save the training under way this often", positive_float, "X", group=WHERE, default=5.0
    )

    def check(self) -> None:
        """Find the mistakes that can be found at once."""
        if self.resume and self.out is None:
            raise UsageError("--resume needs the --out folder of the run to go on with")


# --- compare and table2 ---------------------------------------------------------------------------

DEFAULTS: dict[str, Any] = {each.name: each.default for each in fields(RunConfig)}
_SAME_START = "-same-start"
_CLOSING = """\
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


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Training):
    """What `compare` and `table2` can be told; their presets hold the defaults."""

    preset: Preset = COMPARE
    datasets: tuple[str, ...] = ()
    models: tuple[str, ...] | None = option("models to compare", nonempty, "MODEL", many=True)
    same_start: bool = option(
        "compare every model twice, as it is and, as a row of its own, with the start of "
        "residual-flow in front of it (ActNorm, a spline of each feature, whitening, started from "
        "5,000 training rows; its parameters count): what differs then is what the blocks do. "
        "Models that have this start themselves stay one row, and with a name such as "
        f"maf{_SAME_START} --models takes one alone; not for --images"
    )
    hidden_features: int | None = option("width of ResidualFlow's networks", positive_int)
    num_layers: int | None = option("transforms in each flow, or scale", positive_int)
    num_blocks_per_layer: int | None = option("depth of each network", positive_int)
    images: bool = option("the data sets are images: multi-scale models", group=IMAGES)
    amp: bool = option(
        "compute coupling networks in bfloat16 while training; log-determinants, and residual "
        "blocks, which need it, stay in full precision",
        group=IMAGES,
    )
    alpha: float | None = option(
        "distance from black and white of the logit", positive_float, "X", group=IMAGES
    )
    marginal_bins: int | None = option(
        "bins of a spline for each pixel in residual-flow, which then has 1x1 convolutions, too, "
        "and starts from training images; 0 for none of this",
        natural_int,
        group=IMAGES,
    )
    num_terms: int | None = option(
        "terms of the series that residual-flow is trained by, 0 for the roulette; examinations "
        "are unbiased in either case",
        natural_int,
        group=IMAGES,
    )
    exact_images: int | None = option(
        "test images that get the exact log-determinant where a model estimates it "
        "(default: 256, fewer where images are large)",
        positive_int,
        group=IMAGES,
    )
    dequantisations: int | None = option("draws of noise in tests", positive_int, group=IMAGES)
    race: float | None = option(
        "the same seconds of the CPU for every model and repeat, on a GPU of the clock, such as "
        "150s or 2.5min: the schedule follows the time, validation does not count, and the table "
        "has means over the seeds, steps and learning rates",
        duration,
        "TIME",
        group=HOW,
        is_length=True,
    )
    learning_rates: tuple[float, ...] | None = option(
        "train each model with each of these and the first seed, and keep the rate that validates "
        "best; the other trainings count nothing, but cost as much as one that does (default: "
        f"none; with --race: {' '.join(map(str, RACE_RATES))}, unless --learning-rate is given)",
        positive_float,
        "X",
        group=HOW,
        many=True,
    )
    patience: int | None = option(
        "stop after so many of the 20 validations without a new best", positive_int, group=HOW
    )

    @property
    def are_images(self) -> bool:
        """Whether the data sets are images, as they were said to be or are by their names."""
        if self.images or not (self.preset.finds_images and self.datasets):
            return self.images
        known = names.sets_of_images().keys() - names.data_sets().keys()
        return known.issuperset(self.datasets)

    def default_of(self, name: str) -> object:
        """Return what the help says of an option that was not given."""
        own = {key: value for key, value in vars(self).items() if value is not None}
        rows = {**DEFAULTS, **self.preset.options, **own}.get(name)
        images = IMAGE_DEFAULTS.get(name, rows)
        if name in ("datasets", "models"):
            rows, images = getattr(self.preset, name), getattr(self.preset, f"image_{name}")
        return rows if rows == images else f"{_shown(rows)}; with --images: {_shown(images)}"

    def closing(self) -> str:
        """Return what the help says at its end."""
        rows, images = (listed(names.models(images=images)) for images in (False, True))
        models = f"models:\n{rows}\n\nmodels with --images:\n{images}\n"
        return "\n".join([models, self.preset.examples, _CLOSING])

    def catalogue(self) -> str:
        """Return what `--list` prints."""
        sections = {
            "datasets:": names.data_sets(),
            "images (with --images):": names.sets_of_images(),
            "models:": names.models(images=False),
            "models with --images:": names.models(images=True),
        }
        return "\n\n".join(f"{title}\n{listed(known)}" for title, known in sections.items())

    def check(self) -> None:
        """Find the mistakes that can be found at once."""
        super().check()
        for name in self.datasets:
            self._check_dataset(name)
        known = names.models(images=self.are_images)
        starts = () if self.are_images else [f"{name}{_SAME_START}" for name in known]
        for name in self.models or ():
            is_like_none = name not in known and not suggest(name, known).startswith("did")
            if is_like_none and name in names.data_sets():
                raise UsageError(f"unknown model {name!r}: data sets stand before the options")
            names.check("model", [name], [*known, *starts])
        to_config(replace(self, device="cpu", same_start=self.same_start and self.are_images))

    def _check_dataset(self, name: str) -> None:
        if not name.strip():
            raise UsageError(f"{name!r} is not the name of a data set: see --list")
        rows, images = names.data_sets(), names.sets_of_images()
        if name in (images if self.are_images else rows):
            return
        if name in rows:
            raise UsageError(f"dataset {name!r} is not a set of images: leave out --images")
        if name in images:
            raise UsageError(f"dataset {name!r} is a set of images: add --images")
        if self.are_images:
            names.check("set of images", [name], images)
        path = Path(name).expanduser()
        if not path.exists():
            if path.suffix or os.sep in name:
                raise UsageError(f"no file {name!r} (looked for {str(path.absolute())!r})")
            names.check("data set", [name], rows)


def to_config(options: CompareOptions) -> RunConfig:
    """Turn options into the configuration of a run.

    Raises:
        ValueError: a value cannot work here; the message names it.
    """
    preset, images = options.preset, options.are_images
    defaults = {**DEFAULTS, **preset.options, **(IMAGE_DEFAULTS if images else {})}
    defaults["datasets"] = preset.image_datasets if images else preset.datasets
    defaults["models"] = preset.image_models if images else preset.models
    device = resolve_device(options.device)
    if images:
        defaults |= preset.tuned_to(options.datasets or defaults["datasets"], device)
    if options.quick:
        defaults |= {**QUICK, "budget": None}
    given = {name: getattr(options, name) for name in DEFAULTS}
    if options.minutes is not None:
        given["budget"] = 60 * options.minutes
    if any(given[name] is not None for name in ("steps", "budget", "race")):
        defaults |= {"steps": None, "budget": None, "race": None}
    if given["race"] is not None and given["learning_rate"] is None:
        defaults["learning_rates"] = RACE_RATES
    chosen = {
        name: default if given[name] in (None, ()) else given[name]
        for name, default in defaults.items()
    }
    for name in ("datasets", "models", "learning_rates"):
        chosen[name] = tuple(dict.fromkeys(chosen[name]))
    if options.same_start:
        if images:
            raise ValueError("--same-start is for rows, and these are images: leave it out")
        from nflows_iresnet.experiments.models import with_same_start

        chosen["models"] = with_same_start(chosen["models"])
    return RunConfig(**{**chosen, "images": images, "device": device})


# --- table1 ---------------------------------------------------------------------------------------

_TABLE1_CLOSING = """\
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


@dataclass(frozen=True, kw_only=True)
class Table1Options(Training):
    """What `table1` can be told; `Settings` holds the defaults."""

    dataset: str = Settings.dataset
    coeffs: tuple[float, ...] | None = option(
        "bounds of Lip(g), each below 1", positive_float, "C", many=True
    )
    hidden_channels: int | None = option(
        "channels of the hidden layers of each branch g", positive_int
    )
    num_blocks: int | None = option("residual blocks per scale", positive_int)
    padding: int | None = option("channels of zeros that are appended to the images", natural_int)
    shift: int | None = option(
        "largest random shift of training images, in pixels", natural_int, group=IMAGES
    )

    def default_of(self, name: str) -> object:
        """Return what the help says of an option that was not given."""
        default = getattr(self, name)
        if default is None:
            default = getattr(Settings(), name, None)
        return f"{default}; mnist: a time" if name == "steps" else default

    def closing(self) -> str:
        """Return what the help says at its end."""
        return f"rows:\n{listed(described_rows(DEFAULT_COEFFS), 15)}\n\n{_TABLE1_CLOSING}"

    def catalogue(self) -> str:
        """Return what `--list` prints."""
        rows = listed(described_rows(DEFAULT_COEFFS), 15)
        return f"data sets:\n{listed(names.sets_of_images(), 15)}\n\nrows:\n{rows}"

    def check(self) -> None:
        """Find the mistakes that can be found at once."""
        super().check()
        Settings(coeffs=self.coeffs or DEFAULT_COEFFS)
        names.check("set of images", [self.dataset], names.sets_of_images())


# --- bench and figures ----------------------------------------------------------------------------

_BENCH_CLOSING = """\
how times are taken:
  All models of a case run in one process, with a fixed number of threads, in rounds: each
  round times every model once, starting with another one. Tables show the median, the
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
_FIGURES_CLOSING = """\
examples:
  nflows-iresnet figures                            all, in minutes on a laptop
  nflows-iresnet figures --quick --out here         small models, trained briefly
  nflows-iresnet figures --only dynamics --seed 1   one figure

Writes a PNG per figure, figures.json with every number shown, and report.html with captions. The
exit status is 0 when all was drawn, 1 when a training diverged or a file could not be written, 2
for arguments that cannot work, 130 after Ctrl-C.
"""


@dataclass(frozen=True, kw_only=True)
class BenchOptions(OnDevice):
    """What `bench` can be told."""

    only: tuple[str, ...] | None = option(
        "items to measure (default: all but quality)", nonempty, "NAME", many=True
    )
    quality: bool = option(
        "also measure likelihood over training time: 2 models, 3 data sets, 3 seeds (1 with "
        "--quick), each for --seconds"
    )
    seconds: float | None = option(
        "training time per model for quality (default: 80; 10 with --quick)",
        positive_float,
        "S",
        group=HOW,
    )
    learning_rate: float = option(
        "of Adam for quality, constant", positive_float, "X", group=HOW, default=5e-3
    )
    repeats: int | None = option(
        "rounds per case (default: as many as fit into a few seconds, at least 5; 3 with --quick)",
        positive_int,
        group=HOW,
    )

    def closing(self) -> str:
        """Return what the help says at its end."""
        items = listed(names.items(), 19)
        return f"items, of which --list says what they measure:\n{items}\n\n{_BENCH_CLOSING}"

    def catalogue(self) -> str:
        """Return what `--list` prints."""
        return describe_items()

    def check(self) -> None:
        """Find the mistakes that can be found at once."""
        names.check("item", self.only, names.items())


@dataclass(frozen=True, kw_only=True)
class FiguresOptions(OnDevice):
    """What `figures` can be told."""

    only: tuple[str, ...] | None = option(
        "figures to draw (default: all)", nonempty, "NAME", many=True
    )
    steps: int | None = option(
        "optimiser steps per model (default: what each figure needs)", positive_int, group=HOW
    )

    def closing(self) -> str:
        """Return what the help says at its end."""
        return f"{self.catalogue()}\n\n{_FIGURES_CLOSING}"

    def catalogue(self) -> str:
        """Return what `--list` prints."""
        return f"figures:\n{listed(names.FIGURES, 12)}"

    def check(self) -> None:
        """Find the mistakes that can be found at once."""
        names.check("figure", self.only, names.FIGURES)


# --- command lines --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        about: one line.
        module: where `run` takes the options, imports torch and does the work.
        options: without any that was given.
        words: the option that takes words without a flag, and its help.
    """

    about: str
    module: str
    options: Options
    words: tuple[str, str] | None = None


def _densities(preset: Preset) -> Command:
    module = "nflows_iresnet.experiments.compare"
    words = "name (see --list), or path of a .csv or .npy file with a row per sample"
    return Command(preset.help, module, CompareOptions(preset=preset), ("datasets", words))


COMMANDS = {
    "compare": _densities(COMPARE),
    "table2": _densities(TABLE2),
    "table1": Command(
        "Test errors of invertible classifiers for five bounds, a free one and a ResNet.",
        "nflows_iresnet.experiments.table1.command",
        Table1Options(),
        ("dataset", "name of a set of images, see --list"),
    ),
    "bench": Command(
        "Time this library, normflows and a plain network side by side.",
        "nflows_iresnet.experiments.bench.command",
        BenchOptions(),
    ),
    "figures": Command(
        "Train small models and draw what the method does.",
        "nflows_iresnet.experiments.figures.command",
        FiguresOptions(),
    ),
}
_TYPED_DASHES = tuple("\u2010\u2011\u2012\u2013\u2014\u2212")
"""What typography makes of the hyphen, in pages from which command lines are copied."""


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def __init__(self, prog: str, about: str, closing: str) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog, description=about, epilog=closing, formatter_class=raw, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving the process."""
        raise UsageError(f"{message} (see {self.prog} --help)")

    def refuse_option(self, word: str) -> NoReturn:
        """Raise, and say which option was probably meant."""
        flag = "--" + word.lstrip("-" + "".join(_TYPED_DASHES)).split("=")[0]
        known = [each for each in self._option_string_actions if each.startswith("--")]
        longer = [each for each in known if each.startswith(flag)]
        hint = suggest(flag, longer or known)
        self.error(f"unknown option {word!r}" + (f": {hint}" if hint.startswith("did") else ""))


def parse(argv: Sequence[str]) -> Options:
    """Read a command line that begins with a command.

    Raises:
        UsageError: it cannot be read; the message says what to do about it.
        SystemExit: it asked for help or the version, which is printed.
    """
    if not argv or argv[0].startswith("-"):
        _parse_without_command(argv)
    names.check("command", argv[:1], COMMANDS)
    options = _read(argv[0], argv[1:])
    try:
        options.check()
    except ValueError as error:
        raise UsageError(str(error)) from error
    return options


def _parse_without_command(argv: Sequence[str]) -> NoReturn:
    commands = listed({name: command.about for name, command in COMMANDS.items()}, 10)
    closing = f"commands, of which each has a --help:\n{commands}"
    parser = _Parser(PROGRAM, "Invertible residual networks for nflows.", closing)
    parser.usage = f"{PROGRAM} [-h] [--version] COMMAND ..."
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    _, rest = parser.parse_known_args(argv)
    if rest and rest[0].startswith("-"):
        parser.refuse_option(rest[0])
    parser.error(f"name a COMMAND: {', '.join(COMMANDS)}")


def _read(name: str, words: Sequence[str]) -> Options:
    command = COMMANDS[name]
    parser = _Parser(f"{PROGRAM} {name}", command.about, command.options.closing())
    _declare(parser, command)
    parsed, rest = parser.parse_known_args(words)
    given: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in vars(parsed).items()
    }
    front = given.pop("WORDS", ())
    for word in (*rest, *front):
        if word[:1] in _TYPED_DASHES or (word in rest and word.startswith("-") and word != "--"):
            parser.refuse_option(word)
    found = (*front, *(word for word in rest if word != "--"))
    return replace(command.options, **{**given, **_words(parser, command, found)})


def _words(parser: _Parser, command: Command, found: tuple[str, ...]) -> dict[str, Any]:
    """Return the field that takes words without a flag; argparse leaves some behind options."""
    name = command.words[0] if command.words else ""
    many = isinstance(getattr(command.options, name, None), tuple)
    taken = len(found) if many else int(bool(name))
    if len(found) > taken:
        parser.error(f"{found[taken]!r} is one word too many")
    if not found:
        return {}
    return {name: found if many else found[0]}


def _declare(parser: _Parser, command: Command) -> None:
    if command.words is not None:
        name, text = command.words
        text = f"{text} (default: {_shown(command.options.default_of(name))})"
        parser.add_argument(
            "WORDS", nargs="*", metavar="DATASET", help=text, default=argparse.SUPPRESS
        )
    declared = [each for each in fields(command.options) if each.metadata]
    groups = {title: parser.add_argument_group(title) for title in (WHAT, IMAGES, HOW, WHERE)}
    if any(each.metadata["is_length"] for each in declared):
        groups[_LENGTH] = groups[HOW].add_mutually_exclusive_group()
    for each in declared:
        told, default = each.metadata, command.options.default_of(each.name)
        text = told["help"]
        if "(default:" not in text and default is not None and default is not False:
            text += f" (default: {_shown(default)})"
        group = groups[_LENGTH if told["is_length"] else told["group"]]
        group.add_argument(f"--{each.name.replace('_', '-')}", help=text, **told["how"])


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
