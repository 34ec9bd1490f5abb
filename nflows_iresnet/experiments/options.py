"""What every command can be told, what its help says, and what can be named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from nflows_iresnet.experiments.arguments import (
    HOW,
    IMAGES,
    WHERE,
    Command,
    address,
    check_names,
    duration,
    listed,
    natural_int,
    nonempty,
    one_of,
    option,
    positive_float,
    positive_int,
    read,
    read_without_command,
    shown,
)
from nflows_iresnet.experiments.bench import ITEMS, describe_items
from nflows_iresnet.experiments.config import (
    DEFAULTS,
    IMAGE_DEFAULTS,
    RACE_RATES,
    TRAINING_PRECISIONS,
    RunConfig,
    UsageError,
    flag,
    resolve_device,
    suggest,
)
from nflows_iresnet.experiments.figures import DESCRIPTIONS as FIGURES
from nflows_iresnet.experiments.models import IMAGE_MODELS, MODELS, SAME_START, with_same_start
from nflows_iresnet.experiments.table1 import DEFAULT_COEFFS, Settings, described_rows

how = partial(option, group=HOW)
length = partial(how, is_length=True)
of_images = partial(option, group=IMAGES)
where = partial(option, group=WHERE)

# --- the commands that train densities: one machinery, two sets of defaults -----------------------


@dataclass(frozen=True)
class Preset:
    """What a command does unless it is told otherwise.

    Args:
        command: its name.
        help: one line.
        examples: what `--help` shows at the end.
        datasets: rows of a table, or toy densities.
        image_datasets: with --images.
        models: for rows.
        image_models: for images.
        options: defaults that differ from those of `RunConfig`.
        finds_images: whether names of image sets imply --images.
        shows_published: whether the numbers of the papers stand beside those measured.
        tuned: by the name of a set of images and the kind of the device, the defaults where that
            set is all that is compared.
    """

    command: str
    help: str
    examples: str
    datasets: tuple[str, ...]
    image_datasets: tuple[str, ...]
    models: tuple[str, ...]
    image_models: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    finds_images: bool = False
    shows_published: bool = False
    tuned: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def tuned_to(self, names: Sequence[str], device: str) -> dict[str, Any]:
        """Return the defaults for these sets of images on a device."""
        return self.tuned.get(names[0], {}).get(device, {}) if len(set(names)) == 1 else {}

    def published_beside(self, *, images: bool) -> dict[str, dict[str, str]]:
        """Return the published numbers of the models that are those of the papers.

        For rows that is the residual flow without splines and linear layers; for images there are
        none.
        """
        if not self.shows_published:
            return {}
        from nflows_iresnet.experiments.published import BITS_PER_DIM

        other = "residual-flow-plain" if images else "residual-flow"
        return {model: row for model, row in BITS_PER_DIM.items() if model != other}


_MNIST = {
    "models": ("residual-flow",),
    "steps": None,
    "learning_rate": 3e-3,
    "alpha": 1e-6,
    "marginal_bins": 16,
    "num_terms": 8,
}
MNIST: dict[str, dict[str, Any]] = {
    "cuda": {
        **_MNIST,
        "budget": 600.0,
        "hidden_features": 128,
        "num_layers": 8,
        "batch_size": 256,
        "training_precision": "tf32",
        "exact_images": 64,
    },
    "cpu": {
        **_MNIST,
        "budget": 120.0,
        "hidden_features": 32,
        "num_layers": 2,
        "exact_images": 8,
    },
}
"""Ten minutes on a GPU, where a step of batch 256 takes 69 ms, and two minutes on a CPU."""

COMPARE = Preset(
    command="compare",
    help="Train flows on the same data and report which wins, at what cost.",
    examples="""\
examples:
  nflows-iresnet compare                                  three toy densities, five models
  nflows-iresnet compare my.csv --steps 3000 --out here   your own rows (or .tsv, .txt, .npy)
  nflows-iresnet compare moons --models residual-flow normflows-residual --repeats 3
  nflows-iresnet compare casp --data-dir data --models hybrid nsf-coupling maf --same-start
  nflows-iresnet compare digits --budget 60               one minute of training per model
  nflows-iresnet compare my.csv --steps 3000 --out here --resume    go on after an interruption
  nflows-iresnet compare digits --images                  multi-scale flows, bits per dimension
  nflows-iresnet compare mnist --images --data-dir data --device cuda --minutes 10

`mnist --images` is residual-flow alone unless other --models are named, with a size, a start and a
time that suit the device: ten minutes of training on a GPU, two on a CPU.
""",
    datasets=("moons", "8-gaussians", "checkerboard"),
    image_datasets=("digits",),
    models=("residual-flow", "i-resnet", "realnvp", "maf", "glow"),
    image_models=("residual-flow", "glow", "realnvp"),
    tuned={"mnist": MNIST},
)

TABLE2 = Preset(
    command="table2",
    help="Bits per dimension of generative models, beside the published numbers.",
    examples="""\
examples:
  nflows-iresnet table2                                   digits, minutes on a CPU
  nflows-iresnet table2 --quick                           does it run? half a minute
  nflows-iresnet table2 moons casp                        nats of toys and tables
  nflows-iresnet table2 mnist --data-dir data --device cuda --budget 3600 --hidden-features 256
  nflows-iresnet table2 digits --out here --resume        go on after an interruption

It is `compare` with other defaults: the same steps, the same learning rate and as many parameters
for every model. digits, toys and tables are rows, for which i-resnet and residual-flow-plain are
the papers' models, InvertibleResNet and ResidualFlow without splines and linear layers, and
residual-flow is ResidualFlow as it is by default; larger images (or --images) get multi-scale flows
for glow, realnvp, i-resnet and residual-flow, and flows on the flattened logits for the others,
whose width can match the parameters only coarsely. nice-scaled and realnvp-scaled have the scaling
of the papers, which nflows' flows lack. FFJORD needs zuko: pip install '.[ffjord]' in the clone; it
trains with Hutchinson's estimate and is tested with the exact trace, like every other row. The
published columns are what the papers report for MNIST and CIFAR-10: other data, networks a hundred
times larger, days of training. Compare the order of the models, not the numbers.
""",
    datasets=("digits",),
    image_datasets=("mnist",),
    models=(
        *("nice-scaled", "made", "maf", "realnvp-scaled", "glow"),
        *("ffjord", "i-resnet", "residual-flow-plain", "residual-flow"),
    ),
    image_models=(
        *("nice", "made", "maf", "realnvp", "glow", "ffjord", "i-resnet", "residual-flow"),
    ),
    options={"steps": 1000, "learning_rate": 2e-3},
    finds_images=True,
    shows_published=True,
)

QUICK: dict[str, Any] = {"steps": 20, "num_layers": 2}
"""What --quick changes."""

# --- names ----------------------------------------------------------------------------------------


def models(*, images: bool) -> dict[str, str]:
    """Return the models for rows, or for images."""
    return {name: spec.description for name, spec in (IMAGE_MODELS if images else MODELS).items()}


def items() -> dict[str, str]:
    """Return the items of the benchmark."""
    return {name: item.description for name, item in ITEMS.items()}


def data_sets(*, images: bool) -> dict[str, str]:
    """Return the data sets of rows, or of images; to ask is to import torch."""
    from nflows_iresnet import datasets

    return datasets.available_images() if images else datasets.available()


def _out(files: str) -> Any:
    return where(f"folder for {files} (default: results/COMMAND-TIME)", nonempty, "DIR")


# --- what several can be told --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command can be told; None is for what was not, and depends on the rest."""

    list: bool = option("list what can be named, and stop")
    seed: int = option("reproduces data, weights, batches and samples", natural_int, default=0)
    quick: bool = how("few steps of small models, unless told otherwise: does it run?")
    out: str | None = _out("results.json and .csv, weights, pictures and report.html")
    quiet: bool = where("print only the path of the report")

    def default_of(self, name: str) -> object:
        """Return what the help says of an option that was not given."""
        return getattr(self, name)

    def check(self) -> None:
        """Find the mistakes that can be found at once.

        Raises:
            UsageError: one was found; the message says what to do about it.
            ValueError: likewise.
        """
        for each in fields(self):
            if (known := each.metadata.get("known")) and getattr(self, each.name):
                check_names(known[0], getattr(self, each.name), known[1]())


@dataclass(frozen=True, kw_only=True)
class OnDevice(Options):
    """What commands can be told that run on a GPU, too."""

    device: str = how(
        "where it is done; auto is cuda where there is a GPU",
        one_of("auto", "cpu", "cuda"),
        "{auto,cpu,cuda}",
        default="auto",
    )
    threads: int = how("CPU threads", positive_int, default=1)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(OnDevice):
    """What commands can be told that train one model after the other, and can be resumed."""

    data_dir: str | None = option(
        "folder that holds the data sets (default: $NFLOWS_IRESNET_DATA, where that is set)",
        nonempty,
        "DIR",
    )
    repeats: int | None = option(
        "train each model N times, with seeds S, S+1, ...: repeats 0, 1, ...", positive_int
    )
    num_train: int | None = of_images("training images to keep (default: all)", positive_int)
    num_scales: int | None = of_images("halvings of height and width of images", positive_int)
    steps: int | None = length("optimiser steps per model", positive_int)
    budget: float | None = length(
        "the same training time for every model instead of the same steps",
        positive_float,
        "SECONDS",
    )
    minutes: float | None = length("--budget in minutes", positive_float, "X")
    batch_size: int | None = how("rows or images per step", positive_int)
    learning_rate: float | None = how("of Adam, annealed to zero by a cosine", positive_float, "X")
    training_precision: str | None = how(
        "tf32 allows TensorFloat-32 in training steps on a GPU, never in examinations",
        one_of(*TRAINING_PRECISIONS),
        f"{{{','.join(TRAINING_PRECISIONS)}}}",
    )
    jobs: int = how(
        "train so many models side by side, each in a process with --threads of its own",
        positive_int,
        default=1,
    )
    dask: str | None = how(
        "train on the workers of this Dask scheduler, such as tcp://scheduler:8786",
        address,
        "ADDRESS",
    )
    resume: bool = where("keep what is finished in --out and do the rest")
    checkpoint_minutes: float = where(
        "save the training under way this often", positive_float, "X", default=5.0
    )

    def choose(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """Return defaults, but for what was told; a length that was told excludes the others."""
        given = {name: getattr(self, name) for name in defaults}
        if self.minutes is not None:
            given["budget"] = 60 * self.minutes
        lengths = defaults.keys() & {"steps", "budget", "race"}
        if any(given[name] is not None for name in lengths):
            defaults = {**defaults, **dict.fromkeys(lengths)}
        return {
            name: default if given[name] in (None, ()) else given[name]
            for name, default in defaults.items()
        }

    def check(self) -> None:
        """Find the mistakes that can be found at once."""
        super().check()
        if self.resume and self.out is None:
            raise UsageError("--resume needs the --out folder of the run to go on with")


# --- compare and table2 ---------------------------------------------------------------------------

_CLOSING = """\
Every model gets the same rows, the same batches and, within 10%, as many parameters as ResidualFlow
at --hidden-features and --num-layers. The validation rows, a thousand of them, choose all that is
chosen: training stops after --patience validations without a new best, the best state of the
averaged weights is kept, and of several --learning-rates the best one; the test rows choose
nothing. On a GPU a training step is one CUDA graph where that can be, and it is said where it
cannot. A training under way is saved every few minutes, and goes on from there with --resume.
The exit status is 0 when the comparison is complete (a model that fails is a result), 1 when a file
cannot be written, 2 for arguments or data that cannot work, 130 after Ctrl-C, which saves the
training under way at the end of its step (again, it stops at once), 143 after SIGTERM, which does
the same.
"""


@dataclass(frozen=True, kw_only=True)
class CompareOptions(TrainingOptions):
    """What `compare` and `table2` can be told; their presets hold the defaults."""

    preset: Preset = COMPARE
    datasets: tuple[str, ...] = ()
    models: tuple[str, ...] | None = option("models to compare", nonempty, "MODEL", many=True)
    same_start: bool = option(
        "compare every model twice, as it is and, as a row of its own, with the start of "
        "residual-flow in front of it (ActNorm, a spline of each feature, whitening, started from "
        "5,000 training rows; its parameters count): what differs then is what follows, the blocks "
        "and what stands between them. "
        "Models that have this start themselves stay one row, and with a name such as "
        f"maf{SAME_START} --models takes one alone; not for --images"
    )
    hidden_features: int | None = option("width of ResidualFlow's networks", positive_int)
    num_layers: int | None = option("transforms in each flow, or scale", positive_int)
    num_blocks_per_layer: int | None = option("depth of each network", positive_int)
    images: bool = of_images("the data sets are images: multi-scale models")
    amp: bool = of_images(
        "compute coupling networks in bfloat16 while training; log-determinants, and residual "
        "blocks, which need it, stay in full precision"
    )
    alpha: float | None = of_images(
        "distance from black and white of the logit", positive_float, "X"
    )
    marginal_bins: int | None = of_images(
        "bins of a spline for each pixel in residual-flow, which then has 1x1 convolutions and a "
        "spline of each channel before each block, too, and starts from training images; 0 for "
        "none of this",
        natural_int,
    )
    num_terms: int | None = of_images(
        "terms of the series that residual-flow is trained by, 0 for the roulette; examinations "
        "are unbiased in either case",
        natural_int,
    )
    exact_images: int | None = of_images(
        "test images that get the exact log-determinant where a model estimates it "
        "(default: 256, fewer where images are large)",
        positive_int,
    )
    dequantisations: int | None = of_images("draws of noise in tests", positive_int)
    race: float | None = length(
        "the same seconds of the CPU for every model and repeat, on a GPU of the clock, such as "
        "150, 150s or 2.5min: the schedule follows the time, validation and the start from rows do "
        "not count, and the table has means over the seeds, steps and learning rates",
        duration,
        "TIME",
    )
    learning_rates: tuple[float, ...] | None = how(
        "train each model with each of these and the first seed, and keep the rate that validates "
        "best; the other trainings count nothing, but cost as much as one that does (default: "
        f"none; with --race: {' '.join(map(str, RACE_RATES))}, unless --learning-rate is given)",
        positive_float,
        "X",
        many=True,
    )
    patience: int | None = how(
        "stop after so many of the 20 validations without a new best", positive_int
    )

    @property
    def are_images(self) -> bool:
        """Whether the data sets are images, as they were said to be or are by their names."""
        if self.images or not (self.preset.finds_images and self.datasets):
            return self.images
        known = data_sets(images=True).keys() - data_sets(images=False).keys()
        return known.issuperset(self.datasets)

    def default_of(self, name: str) -> object:
        """Return what the help says of an option that was not given."""
        own = {key: value for key, value in vars(self).items() if value is not None}
        rows = {**DEFAULTS, **self.preset.options, **own}.get(name)
        images = IMAGE_DEFAULTS.get(name, rows)
        if name in ("datasets", "models"):
            rows, images = getattr(self.preset, name), getattr(self.preset, f"image_{name}")
        return rows if rows == images else f"{shown(rows)}; with --images: {shown(images)}"

    def check(self) -> None:
        """Find the mistakes that can be found at once; files and unknown names are loading's."""
        super().check()
        for name in self.datasets:
            self._check_kind(name)
        known = models(images=self.are_images)
        starts = () if self.are_images else [f"{name}{SAME_START}" for name in known]
        for name in self.models or ():
            is_like_none = name not in known and not suggest(name, known).startswith("did")
            if is_like_none and name in data_sets(images=False):
                raise UsageError(f"unknown model {name!r}: data sets stand before the options")
            check_names("model", [name], [*known, *starts])
        to_config(replace(self, device="cpu", same_start=self.same_start and self.are_images))

    def _check_kind(self, name: str) -> None:
        """Check that a name is one of rows, or of images, whichever is meant."""
        kind, other = self.are_images, not self.are_images
        if not name.strip():
            raise UsageError(f"{name!r} is not the name of a data set: see --list")
        if name in data_sets(images=other) and name not in data_sets(images=kind):
            remedy = "not a set of images: leave out" if kind else "a set of images: add"
            raise UsageError(f"dataset {name!r} is {remedy} --images")
        if self.are_images:
            check_names("set of images", [name], data_sets(images=True))


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
    if options.learning_rate is not None and options.learning_rates is not None:
        raise ValueError(
            f"--learning-rate {options.learning_rate:g} would not be used beside --learning-rates: "
            "leave it out, or name it among them"
        )
    if images:
        defaults |= preset.tuned_to(options.datasets or defaults["datasets"], device)
    if options.quick:
        defaults |= {**QUICK, "budget": None}
    if options.race is not None and options.learning_rate is None:
        defaults["learning_rates"] = RACE_RATES
    chosen = options.choose(defaults)
    for name in ("datasets", "models", "learning_rates"):
        chosen[name] = tuple(dict.fromkeys(chosen[name]))
    if options.same_start:
        if images:
            raise ValueError("--same-start is for rows, and these are images: leave it out")
        chosen["models"] = with_same_start(chosen["models"])
    _check_used(options, chosen["models"], device)
    return RunConfig(**{**chosen, "images": images, "device": device})


def _check_used(options: CompareOptions, models: Sequence[str], device: str) -> None:
    """Check that options are not for what is not there, but for those of a preset.

    Raises:
        ValueError: one is; the message says what it is for.
    """
    if not options.are_images or any("residual-flow" in each for each in models):
        return
    names = options.datasets or options.preset.image_datasets
    preset = options.preset.tuned_to(names, device)
    for name in ("num_terms", "marginal_bins"):
        value = getattr(options, name)
        if value and value != preset.get(name):
            raise ValueError(
                f"{flag(name)} {value} is for residual-flow, and it is not among "
                "--models: add it, or leave the option out"
            )


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
step (again, it stops at once), 143 after SIGTERM, which does the same.
"""


@dataclass(frozen=True, kw_only=True)
class Table1Options(TrainingOptions):
    """What `table1` can be told; `Settings` holds the defaults."""

    dataset: str = Settings.dataset
    out: str | None = _out("results.json, table1.png and report.html")
    coeffs: tuple[float, ...] | None = option(
        "bounds of Lip(g), each below 1", positive_float, "C", many=True
    )
    hidden_channels: int | None = option(
        "channels of the hidden layers of each branch g", positive_int
    )
    num_blocks: int | None = option("residual blocks per scale", positive_int)
    padding: int | None = option("channels of zeros that are appended to the images", natural_int)
    shift: int | None = of_images("largest random shift of training images, in pixels", natural_int)

    def default_of(self, name: str) -> object:
        """Return what the help says of an option that was not given."""
        default = getattr(self, name)
        if default is None:
            default = getattr(Settings(), name, None)
        return f"{default}; mnist: a time" if name == "steps" else default

    def check(self) -> None:
        """Find the mistakes that can be found at once."""
        super().check()
        Settings(coeffs=self.coeffs or DEFAULT_COEFFS)
        check_names("set of images", [self.dataset], data_sets(images=True))


# --- bench and figures ----------------------------------------------------------------------------

_BENCH_CLOSING = """\
how times are taken:
  All models of a case run in one process, with a fixed number of threads, in rounds: each
  round times every model once, starting with another one. Tables show the median, the
  quartiles q1 and q3, and the ratio to normflows: that of each round, its median and quartiles.
  "cpu ratio" is that of processor time. With one thread it is the one to trust, and the one that
  targets are held against: other programs that take the processor away lengthen the wall time of
  whom they happen to hit, not the processor time. With more threads, and on a GPU (idle before and
  done after), targets are held against the wall ratio. Columns "x" are how many times smaller a
  number is than normflows'; "x of normflows-value", than that of its estimate of the value: what
  normflows trains by, the row normflows, is made for the gradient, and its value is biased.

examples:
  nflows-iresnet bench --quick                          a subset, minutes
  nflows-iresnet bench --only step-dimension inverse    two items in full
  nflows-iresnet bench --only quality --seconds 30      likelihood over training time
  nflows-iresnet bench --device cuda --out here         here/bench.json and here/bench.png

The exit status is 0 when everything was measured (a missed target is a result), 1 when a file
cannot be written, 2 for arguments that cannot work, 130 after Ctrl-C and 143 after SIGTERM;
what is measured by then is kept.
"""
_FIGURES_CLOSING = """\
examples:
  nflows-iresnet figures                            all, in minutes on a laptop
  nflows-iresnet figures --quick --out here         small models, trained briefly
  nflows-iresnet figures --only dynamics --seed 1   one figure

Writes a PNG per figure, figures.json with every number shown, and report.html with captions. The
exit status is 0 when all was drawn, 1 when a training diverged or a file could not be written, 2
for arguments that cannot work, 130 after Ctrl-C, 143 after SIGTERM.
"""


@dataclass(frozen=True, kw_only=True)
class BenchOptions(OnDevice):
    """What `bench` can be told."""

    out: str | None = _out("bench.json and, of what grows, bench.png, of quality, quality.png")
    only: tuple[str, ...] | None = option(
        "items to measure (default: all but step-compiled and quality)",
        nonempty,
        "NAME",
        many=True,
        known=("item", items),
    )
    quality: bool = option(
        "also measure likelihood over training time: 2 models, 3 data sets, 3 seeds (1 with "
        "--quick), each for --seconds"
    )
    seconds: float | None = how(
        "training time per model for quality (default: 80; 10 with --quick)", positive_float, "S"
    )
    learning_rate: float | None = how(
        "of Adam for quality, constant (default: 0.005)", positive_float, "X"
    )
    repeats: int | None = how(
        "rounds per case (default: as many as fit into a few seconds, at least 5; 3 with --quick)",
        positive_int,
    )

    @property
    def rate(self) -> float:
        """The learning rate for quality."""
        return self.learning_rate or 5e-3

    def check(self) -> None:
        """Find the mistakes that can be found at once."""
        super().check()
        measures_quality = self.quality or "quality" in (self.only or ())
        for name in ("seconds", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not measures_quality:
                option = f"{flag(name)} {value:g}"
                raise UsageError(f"{option} is for the item quality alone: leave it out")
        if self.repeats is not None and self.only is not None and set(self.only) == {"quality"}:
            raise UsageError(
                f"--repeats {self.repeats} is for what is timed, and quality has three seeds: "
                "leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class FiguresOptions(OnDevice):
    """What `figures` can be told."""

    out: str | None = _out("figures.json, a PNG per figure and report.html")
    only: tuple[str, ...] | None = option(
        "figures to draw (default: all)",
        nonempty,
        "NAME",
        many=True,
        known=("figure", FIGURES.keys),
    )
    steps: int | None = how(
        "optimiser steps per model (default: what each figure needs)", positive_int
    )


# --- the commands ---------------------------------------------------------------------------------


def _densities(preset: Preset) -> Command:
    def closing() -> str:
        rows, images = (listed(models(images=images)) for images in (False, True))
        known = f"models:\n{rows}\n\nmodels with --images:\n{images}\n"
        return "\n".join([known, preset.examples, _CLOSING])

    return Command(
        preset.help,
        "nflows_iresnet.experiments.compare",
        CompareOptions(preset=preset),
        closing,
        _all_data_and_models,
        ("datasets", "name (see --list), or path of a .csv, .tsv, .txt or .npy file of rows"),
    )


def _all_data_and_models() -> str:
    sections = {
        "datasets:": data_sets(images=False),
        "images (with --images):": data_sets(images=True),
        "models:": models(images=False),
        "models with --images:": models(images=True),
    }
    return "\n\n".join(f"{title}\n{listed(known)}" for title, known in sections.items())


def _rows() -> str:
    return f"rows:\n{listed(described_rows(DEFAULT_COEFFS), 15)}"


def _items() -> str:
    return f"items, of which --list says what they measure:\n{listed(items(), 19)}"


def _figures() -> str:
    return f"figures:\n{listed(FIGURES, 12)}"


COMMANDS = {
    "compare": _densities(COMPARE),
    "table2": _densities(TABLE2),
    "table1": Command(
        "Test errors of invertible classifiers for five bounds, a free one and a ResNet.",
        "nflows_iresnet.experiments.table1.command",
        Table1Options(),
        lambda: f"{_rows()}\n\n{_TABLE1_CLOSING}",
        lambda: f"data sets:\n{listed(data_sets(images=True), 15)}\n\n{_rows()}",
        ("dataset", "name of a set of images, see --list"),
    ),
    "bench": Command(
        "Time this library, normflows and a plain network side by side.",
        "nflows_iresnet.experiments.bench.command",
        BenchOptions(),
        lambda: f"{_items()}\n\n{_BENCH_CLOSING}",
        describe_items,
    ),
    "figures": Command(
        "Train small models and draw what the method does.",
        "nflows_iresnet.experiments.figures.command",
        FiguresOptions(),
        lambda: f"{_figures()}\n\n{_FIGURES_CLOSING}",
        _figures,
    ),
}


def parse(argv: Sequence[str]) -> Options:
    """Read a command line that begins with a command.

    Raises:
        UsageError: it cannot be read; the message says what to do about it.
        SystemExit: it asked for help or the version, which is printed.
    """
    if not argv or argv[0].startswith("-"):
        read_without_command(argv, COMMANDS)
    check_names("command", argv[:1], COMMANDS)
    options: Options = read(argv[0], COMMANDS[argv[0]], argv[1:])
    try:
        options.check()
    except ValueError as error:
        raise UsageError(str(error)) from error
    return options
