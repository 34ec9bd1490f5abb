"""ActNorm within models of normflows: the order of sampling, losses and data does not matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import normflows as nf
import pytest
import torch
from torch import Tensor, nn

from nflows_iresnet import ResidualFlow, transforms
from nflows_iresnet.interop.normflows import ToNormflows


class Target(nn.Module):
    """A normal around 100."""

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * (z - 100).square().sum(1)


def model() -> Any:
    torch.manual_seed(0)
    base = nf.distributions.DiagGaussian(2, trainable=False)
    return nf.NormalizingFlow(base, [ToNormflows(ResidualFlow(2, 16, 2)._transform)], Target())


def data() -> Tensor:
    return torch.randn(512, 2, generator=torch.Generator().manual_seed(3)) * 20 + 100


BEFORE: dict[str, Callable[[Any], Any]] = {
    "sample": lambda model: model.sample(5),
    "reverse_kld": lambda model: model.reverse_kld(16),
    "reverse_kld-path": lambda model: model.reverse_kld(16, score_fn=False),
    "reverse_alpha_div": lambda model: model.reverse_alpha_div(16, alpha=2, dreg=True),
    "own-samples": lambda model: model.log_prob(model.sample(5)[0]),
}


@pytest.mark.parametrize("use", BEFORE.values(), ids=BEFORE)
def test_what_only_samples_does_not_end_the_waiting_for_data(use: Callable[[Any], Any]) -> None:
    expected, used = model().forward_kld(data()).item(), model()
    use(used)
    assert used.forward_kld(data()).item() == pytest.approx(expected, abs=1e-4)
    assert expected < 100


@pytest.mark.parametrize("score_fn", [True, False])
def test_what_was_learned_from_samples_alone_is_kept(score_fn: bool) -> None:
    trained = model()
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        trained.reverse_kld(16, score_fn=score_fn).backward()
        optimizer.step()
    before = trained.eval().log_prob(data())
    torch.testing.assert_close(trained.train().log_prob(data()), before)
    norms = [each for each in trained.modules() if isinstance(each, transforms.ActNorm)]
    assert all(bool(each.initialized) for each in norms)


@pytest.mark.parametrize("score_fn", [True, False])
def test_the_first_loss_is_that_of_one_model(score_fn: bool) -> None:
    """Sampling and scoring see the same flow, so that evaluation mode gives the same number."""
    values = []
    for training in (True, False):
        flow = model().train(training)
        torch.manual_seed(1)
        values.append(flow.reverse_kld(16, score_fn=score_fn).item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)
