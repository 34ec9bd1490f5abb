"""Two processes, one flow: `torchrun --nproc-per-node=2 examples/ddp.py [--steps N]`.

Each process trains on its own half of the rows; DistributedDataParallel averages the gradients.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed.nn  # before there is a process group: see `main`
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from nflows_iresnet import ResidualFlow
from nflows_iresnet.datasets import Moons


class NegativeLogLikelihood(nn.Module):
    """DistributedDataParallel wraps `forward`; a flow's loss is not its `forward`."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, rows: Tensor) -> Tensor:
        loss: Tensor = -self.flow.log_prob(rows).mean()  # type: ignore[operator]
        return loss


def train(rank: int, world_size: int, steps: int) -> tuple[nn.Module, float]:
    torch.manual_seed(0)
    flow = ResidualFlow(features=2, hidden_features=32, num_layers=4)
    loss_of = DistributedDataParallel(NegativeLogLikelihood(flow))
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    loss = torch.zeros(())
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        rows = Moons().sample(256, generator=generator)[rank::world_size]
        loss = loss_of(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow, float(loss.detach())


def largest_difference_between_replicas(module: nn.Module) -> float:
    values = torch.cat([each.detach().flatten().float() for each in module.state_dict().values()])
    first = values.clone()
    distributed.broadcast(first, src=0)
    difference = (values - first).abs().max()
    distributed.all_reduce(difference, op=distributed.ReduceOp.MAX)
    return float(difference)


def main() -> None:
    """Train, compare the replicas, and leave no thread behind.

    `torch.distributed.nn` takes the process group of the moment of its import for its default
    arguments. DistributedDataParallel imports it; were that the first time, the group and its
    threads would outlive `destroy_process_group`, and a thread that lets go of a tensor while the
    interpreter shuts down aborts the process.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="training steps (default 100)")
    steps = parser.parse_args().steps
    distributed.init_process_group("gloo")
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    flow, loss = train(rank, world_size, steps)
    difference = largest_difference_between_replicas(flow)
    if rank == 0:
        print(f"{world_size} processes, {steps} steps: last loss {loss:.3f} nats")
        print(f"largest difference between the replicas: {difference:.1e}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
