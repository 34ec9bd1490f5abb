"""Two processes, one flow: `torchrun --nproc-per-node=2 examples/ddp.py [--steps N]`.

`fit` shares out the rows of each batch; DistributedDataParallel averages the gradients.
"""

from __future__ import annotations

import argparse

import torch
from torch import distributed, nn

from nflows_iresnet import ResidualFlow
from nflows_iresnet.datasets import Moons
from nflows_iresnet.training import fit


def largest_difference_between_replicas(module: nn.Module) -> float:
    values = torch.cat([each.detach().flatten().float() for each in module.state_dict().values()])
    first = values.clone()
    distributed.broadcast(first, src=0)
    difference = (values - first).abs().max()
    distributed.all_reduce(difference, op=distributed.ReduceOp.MAX)
    return float(difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="training steps (default 100)")
    steps = parser.parse_args().steps
    distributed.init_process_group("gloo")  # "nccl" on GPUs, one for each process
    flow = ResidualFlow(features=2, hidden_features=32, num_layers=4)
    rows = Moons().sample(6_000, generator=torch.Generator().manual_seed(0))
    history = fit(flow, rows[:5_000], rows[5_000:], max_steps=steps, learning_rate=5e-3)
    difference = largest_difference_between_replicas(flow)
    if distributed.get_rank() == 0:
        loss = history.best_validation
        print(f"{distributed.get_world_size()} processes, {history.steps} steps: {loss:.3f} nats")
        print(f"largest difference between the replicas: {difference:.1e}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
