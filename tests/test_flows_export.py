"""torch.export and torch.jit.trace of flows and their parts, with batches of other sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nflows_iresnet import ResidualFlow, logdet, transforms
from nflows_iresnet.flows import HybridFlow
from nflows_iresnet.nn import LipschitzMLP


class Forward(nn.Module):
    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part

    def forward(self, inputs: Tensor, context: Tensor) -> Any:
        return self.part(inputs, context)


class Inverse(Forward):
    def forward(self, inputs: Tensor, context: Tensor) -> Any:
        return self.part.inverse(inputs, context)


class LogProb(Forward):
    def forward(self, inputs: Tensor, context: Tensor) -> Any:
        return self.part.log_prob(inputs, context)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "act-norm": lambda: Forward(transforms.ActNorm(2)),
    "act-norm-inverse": lambda: Inverse(transforms.ActNorm(2)),
    "spline": lambda: Forward(transforms.ElementwiseRationalQuadraticSpline(2)),
    "spline-inverse": lambda: Inverse(transforms.ElementwiseRationalQuadraticSpline(2)),
    "affine": lambda: Forward(transforms.ConditionalAffine(2, 3)),
    "affine-inverse": lambda: Inverse(transforms.ConditionalAffine(2, 3)),
    "hybrid": lambda: LogProb(HybridFlow(2, 8, 2, context_features=3)),
    "flow": lambda: LogProb(ResidualFlow(2, 8, 1, context_features=3)),
}


def batch(size: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(size)
    return torch.randn(size, 2), torch.randn(size, 3)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["export", "trace"])
@pytest.mark.parametrize("name", MODULES)
def test_a_program_of_one_batch_serves_others(name: str, way: str) -> None:
    torch.manual_seed(0)
    module = MODULES[name]().eval()
    if way == "export":
        rows = torch.export.Dim("rows", min=2, max=1024)
        program = torch.export.export(module, batch(5), dynamic_shapes=({0: rows}, {0: rows}))
        run: Callable[..., Any] = program.module()
    else:
        run = torch.jit.trace(module, batch(5), check_trace=False)
    for size in (5, 7):
        torch.testing.assert_close(run(*batch(size)), module(*batch(size)), rtol=1e-4, atol=1e-5)


def test_a_trace_that_would_verify_nothing_is_refused() -> None:
    block: Any = transforms.ResidualTransform(LipschitzMLP(2, [8]), estimator=logdet.Exact())

    class Inverse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, outputs: Tensor) -> Tensor:
            return self.block.inverse(outputs)[0]

    with pytest.raises(RuntimeError, match="verify nothing"):
        torch.jit.trace(Inverse(), (torch.zeros(3, 2),), check_trace=False)
    block.estimator = logdet.RussianRoulette()
    with pytest.raises(RuntimeError, match="number of terms"):
        torch.jit.trace(block, (torch.zeros(3, 2),), check_trace=False)
