r"""Simulation-based inference: a residual flow as density estimator of sbi, beside its own flows.

    python examples/sbi_posterior.py --simulations 10000 --epochs 60 --out sbi_posterior.png

Neural posterior estimation (NPE) trains q(theta | x) on simulated pairs. The simulator is "two
moons" (Greenberg, Nonnenmacher, Macke, Automatic posterior transformation, 2019):

    theta ~ U[-1, 1]^2,    x = p + (-|theta_1 + theta_2|, theta_2 - theta_1) / sqrt(2),
    p = (r cos a + 1/4, r sin a),    a ~ U(-pi/2, pi/2),    r ~ N(0.1, 0.01^2),

whose posterior, two thin crescents, can be sampled exactly. The table shows c2st, the accuracy of
a random forest that tells samples of q from exact ones: 0.5 is perfect, 1 is worst.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from sbi.inference import NPE
from sbi.utils import BoxUniform
from sbi.utils.metrics import c2st
from sbi.utils.tracking import TensorBoardTracker
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from nflows_iresnet.interop.sbi import ResidualFlowBuilder

LEARNING_RATE, NUM_SAMPLES, OURS = 2e-3, 1000, "residual flow"


def crescent(num_points: int) -> Tensor:
    """Draw p, shape (num_points, 2)."""
    angle = (torch.rand(num_points) - 0.5) * math.pi
    radius = 0.1 + 0.01 * torch.randn(num_points)
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], dim=1)


def simulate(theta: Tensor) -> Tensor:
    """Draw x given theta, shapes (B, 2)."""
    total, difference = theta.sum(dim=1), theta[:, 1] - theta[:, 0]
    return crescent(len(theta)) + torch.stack([-total.abs(), difference], dim=1) / math.sqrt(2)


def exact_posterior(x: Tensor, num_samples: int) -> Tensor:
    """Draw from p(theta | x) of one x, shape (num_samples, 2).

    Given p, the simulator determines |theta_1 + theta_2| and theta_2 - theta_1, and both signs of
    the sum are equally likely. Of these candidates those inside the prior's box are kept.
    """
    kept, count = [], 0
    while count < num_samples:
        total, difference = ((crescent(4 * num_samples) - x) * torch.tensor([1.0, -1.0])).T
        possible = total >= 0
        total = total * (2 * torch.randint(2, total.shape) - 1)
        theta = torch.stack([total - difference, total + difference], dim=1) / math.sqrt(2)
        kept.append(theta[possible & (theta.abs() <= 1).all(dim=1)])
        count += len(kept[-1])
    return torch.cat(kept)[:num_samples]


@dataclass(frozen=True)
class Result:
    """Samples (observations, samples, 2) of one estimator, and what they cost."""

    samples: Tensor
    seconds: float
    num_parameters: int

    def scores(self, exact: Tensor) -> list[float]:
        """Return c2st against exact samples for each observation."""
        return [c2st(*pair).item() for pair in zip(exact, self.samples, strict=True)]


def estimators() -> dict[str, Any]:
    """Return what goes into `NPE(density_estimator=...)`."""
    return {OURS: ResidualFlowBuilder(hidden_features=64, num_layers=8), "maf": "maf", "nsf": "nsf"}


def infer(
    density_estimator: Any, theta: Tensor, x: Tensor, observations: Tensor, epochs: int
) -> Result:
    """Train by sbi's own loop, and sample the posterior of each observation."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as logs:
        trainer = NPE(
            BoxUniform(-torch.ones(2), torch.ones(2)),
            density_estimator=density_estimator,
            tracker=TensorBoardTracker(SummaryWriter(logs)),
        )
        network = trainer.append_simulations(theta, x).train(
            training_batch_size=min(500, len(theta) // 20),
            learning_rate=LEARNING_RATE,
            max_num_epochs=epochs - 1,
        )
    seconds = time.perf_counter() - start
    samples = trainer.build_posterior().sample_batched(
        (NUM_SAMPLES,), x=observations, show_progress_bars=False
    )
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    return Result(samples.transpose(0, 1), seconds, num_parameters)


def table(results: dict[str, Result], exact: Tensor) -> str:
    """Return one line per estimator."""
    columns = "".join(f"{f'x_{i}':>7}" for i in range(1, len(exact) + 1))
    header = f"{'c2st':<15}{'parameters':>11}{'seconds':>9}{columns}{'mean':>8}"
    lines = [header, "-" * len(header)]
    for name, each in results.items():
        scores = each.scores(exact)
        cost = f"{each.num_parameters:>11,}{each.seconds:>9.1f}"
        cells = "".join(f"{score:>7.3f}" for score in scores)
        lines.append(f"{name:<15}{cost}{cells}{sum(scores) / len(scores):>8.3f}")
    return "\n".join(lines)


def plot(results: dict[str, Result], exact: Tensor, path: Path) -> None:
    """Save samples of the first two observations (red) over exact ones (grey)."""
    size = (3 * len(results), 6.2)
    figure, axes = plt.subplots(2, len(results), figsize=size, layout="constrained")
    for column, (name, each) in enumerate(results.items()):
        axes[0, column].set_title(name)
        for row in range(2):
            show(axes[row, column], each.samples[row], exact[row])
    for row in range(2):
        axes[row, 0].set_ylabel(rf"$\theta\ |\ x_{row + 1}$")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def show(axes: Axes, samples: Tensor, exact: Tensor) -> None:
    """Draw samples over exact ones, in the window of the latter."""
    for points, colour in ((exact, "tab:gray"), (samples, "tab:red")):
        axes.plot(*points.T, ".", markersize=3.5, color=colour, alpha=0.4, markeredgewidth=0)
    centre = (exact.amin(0) + exact.amax(0)) / 2
    reach = 0.65 * float((exact.amax(0) - exact.amin(0)).max())
    axes.set(
        xlim=(centre[0] - reach, centre[0] + reach),
        ylim=(centre[1] - reach, centre[1] + reach),
        aspect="equal",
        xticks=[],
        yticks=[],
    )


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--simulations", type=int, default=10_000, help="number of pairs (theta, x)"
    )
    parser.add_argument("--epochs", type=int, default=60, help="passes over the simulations")
    parser.add_argument("--observations", type=int, default=5, help="posteriors that are compared")
    parser.add_argument("--quick", action="store_true", help="1000 simulations, 5 epochs, 2 x")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("sbi_posterior.png"), help="picture to save"
    )
    args = parser.parse_args()
    if args.observations < 2:
        parser.error("--observations must be at least 2")
    if args.quick:
        args.simulations, args.epochs, args.observations = 1000, 5, 2
    return args


def main() -> None:
    """Train the three estimators on the same simulations, print the table, save the picture."""
    args = arguments()
    mpl.use("Agg")
    warnings.filterwarnings("ignore", message="Maximum number of epochs|torch.triangular_solve")
    torch.manual_seed(args.seed)
    theta = 2 * torch.rand(args.simulations, 2) - 1
    x = simulate(theta)
    others = simulate(2 * torch.rand(args.observations - 1, 2) - 1)
    observations = torch.cat([torch.zeros(1, 2), others])
    exact = torch.stack([exact_posterior(each, NUM_SAMPLES) for each in observations])
    fresh = torch.stack([exact_posterior(each, NUM_SAMPLES) for each in observations])
    results = {"exact": Result(fresh, seconds=0.0, num_parameters=0)}
    for name, density_estimator in estimators().items():
        print(f"{name}: {args.simulations:,} simulations, {args.epochs} epochs")
        torch.manual_seed(args.seed)
        results[name] = infer(density_estimator, theta, x, observations, args.epochs)
        print()
    print(table(results, exact))
    plot(results, exact, args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
