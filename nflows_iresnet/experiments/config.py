"""What a result depends on: every choice, validated, in one frozen value; versions, machine."""

from __future__ import annotations

import difflib
import math
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from nflows_iresnet import __version__

Choices = TypeVar("Choices", bound=Any)
RACE_RATES = (1e-3, 3e-3, 1e-2)
"""Learning rates of which each model of a race gets the one that validates best."""
TRAINING_PRECISIONS = ("float32", "tf32")
_PACKAGES = ("torch", "nflows", "normflows", "numpy", "scikit-learn", "matplotlib", "rich", "zuko")
_EXTRA = ("jinja2", "joblib", "matplotlib", "pandas", "rich", "scipy")


@dataclass(frozen=True)
class RunConfig:
    """Every choice that a result depends on: equal configurations give equal results.

    What the help of `compare` says of an option of that name is not said again.

    Args:
        datasets: names or paths of the data sets.
        models: names in `models.MODELS`, or in `models.IMAGE_MODELS`.
        steps, budget, race: the length of a training, of which two are None.
        learning_rates: several, of which each model gets the one that validates best with the first
            seed; none for `learning_rate`.
        patience: validations, of 20, without a new best after which a training stops.
        images: whether the data sets are images, of which the rest speaks.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    datasets: tuple[str, ...]
    models: tuple[str, ...]
    steps: int | None = 400
    budget: float | None = None
    race: float | None = None
    device: str = "cpu"
    seed: int = 0
    repeats: int = 1
    data_dir: str | None = None
    batch_size: int = 256
    learning_rate: float = 5e-3
    learning_rates: tuple[float, ...] = ()
    patience: int = 8
    hidden_features: int = 64
    num_layers: int = 6
    num_blocks_per_layer: int = 2
    threads: int = 1
    images: bool = False
    num_train: int | None = None
    num_scales: int = 2
    amp: bool = False
    alpha: float = 0.05
    marginal_bins: int = 0
    num_terms: int = 0
    training_precision: str = "float32"
    exact_images: int | None = None
    dequantisations: int = 1

    def __post_init__(self) -> None:
        """Check that every number is in range."""
        if [self.steps, self.budget, self.race].count(None) != 2:
            raise ValueError("give one of --steps, --budget and --race, and not more")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed must be between 0 and {2**31 - 1}, got {self.seed}")
        for name, value in vars(self).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and name not in ("seed", "alpha", "marginal_bins", "num_terms"):
                _check_positive(name, value)
        for rate in self.learning_rates:
            _check_positive("learning_rates", rate)
        own = [name for name in _OF_IMAGES if getattr(self, name) != DEFAULTS[name]]
        if own and not self.images:
            names, verb = " and ".join(map(flag, own)), "is" if len(own) == 1 else "are"
            raise ValueError(f"{names} {verb} for images: add --images, or leave that out")
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"--alpha must be between 0 and 0.5, got {self.alpha}")
        for name in ("marginal_bins", "num_terms"):
            if getattr(self, name) < 0:
                raise ValueError(f"{flag(name)} must not be negative, got {getattr(self, name)}")
        if self.training_precision not in TRAINING_PRECISIONS:
            known = " or ".join(TRAINING_PRECISIONS)
            raise ValueError(f"--training-precision must be {known}, got {self.training_precision}")

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that are tried."""
        return self.learning_rates or (self.learning_rate,)

    @property
    def is_tuned(self) -> bool:
        """Whether there is a learning rate to be chosen."""
        return len(self.rates) > 1

    def as_arguments(self) -> dict[str, Any]:
        """Every choice as plain JSON data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


DEFAULTS: dict[str, Any] = {each.name: each.default for each in fields(RunConfig)}
_OF_IMAGES = (
    *("num_train", "num_scales", "amp", "alpha"),
    *("marginal_bins", "num_terms", "exact_images", "dequantisations"),
)

IMAGE_DEFAULTS: dict[str, Any] = {"batch_size": 64, "learning_rate": 1e-3, "num_layers": 4}
"""What images need other defaults for."""


def flag(name: str) -> str:
    """Return an option as it is typed."""
    return f"--{name.replace('_', '-')}"


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{flag(name)} must be a positive number, got {value}")


def resolve_device(name: str) -> str:
    """Choose "cuda" or "cpu" for "auto", and check that "cuda" is there.

    Raises:
        ValueError: "cuda" was asked for and torch sees no GPU.
    """
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device 'cuda' is not available to torch {torch.__version__}: "
            "use --device cpu, or install a torch build with CUDA"
        )
    return name


def in_any_folder(config: Choices) -> Choices:
    """Return choices that find the same data from any folder."""
    data_dir = getattr(config, "data_dir", None)
    return config if data_dir is None else replace(config, data_dir=absolute(data_dir))


def absolute(path: str) -> str:
    """Return what names the same place from any folder; ~ is the home of the user."""
    return os.path.abspath(os.path.expanduser(path))


def suggest(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant, else list them all."""
    names = {each.lstrip("-"): each for each in sorted(known)}
    close = difflib.get_close_matches(name.lstrip("-"), names, n=1)
    if close:
        return f"did you mean {names[close[0]]!r}?"
    return f"choose from {', '.join(names.values())}"


def slug(name: str) -> str:
    """Turn a name into something every file system accepts."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "data"


def describe(error: Exception) -> str:
    """Say in one short line what went wrong."""
    lines = str(error).strip().splitlines() or ["no message"]
    text = lines[0] if len(lines[0]) <= 160 else lines[0][:157] + "..."
    return f"{type(error).__name__}: {text}"


class UsageError(Exception):
    """Something that the user can mend; the message is one line."""


# --- versions and machine -------------------------------------------------------------------------


def check_extra() -> None:
    """Check that the `compare` extra is installed.

    Raises:
        UsageError: a package is missing; the message says how to install it.
    """
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} not installed: pip install '.[compare]' in the clone"
        )


def versions() -> dict[str, str | None]:
    """Return the versions of this package and of those that results depend on."""
    return {"nflows-iresnet": __version__, **{name: _version(name) for name in _PACKAGES}}


def describe_environment(device: str) -> dict[str, Any]:
    """Return versions, device and machine as plain JSON data."""
    import torch

    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cpu_count": os.cpu_count(),
        "cuda": torch.version.cuda,
    }


def check_environment(environment: dict[str, Any]) -> None:
    """Check that a record holds what reports say of its environment.

    Raises:
        ValueError: something is missing; the message names it.
    """
    inner = environment.get("versions")
    known = environment | (inner if isinstance(inner, dict) else {})
    for name in ("versions", "device", "device_name", "nflows-iresnet", "torch"):
        if name not in known:
            raise ValueError(f"environment has no {name}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
