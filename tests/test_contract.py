"""Every clause of the contract over every case."""

from __future__ import annotations

import pytest

from nflows_iresnet import testing
from tests.cases import CASES

PAIRS = [(case, clause) for case in CASES for clause in testing.CLAUSES]


@pytest.mark.parametrize(("name", "clause"), PAIRS, ids=[f"{c}-{k}" for c, k in PAIRS])
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
