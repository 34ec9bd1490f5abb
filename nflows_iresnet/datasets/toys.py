"""Plane toy densities in closed form, each with exact samples and an exact log-density."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from nflows_iresnet.datasets.density import Density


@dataclass(frozen=True)
class Circles(Density):
    r"""Two concentric circles of equal weight with isotropic Gaussian noise.

    With :math:`r = |x|`, the noise integrates over a circle of radius :math:`R` in closed form:

    .. math::
        p(x) = \tfrac12 \sum_R \frac{1}{2\pi\sigma^2}
               \exp\!\Bigl(-\frac{(r - R)^2}{2\sigma^2}\Bigr)
               e^{-rR/\sigma^2} I_0\!\Bigl(\frac{rR}{\sigma^2}\Bigr)

    The defaults are scikit-learn's circles with ``factor=0.5, noise=0.08``, times three, as in
    FFJORD.

    References:
        "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models"
        (Grathwohl et al., 2019).

    Args:
        noise: Standard deviation of the noise.
        inner: Radius of the first circle.
        outer: Radius of the second circle.

    Example:
        >>> Circles().log_prob(torch.tensor([[3.0, 0.0]]))
        tensor([-3.1207])
    """

    noise: float = 0.24
    inner: float = 1.5
    outer: float = 3.0

    def __post_init__(self) -> None:
        """Validate the parameters."""
        self._check_positive(noise=self.noise, inner=self.inner, outer=self.outer)

    def _draw(self, num_samples: int, generator: Generator | None) -> Tensor:
        angle = 2 * math.pi * self._uniform(num_samples, generator=generator)
        is_outer = self._choice(2, num_samples, generator=generator)
        radius = self.inner + (self.outer - self.inner) * is_outer
        circle = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        return circle + self.noise * self._normal(num_samples, 2, generator=generator)

    def _log_density(self, points: Tensor) -> Tensor:
        distance = points.norm(dim=1)
        rings = [self._log_ring(distance, radius) for radius in (self.inner, self.outer)]
        return torch.stack(rings).logsumexp(dim=0) - math.log(4 * math.pi * self.noise**2)

    def _log_ring(self, distance: Tensor, radius: float) -> Tensor:
        variance = self.noise**2
        bessel = torch.special.i0e(distance * radius / variance)
        return bessel.log() - (distance - radius).square() / (2 * variance)


@dataclass(frozen=True)
class EightGaussians(Density):
    r"""Eight equal Gaussians on a ring.

    :math:`p(x) = \tfrac18 \sum_{k=0}^{7} \mathcal N(x;\ R\,(\cos\tfrac{\pi k}4,
    \sin\tfrac{\pi k}4),\ \sigma^2 I)`. The defaults are FFJORD's.

    References:
        "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models"
        (Grathwohl et al., 2019).

    Args:
        noise: Standard deviation of each Gaussian.
        radius: Radius of the ring.

    Example:
        >>> EightGaussians(noise=0.5, radius=4.0).log_prob(torch.tensor([[4.0, 0.0]]))
        tensor([-2.5...])
    """

    noise: float = 0.5 / math.sqrt(2)
    radius: float = 4 / math.sqrt(2)

    def __post_init__(self) -> None:
        """Validate the parameters."""
        self._check_positive(noise=self.noise, radius=self.radius)

    def _centre(self, index: Tensor) -> Tensor:
        angle = index.double() * (math.pi / 4)
        return self.radius * torch.stack([angle.cos(), angle.sin()], dim=-1)

    def _draw(self, num_samples: int, generator: Generator | None) -> Tensor:
        centres = self._centre(self._choice(8, num_samples, generator=generator))
        return centres + self.noise * self._normal(num_samples, 2, generator=generator)

    def _log_density(self, points: Tensor) -> Tensor:
        deviations = points[:, None] - self._centre(torch.arange(8, device=points.device))
        return _log_normal(deviations, (self.noise, self.noise)).logsumexp(dim=1) - math.log(8)


@dataclass(frozen=True)
class Checkerboard(Density):
    r"""Uniform on eight of the sixteen squares of :math:`[-4, 4]^2`.

    :math:`p(x) = \tfrac1{32}` where :math:`\lfloor x_1/2 \rfloor + \lfloor x_2/2 \rfloor` is even
    and zero elsewhere; the squares are closed, so that rounding never moves a sample out of them.
    Its entropy is :math:`\log 32`, exactly.

    References:
        "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models"
        (Grathwohl et al., 2019).

    Example:
        >>> Checkerboard().entropy()
        (3.4657359027997265, 0.0)
    """

    def _draw(self, num_samples: int, generator: Generator | None) -> Tensor:
        square = self._choice(8, num_samples, generator=generator)
        column, pair = square % 4, square // 4
        corner = torch.stack([column, 2 * pair + column % 2], dim=1) - 2
        return 2 * (corner + self._uniform(num_samples, 2, generator=generator))

    def _log_density(self, points: Tensor) -> Tensor:
        cells = points / 2
        on_edge = (cells == cells.floor()).any(dim=1)
        is_even = cells.floor().sum(dim=1) % 2 == 0
        inside = (points.abs() <= 4).all(dim=1) & (is_even | on_edge)
        return torch.where(inside, points.new_tensor(-math.log(32)), -math.inf)

    def entropy(
        self, num_samples: int = 100_000, generator: Generator | None = None
    ) -> tuple[float, float]:
        """Differential entropy, exactly: log 32 with a standard error of zero.

        Args:
            num_samples: Not needed here: nothing is sampled.
            generator: Not needed here: nothing is sampled.

        Returns:
            The entropy in nats, and zero.

        Example:
            >>> Checkerboard().entropy()[1]
            0.0
        """
        return math.log(32), 0.0


@dataclass(frozen=True)
class Pinwheel(Density):
    r"""Five Gaussian arms, each swirled by an angle that grows with the radius.

    An arm :math:`z \sim \mathcal N((2, 0),\ \operatorname{diag}(\sigma_r^2, \sigma_t^2))` turns by
    :math:`\theta_k(|z|) = \tfrac{2\pi k}K + \lambda e^{|z|/2}`. In polar coordinates this is a
    shear, so its Jacobian determinant is one and

    .. math:: p(x) = \tfrac1K \sum_k \mathcal N\bigl(R(-\theta_k(|x|))\,x;\ (2, 0),\ \dots\bigr)

    exactly. (The original turns by the first coordinate of :math:`z`, which has no closed form.)

    References:
        "Composing Graphical Models with Neural Networks for Structured Representations and Fast
        Inference" (Johnson et al., 2016).

    Args:
        num_arms: Number of arms K.
        radial_noise: Standard deviation along an arm.
        tangential_noise: Standard deviation across an arm.
        rate: Strength of the swirl.

    Example:
        >>> Pinwheel(rate=1e-9).log_prob(torch.tensor([[2.0, 0.0]]))
        tensor([-1.3...])
    """

    num_arms: int = 5
    radial_noise: float = 0.6
    tangential_noise: float = 0.2
    rate: float = 0.25

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if not isinstance(self.num_arms, int) or self.num_arms < 1:
            raise ValueError(f"num_arms must be a positive integer, got {self.num_arms}")
        self._check_positive(rate=self.rate)
        self._check_positive(radial_noise=self.radial_noise, tangential_noise=self.tangential_noise)

    @property
    def _noises(self) -> tuple[float, float]:
        return self.radial_noise, self.tangential_noise

    def _angle(self, arm: Tensor, distance: Tensor) -> Tensor:
        return 2 * math.pi / self.num_arms * arm + self.rate * (distance / 2).exp()

    def _draw(self, num_samples: int, generator: Generator | None) -> Tensor:
        noise = self._normal(num_samples, 2, generator=generator)
        arm = noise * noise.new_tensor(self._noises) + noise.new_tensor([2.0, 0.0])
        index = self._choice(self.num_arms, num_samples, generator=generator)
        return _rotated(arm, self._angle(index, arm.norm(dim=1)))

    def _log_density(self, points: Tensor) -> Tensor:
        arms = torch.arange(self.num_arms, device=points.device)
        angle = self._angle(arms, points.norm(dim=1, keepdim=True))
        deviations = _rotated(points[:, None], -angle) - points.new_tensor([2.0, 0.0])
        return _log_normal(deviations, self._noises).logsumexp(dim=1) - math.log(self.num_arms)


def _rotated(points: Tensor, angle: Tensor) -> Tensor:
    x, y = points.unbind(dim=-1)
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y], dim=-1)


def _log_normal(deviations: Tensor, scales: tuple[float, float]) -> Tensor:
    widths = deviations.new_tensor(scales)
    normaliser = math.log(2 * math.pi * scales[0] * scales[1])
    return -0.5 * (deviations / widths).square().sum(dim=-1) - normaliser
