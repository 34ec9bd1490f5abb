"""ActNorm of nflows with a data-dependent start that cannot fail."""

from __future__ import annotations

from typing import Any

import torch
from nflows.transforms.normalization import ActNorm as _NflowsActNorm
from torch import Tensor, distributed


class ActNorm(_NflowsActNorm):
    r"""y = exp(s) x + t per feature or channel, started so that the first batch has mean 0, std 1.

    Differs from `nflows.transforms.ActNorm` in the start alone:

    * nflows gives values that are not finite for a constant feature or a batch of one: here the
      standard deviation is bounded below, and a single value only centres. An empty batch starts
      nothing.
    * Where several processes train one model, they start from the statistics of the joined batch
      (three `all_reduce`, in which every process takes part): replicas that started from their own
      batches would differ ever after.
    * A model that is trained through its inverse (variational inference) keeps what it learns: the
      first inverse with gradients ends the waiting for a batch, which would otherwise overwrite
      scale and shift later.
    * Once started, a forward pass neither waits for the device nor breaks a compiled graph.

    Args:
        features: number of features (B, F), or of channels (B, C, H, W).

    References:
        Kingma, Dhariwal. Glow: Generative flow with invertible 1x1 convolutions, 2018.

    Example:
        >>> norm = ActNorm(2)
        >>> outputs, _ = norm(torch.tensor([[1.0, 5.0], [3.0, 9.0]]))
        >>> torch.allclose(outputs.mean(0), torch.zeros(2), atol=1e-6)
        True
    """

    _min_std = 1e-3

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self._has_started = False

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (y, sum of s over what was scaled), shapes (B, *) and (B,)."""
        self._check(inputs)
        if self.training and not self._has_started:
            self._start(inputs)
        scale, shift = self._broadcastable_scale_shift(inputs)
        return scale * inputs + shift, self._logabsdet(inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x, minus the sum of s over what was scaled), shapes (B, *) and (B,)."""
        self._check(inputs)
        if self.training and not self._has_started and torch.is_grad_enabled():
            self.initialized.fill_(True)
            self._has_started = True
        scale, shift = self._broadcastable_scale_shift(inputs)
        return (inputs - shift) / scale, -self._logabsdet(inputs)

    def _check(self, inputs: Tensor) -> None:
        if inputs.dim() not in (2, 4) or inputs.shape[1] != len(self.shift):
            raise ValueError(
                f"expected inputs of shape (batch, {len(self.shift)}) or (batch, "
                f"{len(self.shift)}, height, width), got {tuple(inputs.shape)}"
            )

    def _logabsdet(self, inputs: Tensor) -> Tensor:
        return inputs.shape[2:].numel() * self.log_scale.sum().expand(len(inputs))

    def _start(self, inputs: Tensor) -> None:
        if not self.initialized:
            self._initialize(inputs)
        self._has_started = bool(self.initialized)

    @torch.no_grad()
    def _initialize(self, inputs: Tensor) -> None:
        rows = inputs.movedim(1, -1).reshape(-1, inputs.shape[1]).double()
        count = _sum_over_processes(rows.new_tensor(float(len(rows))))
        if count == 0:
            return
        mean = _sum_over_processes(rows.sum(0)) / count
        squares = _sum_over_processes((rows - mean).square().sum(0))
        variance = squares / (count - 1).clamp_min(1)
        std = variance.sqrt() if count > 1 else torch.ones_like(mean)
        std = std.clamp_min(self._min_std)
        self.log_scale.copy_(-std.log())
        self.shift.copy_(-mean / std)
        self.initialized.fill_(True)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._has_started = False


def _sum_over_processes(values: Tensor) -> Tensor:
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
    return values
