"""What `nflows-iresnet bench` measures, its targets, and the models whose steps it times.

`ITEMS` is the dictionary of measurements, `STEP_MODELS` that of models: one line in either adds to
every table, picture and file of results. No torch is imported, so that `--help` can list everything
at once: what a line needs is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from nflows_iresnet.experiments.models import MODELS, Architecture

if TYPE_CHECKING:
    from nflows_iresnet.experiments.bench.measure import Case, CaseResult
    from nflows_iresnet.experiments.bench.steps import Trainable
    from nflows_iresnet.experiments.options import BenchOptions

OURS = "ours"
BASELINE = "normflows"
FLOOR = "plain"
Parameters = Mapping[str, float]


@dataclass(frozen=True)
class Column:
    """A column of an item's table beside the time, by the key of its number in the measurements.

    Args:
        baseline: model whose value is divided by the others', or None for no ratio.
        times_milliseconds: multiply by the median time, for what repeats could buy.
    """

    key: str
    title: str
    style: str = ".3g"
    baseline: str | None = BASELINE
    times_milliseconds: bool = False

    @property
    def quantity(self) -> str:
        """What the file of results calls what it shows."""
        return f"{self.key} * ms" if self.times_milliseconds else self.key


@dataclass(frozen=True)
class Target:
    """What this project promises itself of a quantity in words: a bound to reach or to stay below.

    Args:
        measure: returns the quantity from the result of a case, None where it cannot be had.
        applies: for which parameters of a case.
    """

    text: str
    bound: float
    measure: Callable[[CaseResult], float | None]
    applies: Callable[[Parameters], bool] = lambda parameters: True
    at_least: bool = True

    def is_met(self, value: float) -> bool:
        """Whether a measured value meets the target."""
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass(frozen=True)
class Item:
    """One thing that is measured, in several cases.

    Args:
        cases: what is measured with given options.
        columns: of the table, beside the time.
        variable: the parameter in which a power law is fitted where no other changes, or None.
        fitted: key of the number that is fitted; the time if None.
        is_optional: runs only when asked for.
    """

    description: str
    cases: Callable[[BenchOptions], list[Case]]
    columns: tuple[Column, ...] = ()
    targets: tuple[Target, ...] = ()
    variable: str | None = None
    fitted: str | None = None
    is_optional: bool = False


@dataclass(frozen=True)
class StepModel:
    """A model whose training step is timed.

    Args:
        build: makes a fresh model of a given size.
        affords: whether a size and a batch are within its means.
    """

    description: str
    build: Callable[[Architecture], Trainable]
    affords: Callable[[Architecture, int], bool] = lambda size, batch: True


def _imported(name: str, *first: object) -> Callable[..., Any]:
    """Return "module:function" of this folder, imported by a call, with first arguments."""

    def call(*arguments: object) -> Any:
        return resolve_name(f"{__package__}.{name}")(*first, *arguments)

    return call


# --- models ---------------------------------------------------------------------------------------

_DENSE_ELEMENTS = 2**24
"""Tangents of hidden units that the exact estimator may keep: 64 MiB per layer in float32."""


def _affords_jacobian(size: Architecture, batch: int) -> bool:
    return batch * size.features * max(size.hidden_features, size.features) <= _DENSE_ELEMENTS


_estimated = partial(_imported, "steps:with_estimator")
STEP_MODELS: dict[str, StepModel] = {
    OURS: StepModel(
        "this library: residual blocks and ActNorm alone",
        MODELS["residual-flow-plain"].build,
    ),
    "ours-exact": StepModel("logdet.Exact", _estimated("Exact"), _affords_jacobian),
    "ours-series": StepModel("logdet.PowerSeries", _estimated("PowerSeries")),
    "ours-roulette": StepModel("logdet.RussianRoulette", _estimated("RussianRoulette")),
    BASELINE: StepModel(
        "Residual of normflows, as its users run it", MODELS["normflows-residual"].build
    ),
    FLOOR: StepModel(
        "x + g(x) of the same widths, no bound and no log-determinant", _imported("steps:plain")
    ),
}

# --- items ----------------------------------------------------------------------------------------

MEMORY = Column("memory_mb", "peak\nMB")
OPERATIONS = Column("operations", "operations", ".0f")
COMPILE_SECONDS = Column("compile_seconds", "compile\ns", ".0f", baseline=None)
ERROR = Column("error", "true\nerror", ".1e", baseline=None)
EVALUATIONS = Column("evaluations", "evalu-\nations", ".1f")
TOLERANCE = Column("tolerance", "toler-\nance", ".0e", baseline=None)
GRADIENT_ERROR = Column("gradient_error", "gradient\nerror", ".1e")
VALUE_BASELINE = "normflows-value"
VALUE_STD = Column("value_std", "value\nstd", ".3f", baseline=VALUE_BASELINE)
VALUE_BIAS = Column("value_bias", "value\nbias", ".3f", baseline=None)
GRADIENT_MSE = Column("gradient_mse", "gradient\nMSE", ".3g")
AT_COST = Column("gradient_mse", "gradient\nMSE * ms", ".3g", times_milliseconds=True)
NLL = Column("nll", "test NLL\nat best", ".3f", baseline=None)
REACH = Column("reach", "seconds to\nnormflows' best", ".2f")
STEPS = Column("steps", "steps", ".0f", baseline=None)


def our_speed(result: CaseResult) -> float | None:
    """Return how many times faster this library's default is than normflows."""
    return result.speed(OURS)


def _ratio(column: Column) -> Callable[[CaseResult], float | None]:
    return lambda result: result.ratio_of(OURS, column)


_operations = partial(
    Target, measure=lambda result: result.value_of(OURS, OPERATIONS), at_least=False
)
_AT_1024 = Target("step at B = 1024, times faster", 2.0, our_speed, lambda p: p["B"] == 1024)

ITEMS: dict[str, Item] = {
    "step-dimension": Item(
        "training step of six blocks (two from d = 256 on) over the dimension, B = 128",
        _imported("steps:over_dimension"),
        targets=(
            Target("step at d = 2, times faster", 3.0, our_speed, lambda p: p["d"] == 2),
            Target("step at d = 8..64, times faster", 2.5, our_speed, lambda p: 8 <= p["d"] <= 64),
            Target("step at d = h = 512, times faster", 1.9, our_speed, lambda p: p["d"] == 512),
            Target(
                "step beside the plain net, times slower",
                2.5,
                lambda result: result.speed(FLOOR, against=OURS),
                at_least=False,
            ),
        ),
        variable="d",
    ),
    "step-batch-2": Item(
        "training step of six blocks over the batch, d = 2",
        _imported("steps:over_batch", 2),
        targets=(_AT_1024,),
        variable="B",
    ),
    "step-batch-64": Item(
        "training step of six blocks over the batch, d = 64",
        _imported("steps:over_batch", 64),
        targets=(_AT_1024,),
        variable="B",
    ),
    "step-depth": Item(
        "training step over the number of blocks, with ActNorm, d = 2, B = 256",
        _imported("steps:over_depth"),
        variable="blocks",
    ),
    "step-image": Item(
        "training step of two blocks of 3 x 3, 1 x 1 and 3 x 3 convolutions",
        _imported("steps:of_images"),
    ),
    "operations": Item(
        "operations of a training step, gradients added to those before, and its time",
        _imported("steps:of_operations"),
        columns=(OPERATIONS,),
        targets=(
            _operations("operations at d = 2", 478, applies=lambda p: p.get("d") == 2),
            _operations("operations at d = 64", 800, applies=lambda p: p.get("d") == 64),
            _operations(
                "operations, images 1 x 8 x 8", 1000, applies=lambda p: p.get("pixels") == 8
            ),
        ),
    ),
    "step-splines": Item(
        "training step of six couplings, or autoregressive transforms, by a spline of each value",
        _imported("steps:of_splines"),
        columns=(OPERATIONS,),
    ),
    "step-compiled": Item(
        "training step of six blocks through torch.compile (compiling takes minutes)",
        _imported("steps:compiled"),
        columns=(COMPILE_SECONDS,),
        is_optional=True,
    ),
    "memory": Item(
        "peak memory of a training step",
        _imported("steps:memory"),
        columns=(MEMORY,),
        targets=(Target("training memory, times less", 1.0, _ratio(MEMORY)),),
    ),
    "likelihood": Item(
        "exact log-density of one block, without gradients",
        _imported("steps:exact_likelihood"),
        variable="d",
    ),
    "inverse": Item(
        "inverse of a trained block with the bound 0.97, to a verified true error "
        "(1e-6 in float64)",
        _imported("inverses:of_trained_blocks"),
        columns=(ERROR, EVALUATIONS, TOLERANCE),
        targets=(Target("inverse, times faster", 3.0, our_speed, lambda p: p["error"] < 2e-6),),
    ),
    "inverse-scaling": Item(
        "evaluations of the inverse over the bound: a linear map that attains it, error <= 1e-5",
        _imported("inverses:over_the_bound"),
        columns=(ERROR, EVALUATIONS, TOLERANCE),
        variable="1/(1-L)",
        fitted=EVALUATIONS.key,
    ),
    "implicit-gradient": Item(
        "inverse and its gradient: ours, normflows' loop as it is, and the same loop run to 1e-5",
        _imported("inverses:with_gradients"),
        columns=(Column("error", "error\nof x", ".1e", baseline=None), GRADIENT_ERROR, MEMORY),
        targets=(Target("memory of the inverse's gradient, times less", 8.0, _ratio(MEMORY)),),
    ),
    "accuracy": Item(
        "scatter of value and parameter gradient of a trained block on digits, beside the time",
        _imported("quality:of_estimates"),
        columns=(VALUE_STD, VALUE_BIAS, GRADIENT_MSE, AT_COST),
        targets=(
            Target("gradient MSE at equal cost, times less", 4.0, _ratio(AT_COST)),
            Target("std of the value, times less", 3.0, _ratio(VALUE_STD)),
        ),
    ),
    "quality": Item(
        "exact test NLL over training seconds, 6 blocks, the default flows of both",
        _imported("quality:over_training_time"),
        columns=(NLL, REACH, STEPS),
        targets=(Target("time to normflows' likelihood, times less", 8.0, _ratio(REACH)),),
        is_optional=True,
    ),
}


def chosen_items(names: Iterable[str] | None, *, quality: bool = False) -> dict[str, Item]:
    """Return the named items, or all that are not optional; and the quality, if wanted."""
    usual = (name for name, item in ITEMS.items() if not item.is_optional)
    chosen = [*(usual if names is None else names), *(["quality"] if quality else [])]
    return {name: ITEMS[name] for name in chosen}


def describe_items() -> str:
    """List items, models and targets with one line each."""
    promises = [
        f"  {name:18}{target.text}: {'at least' if target.at_least else 'at most'} {target.bound:g}"
        for name, item in ITEMS.items()
        for target in item.targets
    ]
    items = [f"  {name:18}{item.description}" for name, item in ITEMS.items()]
    models = [f"  {name:18}{model.description}" for name, model in STEP_MODELS.items()]
    return "\n".join(
        [
            *("items:", *items, ""),
            *("models of a training step:", *models, ""),
            *("targets, held against what is measured:", *promises),
        ]
    )
