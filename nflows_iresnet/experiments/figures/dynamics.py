"""Paths through a plain residual network, which cross, and through an invertible one, which cannot.

A map of the line that is continuous and invertible keeps the order of points. Both networks are
x <- x + g_i(x), i = 1, ..., depth, and are fitted to the same targets by least squares; in one the
g_i are free, in the other Lip(g_i) <= c < 1 is certified, so that no layer can swap two points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from nflows_iresnet.experiments.evaluation import Array
from nflows_iresnet.experiments.figures import Drawing
from nflows_iresnet.experiments.pictures import DATA, INK, STYLE, as_png
from nflows_iresnet.linearization import bind_all
from nflows_iresnet.nn import LipschitzMLP
from nflows_iresnet.training.loop import Training, run
from nflows_iresnet.training.processes import seed_everything
from nflows_iresnet.training.progress import Steps, TrainingPlan

if TYPE_CHECKING:
    from nflows_iresnet.experiments.figures.command import Stage
    from nflows_iresnet.experiments.options import FiguresOptions

EDGE = 2.0
NUM_PATHS = 33
DEPTH = 8
HIDDEN = 32
COEFF = 0.8
BATCH = 256
LEARNING_RATE = 2e-2
STEP_PENALTY = 0.01
"""Weight of the mean squared length of the steps, without which paths of plain networks wander."""

_SHOWN = 3.3
"""Half of the window's width: paths of plain networks may leave it."""


@dataclass(frozen=True)
class Target:
    """What a network is fitted to.

    Args:
        formula: for the reader.
        values: maps inputs (B, 1) to the values wanted at fractions of the depth.
    """

    formula: str
    values: Callable[[Tensor], dict[float, Tensor]]


TARGETS = {
    "reflection": Target("x → -x", lambda x: {1.0: -x}),
    "fold": Target("x → 2 sin 2x", lambda x: {1.0: 2 * (2 * x).sin()}),
    "detour": Target("x → x³ / 4 halfway, x at the end", lambda x: {0.5: x**3 / 4, 1.0: x}),
}
KINDS = {"plain": "plain residual network", "invertible": "invertible residual network"}


class Chain(nn.Module):
    """x <- x + g_i(x) for each of its networks.

    Args:
        nets: g_1, g_2, ..., from (B, 1) to (B, 1).
    """

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the paths of the inputs (B, 1): shape (depth + 1, B, 1)."""
        points = [inputs]
        for function in bind_all(list(self.nets)):
            points.append(points[-1] + function(points[-1]))
        return torch.stack(points)


@dataclass(frozen=True)
class Fitted:
    """A chain after training: its paths and what is measured on them."""

    paths: Array
    targets: Array
    numbers: dict[str, Any]


def plain_chain(depth: int) -> Chain:
    """Build a chain of unconstrained networks."""
    return Chain([_plain_net() for _ in range(depth)])


def _plain_net() -> nn.Module:
    """Build one that starts steep: chains of flat ones collapse all points, and get stuck there."""
    last = nn.Linear(HIDDEN, 1)
    with torch.no_grad():
        last.weight.mul_(2)
    return nn.Sequential(nn.Linear(1, HIDDEN), nn.Tanh(), last)


def invertible_chain(depth: int, coeff: float = COEFF) -> Chain:
    """Build a chain of networks with a certified Lipschitz constant below one."""
    return Chain([LipschitzMLP(1, [HIDDEN, HIDDEN], coeff=coeff) for _ in range(depth)])


BUILDERS = {"plain": plain_chain, "invertible": invertible_chain}


def fit(chain: Chain, target: Target, steps: int, learning_rate: float = LEARNING_RATE) -> None:
    """Fit a chain by least squares on uniform inputs, and keep its last state.

    Raises:
        TrainingDivergedError: a loss was not finite.
    """

    def loss(chain: Chain, inputs: Tensor) -> Tensor:
        paths = chain(inputs)
        lengths = paths.diff(dim=0).square().sum(dim=0).mean()
        return squared_error(paths, target.values(inputs)) + STEP_PENALTY * lengths

    at_the_end = TrainingPlan(learning_rate, Steps(steps), validations=1)
    run(Training(chain, _uniform_inputs(chain), at_the_end, lambda: 0.0, loss=loss))


def _uniform_inputs(chain: Chain) -> Iterator[Tensor]:
    device = next(chain.parameters()).device
    while True:
        yield EDGE * (2 * torch.rand(BATCH, 1, device=device) - 1)


def squared_error(paths: Tensor, wanted: dict[float, Tensor]) -> Tensor:
    """Return the sum of the mean squared errors at the layers with a target."""
    errors = [
        (paths[round(share * (len(paths) - 1))] - y).square().mean() for share, y in wanted.items()
    ]
    return torch.stack(errors).sum()


@torch.no_grad()
def trace(chain: Chain, target: Target, num_paths: int = NUM_PATHS) -> Fitted:
    """Follow evenly spaced points in double precision, and measure."""
    chain = chain.cpu().double()
    inputs = torch.linspace(-EDGE, EDGE, num_paths, dtype=torch.float64)[:, None]
    wanted = target.values(inputs)
    paths = chain(inputs)
    positions = paths[:, :, 0].numpy()
    numbers = {
        "crossings": count_crossings(positions),
        "smallest_gap": smallest_gap(positions),
        "rms_error": float(squared_error(paths, wanted).sqrt()),
        "least_monotone_error": least_monotone_error(wanted),
        "parameters": sum(parameter.numel() for parameter in chain.parameters()),
    }
    return Fitted(positions, wanted[1.0][:, 0].numpy(), numbers | _certificate(chain, inputs))


def least_monotone_error(wanted: dict[float, Tensor]) -> float:
    """Return the least root mean squared error of maps that keep the order of the points."""
    from sklearn.isotonic import IsotonicRegression

    fits = [
        (y, IsotonicRegression().fit_transform(range(len(y)), y[:, 0])) for y in wanted.values()
    ]
    return math.sqrt(
        sum(float((y[:, 0] - torch.as_tensor(fit)).square().mean()) for y, fit in fits)
    )


def _certificate(chain: Chain, inputs: Tensor) -> dict[str, float]:
    """Return the gap that the certified constants guarantee, prod (1 - L_i) times the first one."""
    if not all(isinstance(net, LipschitzMLP) for net in chain.nets):
        return {}
    bounds = [net.lipschitz_bound() for net in chain.nets if isinstance(net, LipschitzMLP)]
    spacing = float(inputs[1] - inputs[0])
    return {
        "largest_lipschitz_bound": max(bounds),
        "guaranteed_gap": spacing * math.prod(1 - bound for bound in bounds),
    }


def count_crossings(paths: Array) -> int:
    """Count how often two paths change their order.

    Paths are straight between layers, so that two of them cross between layers exactly where their
    order changes. Paths that meet and leave each other on the other side cross once, however many
    layers they are together; paths that only touch do not cross.

    Args:
        paths: positions, shape (layers + 1, points).

    Example:
        >>> count_crossings(np.array([[0.0, 1.0], [1.0, 0.0]]))
        1
    """
    return len(find_crossings(paths))


def find_crossings(paths: Array) -> Array:
    """Return position and layer of every crossing, shape (crossings, 2); see `count_crossings`."""
    import pandas as pd

    first, second = np.triu_indices(paths.shape[1], k=1)
    gaps = paths[:, second] - paths[:, first]
    signs = pd.DataFrame(np.sign(gaps)).replace(0, np.nan)
    sides = signs.ffill().fillna(0).to_numpy()  # of paths that touch, the last side before
    layers, pairs = np.nonzero(sides[1:] * sides[:-1] < 0)
    before, after = gaps[layers, pairs], gaps[layers + 1, pairs]
    share = before / np.where(before == after, 1.0, before - after)
    left = paths[layers, first[pairs]]
    right = paths[layers + 1, first[pairs]]
    return np.stack([left + share * (right - left), layers + share], axis=1)


def smallest_gap(paths: Array) -> float:
    """Return the smallest distance of two neighbours, over all layers."""
    return float(np.diff(np.sort(paths, axis=1), axis=1).min())


class Dynamics:
    """The paths of points through every kind of network, fitted to every target."""

    def __init__(self, options: FiguresOptions) -> None:
        self.options = options
        self.names = list(TARGETS)[: 1 if options.quick else None]
        self.num_models = len(self.names) * len(KINDS)

    def draw(self, stage: Stage) -> Drawing:
        """Fit every network to every target and draw their paths."""
        options = self.options
        steps = options.steps or (100 if options.quick else 600)
        depth = 4 if options.quick else DEPTH
        fitted: dict[tuple[str, str], Fitted] = {}
        for name in self.names:
            for kind, build in BUILDERS.items():
                with stage(f"dynamics · {name} · {kind}"):
                    seed_everything(options.seed)
                    chain = build(depth).to(options.device)
                    fit(chain, TARGETS[name], steps)
                    fitted[kind, name] = trace(chain, TARGETS[name])
        numbers = {f"{name}/{kind}": each.numbers for (kind, name), each in fitted.items()}
        chosen = {
            "steps": steps,
            "seed": options.seed,
            "depth": depth,
            "coeff": COEFF,
            "learning_rate": LEARNING_RATE,
            "step_penalty": STEP_PENALTY,
            "hidden_features": HIDDEN,
            "paths": NUM_PATHS,
        }
        return Drawing(
            "Paths through residual networks",
            _caption(fitted, depth),
            as_png(_figure(fitted, self.names)),
            {**chosen, "networks": numbers},
        )


def _caption(fitted: dict[tuple[str, str], Fitted], depth: int) -> str:
    totals = {
        kind: sum(each.numbers["crossings"] for (of, _), each in fitted.items() if of == kind)
        for kind in KINDS
    }
    return (
        f"{NUM_PATHS} points of the line through {depth} layers x ← x + g(x), fitted to the same "
        "targets (triangles) by least squares. The plain networks are free to swap points: "
        f"their paths cross {totals['plain']:,} times, and a density carried along folds. The "
        f"invertible networks, with certified Lip(g) ≤ {COEFF}, keep the order of all points "
        f"({totals['invertible']} crossings). Where the target is not monotone, they come close to "
        "the least error (root mean square) that any monotone map of these points has, in brackets "
        "and found by isotonic regression. Crossings (dark dots) are counted on the computed paths."
    )


def _figure(fitted: dict[tuple[str, str], Fitted], names: list[str]) -> Figure:
    with mpl.rc_context(STYLE):
        size = (max(3.6 * len(names) + 0.4, 4.4), 6.6)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(KINDS), len(names), squeeze=False)
        for row, kind in zip(grid, KINDS, strict=True):
            for axes, name in zip(row, names, strict=True):
                _draw_paths(axes, fitted[kind, name], TARGETS[name].formula)
            row[0].set_ylabel(f"{KINDS[kind]}\nlayer", color=INK)
        return figure


def _draw_paths(axes: Axes, fitted: Fitted, formula: str) -> None:
    layers, count = range(len(fitted.paths)), fitted.paths.shape[1]
    colors = mpl.colormaps["plasma"]([0.9 * i / (count - 1) for i in range(count)])
    for path, color in zip(fitted.paths.T, colors, strict=True):
        axes.plot(path, layers, color=color, lw=1.0)
    axes.scatter(
        fitted.targets, [layers[-1] * 1.05] * count, c=colors, marker="v", s=16, linewidths=0
    )
    points = find_crossings(fitted.paths)
    axes.scatter(points[:, 0], points[:, 1], s=3.0, color=INK, linewidths=0, zorder=3)
    crossings, error = fitted.numbers["crossings"], fitted.numbers["rms_error"]
    least = fitted.numbers["least_monotone_error"]
    axes.set_title(
        f"{formula}\n{crossings:,} crossings, error {error:.2f} (monotone: ≥ {least:.2f})",
        color=INK,
    )
    axes.set(xlim=(-_SHOWN, _SHOWN), ylim=(-0.2, layers[-1] * 1.09), xticks=[-2, 0, 2])
    axes.tick_params(colors=DATA)
    axes.spines[["top", "right"]].set_visible(False)
