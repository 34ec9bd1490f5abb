"""Residual blocks alternating with couplings or autoregressive transforms of nflows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nflows.transforms import Transform
from torch import nn

from nflows_iresnet.flows.base import Expected, Flow, StandardNormal
from nflows_iresnet.flows.partners import Partner, spline_coupling
from nflows_iresnet.flows.residual import block_bins_of, quantile_splines, start_from_data
from nflows_iresnet.logdet import LogDetEstimator
from nflows_iresnet.nn import LipschitzMLP, MatrixNorm
from nflows_iresnet.solvers import Solver
from nflows_iresnet.transforms import (
    ActNorm,
    CompositeTransform,
    ConditionalAffine,
    LinearTransform,
    ResidualTransform,
)
from nflows_iresnet.validation import validated_size


class HybridFlow(Flow):
    r"""Residual blocks alternating with partners that stretch: spline couplings by default.

    From data to noise, with T = `num_layers`:

        start, B_0, LU, P_0, LU, S, B_1, LU, P_1, ..., ActNorm    (T blocks B and P in all),

    where B_i is y = x + g(x), P_i = `partner(i, ...)`, LU a `LinearTransform`, S a spline of each
    feature, and the start ActNorm, a spline of each feature from its quantiles, and whitening. An
    odd T ends with a residual block. What one kind cannot do, the other can: a residual block moves
    all features at once, by less than their distances; a coupling stretches without limit, but half
    of the features given the other half, whose roles alternate from one to the next. With a context
    it enters each g and each partner, and a `ConditionalAffine` map precedes each residual block;
    to forget it is an error.

    **When to pick it.** On tables, beside a residual flow alone, and with short budgets: its steps
    are shorter. Which of the two is ahead depends on the data, and so does the best partner: the
    races of docs/benchmarks.md and the table of docs/measurements.md say by how much. There is no
    Lipschitz constant of the whole: `lipschitz_bound()` certifies the residual blocks, and says
    infinity for all.

    **Cost.** A residual block costs as in `ResidualFlow`, a coupling one evaluation of its network
    both ways: half of the solves in sampling. An autoregressive partner samples with `features`
    evaluations. `GraphedStep` captures it with each of the ready-made partners, but not with the
    spline couplings and spline autoregressive transforms of nflows, which select by boolean masks.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural spline flows, 2019.
        Chen, Behrmann, Duvenaud, Jacobsen. Residual flows for invertible generative modeling, 2019.

    Args:
        features: number of dimensions of the data; at least 2 for couplings.
        hidden_features: width of the hidden layers of each network.
        num_layers: number of residual blocks and partners together, T.
        num_blocks_per_layer: number of hidden layers of each g, and of residual blocks in the
            networks of the ready-made partners.
        context_features: number of context values, or None.
        partner: makes the transforms between the residual blocks: `spline_coupling`,
            `affine_coupling`, `spline_autoregressive`, `masked_autoregressive`, one of them with
            other options by `functools.partial`, or your own, called with (index, features,
            hidden_features, num_blocks_per_layer, context_features), all by position.
        net: makes each g, see `ResidualFlow`.
        estimator: strategy for the log-determinant of residual blocks; `logdet.Auto()` by default.
        solver: strategy for their inverse; `solvers.Anderson()` by default.
        activation: of each g, see `ResidualFlow`.
        coeff: bound of the Lipschitz constant of each g, in (0, 1).
        norm: the norm that weights of each g are divided by, see `ResidualFlow`.
        recompute: trade time for memory, see `transforms.CompositeTransform`.
        marginal_bins: bins of the spline of each feature in the start; 0 leaves it out.
        block_bins: bins of a further spline of each feature before each residual block but the
            first, see `ResidualFlow`, whose default this is; 0 for none.

    Raises:
        ValueError: if a size is not positive, features cannot be split by the partner, or another
            argument is none of its kind.

    Example:
        >>> from functools import partial
        >>> from nflows_iresnet.flows import spline_autoregressive, spline_coupling
        >>> flow = HybridFlow(features=3, hidden_features=16, num_layers=4)
        >>> flow.initialize(torch.randn(2000, 3) * 5 + 2)
        >>> flow.log_prob(torch.zeros(5, 3)).shape, flow.sample(3).shape
        (torch.Size([5]), torch.Size([3, 3]))
        >>> finer = HybridFlow(3, 16, 4, partner=partial(spline_coupling, num_bins=16))
        >>> autoregressive = HybridFlow(3, 16, 4, partner=spline_autoregressive)
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        num_layers: int,
        num_blocks_per_layer: int = 2,
        *,
        context_features: int | None = None,
        partner: Partner | None = None,
        net: Callable[..., nn.Module] = LipschitzMLP,
        estimator: LogDetEstimator | None = None,
        solver: Solver | None = None,
        activation: nn.Module | None = None,
        coeff: float = 0.97,
        norm: MatrixNorm | None = None,
        recompute: bool = False,
        marginal_bins: int = 16,
        block_bins: int | None = None,
    ) -> None:
        features = validated_size("features", features)
        hidden = validated_size("hidden_features", hidden_features)
        depth = validated_size("num_blocks_per_layer", num_blocks_per_layer)
        make_partner = spline_coupling if partner is None else partner
        _require_maker("net", net, "a network for each block, as the class LipschitzMLP")
        _require_maker("partner", make_partner, "a transform, as the function spline_coupling")

        block_bins = block_bins_of(block_bins, pays=features > 2 and marginal_bins != 0)

        def residual() -> list[Transform]:
            branch = net(
                *(features, [hidden] * depth, context_features),
                activation=activation,
                coeff=coeff,
                norm=norm,
            )
            block = ResidualTransform(branch, estimator=estimator, solver=solver)
            if context_features is None:
                return [block]
            return [ConditionalAffine(features, context_features), block]

        layers = [*start_from_data(features, marginal_bins), *residual()]
        for layer in range(1, validated_size("num_layers", num_layers)):
            layers.append(LinearTransform(features))
            if layer % 2 == 0:
                layers += [*quantile_splines("block_bins", features, block_bins), *residual()]
            else:
                sizes = (features, hidden, depth, context_features)
                layers.append(_built(make_partner, layer // 2, *sizes))
        layers.append(ActNorm(features))
        super().__init__(
            CompositeTransform(layers, recompute=recompute),
            StandardNormal([features]),
            expects=Expected((features,), context_features),
        )


def _require_maker(name: str, maker: object, example: str) -> None:
    if isinstance(maker, nn.Module) or not callable(maker):
        raise ValueError(f"{name} must make {example} does, got {maker!r}")


def _built(make: Partner, *sizes: Any) -> Transform:
    """Return a partner, built on the CPU: nflows looks at its masks, which "meta" has not."""
    device = torch.empty(0).device
    with torch.device("cpu"):
        partner: object = make(*sizes)
    if not isinstance(partner, Transform):
        raise ValueError(
            f"partner must return a Transform of nflows, but partner returned {partner!r}"
        )
    return partner if device.type == "cpu" else partner.to(device)
