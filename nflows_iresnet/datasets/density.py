"""The contract of a density that is known exactly, and what its implementations share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Generator, Tensor


class Density(ABC):
    r"""A probability density with exact samples and an exact logarithm.

    With samples :math:`x_i \sim p`, the entropy :math:`H = -\int p \log p` is the lowest mean
    negative log-likelihood that any model of :math:`p` can reach, so a result reads as nats above
    the optimum.

    Implementing a density: derive a frozen dataclass that defines ``_draw`` (float64 samples made
    of ``_uniform``, ``_normal`` and ``_choice``) and ``_log_density`` (float64 in and out,
    differentiable).
    """

    features: ClassVar[int] = 2

    @staticmethod
    def _check_positive(**values: float) -> None:
        for name, value in values.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")

    @staticmethod
    def _uniform(*shape: int, generator: Generator | None) -> Tensor:
        device = None if generator is None else generator.device
        return torch.rand(shape, generator=generator, dtype=torch.float64, device=device)

    @staticmethod
    def _normal(*shape: int, generator: Generator | None) -> Tensor:
        device = None if generator is None else generator.device
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)

    @staticmethod
    def _choice(num_choices: int, *shape: int, generator: Generator | None) -> Tensor:
        device = None if generator is None else generator.device
        return torch.randint(num_choices, shape, generator=generator, device=device)

    @abstractmethod
    def _draw(self, num_samples: int, generator: Generator | None) -> Tensor: ...

    @abstractmethod
    def _log_density(self, points: Tensor) -> Tensor: ...

    def sample(self, num_samples: int, generator: Generator | None = None) -> Tensor:
        """Draw independent samples.

        Args:
            num_samples: How many.
            generator: Torch's generator; ``None`` takes the one that ``torch.manual_seed`` seeds.

        Returns:
            Samples [num_samples, features] in torch's default dtype.

        Raises:
            ValueError: If ``num_samples`` is negative.

        Example:
            >>> from nflows_iresnet.datasets import Circles
            >>> Circles().sample(5).shape
            torch.Size([5, 2])
        """
        if num_samples < 0:
            raise ValueError(f"num_samples must be at least 0, got {num_samples}")
        return self._draw(num_samples, generator).to(torch.get_default_dtype())

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Natural logarithm of the density, computed in float64.

        Args:
            inputs: Points [N, features] of a floating-point dtype.

        Returns:
            Nats [N] in the dtype of ``inputs``; minus infinity outside the support.

        Raises:
            ValueError: If ``inputs`` has another shape or is not floating-point.

        Example:
            >>> from nflows_iresnet.datasets import Checkerboard
            >>> Checkerboard().log_prob(torch.tensor([[1.0, 1.0], [1.0, 3.0]]))
            tensor([-3.4657,    -inf])
        """
        if inputs.ndim != 2 or inputs.shape[1] != self.features:
            shape = tuple(inputs.shape)
            raise ValueError(f"inputs must have shape (N, {self.features}), got {shape}")
        if not inputs.is_floating_point():
            raise ValueError(f"inputs must be floating-point, got {inputs.dtype}")
        return self._log_density(inputs.double()).to(inputs.dtype)

    @torch.no_grad()
    def entropy(
        self, num_samples: int = 100_000, generator: Generator | None = None
    ) -> tuple[float, float]:
        r"""Differential entropy with its standard error.

        :math:`\hat H = -\frac1N \sum_i \log p(x_i)` has the standard error
        :math:`\operatorname{std}(\log p(x_i)) / \sqrt N`.

        Args:
            num_samples: Monte Carlo samples, at least two.
            generator: Torch's generator; ``None`` takes the one that ``torch.manual_seed`` seeds.

        Returns:
            The entropy in nats and its standard error, which is zero where the entropy is exact.

        Raises:
            ValueError: If ``num_samples`` is below two.

        Example:
            >>> from nflows_iresnet.datasets import Circles
            >>> value, standard_error = Circles().entropy(1000)
            >>> abs(value - 3.27) < 5 * standard_error < 0.2
            True
        """
        if num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, got {num_samples}")
        nats = -self._log_density(self._draw(num_samples, generator))
        return nats.mean().item(), nats.std().item() / math.sqrt(num_samples)
