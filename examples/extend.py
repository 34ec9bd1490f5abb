"""A network and an estimator of your own, checked by the library's contract.

Run with `python examples/extend.py`. It prints each clause of the contract as it is checked.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nflows_iresnet import ResidualTransform, linearization, logdet, testing
from nflows_iresnet.nn import LipschitzLinear, lipschitz_bound


class GatedNet(nn.Module):
    r"""g(x) = s o W_2 sin(W_1 x), \|W_i\| <= 0.97, gates s in (-1, 1): Lip(g) <= 0.97^2.

    Nothing but `forward` is needed. `lipschitz` tells estimators the guaranteed bound, and
    `lipschitz_bound` gives the certificate for the present weights.
    """

    lipschitz = 0.97**2

    def __init__(self, features: int, hidden_features: int) -> None:
        super().__init__()
        self.inner = LipschitzLinear(features, hidden_features)
        self.outer = LipschitzLinear(hidden_features, features)
        self.gate = nn.Parameter(torch.zeros(features))

    def forward(self, inputs: Tensor) -> Tensor:
        gate = torch.tanh(self.gate + 1)
        outputs: Tensor = gate * self.outer(torch.sin(self.inner(inputs)))
        return outputs

    def lipschitz_bound(self) -> float:
        return lipschitz_bound(self.inner) * lipschitz_bound(self.outer)


@dataclass(frozen=True)
class SecondOrder(logdet.LogDetEstimator):
    """tr J - tr(J^2) / 2: the first two terms of the series, exactly. Biased by O(L^3)."""

    def logabsdet(
        self,
        at_inputs: linearization.Linearization,
        lipschitz: float | None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        jacobian = at_inputs.jacobian()
        square = (jacobian * jacobian.mT).sum((-2, -1))
        value = at_inputs.trace() - square / 2
        return value, torch.zeros_like(value)


def check(title: str, block: ResidualTransform, bias: float = 0.0) -> None:
    print(title)
    inputs = torch.randn(4, 3)
    for clause in testing.CLAUSES:
        testing.check_transform(block, inputs, clauses=(clause,), bias=bias, num_draws=100)
        print(f"  kept: {clause}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    torch.manual_seed(parser.parse_args().seed)
    net = GatedNet(features=3, hidden_features=16)
    bound = testing.check_lipschitz(net.double(), torch.randn(32, 3), net.lipschitz)
    print(f"largest stretch found {bound:.3f} <= guaranteed {net.lipschitz:.3f}")
    check("own net, default estimator", ResidualTransform(net))
    check("own net, unbiased estimator", ResidualTransform(net, estimator=logdet.RussianRoulette()))
    check("own net, own estimator", ResidualTransform(net, estimator=SecondOrder()), bias=0.3)
    print("and a promise that is not kept is found:")
    try:
        check(
            "own net, own estimator, no bias allowed",
            ResidualTransform(net, estimator=SecondOrder()),
        )
    except AssertionError as error:
        print(f"  broken: {error}")
    else:
        raise SystemExit("the contract did not notice a biased estimator")


if __name__ == "__main__":
    main()
