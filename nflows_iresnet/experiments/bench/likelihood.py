"""The exact likelihood: this library's exact estimator beside the full Jacobian of normflows."""

from __future__ import annotations

import torch

from nflows_iresnet.experiments.adapters import DensityModel
from nflows_iresnet.experiments.bench.contestants import CONTESTANTS, Size
from nflows_iresnet.experiments.bench.items import BASELINE, OURS, Case, Entrant, Item, Settings
from nflows_iresnet.training import seed_everything


def exact_case(size: Size, batch: int) -> Case:
    """Return the case of one size and one number of rows."""

    def enter(settings: Settings) -> list[Entrant]:
        return [_entrant(name, settings) for name in (OURS, BASELINE)]

    def _entrant(name: str, settings: Settings) -> Entrant:
        seed_everything(settings.seed)
        rows = torch.randn(batch, size.features).to(settings.device)
        model = CONTESTANTS[name].build(size)
        assert isinstance(model, DensityModel)
        model.to(settings.device).eval()
        return Entrant(name, lambda: model.exact_log_prob(rows))

    parameters: dict[str, float] = {"d": size.features, "h": size.hidden, "B": batch}
    return Case(f"d={size.features} h={size.hidden} B={batch}", parameters, enter)


def _cases(settings: Settings) -> list[Case]:
    return [
        exact_case(Size(2, 64), 1024),
        exact_case(Size(8, 64), 1024),
        exact_case(Size(64, 128), 128),
    ]


EXACT_LIKELIHOOD = Item("exact log-density of one block, without gradients", _cases, variable="d")
