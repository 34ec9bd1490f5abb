"""torch.compile without a graph break, with the numbers of eager mode."""

from __future__ import annotations

import pytest
import torch

from nflows_iresnet import ResidualFlow, logdet
from nflows_iresnet.flows import HybridFlow, spline_autoregressive
from nflows_iresnet.nn import CLipSwish

FLOWS = {
    "exact-2d": lambda: ResidualFlow(2, 8, 1),
    "exact-5d-context": lambda: ResidualFlow(5, 8, 1, context_features=2),
    "hybrid": lambda: HybridFlow(3, 8, 2),
    "hybrid-autoregressive": lambda: HybridFlow(3, 8, 2, partner=spline_autoregressive),
    "parameter-of-an-activation": lambda: ResidualFlow(2, 8, 1, activation=CLipSwish()),
    "series": lambda: ResidualFlow(4, 8, 1, estimator=logdet.PowerSeries(num_terms=4)),
}


SLOW = [(name, training) for name in FLOWS for training in (True, False)][1:]


@pytest.mark.parametrize(
    ("name", "training"),
    [("exact-2d", True), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
)
def test_log_prob_compiles_to_one_graph(name: str, training: bool) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    flow = FLOWS[name]()
    context = torch.randn(6, 2) if "context" in name else None
    rows = torch.randn(6, int(flow._distribution._shape[0]))
    flow.log_prob(rows, context)
    flow.train(training)
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    results = []
    for log_prob in (compiled, flow.log_prob):
        torch.manual_seed(1)
        flow.zero_grad()
        values = log_prob(rows, context)
        values.sum().backward()
        gradients = [each.grad.clone() for each in flow.parameters() if each.grad is not None]
        results.append([values.detach(), *gradients])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_log_prob_compiles_with_inductor() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    flow = ResidualFlow(2, 8, 1)
    rows = torch.randn(6, 2)
    expected = flow.log_prob(rows)
    compiled = torch.compile(flow.log_prob, fullgraph=True)
    torch.testing.assert_close(compiled(rows), expected, rtol=0, atol=1e-5)


def test_the_roulette_says_why_it_does_not_compile_to_one_graph() -> None:
    """The number of terms is drawn per call: the number of products depends on data."""
    torch.compiler.reset()
    flow = ResidualFlow(2, 8, 1, estimator=logdet.RussianRoulette())
    flow.log_prob(torch.randn(6, 2))
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"(?i)data.dependent|Unsupported|item"):
        compiled(torch.randn(6, 2))
