r"""Solvers of fixed-point equations x = f(x) that verify their residual, or raise.

The inverse of a residual block solves x = y - g(x); its implicit derivative solves
lambda = v - J^T lambda. Both maps contract with the factor L = Lip(g) < 1 in the 2-norm, so that
for ANY point x, however it was found,

    \|x - x*\| <= \|f(x) - x\| / (1 - L)            (Banach),

and a verified residual is a bound of the error. How a solution is found is separate from how it is
differentiated: see `transforms.ResidualTransform`.

How to choose: `Anderson` (the default) needs two to four times fewer evaluations than plain
iteration and keeps its guarantee; `FixedPointIteration` is the method of the papers.
"""

from nflows_iresnet.solvers.anderson import Anderson
from nflows_iresnet.solvers.base import (
    Accelerator,
    FixedPointNotConverged,
    Progress,
    SelectableMap,
    Solution,
    Solver,
)
from nflows_iresnet.solvers.fixed_point import FixedPointIteration

__all__ = [
    "Accelerator",
    "Anderson",
    "FixedPointIteration",
    "FixedPointNotConverged",
    "Progress",
    "SelectableMap",
    "Solution",
    "Solver",
]
