"""The contract of an invertible transform, clause by clause, for your own transforms too.

`check_transform` runs every clause of `CLAUSES` and raises an `AssertionError` that says what
broke. Transforms are in the convention of nflows, (inputs, context) -> (outputs, logabsdet), and
may be random: a log-determinant that differs between seeds is judged by its mean over many draws,
with a standard error.
"""

from __future__ import annotations

from nflows_iresnet.testing.contract import CLAUSES, Clause, check_transform
from nflows_iresnet.testing.networks import check_linearization, check_lipschitz
from nflows_iresnet.testing.subject import Subject, exact_logabsdet

__all__ = [
    "CLAUSES",
    "Clause",
    "Subject",
    "check_linearization",
    "check_lipschitz",
    "check_transform",
    "exact_logabsdet",
]
