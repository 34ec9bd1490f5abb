"""A residual branch as training leaves it, with the rows that enter it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from nflows_iresnet import datasets
from nflows_iresnet.experiments.adapters import value_and_jacobian
from nflows_iresnet.experiments.bench.items import Settings
from nflows_iresnet.flows import ResidualFlow
from nflows_iresnet.nn import LipschitzMLP
from nflows_iresnet.training import Batches, seed_everything
from nflows_iresnet.transforms import ResidualTransform

SOURCES = {2: "checkerboard", 64: "digits"}
HIDDEN = {2: 64, 64: 128}
_BLOCKS = 3
_GAIN = 4.0


@dataclass(frozen=True, eq=False)
class Branch:
    """The branch of a trained flow whose Jacobian is largest.

    Args:
        net: g, with weights enlarged so that the bound 0.97 is used up.
        inputs: rows that enter the block when it sees data, (N, d).
        jacobian_norm: mean of the 2-norm of dg/dx over some of these rows.
    """

    net: LipschitzMLP
    inputs: Tensor
    jacobian_norm: float


def trained_branch(features: int, settings: Settings) -> Branch:
    """Train a small flow and return its branch with the largest Jacobian.

    Random weights would make inverses and estimates look too easy: the norms of their layers
    multiply to the bound, the norm of their product stays far below. Training aligns them.

    Args:
        features: 2 (checkerboard) or 64 (digits).
        settings: seed, device, and how long: 300 steps, 150 if quick.
    """
    steps = 150 if settings.quick else 300
    return _trained_branch(features, steps, settings.seed, settings.device)


@lru_cache(maxsize=4)
def _trained_branch(features: int, steps: int, seed: int, device: torch.device) -> Branch:
    rows = datasets.load(SOURCES[features], seed=seed).train.to(device)
    seed_everything(seed)
    flow = ResidualFlow(features, HIDDEN[features], _BLOCKS, marginal_bins=0, linear=False).to(
        device
    )
    _train(flow, rows, steps, seed)
    return max(_branches(flow, rows), key=lambda branch: branch.jacobian_norm)


def _train(flow: ResidualFlow, rows: Tensor, steps: int, seed: int) -> None:
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    for _, batch in zip(range(steps), Batches(rows, 256, seed), strict=False):
        optimizer.zero_grad(set_to_none=True)
        (-flow.log_prob(batch).mean()).backward()
        optimizer.step()
    flow.eval()


def _branches(flow: ResidualFlow, rows: Tensor) -> list[Branch]:
    blocks = [block for block in flow.modules() if isinstance(block, ResidualTransform)]
    seen: dict[nn.Module, Tensor] = {}
    hooks = [
        block.register_forward_pre_hook(lambda block, inputs: seen.update({block: inputs[0]}))
        for block in blocks
    ]
    with torch.no_grad():
        flow.transform_to_noise(rows[:8192])
    for hook in hooks:
        hook.remove()
    return [_branch(block, seen[block]) for block in blocks]


def _branch(block: ResidualTransform, inputs: Tensor) -> Branch:
    net = block.net
    assert isinstance(net, LipschitzMLP)
    with torch.no_grad():
        for layer in net.layers:
            assert isinstance(layer, nn.Linear)
            layer.weight.mul_(_GAIN)
    _, jacobian = value_and_jacobian(net, inputs[:64])
    norm = float(torch.linalg.matrix_norm(jacobian.double(), 2).mean())
    return Branch(net.requires_grad_(True), inputs.detach(), norm)
