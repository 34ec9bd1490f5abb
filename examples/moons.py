"""The two-moons example of nflows with one line changed: residual blocks instead of MAF layers.

Run with `python examples/moons.py [--steps N] [--out PICTURE]`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, ReversePermutation
from rich.progress import track
from torch import Tensor

from nflows_iresnet import ResidualTransform
from nflows_iresnet.datasets import Moons
from nflows_iresnet.nn import LipschitzMLP

matplotlib.use("Agg")
from matplotlib import pyplot


def build_flow(num_layers: int = 5) -> Flow:
    layers = []
    for _ in range(num_layers):
        layers.append(ReversePermutation(features=2))
        # nflows: MaskedAffineAutoregressiveTransform(features=2, hidden_features=32)
        layers.append(ResidualTransform(LipschitzMLP(features=2, hidden_features=[32, 32])))
    return Flow(CompositeTransform(layers), StandardNormal([2]))


def train(flow: Flow, steps: int) -> None:
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    for _ in track(range(steps), description="training"):
        loss = -flow.log_prob(Moons().sample(256)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def draw(flow: Flow, path: Path) -> None:
    x_axis, y_axis = torch.linspace(-4.5, 4.5, 200), torch.linspace(-3, 3, 200)
    grid = torch.cartesian_prod(x_axis, y_axis)
    panels = {"exact": Moons().log_prob(grid), "residual flow": flow.log_prob(grid)}
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2), sharex=True, sharey=True)
    for axis, (title, log_prob) in zip(axes[:2], panels.items(), strict=True):
        density = log_prob.exp().reshape(200, 200).T
        axis.pcolormesh(x_axis, y_axis, density, shading="gouraud", vmin=0, vmax=0.25)
        axis.set_title(title)
    samples = flow.sample(2000)
    axes[2].scatter(*samples.T, s=2, color="black")
    axes[2].set_title("samples (verified inverse)")
    axes[2].set(xlim=(-4.5, 4.5), ylim=(-3, 3))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def nats_above_the_optimum(flow: Flow, rows: Tensor) -> tuple[float, float]:
    excess = Moons().log_prob(rows) - flow.log_prob(rows)
    return excess.mean().item(), excess.std().item() / len(rows) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default 1000)")
    parser.add_argument("--out", type=Path, default=Path("moons.png"), help="picture to save")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    flow = build_flow()
    train(flow, arguments.steps)
    flow.eval()
    with torch.no_grad():
        excess, error = nats_above_the_optimum(flow, Moons().sample(5000))
        draw(flow, arguments.out)
    print(f"{excess:.4f} ± {error:.4f} nats above the optimum on 5000 new points")
    bounds = [block.lipschitz_bound() for block in flow._transform._transforms[1::2]]
    print(f"certified Lipschitz bounds of the blocks: {', '.join(f'{b:.4f}' for b in bounds)}")
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()
