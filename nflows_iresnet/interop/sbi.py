r"""Residual flows as density estimators of sbi, for `NPE(prior, density_estimator=...)`.

sbi is an extra: `pip install '.[sbi]'` in a clone. It is imported when an estimator is built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import torch
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, Transform
from torch import Tensor, nn

from nflows_iresnet.flows import ResidualFlow
from nflows_iresnet.logdet import Auto, LogDetEstimator
from nflows_iresnet.solvers import Solver
from nflows_iresnet.validation import validated_strategy

if TYPE_CHECKING:
    from sbi.neural_nets.estimators import NFlowsFlow

ZScore = Literal["none", "independent", "structured"]

_ROWS_TO_START = 5000
"""ActNorm starts from at most this many simulations."""


@dataclass(frozen=True, kw_only=True)
class ResidualFlowBuilder:
    r"""Builds the density estimator p(theta \| x) of sbi's `NPE` as a conditional `ResidualFlow`.

    sbi calls the builder with the training simulations, from which come the numbers of features,
    the z-scores of theta and x, and the start of ActNorm (sbi's first call of a new estimator has
    two rows, which would start it badly). The estimator is sbi's own `NFlowsFlow`, so that
    `train`, `build_posterior`, `sample`, `sample_batched` and `log_prob` work as with 'maf'.

    References:
        Papamakarios, Murray. Fast epsilon-free inference of simulation models with Bayesian
        conditional density estimation, 2016. Tejero-Cantero et al. sbi: A toolkit for
        simulation-based inference, 2020.

    Args:
        hidden_features: width of the hidden layers of each residual block.
        num_layers: number of residual blocks.
        num_blocks_per_layer: number of hidden layers of each residual block.
        embedding_net: maps x, shape (B, \*), to a context of shape (B, C); trained with the flow.
        z_score_theta: 'independent' standardises each parameter, 'structured' all with one mean
            and deviation, 'none' leaves them.
        z_score_x: the same for the observations, before the embedding.
        estimator: strategy for the log-determinant; by default exact up to 16 parameters, because a
            posterior is evaluated far more often than it is trained.
        solver: strategy for the inverse, see `ResidualFlow`.
        coeff: bound of the Lipschitz constant of each block, in (0, 1).
        marginal_bins: bins of the spline of each parameter, see `ResidualFlow`; none by default,
            because posteriors were measured without. There are no linear maps, for this reason.

    Raises:
        ValueError: if `z_score_theta` or `z_score_x` is none of the three, or `embedding_net`,
            `estimator` or `solver` is none of its kind.

    Example:
        >>> from nflows_iresnet.interop.sbi import ResidualFlowBuilder
        >>> builder = ResidualFlowBuilder(hidden_features=64, num_layers=8)
        >>> trainer = NPE(prior, density_estimator=builder)  # doctest: +SKIP
        >>> trainer.append_simulations(theta, x).train()  # doctest: +SKIP
        >>> trainer.build_posterior().sample((1000,), x=x_observed)  # doctest: +SKIP
    """

    hidden_features: int = 64
    num_layers: int = 8
    num_blocks_per_layer: int = 2
    embedding_net: nn.Module = field(default_factory=nn.Identity)
    z_score_theta: ZScore = "independent"
    z_score_x: ZScore = "independent"
    estimator: LogDetEstimator | None = Auto(max_exact_features=16)
    solver: Solver | None = None
    coeff: float = 0.97
    marginal_bins: int = 0

    def __post_init__(self) -> None:
        for name in ("z_score_theta", "z_score_x"):
            if getattr(self, name) not in get_args(ZScore):
                raise ValueError(
                    f"{name} must be one of {get_args(ZScore)}, got {getattr(self, name)!r}"
                )
        validated_strategy("embedding_net", self.embedding_net, nn.Module, "torch.nn.Identity()")
        if self.estimator is not None:
            validated_strategy("estimator", self.estimator, LogDetEstimator, "logdet.Exact()")
        if self.solver is not None:
            example = "solvers.Anderson()"
            validated_strategy("solver", self.solver, Solver, example)  # type: ignore[type-abstract]

    def __call__(self, theta: Tensor, x: Tensor) -> NFlowsFlow:
        """Return an estimator of p(theta | x) that is ready to be trained.

        Args:
            theta: parameters of simulations, shape (B, features).
            x: what was simulated with them, shape (B, *).
        """
        from sbi.neural_nets.estimators import NFlowsFlow

        embedding_net = self._embedding(x)
        with torch.no_grad():
            context_features = embedding_net(x[:2])[0].numel()
        flow = ResidualFlow(
            theta[0].numel(),
            self.hidden_features,
            self.num_layers,
            self.num_blocks_per_layer,
            context_features=context_features,
            estimator=self.estimator,
            solver=self.solver,
            coeff=self.coeff,
            marginal_bins=self.marginal_bins,
            linear=False,
        )
        transform = CompositeTransform([*self._standardised(theta), flow._transform])
        context_net = nn.Sequential(embedding_net, flow._embedding_net)
        net = Flow(transform, flow._distribution, context_net)
        with torch.no_grad():
            net.log_prob(theta[:_ROWS_TO_START].flatten(start_dim=1), x[:_ROWS_TO_START])
        return NFlowsFlow(net, input_shape=theta[0].shape, condition_shape=x[0].shape)

    def _embedding(self, x: Tensor) -> nn.Module:
        from sbi.utils.sbiutils import standardizing_net

        if self.z_score_x == "none":
            return self.embedding_net
        structured = self.z_score_x == "structured"
        return nn.Sequential(standardizing_net(x, structured), self.embedding_net)

    def _standardised(self, theta: Tensor) -> list[Transform]:
        from sbi.utils.sbiutils import standardizing_transform

        if self.z_score_theta == "none":
            return []
        return [standardizing_transform(theta, self.z_score_theta == "structured")]
