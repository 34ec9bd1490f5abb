"""Every clause of the contract over every case."""

from __future__ import annotations

import pytest
import torch

from nflows_iresnet import testing
from tests.cases import CASES

COSTLY = {"inverse_gradients", "logabsdet_is_exact_or_unbiased", "weighted_gradient"}
PAIRS = [
    pytest.param(
        name,
        clause,
        id=f"{name}-{clause}",
        marks=[pytest.mark.slow] if case.is_variant and clause in COSTLY else [],
    )
    for name, case in CASES.items()
    for clause in testing.CLAUSES
]


@pytest.mark.parametrize(("name", "clause"), PAIRS)
def test_contract(name: str, clause: str) -> None:
    case = CASES[name]
    if clause in case.excluded:
        pytest.skip(case.excluded[clause])
    testing.check_transform(
        case.factory(),
        case.inputs(),
        case.context(),
        clauses=(clause,),
        num_draws=case.num_draws,
        bias=case.bias,
    )


@pytest.mark.parametrize("name", CASES)
def test_state_dict_into_a_fresh_model(name: str) -> None:
    """Everything that a forward pass depends on is in the state_dict."""
    case = CASES[name]
    trained, fresh = case.factory().double(), case.factory().double()
    inputs, context = case.inputs(), case.context()
    trained(inputs, context)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    fresh.load_state_dict(trained.state_dict())
    results = []
    for model in (trained, fresh):
        torch.manual_seed(0)
        results.append(model(inputs, context))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
