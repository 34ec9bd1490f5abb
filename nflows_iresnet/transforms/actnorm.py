"""ActNorm of nflows with a data-dependent start that cannot fail."""

from __future__ import annotations

import torch
from nflows.transforms.normalization import ActNorm as _NflowsActNorm
from torch import Tensor


class ActNorm(_NflowsActNorm):
    r"""y = exp(s) x + t per feature or channel, started so that the first batch has mean 0, std 1.

    Differs from `nflows.transforms.ActNorm` in the start alone, which there gives values that are
    not finite for a constant feature or a batch of one: here the standard deviation is bounded
    below, and a batch of fewer than two values only centres. An empty batch starts nothing. The
    start is in place, so that optimisers, compiled graphs and `state_dict` see the same tensors.

    Args:
        features: number of features (B, F), or of channels (B, C, H, W).

    References:
        Kingma, Dhariwal. Glow: Generative flow with invertible 1x1 convolutions, 2018.
    """

    _min_std = 1e-3

    @torch.no_grad()
    def _initialize(self, inputs: Tensor) -> None:
        rows = inputs.movedim(1, -1).reshape(-1, inputs.shape[1])
        if not len(rows):
            return
        std = rows.std(dim=0) if len(rows) > 1 else torch.ones_like(rows[0])
        std = std.clamp_min(self._min_std)
        self.log_scale.copy_(-std.log())
        self.shift.copy_(-(rows / std).mean(dim=0))
        self.initialized.fill_(True)
