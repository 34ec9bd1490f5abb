"""Training steps: zero_grad, log_prob, backward, Adam, and what the library asks for after it.

Their time, their memory and their operations, beside those of a net without a density.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nflows_iresnet import logdet
from nflows_iresnet.experiments.adapters import (
    DensityModel,
    NormflowsResidualModel,
    ResidualModel,
    as_density_model,
    residual_blocks,
)
from nflows_iresnet.experiments.bench import (
    BASELINE,
    COMPILE_SECONDS,
    FLOOR,
    MEMORY,
    OPERATIONS,
    OURS,
    STEP_MODELS,
)
from nflows_iresnet.experiments.bench.measure import Case, Run, Work, time_once
from nflows_iresnet.experiments.evaluation import peak_megabytes
from nflows_iresnet.experiments.models import MODELS, Architecture
from nflows_iresnet.experiments.options import BenchOptions
from nflows_iresnet.flows import ImageResidualFlow, spline_autoregressive, spline_coupling
from nflows_iresnet.flows.base import Flow, StandardNormal
from nflows_iresnet.nn import LipschitzCNN, LipschitzMLP
from nflows_iresnet.training.processes import seed_everything
from nflows_iresnet.transforms import CompositeTransform, ResidualTransform

# --- models beside those of `compare` -------------------------------------------------------------


class PlainNet(nn.Module):
    """x + g(x) with ordinary layers, scored without a log-determinant: the floor.

    Args:
        branches: the functions g, one per block.
    """

    def __init__(self, branches: Iterable[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return the log-density of the outputs under a standard normal, (B, *) -> (B,)."""
        for branch in self.branches:
            inputs = inputs + branch(inputs)
        constant = 0.5 * inputs.shape[1:].numel() * math.log(2 * math.pi)
        return -0.5 * inputs.square().flatten(start_dim=1).sum(1) - constant

    def after_step(self) -> None:
        """Do nothing."""


Trainable = DensityModel | PlainNet


class _OfChannels(nn.Module):
    """An activation along the channels of images, (B, channels, H, W) to the same shape."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.activation(inputs.movedim(1, -1)).movedim(-1, 1)
        return outputs


def _plain_branch(net: LipschitzMLP | LipschitzCNN) -> nn.Sequential:
    """Return the layers of a network one after another: by themselves they know of no bound."""
    is_of_images = isinstance(net, LipschitzCNN)
    between = [_OfChannels(each) if is_of_images else each for each in net.activations]
    first, *others = net.layers
    pairs = zip(between, others, strict=True)
    return nn.Sequential(first, *(module for pair in pairs for module in pair))


def plain(size: Architecture) -> PlainNet:
    """Build the plain net with the widths and the activations of our flow."""
    widths = [size.hidden_features] * size.num_blocks_per_layer
    nets = (LipschitzMLP(size.features, widths) for _ in range(size.num_layers))
    return PlainNet(map(_plain_branch, nets))


def with_estimator(name: str, size: Architecture) -> DensityModel:
    """Build our flow with a class of `logdet` in place of its default."""
    model = MODELS["residual-flow-plain"].build(size)
    for block in residual_blocks(model):
        block.estimator = getattr(logdet, name)()
    return model


def first_block(model: Trainable) -> Trainable:
    """Return the first block of a model alone, without the ActNorm beside it."""
    if isinstance(model, NormflowsResidualModel):
        blocks = [flow for flow in model.flow.flows if hasattr(flow, "iresblock")]
        model.flow.flows = nn.ModuleList(blocks[:1])
    elif isinstance(model, ResidualModel):
        shape = model.flow._distribution._shape
        model.flow = Flow(residual_blocks(model.flow)[0], StandardNormal(shape))
    return model


class CompiledModel(ResidualModel):
    """A flow of this library whose `log_prob` goes through `torch.compile`, as one graph.

    With the exact log-determinant where that is the default, else with the power series, of about
    as many terms as the roulette needs for a bound of 0.97: that cannot be compiled, since the
    number of its terms is random.
    """

    def __init__(self, size: Architecture) -> None:
        super().__init__(MODELS["residual-flow-plain"].build_flow(size))
        exact = size.features <= logdet.Auto().max_exact_features
        for block in residual_blocks(self.flow):
            block.estimator = logdet.Exact() if exact else logdet.PowerSeries(num_terms=6)
        self._compiled = torch.compile(self.flow.log_prob, fullgraph=True)
        self._has_started = False

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return the flow's log-density; the first call, which starts ActNorm, is not compiled."""
        if self._has_started:
            return self._compiled(inputs)
        self._has_started = True
        return super().log_prob(inputs)


class ImageSize(NamedTuple):
    """The size of a model of two convolutional blocks, without ActNorm or changes of the shape."""

    channels: int
    pixels: int
    hidden: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image."""
        return self.channels, self.pixels, self.pixels

    def nets(self) -> list[LipschitzCNN]:
        """Return our networks of 3 x 3, 1 x 1 and 3 x 3 convolutions, one per block."""
        return [LipschitzCNN(self.channels, [self.hidden] * 2) for _ in range(2)]


def _our_images(size: ImageSize) -> DensityModel:
    transform = CompositeTransform(map(ResidualTransform, size.nets()))
    return ResidualModel(Flow(transform, StandardNormal(size.shape)))


def _normflows_images(size: ImageSize) -> DensityModel:
    import normflows

    widths = [size.channels, size.hidden, size.hidden, size.channels]
    nets = [normflows.nets.LipschitzCNN(widths, [3, 1, 3]) for _ in range(2)]
    base = normflows.distributions.DiagGaussian(size.shape, trainable=False)
    blocks = [normflows.flows.Residual(net) for net in nets]
    return NormflowsResidualModel(normflows.NormalizingFlow(base, blocks))


IMAGE_MODELS: dict[str, Callable[[ImageSize], Trainable]] = {
    OURS: _our_images,
    BASELINE: _normflows_images,
    FLOOR: lambda size: PlainNet(map(_plain_branch, size.nets())),
}

# --- operations -----------------------------------------------------------------------------------

_VIEW = re.compile(
    "_reshape_alias|_unsafe_view|alias|as_strided|chunk|detach|diagonal|expand|lift_fresh|permute|"
    "select|slice|split|split_with_sizes|squeeze|t|transpose|unbind|unsqueeze|view"
)
"""Operations that make another view of the same memory."""


def moves_data(name: str) -> bool:
    """Whether an operation of torch, by its name without a namespace, is more than a view."""
    return _VIEW.fullmatch(name) is None


class OperationCounter(TorchDispatchMode):
    """Counts what is asked of the device inside its context, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take note of an operation, and do it."""
        kwargs = kwargs or {}
        self.see(func._schema.name.split("::")[-1], args, kwargs)
        return func(*args, **kwargs)

    def see(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count an operation, unless it moves no data."""
        self.count += moves_data(name)


def counted_operations(work: Work) -> int:
    """Return how many operations some work asks for, the first call apart."""
    work()
    with OperationCounter() as counter:
        work()
    return counter.count


# --- cases ----------------------------------------------------------------------------------------

Build = Callable[[Architecture], Trainable]
TRIO: dict[str, Build] = {name: STEP_MODELS[name].build for name in (OURS, BASELINE, FLOOR)}
Numbers = Callable[[Trainable, Tensor, Work], dict[str, float]]
"""What is measured beside the time, of a model, a batch and a step."""
_LEARNING_RATE = 1e-4
"""So small that many steps leave a model as it is."""


def training_step(
    model: Trainable, batches: Iterator[Tensor], learning_rate: float = _LEARNING_RATE
) -> Work:
    """Return a function that takes one step of Adam on the next batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (-model.log_prob(next(batches)).mean()).backward()
        optimizer.step()
        model.after_step()

    return step


def _time_alone(model: Trainable, batch: Tensor, step: Work) -> dict[str, float]:
    return {}


def _peak_memory(model: Trainable, batch: Tensor, step: Work) -> dict[str, float]:
    return {MEMORY.key: peak_megabytes(step, batch.device)}


def _operations(model: Trainable, batch: Tensor, step: Work) -> dict[str, float]:
    def add_gradients() -> None:
        (-model.log_prob(batch).mean()).backward()
        model.after_step()

    return {OPERATIONS.key: float(counted_operations(add_gradients))}


def _step_runs(
    builds: Mapping[str, Callable[[], Trainable]],
    draw: Callable[[], Tensor],
    numbers: Numbers,
    options: BenchOptions,
) -> list[Run]:
    def run(name: str, build: Callable[[], Trainable]) -> Run:
        seed_everything(options.seed)
        batch, model = draw().to(options.device), build()
        model.to(options.device)
        step = training_step(model, itertools.repeat(batch))
        return Run(name, step, lambda: numbers(model, batch, step))

    return [run(name, build) for name, build in builds.items()]


def step_case(
    size: Architecture,
    batch: int,
    builds: Mapping[str, Build] = TRIO,
    numbers: Numbers = _time_alone,
    generator: torch.Generator | None = None,
) -> Case:
    """Return the case of some models that take steps on one batch of rows.

    Args:
        size: of the models.
        batch: rows, B.
        builds: makes the models.
        numbers: what is measured beside the time.
        generator: of the rows; they come from the seed of the benchmark by default.
    """
    ready = {name: partial(build, size) for name, build in builds.items()}
    draw = partial(torch.randn, batch, size.features, generator=generator)
    return Case.timed(partial(_step_runs, ready, draw, numbers), **_parameters(size, batch))


def _parameters(size: Architecture, batch: int) -> dict[str, Any]:
    return {"d": size.features, "h": size.hidden_features, "B": batch, "blocks": size.num_layers}


_HIDDEN = {2: 64, 8: 64, 16: 64, 64: 128, 256: 256, 512: 512}
"""Hidden width for each dimension."""


def _flow(features: int, blocks: int | None = None) -> Architecture:
    """Return a flow of six blocks by default; of two where they are wide."""
    usual = 2 if features >= 256 else 6
    return Architecture(features, _HIDDEN[features], blocks or usual, 2)


def over_dimension(options: BenchOptions) -> list[Case]:
    """Return the cases of all models, of which those take part that can afford it."""
    sizes = [_flow(features) for features in ((2, 16, 64, 512) if options.quick else _HIDDEN)]
    return [
        step_case(
            size,
            128,
            {name: each.build for name, each in STEP_MODELS.items() if each.affords(size, 128)},
        )
        for size in sizes
    ]


def over_batch(features: int, options: BenchOptions) -> list[Case]:
    """Return the cases over the batch."""
    chosen = (32, 1024) if options.quick else (32, 128, 1024, 8192)
    return [step_case(_flow(features), batch) for batch in chosen]


def over_depth(options: BenchOptions) -> list[Case]:
    """Return the cases over the number of blocks."""
    chosen = (1, 10) if options.quick else (1, 3, 10, 30, 100)
    return [step_case(_flow(2, blocks), 256) for blocks in chosen]


def memory(options: BenchOptions) -> list[Case]:
    """Return the cases whose peak memory is measured."""
    blocks = {name: partial(_block, build) for name, build in TRIO.items()}
    sizes = ((2, 256), (64, 128), (512, 128))
    return [
        *(step_case(_flow(d, 1), batch, blocks, _peak_memory) for d, batch in sizes),
        step_case(_flow(2, 10), 256, numbers=_peak_memory),
    ]


def _block(build: Build, size: Architecture) -> Trainable:
    return first_block(build(size))


def compiled(options: BenchOptions) -> list[Case]:
    """Return the cases that also go through `torch.compile`."""
    return [_compiled(_flow(features, 1 if options.quick else 6), 128) for features in (2, 64)]


def _compiled(size: Architecture, batch: int) -> Case:
    def prepare(options: BenchOptions) -> list[Run]:
        every: dict[str, Build] = {**TRIO, "ours-compiled": CompiledModel}
        builds = {name: partial(build, size) for name, build in every.items()}
        draw = partial(torch.randn, batch, size.features)
        *others, last = _step_runs(builds, draw, _time_alone, options)
        assert last.work is not None
        last.work()
        seconds = time_once(last.work).seconds
        return [*others, replace(last, numbers=lambda: {COMPILE_SECONDS.key: seconds})]

    return Case.timed(prepare, **_parameters(size, batch))


def of_images(options: BenchOptions) -> list[Case]:
    """Return the cases of convolutional blocks."""
    sizes = [
        (ImageSize(1, 8, 32), 64),
        (ImageSize(1, 28, 32), 16),
        (ImageSize(4, 14, 64), 16),
        (ImageSize(12, 8, 64), 32),
    ]
    return [_image_case(*each) for each in sizes[: 2 if options.quick else None]]


def _image_case(size: ImageSize, batch: int) -> Case:
    builds = {name: partial(build, size) for name, build in IMAGE_MODELS.items()}
    draw = partial(torch.randn, batch, *size.shape)
    runs = partial(_step_runs, builds, draw, _time_alone)
    return Case.timed(runs, c=size.channels, pixels=size.pixels, h=size.hidden, B=batch)


_COUNTED: dict[str, Build] = {
    OURS: MODELS["residual-flow"].build,
    BASELINE: MODELS["normflows-residual"].build,
    FLOOR: plain,
    **{name: MODELS[name].build for name in ("realnvp", "maf", "nsf-coupling")},
}


def of_operations(options: BenchOptions) -> list[Case]:
    """Return the cases whose operations are counted: flows of six blocks, and one on images."""
    flows = [_flow(features) for features in ((2,) if options.quick else (2, 64))]
    sizes = [*((flow, 128) for flow in flows), (Architecture(10, 116, 6, 2), 512)]
    rows = torch.Generator().manual_seed(options.seed)
    vectors = [step_case(*each, _COUNTED, _operations, rows) for each in sizes]
    draw = partial(_random_pixels, 64, 1, 8, 8, generator=rows)
    images = partial(_step_runs, {OURS: _image_flow}, draw, _operations)
    return [*vectors, Case.timed(images, c=1, pixels=8, h=32, B=64, blocks=4)]


def _image_flow() -> DensityModel:
    return ResidualModel(ImageResidualFlow((1, 8, 8), 32, 4, num_scales=1))


_SPLINES = Architecture(features=10, hidden_features=64, num_layers=6, num_blocks_per_layer=2)
_BOUND = 5.0


def of_splines(options: BenchOptions) -> list[Case]:
    """Return the cases of transforms by a spline of each value, theirs by the formula of nflows."""
    return [_spline_case(is_autoregressive=each) for each in (False, True)]


def _spline_case(*, is_autoregressive: bool) -> Case:
    builds = {
        OURS: partial(_our_splines, is_autoregressive=is_autoregressive),
        BASELINE: partial(_normflows_splines, is_autoregressive=is_autoregressive),
    }
    ready = {name: partial(build, _SPLINES) for name, build in builds.items()}
    draw = partial(torch.randn, 512, _SPLINES.features)
    parameters = {**_parameters(_SPLINES, 512), "autoregressive": int(is_autoregressive)}
    return Case.timed(partial(_step_runs, ready, draw, _operations), **parameters)


def _our_splines(size: Architecture, *, is_autoregressive: bool) -> DensityModel:
    make = spline_autoregressive if is_autoregressive else spline_coupling
    sizes = (size.features, size.hidden_features, size.num_blocks_per_layer)
    transforms = [make(index, *sizes, bound=_BOUND) for index in range(size.num_layers)]
    return as_density_model(Flow(CompositeTransform(transforms), StandardNormal([size.features])))


def _normflows_splines(size: Architecture, *, is_autoregressive: bool) -> DensityModel:
    from normflows import NormalizingFlow, distributions, flows

    sizes = (size.features, size.num_blocks_per_layer, size.hidden_features)
    splines = {"num_bins": 8, "tail_bound": _BOUND}
    transforms = []
    for index in range(size.num_layers):
        if is_autoregressive:
            each = flows.AutoregressiveRationalQuadraticSpline(*sizes, **splines)
        else:
            mask = bool(index % 2)
            each = flows.CoupledRationalQuadraticSpline(*sizes, **splines, reverse_mask=mask)
            each.prqct.unconditional_transform = None  # of the other half, which ours leaves alone
        transforms.append(each)
    base = distributions.DiagGaussian(size.features, trainable=False)
    return as_density_model(NormalizingFlow(base, transforms))


def _random_pixels(*shape: int, generator: torch.Generator) -> Tensor:
    return 256 * torch.rand(*shape, generator=generator)


def exact_likelihood(options: BenchOptions) -> list[Case]:
    """Return the cases of our exact estimator beside the full Jacobian of normflows."""
    return [_likelihood_case(_flow(d, 1), batch) for d, batch in ((2, 1024), (8, 1024), (64, 128))]


def _likelihood_case(size: Architecture, batch: int) -> Case:
    def run(name: str, options: BenchOptions) -> Run:
        seed_everything(options.seed)
        rows = torch.randn(batch, size.features).to(options.device)
        model = first_block(STEP_MODELS[name].build(size))
        assert isinstance(model, DensityModel)
        model.to(options.device).eval()
        return Run(name, lambda: model.exact_log_prob(rows))

    def prepare(options: BenchOptions) -> list[Run]:
        return [run(name, options) for name in (OURS, BASELINE)]

    return Case.timed(prepare, d=size.features, h=size.hidden_features, B=batch)
