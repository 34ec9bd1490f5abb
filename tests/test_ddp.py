"""Two processes give the gradients of one process on the joined batch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed.nn  # before there is a process group, as training/processes.py does
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from nflows_iresnet import ResidualFlow
from nflows_iresnet import nn as lipschitz_nn


class Loss(nn.Module):
    def __init__(self, flow: ResidualFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, rows: Tensor, context: Tensor) -> Tensor:
        loss: Tensor = -self.flow.log_prob(rows, context).mean()
        return loss


def build() -> Loss:
    torch.manual_seed(0)
    norm = lipschitz_nn.PowerIteration()
    return Loss(ResidualFlow(3, 8, 2, context_features=2, norm=norm).double())


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(16, 3, generator=generator, dtype=torch.float64)
    return rows, torch.randn(16, 2, generator=generator, dtype=torch.float64)


def step(module: nn.Module, rows: Tensor, context: Tensor) -> dict[str, Tensor]:
    module(rows, context).backward()
    named = module.named_parameters()
    results = {name.removeprefix("module."): _gradient(each) for name, each in named}
    return results | {
        f"buffer {name.removeprefix('module.')}": b for name, b in module.named_buffers()
    }


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def worker(rank: int, folder: str) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    rows, context = data()
    half = slice(8 * rank, 8 * (rank + 1))
    torch.save(
        step(DistributedDataParallel(build()), rows[half], context[half]), f"{folder}/{rank}.pt"
    )
    distributed.destroy_process_group()
    assert not threads_of_the_group()


def threads_of_the_group() -> list[str]:
    """Those that still run could abort the process at its end; empty off Linux."""
    names = [each.read_text() for each in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


@pytest.mark.slow
def test_gradients_and_buffers_equal_those_of_the_joined_batch(tmp_path: Path) -> None:
    start_processes(worker, (str(tmp_path),), nprocs=2, start_method="spawn")
    expected = step(build(), *data())
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.slow
def test_the_example_keeps_replicas_equal() -> None:
    import subprocess
    import sys

    example = Path(__file__).parent.parent / "examples" / "ddp.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(example)]
    done = subprocess.run([*command, "--steps", "5"], capture_output=True, text=True, check=True)
    assert "between the replicas: 0.0e+00" in done.stdout
