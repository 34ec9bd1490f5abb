r"""Variational inference: fit a flow to a density that is known up to a constant.

    python examples/variational.py --target ring --steps 200 --out variational.png

Minimises the reverse Kullback-Leibler divergence, i.e. maximises

    ELBO = E_q[log p~(x) - log q(x)] = log Z - KL(q || p~ / Z)  <=  log Z = log \int p~(x) dx

over flows q. Training only ever SAMPLES: the gradient passes through the inverse of each residual
block by the implicit function theorem, with memory that does not grow with the solver's steps.
Both targets have a log Z in closed form, so that the table shows the true divergence, and how well
importance sampling with q as proposal finds log Z; it can only do so if q is normalised.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from nflows.flows import Flow, SimpleRealNVP
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from nflows_iresnet import ResidualFlow
from nflows_iresnet.nn import SmoothAbs

BATCH, NUM_EVALUATION = 256, 10_000
COLOURS = {"RealNVP": "tab:blue", "ResidualFlow": "tab:red"}


@dataclass(frozen=True)
class Target:
    """An unnormalised log-density of points (B, 2), its log Z, and a window (x0, x1, y0, y1)."""

    log_density: Callable[[Tensor], Tensor]
    log_z: float
    window: tuple[float, float, float, float]

    def grid(self, size: int = 200) -> Tensor:
        """Return the points of a regular grid, shape (size * size, 2), rows first."""
        left, right, bottom, top = self.window
        columns, rows = torch.linspace(left, right, size), torch.linspace(bottom, top, size)
        return torch.cartesian_prod(rows, columns).flip(1)


def ring(radius: float = 2.0, width: float = 0.35) -> Target:
    """p~(x) = exp(-(|x| - r)^2 / (2 w^2)): a hole that the flow must tear open."""
    hole = width**2 * math.exp(-0.5 * (radius / width) ** 2)
    rest = radius * width * math.sqrt(math.pi / 2) * (1 + math.erf(radius / width / math.sqrt(2)))
    return Target(
        lambda x: -0.5 * ((x.norm(dim=1) - radius) / width) ** 2,
        log_z=math.log(2 * math.pi * (hole + rest)),
        window=(-3.5, 3.5, -3.5, 3.5),
    )


def banana(spread: float = 2.0, width: float = 0.5, bend: float = 0.5) -> Target:
    """A Gaussian sheared along a parabola, with its Z; one coupling layer can represent it."""

    def log_density(x: Tensor) -> Tensor:
        height = x[:, 1] - bend * (x[:, 0].square() - spread**2)
        return -0.5 * ((x[:, 0] / spread).square() + (height / width).square())

    return Target(log_density, math.log(2 * math.pi * spread * width), (-6.5, 6.5, -4.0, 14.0))


TARGETS: dict[str, Callable[[], Target]] = {"ring": ring, "banana": banana}


@dataclass(frozen=True)
class Fit:
    """A trained flow, its ELBO after each step, and the seconds that training took."""

    flow: Flow
    history: list[float]
    seconds: float


@dataclass(frozen=True)
class Score:
    """What fresh samples (N, 2) of a flow say about it, with standard errors."""

    samples: Tensor
    elbo: tuple[float, float]
    importance_log_z: tuple[float, float]


def residual_flow() -> Flow:
    """Five residual blocks; `sample_and_log_prob` is differentiable out of the box.

    `SmoothAbs` grows linearly, so that it moves tails as readily as the bulk.
    """
    return ResidualFlow(2, hidden_features=40, num_layers=5, activation=SmoothAbs())


def real_nvp(num_parameters: int) -> Flow:
    """Eight coupling layers, as wide as brings them closest to a number of parameters."""

    def build(width: int) -> Flow:
        return SimpleRealNVP(2, hidden_features=width, num_layers=8, num_blocks_per_layer=2)

    return build(min(range(4, 64), key=lambda w: abs(count_parameters(build(w)) - num_parameters)))


def count_parameters(module: nn.Module) -> int:
    """Return the number of trainable numbers."""
    return sum(parameter.numel() for parameter in module.parameters())


def fit(flow: Flow, target: Target, steps: int, advance: Callable[[], None]) -> Fit:
    """Maximise the ELBO over reparametrised samples."""
    start, history = time.perf_counter(), []
    flow.log_prob(torch.randn(BATCH, 2))  # starts ActNorm, before anything is sampled through it
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        samples, log_q = flow.sample_and_log_prob(BATCH)
        elbo = (target.log_density(samples) - log_q).mean()
        optimizer.zero_grad()
        (-elbo).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), max_norm=10.0)
        optimizer.step()
        schedule.step()
        history.append(elbo.item())
        advance()
    return Fit(flow.eval(), history, time.perf_counter() - start)


@torch.no_grad()
def score(flow: Flow, target: Target) -> Score:
    """Estimate the ELBO, and log Z by importance sampling, from fresh samples."""
    samples, log_q = flow.sample_and_log_prob(NUM_EVALUATION)
    log_weights = target.log_density(samples) - log_q
    weights = (log_weights - log_weights.max()).exp()
    log_z = log_weights.max() + weights.mean().log()
    return Score(samples, mean_and_error(log_weights), (log_z.item(), relative_error(weights)))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of (N,) and its standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def relative_error(values: Tensor) -> float:
    """Return the standard error of log mean(values), to first order."""
    mean, error = mean_and_error(values)
    return error / mean


def table(fits: dict[str, Fit], scores: dict[str, Score], target: Target) -> str:
    """Return one line per model; KL is log Z - ELBO."""
    header = (
        f"{'model':<14}{'parameters':>11}{'seconds':>9}{'ELBO':>19}{'KL(q||p)':>10}"
        f"{'log Z by importance':>22}"
    )
    lines = [f"log Z = {target.log_z:.4f}", header, "-" * len(header)]
    for name, each in scores.items():
        elbo, log_z = (
            "{:.4f} ± {:.4f}".format(*pair) for pair in (each.elbo, each.importance_log_z)
        )
        lines.append(
            f"{name:<14}{count_parameters(fits[name].flow):>11,}{fits[name].seconds:>9.1f}"
            f"{elbo:>19}{target.log_z - each.elbo[0]:>10.4f}{log_z:>22}"
        )
    return "\n".join(lines)


def plot(fits: dict[str, Fit], scores: dict[str, Score], target: Target, path: Path) -> None:
    """Save densities above, training curves and samples below."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 8), layout="constrained")
    grid = target.grid()
    truth = (target.log_density(grid) - target.log_z).exp()
    show_density(axes[0, 0], truth, truth, target, "target")
    show_curves(axes[1, 0], fits, target)
    for column, (name, each) in enumerate(scores.items(), start=1):
        with torch.no_grad():
            density = fits[name].flow.log_prob(grid).exp()
        divergence = target.log_z - each.elbo[0]
        show_density(axes[0, column], density, truth, target, f"{name}: KL = {divergence:.3f} nats")
        show_samples(axes[1, column], each.samples[:3000], truth, target, name)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def show_density(axes: Axes, density: Tensor, truth: Tensor, target: Target, title: str) -> None:
    """Draw a density on the grid, its colours up to a little above the target's maximum."""
    side = math.isqrt(len(density))
    image = density.reshape(side, side)
    axes.imshow(
        image,
        extent=target.window,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=0,
        vmax=1.2 * float(truth.max()),
    )
    frame(axes, target, title)


def show_samples(axes: Axes, samples: Tensor, truth: Tensor, target: Target, name: str) -> None:
    """Draw samples over the contours of the target at one, two and three standard deviations."""
    side = math.isqrt(len(truth))
    left, right, bottom, top = target.window
    columns, rows = torch.linspace(left, right, side), torch.linspace(bottom, top, side)
    levels = [float(truth.max()) * math.exp(-0.5 * sigma**2) for sigma in (3, 2, 1)]
    axes.plot(*samples.T, ".", markersize=3, color=COLOURS[name], alpha=0.5, markeredgewidth=0)
    axes.contour(columns, rows, truth.reshape(side, side), levels, colors="0.4", linewidths=0.7)
    frame(axes, target, f"{name}: samples")


def frame(axes: Axes, target: Target, title: str) -> None:
    """Cut to the window of the target, without ticks."""
    left, right, bottom, top = target.window
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], title=title)


def show_curves(axes: Axes, fits: dict[str, Fit], target: Target, window: int = 10) -> None:
    """Draw the ELBO of each model over the steps, a running mean, below log Z."""
    axes.axhline(target.log_z, color="black", linestyle="--", label="log Z, the optimum")
    for name, each in fits.items():
        history = torch.tensor(each.history).unfold(0, min(window, len(each.history)), 1).mean(1)
        steps = range(len(each.history) - len(history) + 1, len(each.history) + 1)
        axes.plot(steps, history, color=COLOURS[name], label=f"{name}, {each.seconds:.0f} s")
    axes.set(
        ylim=(target.log_z - 1, target.log_z + 0.1), xlabel="step", ylabel="nats", title="ELBO"
    )
    axes.legend(loc="lower right")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default="ring")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("variational.png"), help="picture to save")
    return parser.parse_args()


def main() -> None:
    """Fit both models, print the table, save the picture."""
    args = arguments()
    mpl.use("Agg")
    target = TARGETS[args.target]()
    torch.manual_seed(args.seed)
    residual = residual_flow()
    flows = {"RealNVP": real_nvp(count_parameters(residual)), "ResidualFlow": residual}
    fits = {}
    with Progress(console=Console(file=sys.stderr), transient=True) as progress:
        for name, flow in flows.items():
            task = progress.add_task(name, total=args.steps)
            torch.manual_seed(args.seed)
            fits[name] = fit(flow, target, args.steps, partial(progress.advance, task))
    scores = {name: score(each.flow, target) for name, each in fits.items()}
    print(table(fits, scores, target))
    plot(fits, scores, target, args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
